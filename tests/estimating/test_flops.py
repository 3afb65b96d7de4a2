"""FLOPs in a jaxpr, against counts by hand."""

import jax
import jax.numpy as jnp

from deepgen_jax.estimating.flops import count_flops
from deepgen_jax.models import plain
from deepgen_jax.models.layers import attention

X, W = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
PRODUCT = 2 * 8 * 16 * 16


def test_products_in_jit_and_loops():
  assert count_flops(lambda x, w: jax.jit(jnp.dot)(x, w), X, W) == PRODUCT
  looped = lambda x, w: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0]
  assert count_flops(looped, X, W) == 3 * PRODUCT
  batched = lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k)
  q = jax.ShapeDtypeStruct((2, 5, 3, 7), jnp.float32)
  assert count_flops(batched, q, q) == 2 * 2 * 3 * 5 * 5 * 7


def test_gradients_count_what_is_needed_alone():
  """A trained kernel takes forward and two backward products; frozen and first in line, just the forward one."""
  loss = lambda w, x: (x @ w).sum()
  both = lambda x, w: jax.grad(loss, argnums=(0, 1))(w, x)
  assert count_flops(both, X, W) == 3 * PRODUCT
  assert count_flops(lambda x, w: jax.grad(loss)(w, x), X, W) == 2 * PRODUCT


def test_scores_that_attention_computes_again_dont_count(monkeypatch):
  q = jax.ShapeDtypeStruct((2, 6, 3, 8), jnp.float32)
  for many, chunk in ((1000, 1000), (1, 1000), (1, 4)):
    monkeypatch.setattr(plain, "MANY", many)
    monkeypatch.setattr(plain, "CHUNK", chunk)
    gradient = jax.grad(lambda q, k, v: attention(q, k, v).sum(), argnums=(0, 1, 2))
    assert count_flops(gradient, q, q, q) == 6 * (2 * 2 * 3 * 6 * 6 * 8)  # two products forward, four backward


def test_convolutions():
  image, kernel = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
  convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  assert count_flops(convolve, image, kernel) == 2 * 8 * 8 * 5 * 27
