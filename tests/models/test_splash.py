"""Splash attention, its kernels run as plain JAX, against the XLA back end: outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax import sharding
from deepgen_jax.models import splash
from deepgen_jax.models.layers import attention

HEADS, SIZE = 2, 16


def draw(rows, columns, kv_heads, batch=2):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, v = normal(batch, rows, HEADS, SIZE), normal(batch, columns, kv_heads, SIZE), normal(batch, columns, kv_heads, SIZE)
  segments = lambda length, valid: jnp.asarray(np.arange(length)[None] < np.asarray(valid)[:, None], jnp.int32)
  return (q, k, v), segments


def both(arrays, weight, **kwargs):
  """(output, gradients of its sum under random weights) of each back end."""

  def run(backend):
    def loss(*args):
      out = attention(*args, backend=backend, **kwargs)
      return (out * weight).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, grads

  return run("xla"), run("splash_interpret")


@pytest.mark.parametrize(
  "rows, columns, kv_heads, offset",
  [(100, 100, 2, None), (40, 168, 1, 128), (40, 128, 1, 88), (100, 640, 2, None)],
  ids=["padded", "causal, grouped", "queries alone padded", "several blocks of keys"],
)
def test_splash_equals_xla(rows, columns, kv_heads, offset, monkeypatch):
  """Real rows and all gradients; tolerance: another order of float32 sums."""
  monkeypatch.setattr(splash, "KEYS", 384)
  arrays, segments = draw(rows, columns, kv_heads)
  kv = segments(columns, [columns, columns - 7])
  queries = kv[:, columns - rows :] if offset else kv[:, :rows]
  real = queries[:, :, None, None]
  weight = real * jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)
  expected, got = both(arrays, weight, q_segments=queries, kv_segments=kv, causal_offset=offset)
  np.testing.assert_allclose(got[0] * real, expected[0] * real, atol=2e-5)
  assert np.isfinite(got[0]).all()
  for a, b in zip(got[1], expected[1]):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_splash_on_a_mesh_equals_one_device():
  """Samples over data, heads over tensor; grouped keys and values follow their queries."""
  (q, k, v), segments = draw(128, 128, 2, batch=4)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  mask = segments(128, [128, 100, 90, 128])

  def run(q, k, v):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return attention(q, k, v, q_segments=mask, kv_segments=mask, backend="splash_interpret")

  placed = jax.device_put((q, k, v), sharding.batch_sharding(mesh))
  np.testing.assert_allclose(jax.jit(run)(*placed), attention(q, k, v, q_segments=mask, kv_segments=mask), atol=2e-5)


def test_unknown_back_ends_are_errors():
  arrays, _ = draw(8, 8, 2)
  with pytest.raises(ValueError, match="splash_interpret"):
    attention(*arrays, backend="flash")
