"""Text in images: the scoring on lines given by hand, and the whole reward on rendered words."""

import numpy as np
import pytest

from deepgen_jax.data import words
from deepgen_jax.errors import UserError
from deepgen_jax.rewards import ocr
from deepgen_jax.rewards.registry import build
from deepgen_jax.rewards.reward import Item

pytest.importorskip("rapidocr_onnxruntime")

SPECIMENS = [("STOP", "white", "red"), ("WOLF", "black", "yellow"), ("GO", "green", "white"), ("NIGHT", "pink", "black")]


def lines(*texts):
  """Lines that a recogniser is sure of."""
  return [ocr.Line(text, spelled(text)) for text in texts]


def spelled(text, sure=0.999):
  """Frames of a text: each letter or digit, and a blank after it."""
  frames = np.full((2 * len(text), 1 + len(ocr.ALPHABET)), (1 - sure) / len(ocr.ALPHABET))
  frames[:, 0] = 0
  for i, character in enumerate(text):
    frames[2 * i, 1 + ocr.ALPHABET.index(character) if character in ocr.ALPHABET else 0] = sure
    frames[2 * i + 1, 0] = sure
  return frames / frames.sum(1, keepdims=True)


def test_targets():
  assert ocr.targets('a sign "STOP here" and "", then "GO"') == ["STOP here", "GO"]
  assert ocr.targets("a sign \u201cSTOP\u201d") == ["STOP"]
  assert ocr.targets("it's a sign") == []
  assert ocr.normalise("Caf\u00e9 No. 5, \u4f60") == "CafNo5" and ocr.normalise("No. 5", case_sensitive=False) == "no5"


@pytest.mark.parametrize(
  "a, b, expected", [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2), ("a", "a", 0)]
)
def test_edit_distance(a, b, expected):
  assert ocr.distance(a, b) == expected


@pytest.mark.parametrize(
  "target, read, expected",
  [
    ("STOP", ["STOP"], 1),
    ("STOP", ["ST OP!"], 1),  # spaces and punctuation don't count
    ("STOP", ["SHOP"], 0.75),
    ("STOP", ["Stop"], 0.25),  # case counts
    ("hello0", ["he11oo"], 1),  # glyphs that look alike
    ("level", ["1ewe1"], 1),
    ("Hello", ["HeIlo"], 0.8),  # capitals have none
    ("ONETWOTHREE", ["ONE", "TWO", "THREE"], 1),  # neighbours put together
    ("TWOTHREE", ["ONE", "TWO", "THREE", "FOUR"], 1),
    ("ABCDE", ["A", "B", "C", "D", "E"], 1),  # more than three: all of them
    ("ABCD", ["A", "B", "C", "D", "E"], 0.75),  # four of five are no candidate: "ABC" or all
    ("STOP", ["completely different text"], 0),  # never below 0
    ("STOP", [], 0),
    ("STOP", ["\u4f60\u597d"], 0),
  ],
)
def test_the_new_scoring(target, read, expected):
  assert ocr.score_new(target, lines(*read)) == pytest.approx(expected)


def test_other_ways_of_scoring():
  assert ocr.score_exact("STOP", lines("BUS", "STOP")) == 1
  assert ocr.score_exact("BUSSTOP", lines("BUS", "STOP")) == 1
  assert ocr.score_exact("STOP", lines("SHOP")) == 0
  assert ocr.score_exact("stop", lines("Stop"), case_sensitive=False) == 1
  assert ocr.score_new("stop", lines("Stop"), case_sensitive=False) == 1


def test_the_dense_scoring():
  dense = lambda target, *read, **options: ocr.score_dense(target, lines(*read), **options)
  assert -0.01 < dense("STOP", "STOP") <= 0
  assert -0.01 < dense("BUSSTOP", "BUS", "STOP") <= 0  # over several lines
  assert -0.01 < dense("STOP", "ST-OP") <= 0  # what isn't scored counts as blank
  assert -0.01 < dense("stop", "Stop", case_sensitive=False) <= 0
  assert ocr.FLOOR < dense("STOP", "SHOP") < -1
  assert dense("STOP", "QQQQ") < dense("STOP", "SHOP")
  assert dense("STOP") == ocr.FLOOR
  assert dense("STOPSTOP", "A") == ocr.FLOOR  # too few frames
  half = ocr.Line("", 0.5 * spelled("STOP") + 0.5 * spelled("SHOP"))
  assert dense("STOP", "SHOP") < ocr.score_dense("STOP", [half]) < dense("STOP", "STOP")


@pytest.fixture(scope="module")
def rewards():
  return {scoring: build("ocr", scoring=scoring) for scoring in ("new", "exact", "dense")}


@pytest.mark.parametrize("size", [48, 64, 256])
def test_rendered_words_are_read(rewards, size):
  items = [Item(words.caption(*word), words.render(*word, size=size)) for word in SPECIMENS]
  assert rewards["new"](items).tolist() == [1] * 4
  assert rewards["exact"](items).tolist() == [1] * 4
  assert (rewards["dense"](items) > -0.1).all()
  swapped = [Item(a.prompt, b.image) for a, b in zip(items, items[1:] + items[:1])]
  assert (rewards["new"](swapped) < 0.5).all()
  assert rewards["exact"](swapped).tolist() == [0] * 4
  assert (rewards["dense"](swapped) < -3).all()


def test_dense_rises_where_the_others_are_still_zero(rewards):
  word = SPECIMENS[0]
  image = words.render(*word).astype(float)
  noise = np.random.default_rng(1).integers(0, 256, image.shape)
  items = [Item(words.caption(*word), ((1 - a) * image + a * noise).astype(np.uint8)) for a in (0.8, 0.6, 0.5, 0)]
  assert rewards["exact"](items[:2]).tolist() == [0, 0]
  assert (np.diff(rewards["dense"](items)) > 0.01).all()


def test_several_targets_count_by_their_length(rewards):
  image = np.concatenate([words.render(*word, size=128) for word in SPECIMENS[:2]])
  scores = rewards["exact"]([Item(text, image) for text in ('"STOP" over "WOLF"', '"STOP" over "NIGHTS"', '"STOP WOLF"')])
  assert scores.tolist() == pytest.approx([1, 4 / 10, 1])


def test_no_target_is_missing():
  reward = build("ocr")
  image = words.render(*SPECIMENS[0])
  scores = reward([Item("a red sign", image), Item('the word "STOP"', image), Item('the word "\u4f60\u597d"', image)])
  assert np.isnan(scores).tolist() == [True, False, True] and scores[1] == 1
  assert sorted(reward.failures.values()) == [1, 1]


def test_an_image_that_fails_is_missing_and_the_others_are_judged():
  reward = build("ocr")
  images = [words.render(*SPECIMENS[0]), np.zeros((0, 64, 3), np.uint8)]
  scores = reward([Item('"STOP"', image) for image in images])
  assert scores[0] == 1 and np.isnan(scores[1])
  assert sum(reward.failures.values()) == 1


def test_nothing_in_the_image_is_a_score():
  blank = np.full((64, 64, 3), 200, np.uint8)
  assert build("ocr")([Item('"STOP"', blank)]).tolist() == [0]
  assert build("ocr", scoring="dense")([Item('"STOP"', blank)])[0] < -3


def test_wrong_options():
  with pytest.raises(UserError, match=r"unknown scoring 'dence'; use new, exact, dense. Did you mean 'dense'"):
    build("ocr", scoring="dence")
  with pytest.raises(UserError, match="max_ngram is 0"):
    build("ocr", max_ngram=0)
