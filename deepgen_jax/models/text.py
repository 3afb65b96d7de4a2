"""Qwen2.5-VL text decoder: GQA, q/k/v biases, M-RoPE, SwiGLU.

Layers live in stacked segments that end where SCB reads a hidden state, so no other hidden state is kept. Where a mesh splits
parameters, one loop may run all segments, at the price of a copy of a device's share of them: its body is compiled once. What
no reader needs (the layers after the last read, the final norm, an untied head) sits in its own leaves and may be absent from
the tree when only hidden states are asked for.

The sequence may come as several *streams* that follow each other, e.g. (prompt, think tokens): a later stream sees the earlier
ones, never the other way round. With the prompt as its own stream no gradient flows through it when only think tokens
train, and XLA builds no backward pass for it (design 3.7).
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepgen_jax.models.config import TextConfig
from deepgen_jax.models.layers import REMAT, Linear, RMSNorm, attention, embed, merge_heads, split_heads, stack
from deepgen_jax.sharding import keep_dealt, splits_parameters

_INIT = nn.initializers.normal(0.02)


def mrope(positions: Array, config: TextConfig) -> tuple[Array, Array]:
  """Multimodal rotary tables.  positions int [B,3,T] (time, row, column) -> cos, sin float32 [B,T,1,head_dim/2].

  Rotary pair i turns by positions[axis(i)] * theta^(-2i/head_dim); the first mrope_section[0] pairs follow time, then row,
  column.
  """
  half = config.head_dim // 2
  frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) * 2 / config.head_dim)
  axis = np.repeat(np.arange(3), config.mrope_section)
  angle = positions.astype(jnp.float32)[:, axis, :].swapaxes(1, 2) * frequency
  return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def rotate(x: Array, table: tuple[Array, Array]) -> Array:
  """Rotates halves of the last axis; x [B,T,H,D], tables [B,T,1,D/2], computed in float32."""
  cos, sin = table
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class DecoderLayer(nn.Module):
  """One pre-norm layer over streams that follow each other (see the head of the file)."""

  config: TextConfig
  attention: str = "xla"

  @nn.compact
  def __call__(self, streams, tables, segments):
    """streams: tuple of [B,T_i,C]; tables: rotary tables of each; segments: int [B,T_i] of each (0 = padding)."""
    c = self.config
    norm = RMSNorm(c.rms_eps, name="input_norm")
    q = Linear(c.num_heads * c.head_dim, kernel_init=_INIT, name="q")
    k = Linear(c.num_kv_heads * c.head_dim, kernel_init=_INIT, name="k")
    v = Linear(c.num_kv_heads * c.head_dim, kernel_init=_INIT, name="v")
    out = Linear(c.hidden_size, use_bias=False, kernel_init=_INIT, name="out")
    post_norm = RMSNorm(c.rms_eps, name="post_norm")
    gate = Linear(c.intermediate_size, use_bias=False, kernel_init=_INIT, name="gate")
    up = Linear(c.intermediate_size, use_bias=False, kernel_init=_INIT, name="up")
    down = Linear(c.hidden_size, use_bias=False, kernel_init=_INIT, name="down")

    done, keys, values, seen = [], [], [], []
    for x, table, segment in zip(streams, tables, segments):
      h = norm(x)
      offset = sum(s.shape[1] for s in seen)
      keys.append(rotate(split_heads(k(h), c.num_kv_heads), table))
      values.append(split_heads(v(h), c.num_kv_heads))
      seen.append(segment)
      h = attention(
        rotate(split_heads(q(h), c.num_heads), table),
        jnp.concatenate(keys, axis=1),
        jnp.concatenate(values, axis=1),
        q_segments=segment,
        kv_segments=jnp.concatenate(seen, axis=1),
        causal_offset=offset,
        backend=self.attention,
      )
      x = x + out(merge_heads(h))
      h = post_norm(x)
      done.append(x + down(jax.nn.silu(gate(h)) * up(h)))
    return keep_dealt(tuple(done)), None


class TextDecoder(nn.Module):
  """Methods are entered through `apply(..., method=...)`; parameters of layers past the last read are used by `logits`
  alone. one_loop: over all segments, where a mesh splits parameters.
  """

  config: TextConfig
  read_layers: tuple[int, ...]
  unroll: bool = False
  remat: str = "none"
  attention: str = "xla"
  one_loop: bool = True

  def setup(self):
    c = self.config
    ends = sorted(self.read_layers)
    if not ends or ends[0] < 1 or ends[-1] > c.num_layers or len(set(ends)) != len(ends):
      raise ValueError(f"read_layers {self.read_layers} must be distinct numbers from 1 to {c.num_layers}")
    starts = [0, *ends]
    lengths = [end - start for start, end in zip(starts, [*ends, c.num_layers]) if end > start]
    self.embedding = self.param("embedding", _INIT, (c.vocab_size, c.hidden_size), jnp.float32)
    segment = lambda n: stack(DecoderLayer, n, self.unroll, remat=self.remat, initializing=self.is_initializing())
    self.segments = [segment(n)(c, attention=self.attention) for n in lengths]
    self.norm = RMSNorm(c.rms_eps)
    if not c.tie_word_embeddings:
      self.head = Linear(c.vocab_size, use_bias=False, kernel_init=_INIT)

  def embed(self, ids: Array, features: Array | None = None, feature_index: Array | None = None, dtype=jnp.float32) -> Array:
    """ids int [B,T] -> [B,T,C]; where feature_index [B,T] is k >= 0 the slot takes features[b, k] ([B,V,C]) instead."""
    x = embed(ids, self.embedding, dtype)
    if features is None:
      return x
    rows = jnp.take_along_axis(features.astype(dtype), jnp.maximum(feature_index, 0)[..., None], axis=1)
    return jnp.where((feature_index >= 0)[..., None], rows, x)

  def hidden_states(self, streams: Sequence[Array], positions: Sequence[Array], segments: Sequence[Array]) -> list[Array]:
    """Residual streams after each of `read_layers`, in that order, without the final norm; each [B, sum T_i, C].

    streams: embeddings [B,T_i,C]; positions int [B,3,T_i]; segments int [B,T_i], 0 where padded.
    """
    states, _ = self._run(tuple(streams), positions, tuple(segments), len(self.read_layers))
    return [states[layer] for layer in self.read_layers]

  def logits(self, x: Array, positions: Array, segments: Array) -> Array:
    """Next-token logits float32 [B,T,vocab] of embeddings x [B,T,C]: all layers, the final norm and the head."""
    _, (x,) = self._run((x,), (positions,), (segments,), len(self.segments))
    x = self.norm(x)
    if not self.config.tie_word_embeddings:
      return self.head(x).astype(jnp.float32)
    table = getattr(self.embedding, "kernel", self.embedding)
    return (x @ table.astype(x.dtype).T).astype(jnp.float32)

  def _run(self, streams, positions, segments, count):
    tables = tuple(mrope(p, self.config) for p in positions)
    ends = [*sorted(self.read_layers), self.config.num_layers][:count]
    if self._one_loop(count):
      stacks = [segment.variables["params"] for segment in self.segments[:count]]
      return self._joined(stacks, ends, streams, tables, segments)
    states = {}
    for segment, layer in zip(self.segments[:count], ends):
      streams, _ = segment(streams, tables, segments)
      states[layer] = jnp.concatenate(streams, axis=1)
    return states, streams

  def _one_loop(self, count):
    if not self.one_loop or self.unroll or self.is_initializing() or count < 2 or not splits_parameters():
      return False
    kinds = {jax.tree.structure(segment.variables["params"]) for segment in self.segments[:count]}
    return len(kinds) == 1  # LoRA may be on some segments alone

  def _joined(self, stacks, ends, streams, tables, segments):
    """The segments as one loop, whose layers write their result where their segment's belongs: its last one's stays."""
    params = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
    slots = jnp.asarray(np.repeat(np.arange(len(ends)), np.diff([0, *ends])), jnp.int32)
    layer = DecoderLayer(self.config, attention=self.attention, parent=None)
    run = lambda params, streams: layer.apply({"params": params}, streams, tables, segments)[0]
    if REMAT[self.remat] is not None:
      run = jax.checkpoint(run, prevent_cse=False, policy=REMAT[self.remat])

    def step(carry, inputs):
      streams, states = carry
      params, slot = inputs
      streams = run(params, streams)
      write = lambda state, x: jax.lax.dynamic_update_index_in_dim(state, x, slot, 0)
      return (streams, jax.tree.map(write, states, streams)), None

    states = tuple(jnp.zeros((len(ends), *x.shape), x.dtype) for x in streams)
    (streams, states), _ = jax.lax.scan(step, (streams, states), (params, slots))
    return {end: jnp.concatenate([state[i] for state in states], axis=1) for i, end in enumerate(ends)}, streams
