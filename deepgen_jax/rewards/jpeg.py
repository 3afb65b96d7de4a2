"""How well an image compresses as JPEG: cheap rewards for trying a set-up, as in DDPO (arXiv 2305.13301)."""

from __future__ import annotations

import io

from PIL import Image

from deepgen_jax.rewards.reward import Item, PerItem, Reward

QUALITY = 95
PER_UNIT = 500  # kilobytes of JPEG that cost one unit of compressibility


def jpeg_incompressibility() -> Reward:
  """Size as JPEG of quality 95, in kB of 1000 bytes."""
  return PerItem("jpeg_incompressibility", _kilobytes)


def jpeg_compressibility() -> Reward:
  """Minus that size / 500: about -0.5 to 0 for images of 512 x 512."""
  return PerItem("jpeg_compressibility", lambda item: -_kilobytes(item) / PER_UNIT)


def _kilobytes(item: Item) -> float:
  buffer = io.BytesIO()
  Image.fromarray(item.image).save(buffer, "JPEG", quality=QUALITY)
  return buffer.tell() / 1000
