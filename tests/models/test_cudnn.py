"""The cuDNN back end: its program around JAX's own products equals the XLA back end, and it lowers to cuDNN's kernels."""

from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import AbstractMesh, AxisType

from deepgen_jax import sharding
from deepgen_jax.benchmarking import full
from deepgen_jax.config import load_config
from deepgen_jax.estimating.inputs import blank_sample
from deepgen_jax.models.config import TINY
from deepgen_jax.models.deepgen import PARTS, DeepGen
from deepgen_jax.models.layers import REMAT, attention
from deepgen_jax.stages import supervised

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


def lower_for_cuda(function, shapes):
  """Text of a function lowered where no GPU is: what JAX asks of it is answered in its place."""
  with (
    mock.patch.object(fused, "check_cudnn_version", lambda: 91000),
    mock.patch.object(fused, "check_compute_capability", lambda capability: True),
    mock.patch.object(fused, "is_cuda_compute_capability_equal", lambda capability: False),
  ):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("offset, kind", [(None, "PADDING"), (0, "PADDING_CAUSAL")])
def test_cudnn_is_what_a_gpu_runs(offset, kind):
  """Both passes are its kernels."""
  segments = real_tokens(64)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(64, 64, 2, jnp.bfloat16)]

  def loss(*args):
    out = attention(*args, q_segments=segments, kv_segments=segments, causal_offset=offset, backend="cudnn")
    return out.astype(jnp.float32).sum()

  text = lower_for_cuda(jax.grad(loss, (0, 1, 2)), shapes)
  assert "__cudnn$fmhaSoftmax(" in text
  assert "__cudnn$fmhaSoftmaxBackward(" in text
  assert text.count(f"\\22{kind}\\22") == 2


@pytest.mark.parametrize("remat, forward", [("full", 2), ("attention", 1), ("dots", 1)])
def test_the_backward_pass_keeps_the_kernel_s_result(remat, forward):
  """Times that a block's gradient runs the forward kernel."""
  segments = real_tokens(64)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(64, 64, 2, jnp.bfloat16)]

  def block(*args):
    return attention(*args, q_segments=segments, kv_segments=segments, backend="cudnn").astype(jnp.float32).sum()

  kept = jax.checkpoint(block, policy=REMAT[remat])
  assert lower_for_cuda(jax.value_and_grad(kept, (0, 1, 2)), shapes).count("__cudnn$fmhaSoftmax(") == forward


@pytest.mark.parametrize("kv_heads, tensor, used", [(2, 2, False), (4, 2, True), (2, 1, True)])
def test_groups_whose_queries_alone_are_split_go_to_xla(kv_heads, tensor, used):
  """JAX refuses to partition the kernel where queries' heads lie otherwise than keys'."""
  sizes = {"data": 1, "fsdp": 1, "tensor": tensor}
  axes = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3)  # no devices: a GPU may be alone
  mesh = SimpleNamespace(abstract_mesh=axes)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(64, 64, kv_heads, jnp.bfloat16)]
  attend = sharding.on_mesh(mesh, lambda *args: attention(*args, causal_offset=0, backend="cudnn"))
  assert ("__cudnn$fmha" in lower_for_cuda(attend, shapes)) == used


def test_parameters_are_made_without_it():
  """Their tracing computes in float32, which the kernel doesn't."""
  shapes = jax.eval_shape(DeepGen(TINY, jnp.bfloat16, attention="cudnn").init, jax.random.key(0))
  assert shapes.keys() == set(PARTS)


needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an accelerator: an NVIDIA GPU")


def errors_in_bfloat16(run, exact):
  """back end -> relative error of everything that run(back end) gives, over all of it."""
  flat = lambda tree: np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
  exact = flat(exact)
  return {name: np.linalg.norm(flat(run(name)) - exact) / np.linalg.norm(exact) for name in ("xla", "cudnn")}


@needs_gpu
@pytest.mark.parametrize("rows, columns, kv_heads, offset", [(320, 320, 4, None), (320, 320, 2, 0), (192, 320, 4, None)])
@pytest.mark.parametrize("size", [64, 128])
def test_on_a_gpu_the_kernel_is_as_exact_as_xla(rows, columns, kv_heads, offset, size):
  """Real rows and gradients in bfloat16, against float32 products in full precision; in the padding, huge values."""
  rng = np.random.default_rng(0)
  queries, keys = real_tokens(rows), real_tokens(columns)
  draw = lambda real, heads: jnp.asarray(rng.normal(size=(*real.shape, heads, size)), jnp.float32)
  spoil = lambda x, real: jnp.where(real[..., None, None] == 1, x, 1e3)
  arrays = spoil(draw(queries, HEADS), queries), spoil(draw(keys, kv_heads), keys), spoil(draw(keys, kv_heads), keys)
  weight = draw(queries, HEADS) * (queries[..., None, None] == 1)

  def run(backend, dtype=jnp.bfloat16):
    def loss(*args):
      out = attention(*args, q_segments=queries, kv_segments=keys, causal_offset=offset, backend=backend)
      return (out.astype(jnp.float32) * weight).sum(), out * (queries[..., None, None] == 1)

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*(x.astype(dtype) for x in arrays))
    return out, grads

  with jax.default_matmul_precision("highest"):
    exact = run("xla", jnp.float32)
  errors = errors_in_bfloat16(run, exact)
  assert errors["cudnn"] < 1.5 * errors["xla"] < 0.02, errors


@needs_gpu
def test_on_a_gpu_an_edit_s_gradients_are_as_exact_as_xla_s():
  """The tiny model with padded prompts: the loss's gradients with respect to SCB and DiT."""
  config = load_config("configs/align.py:tiny")
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  sample = blank_sample(config, DeepGen(TINY), "edit", 40)
  batch = full.noisy(jax.tree.map(lambda x: np.repeat(np.asarray(x), 2, axis=0), sample))
  batch["text_mask"][1, 20:] = False
  shapes = jax.eval_shape(DeepGen(TINY).init, jax.random.key(0))
  params = full.draw(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), shapes))

  def run(backend, dtype=jnp.bfloat16):
    model = DeepGen(TINY, dtype, remat="dots", attention=backend)

    def loss(trained):
      losses, _ = supervised.make_loss(config, model)(params | trained, batch, jax.random.split(jax.random.key(0), 2))
      return losses.mean()

    return jax.jit(jax.grad(loss))({part: params[part] for part in ("scb", "dit")})

  with jax.default_matmul_precision("highest"):
    exact = run("xla", jnp.float32)
  errors = errors_in_bfloat16(run, exact)
  assert errors["cudnn"] < 1.5 * errors["xla"] < 0.2, errors
