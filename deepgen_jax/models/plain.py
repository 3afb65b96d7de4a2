"""Attention as products of plain matrices, on any platform. With many scores, the backward pass computes them again.

Kept are then the result and, for each row, the logarithm of its softmax's sum (as in FlashAttention-2, arXiv 2307.08691). A CPU
takes one head after the other, whose scores stay in its cache: at 1280 tokens that takes two thirds of the time with
gradients. Elsewhere long sequences go in chunks of queries.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from deepgen_jax.models.splash import SAVED

CHUNK = 2048  # queries whose scores are in memory at a time
MANY = 2**16  # scores of a head from which they aren't kept
RECOMPUTED = "recomputed"  # name scope of what has been computed before
_MASKED = float(0.7 * np.finfo(np.float32).min)


def plain_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
  """Softmax attention; q [B,T,H,D], k and v [B,S,K,D], mask bool [1 or B,T,S] -> [B,T,H,D]. Softmax and sums in float32."""
  batch, rows, heads, size = q.shape
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B,K,S,D]
  q = q.reshape(batch, rows, k.shape[1], -1, size).transpose(0, 2, 3, 1, 4)  # [B,K,G,T,D]: G queries share a key
  if rows * k.shape[2] < MANY:
    (out, _), _ = _every_head(_forward_head, (q,), (k, v), mask)
  else:
    out = _attend(q, k, v, mask)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, rows, heads, size)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
  """q [B,K,G,T,D], k and v [B,K,S,D], mask bool [1 or B,T,S] -> as q."""
  return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask):
  (out, sums), _ = _in_parts(_forward_head, (q,), (k, v), mask)
  out, sums = checkpoint_name(out, SAVED), checkpoint_name(sums, SAVED)
  return out, (q, k, v, mask, out, sums)


def _attend_backward(kept, gradient):
  q, k, v, mask, out, sums = kept
  (dq,), (dk, dv) = _in_parts(_backward_head, (q, out, sums, gradient), (k, v), mask)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward_head(queries, keys, mask):
  """q [G,T,D], k and v [S,D], mask [T,S] -> ((result, logarithm of each row's sum [G,T]), ())."""
  (q,), (k, v) = queries, keys
  scores = _product(_flat(q * q.shape[-1] ** -0.5), k, 1, 1)  # [GT,S]
  if mask is not None:
    scores = jnp.where(mask, scores.reshape(*q.shape[:2], -1), _MASKED).reshape(scores.shape)
  top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - top)
  total = weights.sum(-1, keepdims=True)
  out = _product(weights.astype(v.dtype), v, 1, 0) / total
  return (out.astype(q.dtype).reshape(q.shape), (top + jnp.log(total)).reshape(q.shape[:2])), ()


def _backward_head(queries, keys, mask):
  """q, result, sums, the result's gradient; k, v; mask -> ((gradient of q,), (those of k and v, of these queries, float32))."""
  (q, out, sums, gradient), (k, v) = queries, keys
  scaled, flat = _flat(q * q.shape[-1] ** -0.5), _flat(gradient)
  dots = (out.astype(jnp.float32) * gradient).sum(-1)
  with jax.named_scope(RECOMPUTED):
    scores = _product(k, scaled, 1, 1)  # [S,GT]: this way one product below has to transpose, otherwise two
  if mask is not None:
    scores = jnp.where(mask.T[:, None], scores.reshape(-1, *q.shape[:2]), _MASKED).reshape(scores.shape)
  weights = jnp.exp(scores - sums.reshape(-1))
  change = (weights * (_product(v, flat, 1, 1) - dots.reshape(-1))).astype(q.dtype)
  dq = _product(change, k, 0, 0) * q.shape[-1] ** -0.5
  return (dq.astype(q.dtype).reshape(q.shape),), (_product(change, scaled, 1, 0), _product(weights.astype(v.dtype), flat, 1, 0))


def _flat(x: Array) -> Array:
  return x.reshape(-1, x.shape[-1])


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
  """Two matrices, summed over these axes in float32."""
  return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _in_parts(fn: Callable, queries: tuple, keys: tuple, mask: Array | None):
  """fn(queries, keys, mask) of a head -> (arrays of queries, sums over queries), for all heads, in the platform's parts.

  queries: arrays [B,K,G,T,...]; keys: [B,K,S,D].
  """
  chunked = lambda *args: _by_chunk(fn, *args)
  cpu, default = (lambda *args, run=run: run(chunked, *args) for run in (_head_by_head, _every_head))
  return jax.lax.platform_dependent(queries, keys, mask, cpu=cpu, default=default)


def _every_head(fn, queries, keys, mask):
  over_mask = None if mask is None or len(mask) == 1 else 0
  mask = mask[0] if mask is not None and len(mask) == 1 else mask
  return jax.vmap(jax.vmap(fn, (0, 0, None)), (0, 0, over_mask))(queries, keys, mask)


def _head_by_head(fn, queries, keys, mask):
  batch, heads = queries[0].shape[:2]

  def head(i):
    own = None if mask is None else mask[i // heads % len(mask)]
    return fn(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[i], (queries, keys)), own)

  made = jax.lax.map(head, jnp.arange(batch * heads))
  return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), made)


def _by_chunk(fn, queries, keys, mask):
  rows = queries[0].shape[1]
  if rows <= CHUNK:
    return fn(queries, keys, mask)
  made = []
  for i in range(0, rows, CHUNK):
    own = None if mask is None else mask[i : i + CHUNK]
    made.append(fn(tuple(x[:, i : i + CHUNK] for x in queries), keys, own))
  of_queries, sums = zip(*made)
  return tuple(jnp.concatenate(x, 1) for x in zip(*of_queries)), tuple(sum(x[1:], x[0]) for x in zip(*sums))
