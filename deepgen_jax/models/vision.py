"""Qwen2.5-VL vision tower: 14 px patches, window and full attention, 2x2 merge, 2-D rotary positions.

Patches come in the order of the Hugging Face processor: merged cells in raster order, inside a cell its 2x2 patches. Windows
are segment ids of the attention, so nothing is ever permuted, and the merged tokens leave in raster order.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepgen_jax.models.config import VisionConfig
from deepgen_jax.models.layers import Linear, RMSNorm, attention, merge_heads, split_heads, stack
from deepgen_jax.models.text import rotate
from deepgen_jax.sharding import keep_dealt

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CELL = 32  # pixels of the image, before the resize by 7/8, that become one merged token along a side
ROTARY_THETA = 10000.0


def patch_grid(height: int, width: int, config: VisionConfig) -> tuple[int, int]:
  """Patch rows and columns of an image of that many pixels. Raises ValueError unless both sides are multiples of 32."""
  if height % CELL or width % CELL or not height or not width:
    raise ValueError(f"image of {height}x{width} pixels: both sides must be multiples of {CELL}")
  return height // CELL * config.merge_size, width // CELL * config.merge_size


def patchify(images: Array, config: VisionConfig) -> Array:
  """Images -> normalised patches float32 [B, rows*cols, 3*frames*patch*patch] with (rows, cols) = `patch_grid`.

  images: [B,H,W,3], uint8 or float in [-1,1]. As the reference does: bilinear resize by 28/32 without antialiasing, CLIP mean
  and standard deviation, the image repeated as the frames of one temporal patch. Columns are (channel, frame, row, column).
  """
  rows, columns = patch_grid(*images.shape[1:3], config)
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 127.5 - 1
  x = _shrink(_shrink(images.astype(jnp.float32), 1), 2)
  x = ((x + 1) / 2 - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)
  merge, patch = config.merge_size, config.patch_size
  x = x.reshape(-1, rows // merge, merge, patch, columns // merge, merge, patch, 3)
  x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # batch, cell (2), patch of the cell (2), channel, pixel (2)
  x = jnp.repeat(x[:, :, :, :, :, :, None], config.temporal_patch_size, axis=6)
  return x.reshape(x.shape[0], rows * columns, -1)


def _shrink(x: Array, axis: int) -> Array:
  """Bilinear resize by 7/8 along one axis (half-pixel centres): every 8 samples give 7, each between two neighbours."""
  x = jnp.moveaxis(x, axis, -1)
  x = x.reshape(*x.shape[:-1], -1, 8)
  index = np.arange(7)
  weight = ((index + 0.5) * 8 / 7 - 0.5 - index).astype(np.float32)
  y = x[..., :-1] * (1 - weight) + x[..., 1:] * weight
  return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, axis)


def patch_positions(grid: tuple[int, int], config: VisionConfig) -> np.ndarray:
  """(row, column) of each patch in processor order, int32 [rows*cols, 2]."""
  rows, columns = grid
  merge = config.merge_size
  positions = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
  positions = positions.reshape(rows // merge, merge, columns // merge, merge, 2)
  return positions.swapaxes(1, 2).reshape(-1, 2).astype(np.int32)


def window_segments(grid: tuple[int, int], config: VisionConfig) -> np.ndarray:
  """Window of each patch in processor order, int32 [rows*cols], from 1; windows at the right and bottom may be partial."""
  side = config.window_size // config.merge_size // config.patch_size * config.merge_size  # patches
  window = patch_positions(grid, config) // side
  return 1 + window[:, 0] * -(-grid[1] // side) + window[:, 1]


def rotary_table(grid: tuple[int, int], config: VisionConfig) -> tuple[Array, Array]:
  """cos, sin float32 [1, rows*cols, 1, head_dim/2]; the first half of the pairs turns with the row, the rest by column."""
  head_dim = config.hidden_size // config.num_heads
  frequency = ROTARY_THETA ** (-jnp.arange(head_dim // 4, dtype=jnp.float32) * 4 / head_dim)
  angle = jnp.asarray(patch_positions(grid, config), jnp.float32)[..., None] * frequency
  angle = angle.reshape(1, -1, 1, head_dim // 2)
  return jnp.cos(angle), jnp.sin(angle)


class VisionBlock(nn.Module):
  """One pre-norm layer; window or full attention by a flag."""

  config: VisionConfig

  @nn.compact
  def __call__(self, x, is_full, table, windows):
    """x [B,N,C]; is_full: this layer attends to the whole image, not to its window; windows int [B,N]."""
    c = self.config
    h = RMSNorm(name="norm1")(x)
    q, k, v = (split_heads(Linear(c.hidden_size, name=n)(h), c.num_heads) for n in ("q", "k", "v"))
    segments = jnp.where(is_full, 1, windows)
    h = attention(rotate(q, table), rotate(k, table), v, q_segments=segments, kv_segments=segments)
    x = x + Linear(c.hidden_size, name="out")(merge_heads(h))
    h = RMSNorm(name="norm2")(x)
    h = jax.nn.silu(Linear(c.intermediate_size, name="gate")(h)) * Linear(c.intermediate_size, name="up")(h)
    return keep_dealt(x + Linear(c.hidden_size, name="down")(h)), None


class VisionTower(nn.Module):
  """Patches -> merged tokens."""

  config: VisionConfig
  unroll: bool = False

  @nn.compact
  def __call__(self, patches: Array, grid: tuple[int, int]) -> Array:
    """patches [B, rows*cols, 3*frames*patch*patch] from `patchify`; grid (rows, cols), static -> [B, rows*cols/4, out_size].

    Computes in the dtype of the patches. One grid a call; tokens are the merged cells in raster order.
    """
    c = self.config
    x = keep_dealt(Linear(c.hidden_size, use_bias=False, name="patch_embed")(patches))
    is_full = np.isin(np.arange(c.num_layers), c.full_attention_layers)
    windows = jnp.broadcast_to(window_segments(grid, c), x.shape[:2])
    blocks = stack(VisionBlock, c.num_layers, self.unroll, per_layer=1, initializing=self.is_initializing())(c, name="blocks")
    x, _ = blocks(x, jnp.asarray(is_full), rotary_table(grid, c), windows)
    x = RMSNorm(name="merge_norm")(x)
    cell = c.merge_size**2
    x = x.reshape(x.shape[0], x.shape[1] // cell, cell * c.hidden_size)
    x = jax.nn.gelu(Linear(x.shape[-1], name="merge_fc1")(x), approximate=False)
    return Linear(c.out_size, name="merge_fc2")(x)
