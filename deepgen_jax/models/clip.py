"""CLIP (arXiv 2103.00020): a causal text transformer and a vision transformer that meet in one space.

    ids [B,T]       -> token + position embeddings -> layers -> norm -> state at the end token -> projection -> [B,P]
    pixels [B,S,S,3] -> patches, class token first -> norm -> layers -> norm of the class token -> projection -> [B,P]

Layers are pre-norm. Follows transformers' CLIPModel.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from deepgen_jax.models.layers import LayerNorm, Linear, attention, embed, merge_heads, split_heads, stack
from deepgen_jax.models.vision import CLIP_MEAN, CLIP_STD

ACTIVATIONS = {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x), "gelu": lambda x: jax.nn.gelu(x, approximate=False)}
_INIT = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class TowerConfig:
  """Sizes of one of the two transformers; `activation` is a key of ACTIVATIONS."""

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  activation: str = "quick_gelu"
  eps: float = 1e-5


@dataclass(frozen=True)
class CLIPConfig:
  """The defaults are those of ViT-L/14."""

  text: TowerConfig = TowerConfig(768, 3072, 12, 12)
  vision: TowerConfig = TowerConfig(1024, 4096, 24, 16)
  vocab_size: int = 49408
  max_length: int = 77  # tokens
  image_size: int = 224  # pixels
  patch_size: int = 14
  projection_size: int = 768


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
  """uint8 [H,W,3] -> float32 [size,size,3]: shorter side to `size` (PIL bicubic), middle cut out, CLIP's mean and deviation."""
  height, width = image.shape[:2]
  short = min(height, width)
  height, width = (size if side == short else size * side // short for side in (height, width))
  picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
  top, left = (height - size) // 2, (width - size) // 2
  pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 255
  return (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)


class CLIPLayer(nn.Module):
  """One pre-norm layer."""

  config: TowerConfig
  causal: bool

  @nn.compact
  def __call__(self, x):
    """x [B,T,C]."""
    c = self.config
    h = LayerNorm(c.eps, name="norm1")(x)
    q, k, v = (split_heads(Linear(c.hidden_size, name=name)(h), c.num_heads) for name in ("q", "k", "v"))
    h = attention(q, k, v, causal_offset=0 if self.causal else None)
    x = x + Linear(c.hidden_size, name="out")(merge_heads(h))
    h = Linear(c.intermediate_size, name="fc1")(LayerNorm(c.eps, name="norm2")(x))
    return x + Linear(c.hidden_size, name="fc2")(ACTIVATIONS[c.activation](h)), None


class TextTower(nn.Module):
  """Token ids -> projected state of the end token."""

  config: CLIPConfig

  @nn.compact
  def __call__(self, ids: Array, ends: Array) -> Array:
    """ids int [B,T], T at most max_length; ends int [B], place of each end token, after which nothing counts -> [B,P]."""
    c = self.config
    tokens = self.param("tokens", _INIT, (c.vocab_size, c.text.hidden_size), jnp.float32)
    positions = self.param("positions", _INIT, (c.max_length, c.text.hidden_size), jnp.float32)
    x = embed(ids, tokens, jnp.float32) + positions[: ids.shape[1]]
    x, _ = stack(CLIPLayer, c.text.num_layers, False)(c.text, causal=True, name="layers")(x)
    x = LayerNorm(c.text.eps, name="norm")(jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0])
    return Linear(c.projection_size, use_bias=False, name="projection")(x)


class ImageTower(nn.Module):
  """Pixels -> projected state of the class token."""

  config: CLIPConfig

  @nn.compact
  def __call__(self, pixels: Array) -> Array:
    """pixels float32 [B,S,S,3] from `preprocess` -> [B,P]."""
    c, side = self.config, self.config.image_size // self.config.patch_size
    x = pixels.reshape(-1, side, c.patch_size, side, c.patch_size, 3).swapaxes(2, 3)
    x = Linear(c.vision.hidden_size, use_bias=False, name="patch_embed")(x.reshape(len(pixels), side * side, -1))
    first = self.param("class_token", _INIT, (c.vision.hidden_size,), jnp.float32)
    positions = self.param("positions", _INIT, (side * side + 1, c.vision.hidden_size), jnp.float32)
    x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, len(first))), x], axis=1) + positions
    x = LayerNorm(c.vision.eps, name="norm_in")(x)
    x, _ = stack(CLIPLayer, c.vision.num_layers, False)(c.vision, causal=False, name="layers")(x)
    x = LayerNorm(c.vision.eps, name="norm_out")(x[:, 0])
    return Linear(c.projection_size, use_bias=False, name="projection")(x)


def abstract_params(config: CLIPConfig) -> dict:
  """Shapes of {"text": ..., "image": ...}."""
  ids, ends = jnp.zeros((1, 1), int), jnp.zeros(1, int)
  pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
  init = lambda module, *inputs: jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  return {"text": init(TextTower(config), ids, ends), "image": init(ImageTower(config), pixels)}
