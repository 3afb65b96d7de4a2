"""Sizes as JPEG."""

import io

import numpy as np
from PIL import Image

from deepgen_jax.rewards.registry import build
from deepgen_jax.rewards.reward import Item


def test_sizes():
  rng = np.random.default_rng(0)
  images = [np.full((64, 96, 3), 200, np.uint8), rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)]
  expected = []
  for image in images:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    expected.append(len(buffer.getvalue()))
  items = [Item("a", image) for image in images]
  assert np.allclose(build("jpeg_incompressibility")(items), np.array(expected) / 1000, rtol=1e-12)
  assert np.allclose(build("jpeg_compressibility")(items), -np.array(expected) / 1000 / 500, rtol=1e-12)
  assert expected[1] > 5 * expected[0]


def test_an_image_that_cannot_be_written_is_missing():
  reward = build("jpeg_compressibility")
  assert np.isnan(reward([Item("a", np.zeros((0, 4, 3), np.uint8))])).all()
  assert sum(reward.failures.values()) == 1
