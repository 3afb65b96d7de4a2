"""The plain attention equals jax.nn.dot_product_attention: grouped heads, segments, causal offsets, chunks, and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.models import layers, plain


def draw(rows, columns, heads=6, kv_heads=2, size=8, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shape = lambda length, count: jnp.asarray(rng.normal(size=(3, length, count, size)), dtype)
  q, k, v = shape(rows, heads), shape(columns, kv_heads), shape(columns, kv_heads)
  segments = [jnp.asarray(rng.integers(0, 3, (3, length)).astype(np.int32).clip(0, 2)) for length in (rows, columns)]
  return q, k, v, segments[0], segments[1].at[:, :3].set(jnp.arange(3))  # every query has a key


def expected(q, k, v, q_segments, kv_segments, offset):
  mask = (q_segments[:, :, None] == kv_segments[:, None, :])[:, None]
  if offset is not None:
    mask &= jnp.arange(k.shape[1])[None] <= jnp.arange(q.shape[1])[:, None] + offset
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def with_gradients(fn, arrays):
  """-> (value, gradients of a sum of its sines)."""
  return jax.jit(lambda *a: (fn(*a), jax.grad(lambda *a: jnp.sin(fn(*a)).sum(), argnums=(0, 1, 2))(*a)))(*arrays)


@functools.cache
def wanted(rows, columns, offset):
  *arrays, q_segments, kv_segments = draw(rows, columns)
  return with_gradients(lambda q, k, v: expected(q, k, v, q_segments, kv_segments, offset), arrays)


@pytest.mark.parametrize("many", [1, 1000])
@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("rows, columns, offset", [(9, 9, None), (7, 12, 5), (5, 11, None)])
def test_values_and_gradients(monkeypatch, rows, columns, offset, chunk, many):
  monkeypatch.setattr(plain, "CHUNK", chunk)
  monkeypatch.setattr(plain, "MANY", many)
  *arrays, q_segments, kv_segments = draw(rows, columns)
  ours = lambda q, k, v: layers.attention(q, k, v, q_segments=q_segments, kv_segments=kv_segments, causal_offset=offset)
  value, gradients = with_gradients(ours, arrays)
  np.testing.assert_allclose(value, wanted(rows, columns, offset)[0], atol=2e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, wanted(rows, columns, offset)[1])


@pytest.mark.parametrize("many", [1, 1000])
def test_without_a_mask(monkeypatch, many):
  monkeypatch.setattr(plain, "MANY", many)
  q, k, v, *_ = draw(5, 7)
  np.testing.assert_allclose(layers.attention(q, k, v), jax.nn.dot_product_attention(q, k, v, implementation="xla"), atol=2e-6)


def test_bfloat16_is_summed_in_float32():
  q, k, v, *_ = draw(16, 64, dtype=jnp.bfloat16)
  got = layers.attention(q, k, v)
  assert got.dtype == jnp.bfloat16
  exact = layers.attention(*(x.astype(jnp.float32) for x in (q, k, v)))
  np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.02)
