"""The data that the tiny base is trained on: nothing held out enters, and batches follow from their number alone."""

import numpy as np
import pytest

from configs import pretrain_tiny
from deepgen_jax.data import words
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration, RenderedWords
from deepgen_jax.stages import pretrain_dit, pretrain_vae, pretrain_vlm
from deepgen_jax.stages.pretrain_dit import MAX_WORDS, Data, Vocabulary, split, spread


class Places:
  """Latents that say which image they are of."""

  def __init__(self, emoji):
    written = words.combinations(held_out=False)
    self.words = [written[i] for i in np.random.default_rng(0).choice(len(written), pretrain_dit.WORDS, replace=False)]
    self.mean = np.arange(len(emoji) + len(self.words))
    self.logvar = -self.mean


@pytest.fixture(scope="module")
def data(emoji):
  return Data(pretrain_tiny.get_config("dit"), emoji, Places(emoji))


def test_split_spells_quoted_words():
  assert split('the word "UP" in light-blue') == ["the", "word", '"U', '"P', "in", "light", "blue"]
  assert split("") == []


def test_vocabulary_pads_cuts_and_knows_what_it_does_not_know():
  vocabulary = Vocabulary(["red apple", "green apple"])
  ids, mask = vocabulary(["red pear", "", "apple " * 40])
  assert len(vocabulary) == 4 and ids.shape == mask.shape == (3, MAX_WORDS + 1)
  assert ids[0].tolist() == [0, 3, 0] + [0] * (MAX_WORDS - 2) and mask[0].sum() == 3
  assert mask[1].sum() == 1 and mask[2].all() and (ids[2, 1:] == 1).all()


def test_context_slots_hold_every_word_and_no_padding():
  mask = np.arange(6)[None] < np.array([[6], [2]])
  dealt = spread(mask, 20, np.random.default_rng(0))
  for row, count in enumerate((6, 2)):
    shown = dealt["slots"][row][dealt["slot_mask"][row]]
    assert set(shown) == set(range(count)) and dealt["slots"][row].max() < count
    np.testing.assert_array_equal(shown[:count], range(count))
  counts = np.concatenate([spread(mask, 20, np.random.default_rng(i))["slot_mask"].sum(1) for i in range(40)])
  assert counts.min() >= 2 and counts.max() == 20 and len(set(counts)) > 10


def test_dit_batches_hold_nothing_held_out(data, emoji):
  """A generation shows its own caption; an edit leads from a training image to a training image."""
  tasks = set()
  for m in range(60):
    batch = data.draw(m, 32)
    tasks.add("reference" in batch)
    for key in ("mean", "reference"):
      drawn = batch.get(key, np.zeros(0, int))
      assert not emoji.held_out[drawn[drawn < len(emoji)]].any()
    if "reference" in batch:
      assert (batch["reference"] < len(emoji)).all() and (batch["reference"] != batch["mean"]).all()
    else:
      ids, _ = data.vocabulary([emoji.captions[i] if i < len(emoji) else "" for i in batch["mean"]])
      shown = (batch["ids"] != 0).any(1) & (batch["mean"] < len(emoji))  # not dropped
      np.testing.assert_array_equal(batch["ids"][shown], ids[shown])
  assert tasks == {True, False}
  repeated = data.draw(7, 32)
  assert all(np.array_equal(repeated[key], value) for key, value in data.draw(7, 32).items())


def test_held_out_captions_use_known_words(data, emoji):
  """What is held out can be recombined: no word of it is new."""
  ids, mask = data.vocabulary([emoji.captions[i] for i in np.flatnonzero(emoji.held_out)])
  assert (ids[:, 1:][mask[:, 1:]] > 0).all()


@pytest.mark.parametrize("kind", ["repeat", "sketch", "describe", "result"])
def test_dialogues_answer_with_training_captions(kind, emoji):
  source = EmojiEdits(emoji) if kind == "result" else EmojiGeneration(emoji)
  dialogues = pretrain_vlm.Dialogues(source, kind)
  held_out = {emoji.captions[i] for i in np.flatnonzero(emoji.held_out)}
  assert len(dialogues) == len(source)
  for i in range(0, len(dialogues), 97):
    sample, original = dialogues[i], source[i]
    assert sample.task == dialogues.task == ("generate" if kind in ("repeat", "sketch") else "edit")
    assert sample.answer and sample.answer not in held_out
    if kind == "result":
      assert sample.answer == emoji.captions[source.edits[i].target] and sample.texts == original.texts
    elif kind == "sketch":
      assert sample.answer == pretrain_vlm.sketch(original.target) and sample.texts == original.texts
    else:
      assert sample.answer == original.texts[0]
    if kind == "describe":
      np.testing.assert_array_equal(sample.references[0], original.target)


def test_a_sketch_names_the_nearest_colours():
  image = np.full((60, 60, 3), 255, np.uint8)
  image[:10, 50:] = (220, 50, 70)  # the cell at the top right
  image[50:, :10] = (120, 80, 60)
  assert pretrain_vlm.sketch(image) == "wwwwwr" + "w" * 24 + "Ewwwww"


def test_dialogues_of_words():
  sample = pretrain_vlm.Dialogues(RenderedWords(), "describe")[0]
  assert sample.answer.startswith("the word ") and sample.texts == pretrain_vlm.DESCRIBE


def test_augmentation_keeps_size_and_can_be_repeated(emoji):
  image = emoji.image(100)
  one, two = (pretrain_vae.augment(image, np.random.default_rng(5)) for _ in range(2))
  np.testing.assert_array_equal(one, two)
  assert one.shape == image.shape and one.dtype == np.uint8
  assert any(not np.array_equal(pretrain_vae.augment(image, np.random.default_rng(i)), image) for i in range(5))
