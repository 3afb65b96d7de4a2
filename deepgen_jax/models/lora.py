"""LoRA as a leaf of the parameter tree.

Where a kernel was, the tree holds `LoraKernel(kernel, a, b, scale)`; `layers.linear` and `layers.embed` compute
x W + scale (drop(x) a) b and networks don't know it (design 3.9). Kernels of stacked layers carry the same leading axis on
all their leaves.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@flax.struct.dataclass
class LoraKernel:
  """kernel [..., in, out], a [..., in, rank], b [..., rank, out].

  `keys` (uint32 [..., B, T, 2], optional) are the dropout keys of every token: with them a token's mask doesn't depend on
  batch or padding. No keys, no dropout.
  """

  kernel: Array  # stays the first leaf: flax checks the shape of a parameter on it
  a: Array
  b: Array
  keys: Array | None = None
  scale: float = flax.struct.field(pytree_node=False, default=1.0)
  rate: float = flax.struct.field(pytree_node=False, default=0.0)


def _is_lora(leaf) -> bool:
  return isinstance(leaf, LoraKernel)


def lora_delta(x: Array, lora: LoraKernel) -> Array:
  """scale (drop(x) a) b for x [..., in] (with dropout keys: x [B,T,in])."""
  if lora.keys is not None and lora.rate > 0:
    draw = lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - lora.rate, (x.shape[-1],))
    keep = jax.vmap(jax.vmap(draw))(lora.keys)
    x = jnp.where(keep, x / (1 - lora.rate), 0).astype(x.dtype)
  return (x @ lora.a.astype(x.dtype)) @ lora.b.astype(x.dtype) * lora.scale


def lora_embedding(ids: Array, lora: LoraKernel, dtype) -> Array:
  """scale a[ids] b: the low-rank update of an embedding table; never dropped (as in peft)."""
  return lora.a[ids].astype(dtype) @ lora.b.astype(dtype) * lora.scale


def path_name(path) -> str:
  """A jax key path as "scb/layers/q/kernel"."""
  return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def add_lora(params, targets: Sequence[str], rank: int, alpha: float, key: Array, rate: float = 0.0):
  """Replaces each kernel or embedding whose path matches one of the regexes by a LoraKernel that starts as a no-op.

  Linear layers: a ~ N(0, 1/rank^2), b = 0 (peft's 'gaussian'). Embeddings: a = 0, b ~ N(0, 1). Raises ValueError for a
  regex that matches nothing. Works on stacked kernels [layers, in, out].
  """
  used = set()

  def visit(path, leaf):
    name = path_name(path)
    hit = next((t for t in targets if re.fullmatch(t, name)), None)
    if hit is None:
      return leaf
    used.add(hit)
    *stacked, rows, columns = leaf.shape
    draw = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if name.endswith("embedding"):
      a = jnp.zeros((*stacked, rows, rank), jnp.float32)
      b = jax.random.normal(draw, (*stacked, rank, columns), jnp.float32)
    else:
      a = jax.random.normal(draw, (*stacked, rows, rank), jnp.float32) / rank
      b = jnp.zeros((*stacked, rank, columns), jnp.float32)
    return LoraKernel(leaf, a, b, scale=alpha / rank, rate=rate)

  out = jax.tree_util.tree_map_with_path(visit, params)
  if unused := [t for t in targets if t not in used]:
    raise ValueError(f"LoRA targets that match no parameter: {unused}")
  return out


def merge_lora(params):
  """Every LoraKernel becomes the plain kernel W + scale a b (computed in float32); other leaves stay."""
  delta = lambda p: p.scale * (p.a.astype(jnp.float32) @ p.b.astype(jnp.float32))
  merge = lambda p: (p.kernel.astype(jnp.float32) + delta(p)).astype(p.kernel.dtype)
  return jax.tree.map(lambda p: merge(p) if _is_lora(p) else p, params, is_leaf=_is_lora)


def without_lora(params):
  """Every LoraKernel becomes the kernel that it lies on: the weights that it started from, without a copy."""
  return jax.tree.map(lambda p: p.kernel if _is_lora(p) else p, params, is_leaf=_is_lora)


def with_dropout_keys(params, token_keys: Array):
  """Gives each LoraKernel its own fold of `token_keys` (uint32 [B,T,2], one key a token)."""

  def visit(path, leaf):
    if not _is_lora(leaf) or leaf.rate == 0:
      return leaf
    seed = zlib.crc32(path_name(path).encode())
    layers = leaf.kernel.shape[0] if leaf.kernel.ndim == 3 else None
    seeds = np.uint32(seed) if layers is None else (np.uint32(seed) + np.arange(layers, dtype=np.uint32))
    fold = lambda key, s: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), s))
    fold_tokens = jax.vmap(jax.vmap(fold, (0, None)), (0, None))
    keys = fold_tokens(token_keys, seeds) if layers is None else jax.vmap(fold_tokens, (None, 0))(token_keys, seeds)
    return leaf.replace(keys=keys)

  return jax.tree_util.tree_map_with_path(visit, params, is_leaf=_is_lora)
