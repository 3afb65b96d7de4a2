"""The few pieces that all networks share: one `linear`, one `embed`, one `attention`, the norms, scan over stacked layers.

Parameters are float32 masters; every function here computes in the dtype of its activations, except what must be float32
(norm statistics, softmax). A kernel may be an array or a `LoraKernel`: networks don't know the difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from deepgen_jax.models import cudnn
from deepgen_jax.models.lora import LoraKernel, lora_delta, lora_embedding
from deepgen_jax.models.plain import plain_attention
from deepgen_jax.models.splash import SAVED, splash_attention

BACKENDS = ("xla", "splash", "cudnn", "splash_interpret", "cudnn_interpret")

# What a scanned block keeps for its backward pass (the rest is computed again): everything; results of its linears and of
# attention; those of attention; its input alone.
_POLICIES = jax.checkpoint_policies
_ATTENTION = _POLICIES.save_from_both_policies(_POLICIES.save_only_these_names(SAVED), cudnn.is_result)
REMAT = {
  "none": None,
  "dots": _POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, _ATTENTION),
  "attention": _ATTENTION,
  "full": _POLICIES.nothing_saveable,
}


def best_attention(platform: str, dtype) -> str:
  """The back end of BACKENDS for a platform ("cpu", "gpu", "tpu") and a compute dtype."""
  if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and cudnn.is_available():
    return "cudnn"
  return "splash" if platform == "tpu" else "xla"


def linear(x: Array, kernel: Array | LoraKernel, bias: Array | None = None) -> Array:
  """x [..., in], kernel [in, out], bias [out] -> [..., out], in the dtype of x. A LoraKernel adds scale * (drop(x) a) b."""
  base = kernel.kernel if isinstance(kernel, LoraKernel) else kernel
  y = (x.reshape(-1, x.shape[-1]) @ base.astype(x.dtype)).reshape(*x.shape[:-1], -1)  # 2-D: on CPU a third faster to train
  if isinstance(kernel, LoraKernel):
    y = y + lora_delta(x, kernel)
  return y if bias is None else y + bias.astype(x.dtype)


def embed(ids: Array, table: Array | LoraKernel, dtype) -> Array:
  """ids [...] int, table [vocab, size] -> [..., size]."""
  if isinstance(table, LoraKernel):
    return table.kernel[ids].astype(dtype) + lora_embedding(ids, table, dtype)
  return table[ids].astype(dtype)


def attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  q_segments: Array | None = None,
  kv_segments: Array | None = None,
  causal_offset: int | None = None,
  backend: str = "xla",
) -> Array:
  """Softmax attention; q [B,T,H,D], k and v [B,S,K,D] with K dividing H -> [B,T,H,D].

  A query sees the keys of its own segment (int [B,T] and [B,S]; by convention 0 is padding, so that padded rows see padded
  rows and stay finite), and with `causal_offset` only keys at positions <= its own index + offset. Scale 1/sqrt(D),
  softmax in float32. backend: "xla" anywhere, "splash" on TPU, "cudnn" on NVIDIA GPUs (segments of 0 and 1; what its kernel
  can't do (`cudnn.fits`) goes to "xla"), with "_interpret" their programs on any platform.
  """
  if backend not in BACKENDS:
    raise ValueError(f"attention back end {backend!r} is none of {', '.join(BACKENDS)}")
  interpret = backend.endswith("_interpret")
  if backend.startswith("cudnn") and cudnn.fits(q, k, causal_offset, interpret):
    return cudnn.cudnn_attention(q, k, v, q_segments, kv_segments, causal_offset is not None, interpret)
  if backend.startswith("splash"):
    return splash_attention(q, k, v, q_segments, kv_segments, causal_offset, interpret)
  mask = None
  if q_segments is not None:
    mask = q_segments[:, :, None] == kv_segments[:, None, :]
  if causal_offset is not None:
    rows = jnp.arange(q.shape[1])[:, None] + causal_offset
    causal = (jnp.arange(k.shape[1])[None, :] <= rows)[None]
    mask = causal if mask is None else mask & causal
  return plain_attention(q, k, v, mask)


def layer_norm(x: Array, scale: Array | None = None, bias: Array | None = None, eps: float = 1e-6) -> Array:
  """LayerNorm over the last axis, statistics in float32, result in the dtype of x."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
  if scale is not None:
    y = y * scale + bias
  return y.astype(x.dtype)


def rms_norm(x: Array, scale: Array, eps: float = 1e-6) -> Array:
  """RMSNorm over the last axis, statistics in float32, result in the dtype of x."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
  return (y * scale).astype(x.dtype)


def split_heads(x: Array, heads: int) -> Array:
  """[..., heads * D] -> [..., heads, D]."""
  return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: Array) -> Array:
  """[..., H, D] -> [..., H * D]."""
  return x.reshape(*x.shape[:-2], -1)


class Linear(nn.Module):
  """Dense layer; parameters `kernel` [in, out] and `bias` [out]."""

  features: int
  use_bias: bool = True
  kernel_init: Callable = nn.initializers.xavier_uniform()
  bias_init: Callable = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
    bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
    return linear(x, kernel, bias)


class RMSNorm(nn.Module):
  """RMSNorm with a learned `scale`."""

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32), self.eps)


class LayerNorm(nn.Module):
  """LayerNorm with learned `scale` and `bias`."""

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    return layer_norm(x, scale, bias, self.eps)


def stack(
  block: type[nn.Module], length: int, unroll: bool, per_layer: int = 0, remat: str = "none", initializing: bool = False
) -> type[nn.Module]:
  """`block` repeated `length` times over parameters stacked on a leading axis; one compiled body unless unrolled.

  The block is called as block(carry, *per_layer inputs, *shared inputs) -> (carry, None). Of its inputs the first
  `per_layer` carry a leading layer axis, the others are shared by all layers. remat: what the backward pass finds in memory,
  a key of REMAT. initializing: whether parameters are being drawn.
  """
  inputs = _num_inputs(block)
  if REMAT[remat] is not None:
    block = nn.remat(
      block, prevent_cse=unroll, policy=REMAT[remat]
    )  # inside a loop nothing can be merged with the forward pass
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0,) * per_layer + (nn.broadcast,) * (inputs - per_layer),
    length=length,
    unroll=length if unroll else 1,
    # Flax traces the block once more to look for constants of the loop, of which there are none. That takes random keys too:
    # without it a seed draws other numbers.
    check_constancy_invariants=initializing,
  )


def _num_inputs(block: type[nn.Module]) -> int:
  return len(inspect.signature(block.__call__).parameters) - 2  # without self and the carry
