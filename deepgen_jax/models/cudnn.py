"""Attention on NVIDIA GPUs by cuDNN's fused kernel: no score matrix in memory, forward or backward.

The kernel knows padding as lengths: a row's real tokens come first. Ours may have padding between them (prompt, padding, think
tokens), so that keys and values are moved to the front for the kernel; under a causal mask queries too, and the result back,
so that the order among them stays as it is.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jax import Array

from deepgen_jax.sharding import splits_heads


def is_available() -> bool:
  """Whether the GPU here has these kernels: NVIDIA's do from Ampere on. Yes where none is: the program is for one elsewhere."""
  capability = getattr(jax.devices()[0], "compute_capability", "9.0")
  return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8


def fits(q: Array, k: Array, causal_offset: int | None, interpret: bool) -> bool:
  """Whether the kernel can do it: 16-bit floats (parameters are made by float32 tracing), a causal mask that begins with the
  first key (a second stream's queries begin later), and where a mesh splits heads, as many of keys as of queries: the table
  splits a group's queries alone, and JAX wants both alike.
  """
  floats = interpret or q.dtype.itemsize == 2
  mask = causal_offset is None or (causal_offset == 0 and q.shape[1] == k.shape[1])
  return floats and mask and (q.shape[2] == k.shape[2] or not splits_heads())


def is_result(primitive, *_, **__) -> bool:
  """A remat policy: keeps what the forward kernel gives, the output and the softmax's normaliser, which JAX gives no names."""
  return primitive.name.startswith("dot_product_attention_fwd")


def cudnn_attention(
  q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None, causal: bool, interpret: bool
) -> Array:
  """As `layers.attention`, for segments of 0 (padding) and 1, but that padded rows become something finite.  q [B,T,H,D] and
  k, v [B,S,K,D] in bfloat16 or float16, D at most 128 and a multiple of 8 -> [B,T,H,D]. causal: T is S, with the same segments.

  interpret: the same around JAX's own products, on any platform and in any dtype, for tests.
  """
  attend = lambda q, k, v, **lengths: jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation="xla" if interpret else "cudnn", **lengths
  )
  if q_segments is None:
    return attend(q, k, v)
  order = _real_first(kv_segments)
  keys = jnp.maximum((kv_segments != 0).sum(1, dtype=jnp.int32), 1)  # of padding alone: what comes out is finite
  k, v = _move(k, *order), _move(v, *order)
  if not causal:  # whose queries may stay where they are; those of padding see real keys too
    return attend(q, k, v, key_value_seq_lengths=keys)
  out = attend(_move(q, *order), k, v, query_seq_lengths=keys, key_value_seq_lengths=keys)
  out = jnp.where((jnp.arange(q.shape[1]) < keys[:, None])[..., None, None], out, 0)
  return _move(out, *order[::-1])


def _real_first(segments: Array) -> tuple[Array, Array]:
  """segments int [B,T] -> the order int [B,T] that has a row's real tokens first, otherwise unchanged, and its inverse."""
  order = jnp.argsort(segments == 0, axis=1, stable=True)
  return order, jnp.argsort(order, axis=1)


@jax.custom_vjp
def _move(x: Array, order: Array, inverse: Array) -> Array:
  """x [B,T,...] with tokens in that order. Its gradient is moved back, where that of an index would be scattered."""
  return jnp.take_along_axis(x, order[..., None, None], axis=1)


def _move_forward(x, order, inverse):
  return _move(x, order, inverse), (order, inverse)


def _move_backward(orders, gradient):
  return _move(gradient, *orders[::-1]), None, None


_move.defvjp(_move_forward, _move_backward)
