"""Reading and sizing images: what PIL, a path or an array becomes before any network sees it."""

from __future__ import annotations

import io
import math
import os

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from deepgen_jax.errors import UserError

MULTIPLE = 32  # sides that both the vision tower and the DiT can cut into tokens


def load_image(source: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
  """A path (local or gs://), PIL image or array [H,W], [H,W,1|3|4] uint8 -> uint8 [H,W,3].

  The EXIF orientation is applied, transparency is put on white. Raises UserError naming a file that can't be read.
  """
  if isinstance(source, np.ndarray):
    if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)):
      raise UserError(f"an image array must be uint8 [H,W,3], not {source.dtype} {list(source.shape)}")
    return _rgb(Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source))
  if isinstance(source, Image.Image):
    return _rgb(source)
  path = epath.Path(source)
  try:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
      return _rgb(image)
  except FileNotFoundError as error:
    raise UserError(f"image {path} does not exist") from error
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(f"cannot read image {path}: {error}. Give a PNG, JPEG or WebP file.") from error


def _rgb(image: Image.Image) -> np.ndarray:
  image = ImageOps.exif_transpose(image)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    image = white
  return np.array(image.convert("RGB"))


def fixed_size(height: int, width: int, size: int) -> tuple[int, int]:
  """(height, width) after `fix_pixels`: about size x size pixels, the aspect ratio kept, sides rounded up to 32.

  The reference's rule, in its order of operations (float64): exact squares give size x size if that is a multiple of 32.
  """
  ratio = size / math.sqrt(height * width)
  return math.ceil(height * ratio / MULTIPLE) * MULTIPLE, math.ceil(width * ratio / MULTIPLE) * MULTIPLE


def fix_pixels(image: np.ndarray | Image.Image, size: int) -> np.ndarray:
  """uint8 [H,W,3] (or an RGB PIL image) -> uint8 [H',W',3] of `fixed_size`, resized by PIL's antialiased bicubic filter."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  height, width = fixed_size(image.height, image.width, size)
  if (height, width) != (image.height, image.width):
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  return np.array(image)


def reference_sizes(images) -> list[tuple[int, int]]:
  """(H, W) in pixels of each image [H,W,3]. Raises ValueError if a side isn't a multiple of 32: nothing is resized here."""
  sizes = []
  for image in images:
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
    if height % MULTIPLE or width % MULTIPLE:
      raise ValueError(f"a reference image is {height}x{width} (height x width); its sides must be multiples of {MULTIPLE}")
    sizes.append((height, width))
  return sizes
