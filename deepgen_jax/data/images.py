"""Reading and sizing images: what PIL, a path or an array becomes before any network sees it."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from deepgen_jax.errors import UserError

MULTIPLE = 32  # sides that both the vision tower and the DiT can cut into tokens
MAX_PIXELS = 100_000_000  # 300 MB in memory: what says it has more is a mistake, or made to fill it
SAME_ASPECT = 0.02  # aspect ratios this close differ by rounding alone: of sides to pixels, or of crops to multiples of 8


def load_image(source: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
  """A path (local or gs://), PIL image or array [H,W], [H,W,1|3|4] uint8 -> uint8 [H,W,3], as `decode_image` makes it.

  Raises UserError naming a file that can't be read.
  """
  if isinstance(source, np.ndarray):
    if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)):
      raise UserError(f"an image array must be uint8 [H,W,3], not {source.dtype} {list(source.shape)}")
    return _rgb(Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source))
  if isinstance(source, Image.Image):
    return _rgb(source)
  path = epath.Path(source)
  try:
    data = path.read_bytes()
  except FileNotFoundError as error:
    raise UserError(f"image {path} does not exist") from error
  except OSError as error:
    raise UserError(f"cannot read image {path}: {error}") from error
  return decode_image(data, os.fspath(path))


def decode_image(data: bytes, name: str) -> np.ndarray:
  """An image file's bytes -> uint8 [H,W,3].

  EXIF orientation is applied, transparency is put on white, 16 bits are scaled to 8, CMYK and palettes become RGB, an
  animation gives its first frame. Raises UserError, with `name` in it, for what is truncated or no image.
  """
  if not data:
    raise UserError(f"cannot read image {name}: the file is empty")
  try:
    with Image.open(io.BytesIO(data)) as image:
      if image.width * image.height > MAX_PIXELS:
        raise UserError(f"its {image.height}x{image.width} pixels (height x width) are more than {MAX_PIXELS:,}")
      return _rgb(image)
  except Exception as error:  # on damaged files PIL raises many kinds: SyntaxError, struct.error, EOFError, IndexError ...
    reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
    raise UserError(f"cannot read image {name}: {reason}. Give a PNG, JPEG or WebP file.") from error


def _rgb(image: Image.Image) -> np.ndarray:
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):  # grey of 16 bits: PIL's own conversion would cut at 255 instead of scaling
    image = Image.fromarray(np.round(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
  elif image.mode == "F":
    raise UserError("its pixels are floating-point numbers of unknown range; store it with 8 or 16 bits")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    image = white
  return np.array(image.convert("RGB"))


def fixed_size(height: int, width: int, size: int) -> tuple[int, int]:
  """(height, width) after `fix_pixels`: about size x size pixels, the aspect ratio kept, sides rounded up to 32.

  The reference's rule, in its order of operations (float64): exact squares give size x size if that is a multiple of 32.
  Aspect ratios from 0.1 to 10 have 89 sizes at 512 and 181 at 1024: so many programs the VAE and the vision tower compile at
  most; the DiT takes tokens of any of them.
  """
  ratio = size / math.sqrt(height * width)
  return math.ceil(height * ratio / MULTIPLE) * MULTIPLE, math.ceil(width * ratio / MULTIPLE) * MULTIPLE


def fix_pixels(image: np.ndarray | Image.Image, size: int) -> np.ndarray:
  """uint8 [H,W,3] (or an RGB PIL image) -> uint8 [H',W',3] of `fixed_size`, resized by PIL's antialiased bicubic filter."""
  height, width = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
  return _resized(image, fixed_size(height, width, size))


def fix_edit(target: np.ndarray, references: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
  """A target and its references, uint8 [H,W,3] each of any size -> the same after `fix_pixels`.

  The only reference of an edit gets the target's size where their aspect ratios agree within `SAME_ASPECT`, so that what isn't
  edited stays in its place; otherwise, and with several references, each keeps its own size. (The reference implementation
  sizes them one by one, and pairs that differ by a pixel can land in different sizes.)
  """
  fixed = fix_pixels(target, size)
  if len(references) == 1:
    (source,) = references
    aspects = [image.shape[1] / image.shape[0] for image in (target, source)]
    if abs(math.log(aspects[0] / aspects[1])) <= SAME_ASPECT:
      return fixed, (_resized(source, fixed.shape[:2]),)
  return fixed, tuple(fix_pixels(image, size) for image in references)


def _resized(image: np.ndarray | Image.Image, size: tuple[int, int]) -> np.ndarray:
  """To (height, width)."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  if size != (image.height, image.width):
    image = image.resize(size[::-1], Image.Resampling.BICUBIC)
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
