"""Attention on NVIDIA GPUs by cuDNN's fused kernel: no score matrix in memory, forward or backward.

The kernel knows padding as lengths: a row's real tokens come first. Ours may have padding between them (prompt, padding, think
tokens), so that tokens are moved to the front for the kernel and back after it; a causal order among them stays as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def fits(q: Array, k: Array, causal_offset: int | None) -> bool:
  """Whether the kernel can do it: a causal mask must begin with the first key (a second stream's queries begin later)."""
  return causal_offset is None or (causal_offset == 0 and q.shape[1] == k.shape[1])


def cudnn_attention(
  q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None, causal: bool, interpret: bool
) -> Array:
  """As `layers.attention`, for segments of 0 (padding) and 1; padded rows become zero.  q [B,T,H,D] and k, v [B,S,K,D] in
  bfloat16 or float16, D at most 128 and a multiple of 8 -> [B,T,H,D].

  interpret: the same around JAX's own products, on any platform and in any dtype, for tests.
  """
  attend = lambda q, k, v, **lengths: jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation="xla" if interpret else "cudnn", **lengths
  )
  if q_segments is None:
    return attend(q, k, v)
  q_order, kv_order = _real_first(q_segments), _real_first(kv_segments)
  move = lambda x, order: jnp.take_along_axis(x, order[..., None, None], axis=1)
  lengths = {
    "query_seq_lengths": (q_segments != 0).sum(1, dtype=jnp.int32),
    "key_value_seq_lengths": (kv_segments != 0).sum(1, dtype=jnp.int32),
  }
  out = attend(move(q, q_order), move(k, kv_order), move(v, kv_order), **lengths)
  out = jnp.where((jnp.arange(q.shape[1]) < lengths["query_seq_lengths"][:, None])[..., None, None], out, 0)
  return move(out, jnp.argsort(q_order, axis=1))


def _real_first(segments: Array) -> Array:
  """segments int [B,T] -> the order int [B,T] that has a row's real tokens first, otherwise unchanged."""
  return jnp.argsort(segments == 0, axis=1, stable=True)
