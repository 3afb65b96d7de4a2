"""Stacked channel bridging (SCB): think tokens, and the connector from VLM hidden states to the DiT's conditioning.

    states [B,T,6*C] -> projector -> bidirectional encoder -> mean over valid tokens -> pooled head -> pooled [B,P]
                                                          -> context head           -> context [B,T,D]

Encoder layers are pre-norm (SigLIP style), without positions and without a final norm. Both heads start at zero, as in the
reference. Departure: padding is masked in the attention and in the mean (the reference lets it leak).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from deepgen_jax.models.config import DeepGenConfig, SCBConfig
from deepgen_jax.models.layers import LayerNorm, Linear, attention, merge_heads, split_heads, stack
from deepgen_jax.sharding import keep_dealt


def _torch_uniform(key, shape, dtype=jnp.float32):
  """torch's default Linear initialisation, U(-1/sqrt(in), 1/sqrt(in))."""
  bound = 1 / math.sqrt(shape[0])
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class EncoderLayer(nn.Module):
  """One pre-norm bidirectional layer."""

  config: SCBConfig
  attention: str = "xla"

  @nn.compact
  def __call__(self, x, segments):
    """x [B,T,C]; segments int [B,T], 0 where padded."""
    c = self.config
    h = LayerNorm(c.layer_norm_eps, name="norm1")(x)
    q, k, v = (split_heads(Linear(c.hidden_size, name=n)(h), c.num_heads) for n in ("q", "k", "v"))
    h = attention(q, k, v, q_segments=segments, kv_segments=segments, backend=self.attention)
    x = x + Linear(c.hidden_size, name="out")(merge_heads(h))
    h = LayerNorm(c.layer_norm_eps, name="norm2")(x)
    tiny = nn.initializers.normal(1e-6)
    h = jax.nn.gelu(Linear(c.intermediate_size, bias_init=tiny, name="fc1")(h), approximate=True)
    return keep_dealt(x + Linear(c.hidden_size, bias_init=tiny, name="fc2")(h)), None


class SCB(nn.Module):
  """Needs the whole model's sizes: its input is the VLM's, its outputs are the DiT's."""

  config: DeepGenConfig
  unroll: bool = False
  remat: str = "none"
  attention: str = "xla"

  def setup(self):
    c, text, dit = self.config.scb, self.config.text, self.config.dit
    zeros = nn.initializers.zeros
    think_init = nn.initializers.normal(1 / math.sqrt(text.hidden_size))
    self.think_tokens = self.param("think_tokens", think_init, (c.num_think_tokens, text.hidden_size), jnp.float32)
    bound = 1 / math.sqrt(len(c.read_layers) * text.hidden_size)
    bias_init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    self.projector = Linear(c.hidden_size, kernel_init=_torch_uniform, bias_init=bias_init)
    layers = stack(EncoderLayer, c.num_layers, self.unroll, remat=self.remat, initializing=self.is_initializing())
    self.layers = layers(c, attention=self.attention)
    self.pooled_head = Linear(dit.pooled_size, kernel_init=zeros)
    self.context_head = Linear(dit.context_size, kernel_init=zeros)

  def __call__(self, states: Array, mask: Array) -> tuple[Array, Array]:
    """states [B,T,reads*C], the hidden states side by side on channels; mask bool [B,T] -> pooled [B,P], context [B,T,D]."""
    x = self.projector(states)
    x, _ = self.layers(x, mask.astype(jnp.int32))
    weight = mask[..., None].astype(jnp.float32)
    mean = (x.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
    return self.pooled_head(mean.astype(x.dtype)), self.context_head(x)
