"""The similarity of emoji and captions: it sees the training part alone, and knows compositions that it never saw."""

import ast
import inspect

import numpy as np
import pytest

from deepgen_jax.rewards import emoji_similarity
from deepgen_jax.rewards.registry import build
from deepgen_jax.rewards.reward import Item


@pytest.fixture(scope="module")
def some(emoji):
  """Places of the emoji of a few kinds, of which there are held-out ones, in training and held out."""
  kinds = ("skin tone", "o'clock", "heart", "circle", "square")
  chosen = np.array([any(kind in caption for kind in kinds) and len(caption) < 32 for caption in emoji.captions])
  return np.flatnonzero(chosen & ~emoji.held_out), np.flatnonzero(chosen & emoji.held_out)


@pytest.fixture(scope="module")
def fitted(emoji, some):
  return emoji_similarity.fit(emoji.images()[some[0]], [emoji.captions[i] for i in some[0]])


def reward_of(model, monkeypatch):
  monkeypatch.setattr(emoji_similarity, "prepare", lambda data_dir: model)
  return build("emoji_similarity", data_dir="unused")


def test_unseen_compositions(emoji, some, fitted):
  held_out = some[1]
  assert len(held_out) > 30
  texts = np.stack([fitted.caption_vector(emoji.captions[i]) for i in held_out])
  rng = np.random.default_rng(0)
  images = emoji.images()[held_out]
  for looks in (images, np.clip(images + rng.normal(0, 25, images.shape), 0, 255).astype(np.uint8)):
    scores = fitted.image_vectors(list(looks)) @ texts.T
    own = np.diag(scores)
    assert (own[:, None] > scores).mean() > 0.95  # measured: 0.98
    assert (own == scores.max(1)).mean() > 0.6  # measured: 0.78, 0.76; by chance 0.01


def test_nothing_held_out_enters_the_fit(emoji, emoji_dir, tmp_path, monkeypatch):
  seen = {}

  def fit(images, captions):
    seen["images"], seen["captions"] = images, captions
    return emoji_similarity.Similarity(["a"], np.ones(1), np.ones((2, 1), np.float32))

  monkeypatch.setattr(emoji_similarity, "fit", fit)
  monkeypatch.setattr(emoji_similarity.emoji, "prepare", lambda data_dir: emoji)
  emoji_similarity.prepare(tmp_path)
  assert seen["captions"] == [caption for caption, out in zip(emoji.captions, emoji.held_out) if not out]
  pixels = {image.tobytes() for image in emoji.images()[emoji.held_out]}
  assert len(seen["images"]) == len(seen["captions"]) and not pixels & {image.tobytes() for image in seen["images"]}


def test_the_fit_is_kept_and_a_damaged_one_replaced(emoji, fitted, tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(emoji_similarity, "fit", lambda *inputs: calls.append(1) or fitted)
  monkeypatch.setattr(emoji_similarity.emoji, "prepare", lambda data_dir: emoji)
  emoji_similarity.prepare(tmp_path)
  kept = emoji_similarity.prepare(tmp_path)
  assert len(calls) == 1
  assert kept.terms == fitted.terms
  assert np.array_equal(kept.kernel, fitted.kernel) and np.array_equal(kept.rarity, fitted.rarity)
  (file,) = tmp_path.iterdir()
  file.write_bytes(file.read_bytes()[:1000])
  emoji_similarity.prepare(tmp_path)
  assert len(calls) == 2


def test_the_fit_is_the_same_every_time(emoji):
  images, captions = emoji.images()[:40], emoji.captions[:40]
  one, two = emoji_similarity.fit(images, captions), emoji_similarity.fit(images, captions)
  assert np.array_equal(one.kernel, two.kernel)


def test_scores(emoji, some, fitted, monkeypatch):
  reward = reward_of(fitted, monkeypatch)
  place = emoji.captions.index("red heart")
  other = emoji.captions.index("blue heart")
  heart, blue = emoji.image(place), emoji.image(other)
  large = heart.repeat(3, axis=0).repeat(3, axis=1)
  noise = np.random.default_rng(0).integers(0, 256, heart.shape, dtype=np.uint8)
  items = [Item(text, image) for text in ("red heart", "Blue heart") for image in (heart, blue, large, noise)]
  scores = reward([*items, Item("xyzzy", heart)])
  assert scores[0] > 0.5 and scores[0] > scores[1] + 0.1 and scores[5] > scores[4] + 0.1
  assert abs(scores[2] - scores[0]) < 0.1  # another size of the same
  assert scores[3] < 0.3 and scores[7] < 0.3
  assert np.isnan(scores[8]) and sum(reward.failures.values()) == 1
  assert np.array_equal(reward(items[5:6]), scores[5:6])  # whatever else is in the call


def test_it_shares_nothing_with_the_retrieval_score():
  tree = ast.parse(inspect.getsource(emoji_similarity))
  imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
  imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
  assert not any("retrieval" in name for name in imported)
