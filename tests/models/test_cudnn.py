"""The cuDNN back end: its program around JAX's own products equals the XLA back end, and it lowers to cuDNN's kernels."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from deepgen_jax.models.layers import attention

HEADS, SIZE = 4, 16


def draw(rows, columns, kv_heads, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  normal = lambda length, heads: jnp.asarray(rng.normal(size=(2, length, heads, SIZE)), dtype)
  return normal(rows, HEADS), normal(columns, kv_heads), normal(columns, kv_heads)


def real_tokens(length):
  """Padding before, between and behind: int [2,length]."""
  places = np.arange(length)
  return jnp.asarray(np.stack([(places < 5) | (places > length - 9), (places > 2) & (places < 20)]), jnp.int32)


@pytest.mark.parametrize(
  "rows, columns, kv_heads, offset",
  [(40, 40, 4, None), (40, 40, 2, 0), (24, 40, 4, None), (16, 40, 2, 24)],
  ids=["padded", "causal, grouped", "cross", "a second causal stream"],
)
def test_cudnn_equals_xla(rows, columns, kv_heads, offset):
  """Real rows and all gradients, garbage in the padding; tolerance: another order of float32 sums."""
  arrays, kv = draw(rows, columns, kv_heads), real_tokens(columns)
  queries = kv[:, columns - rows :] if offset else real_tokens(rows)
  real = queries[:, :, None, None] == 1
  weight = real * jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

  def run(backend):
    def loss(*args):
      out = attention(*args, q_segments=queries, kv_segments=kv, causal_offset=offset, backend=backend)
      return (out * weight).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, grads

  expected, got = run("xla"), run("cudnn_interpret")
  np.testing.assert_allclose(got[0] * real, expected[0] * real, atol=2e-5)
  assert np.isfinite(got[0]).all()
  for a, b in zip(got[1], expected[1]):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("offset, kind", [(None, "PADDING"), (0, "PADDING_CAUSAL")])
def test_cudnn_is_what_a_gpu_runs(offset, kind):
  """Lowered for CUDA where there is none, so that what JAX asks of the GPU is answered for it: both passes are its kernels."""
  segments = real_tokens(64)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(64, 64, 2, jnp.bfloat16)]

  def loss(*args):
    out = attention(*args, q_segments=segments, kv_segments=segments, causal_offset=offset, backend="cudnn")
    return out.astype(jnp.float32).sum()

  with (
    mock.patch.object(fused, "check_cudnn_version", lambda: 91000),
    mock.patch.object(fused, "check_compute_capability", lambda capability: True),
    mock.patch.object(fused, "is_cuda_compute_capability_equal", lambda capability: False),
  ):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmax(" in text
  assert "__cudnn$fmhaSoftmaxBackward(" in text
  assert text.count(f"\\22{kind}\\22") == 2
