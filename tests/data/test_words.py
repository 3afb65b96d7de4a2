import numpy as np

from deepgen_jax.data import words


def test_words_split_and_captions():
  training, held = words.combinations(False), words.combinations(True)
  assert not {w for w, _, _ in training} & {w for w, _, _ in held}
  assert 0.05 < len(held) / (len(training) + len(held)) < 0.15
  assert len({words.caption(*c) for c in training}) == len(training) > 5000
  assert words.caption("STOP", "white", "red") == 'the word "STOP" in white on a red background'
  assert words.caption("STOP", "white", "orange").endswith("on an orange background")


def test_a_word_is_drawn_inside_its_background():
  for word in ("GO", "WOLF"):
    image = words.render(word, "white", "red")
    assert image.shape == (64, 64, 3)
    border = np.concatenate([image[:2], image[-2:], image[:, :2].swapaxes(0, 1), image[:, -2:].swapaxes(0, 1)])
    assert (border == words.COLOURS["red"]).all()
    assert (image == words.COLOURS["white"]).all(-1).mean() > 0.01
  assert not np.array_equal(words.render("GO", "white", "red"), words.render("NO", "white", "red"))
