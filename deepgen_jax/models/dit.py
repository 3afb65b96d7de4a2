"""SD3.5 MMDiT over explicit tokens: target and reference patches with (row, column) positions, under a mask.

A token is a 2x2 patch of latents, channels in the order (patch row, patch column, latent channel). A sample is
[target tokens | reference tokens], any number of references, padded to a budget; `segments` is 0 where padded. Each image takes
the centre crop of the position table (`crop_positions`), as in the reference: nothing but content tells target and references
apart.

What doesn't depend on the timestep is done once by `prepare`; `velocity` is the part that a sampler repeats.
"""

from __future__ import annotations

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepgen_jax.models.config import DiTConfig
from deepgen_jax.models.layers import Linear, RMSNorm, attention, layer_norm, merge_heads, split_heads, stack
from deepgen_jax.sharding import keep_dealt, map_paths


def patchify(latents, patch_size: int = 2):
  """[..., h, w, c] -> tokens [..., (h/p)(w/p), p*p*c], raster order."""
  *lead, h, w, c = latents.shape
  x = latents.reshape(*lead, h // patch_size, patch_size, w // patch_size, patch_size, c)
  return x.swapaxes(-4, -3).reshape(*lead, (h // patch_size) * (w // patch_size), patch_size**2 * c)


def unpatchify(tokens, h: int, w: int, patch_size: int = 2):
  """Inverse of `patchify`: tokens [..., (h/p)(w/p), p*p*c] -> [..., h, w, c]."""
  *lead, _, d = tokens.shape
  x = tokens.reshape(*lead, h // patch_size, w // patch_size, patch_size, patch_size, d // patch_size**2)
  return x.swapaxes(-4, -3).reshape(*lead, h, w, d // patch_size**2)


def crop_positions(rows: int, columns: int, config: DiTConfig) -> np.ndarray:
  """Positions int32 [rows*columns, 2] of the centre crop of the table for an image of that many patches."""
  size = config.pos_embed_max_size
  if rows > size or columns > size:
    raise ValueError(f"image of {rows}x{columns} patches is larger than the position table ({size}x{size})")
  grid = np.meshgrid(np.arange(rows) + (size - rows) // 2, np.arange(columns) + (size - columns) // 2, indexing="ij")
  return np.stack(grid, -1).reshape(-1, 2).astype(np.int32)


def position_table(config: DiTConfig) -> np.ndarray:
  """One axis of the 2-D sin-cos table, [pos_embed_max_size, hidden/2] float32 (computed in float64, as diffusers does).

  The 2-D embedding of (row, column) is concat(table[column], table[row]). Positions step by base / max, so that an image of
  sample_size spans [0, base) whatever the table's size.
  """
  quarter = config.hidden_size // 4
  base = config.sample_size // config.patch_size
  positions = np.arange(config.pos_embed_max_size, dtype=np.float64) / (config.pos_embed_max_size / base)
  angle = positions[:, None] / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def timestep_features(timestep: Array, size: int = 256) -> Array:
  """Sinusoids [B,size] float32 (cosines first) of timesteps [B] in 0..1000."""
  frequency = jnp.exp(-math.log(10000) * jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
  angle = timestep.astype(jnp.float32)[:, None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


@flax.struct.dataclass
class Prepared:
  """What `velocity` needs and no timestep changes. context [B,L,C], pooled embedding [B,C], references [B,R,C]."""

  context: Array
  context_segments: Array
  pooled: Array
  target_positions: Array  # [B,N,C] position embedding
  target_segments: Array
  references: Array | None = None
  reference_segments: Array | None = None
  layers: tuple | None = None  # parameters of each block of each run, where they were taken apart


def _modulate(x, shift, scale):
  return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


class _Attention(nn.Module):
  """q/k/v of one stream with optional RMS norm on heads; `prefix` names its parameters."""

  config: DiTConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    q, k, v = (split_heads(Linear(c.hidden_size, name=n)(x), c.num_heads) for n in ("q", "k", "v"))
    if c.qk_norm:
      q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
    return q, k, v


class _MLP(nn.Module):
  config: DiTConfig

  @nn.compact
  def __call__(self, x):
    h = jax.nn.gelu(Linear(4 * self.config.hidden_size, name="fc1")(x), approximate=True)
    return Linear(self.config.hidden_size, name="fc2")(h)


class Block(nn.Module):
  """Joint block with AdaLN-Zero. dual: a second attention over image tokens alone. last: the context is read, not updated."""

  config: DiTConfig
  dual: bool = False
  last: bool = False
  attention: str = "xla"

  @nn.compact
  def __call__(self, streams, temb, segments):
    """streams (x [B,N,C], context [B,L,C]); temb [B,C] after SiLU; segments (int [B,N], int [B,L])."""
    cfg, (x, context), (x_segments, c_segments) = self.config, streams, segments
    size = cfg.hidden_size
    mod = jnp.split(Linear((9 if self.dual else 6) * size, name="modulation")(temb), 9 if self.dual else 6, axis=-1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mod[:6]
    c_mod = jnp.split(Linear((2 if self.last else 6) * size, name="context_modulation")(temb), 2 if self.last else 6, axis=-1)
    if self.last:
      c_scale, c_shift = c_mod  # diffusers' AdaLayerNormContinuous puts scale first
    else:
      c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = c_mod

    q, k, v = _Attention(cfg, name="attn")(_modulate(x, shift, scale))
    cq, ck, cv = _Attention(cfg, name="context_attn")(_modulate(context, c_shift, c_scale))
    joint = jnp.concatenate([x_segments, c_segments], axis=1)
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in ((q, cq), (k, ck), (v, cv)))
    h = merge_heads(attention(q, k, v, q_segments=joint, kv_segments=joint, backend=self.attention))
    h, c_h = h[:, : x.shape[1]], h[:, x.shape[1] :]
    out = gate[:, None] * Linear(size, name="out")(h)
    if self.dual:
      q, k, v = _Attention(cfg, name="attn2")(_modulate(x, mod[6], mod[7]))
      h = attention(q, k, v, q_segments=x_segments, kv_segments=x_segments, backend=self.attention)
      out = out + mod[8][:, None] * Linear(size, name="out2")(merge_heads(h))
    x = x + out
    x = x + mlp_gate[:, None] * _MLP(cfg, name="mlp")(_modulate(x, mlp_shift, mlp_scale))
    if not self.last:
      context = context + c_gate[:, None] * Linear(size, name="context_out")(c_h)
      h = _modulate(context, c_mlp_shift, c_mlp_scale)
      context = context + c_mlp_gate[:, None] * _MLP(cfg, name="context_mlp")(h)
    return keep_dealt((x, context)), None


class DiT(nn.Module):
  """Blocks are stacked in runs of one kind: `blocks_0`, `blocks_1`, ... (full size: 13 dual, 10 plain, the last)."""

  config: DiTConfig
  unroll: bool = False
  remat: str = "none"
  attention: str = "xla"

  def setup(self):
    c = self.config
    self.patch_embed = Linear(c.hidden_size)
    self.context_embed = Linear(c.hidden_size)
    self.time_fc1, self.time_fc2 = Linear(c.hidden_size), Linear(c.hidden_size)
    self.pooled_fc1, self.pooled_fc2 = Linear(c.hidden_size), Linear(c.hidden_size)
    self.blocks = [
      stack(Block, length, self.unroll, remat=self.remat, initializing=self.is_initializing())(
        c, dual=dual, last=last, attention=self.attention
      )
      for length, dual, last in block_runs(c)
    ]
    self.out_modulation = Linear(2 * c.hidden_size)
    self.out = Linear(c.patch_dim)

  def prepare(
    self,
    context: Array,
    context_mask: Array,
    pooled: Array,
    positions: Array,
    mask: Array,
    reference_tokens: Array | None = None,
    reference_positions: Array | None = None,
    reference_mask: Array | None = None,
    apart: bool = False,
  ) -> Prepared:
    """Embeds conditioning once. apart: takes the blocks' parameters out of their stacks, which on a GPU and a CPU are copied
    at every step otherwise; for samplers, as a gradient would have to put them together again.

    context [B,L,D], context_mask bool [B,L], pooled [B,P]; positions int [B,N,2] and mask bool [B,N] of the target tokens;
    reference_tokens [B,R,patch_dim] with positions [B,R,2] and mask [B,R], all references of a sample one after the other.
    """
    references = None
    if reference_tokens is not None:
      references = self.patch_embed(reference_tokens) + self._embed_positions(reference_positions, reference_tokens.dtype)
      reference_mask = reference_mask.astype(jnp.int32)
    return Prepared(
      context=self.context_embed(context),
      context_segments=context_mask.astype(jnp.int32),
      pooled=self.pooled_fc2(jax.nn.silu(self.pooled_fc1(pooled))),
      target_positions=self._embed_positions(positions, context.dtype),
      target_segments=mask.astype(jnp.int32),
      references=references,
      reference_segments=reference_mask,
      layers=self._layers(context.dtype) if apart else None,
    )

  def velocity(self, tokens: Array, timestep: Array, prepared: Prepared) -> Array:
    """Noisy target tokens [B,N,patch_dim], timestep [B] in 0..1000 -> velocity [B,N,patch_dim] (undefined where padded)."""
    x = self.patch_embed(tokens) + prepared.target_positions
    segments = prepared.target_segments
    if prepared.references is not None:
      x = jnp.concatenate([x, prepared.references], axis=1)
      segments = jnp.concatenate([segments, prepared.reference_segments], axis=1)
    features = timestep_features(timestep).astype(x.dtype)
    temb = jax.nn.silu(self.time_fc2(jax.nn.silu(self.time_fc1(features))) + prepared.pooled)
    streams = (x, prepared.context)
    segments = (segments, prepared.context_segments)
    for i, (block, (_, dual, last)) in enumerate(zip(self.blocks, block_runs(self.config))):
      if prepared.layers is None:
        streams, _ = block(streams, temb, segments)
        continue
      single = Block(self.config, dual, last, self.attention, parent=None)
      for layer in prepared.layers[i]:
        streams, _ = single.apply({"params": layer}, streams, temb, segments)
    scale, shift = jnp.split(self.out_modulation(temb), 2, axis=-1)
    return self.out(_modulate(streams[0][:, : tokens.shape[1]], shift, scale))

  def __call__(self, tokens: Array, timestep: Array, *args, **kwargs) -> Array:
    """`velocity` on top of `prepare(*args, **kwargs)`."""
    return self.velocity(tokens, timestep, self.prepare(*args, **kwargs))

  def _layers(self, dtype) -> tuple:
    """Parameters of each block of each run, those of linears cast as these would at every step."""
    cast = lambda path, x: x.astype(dtype) if path.endswith(("/kernel", "/bias", "/a", "/b")) else x
    layer = lambda stack, i: map_paths(lambda path, x: cast(path, x[i]), stack)
    stacks = [block.variables["params"] for block in self.blocks]
    lengths = [length for length, *_ in block_runs(self.config)]
    return tuple(tuple(layer(stack, i) for i in range(length)) for stack, length in zip(stacks, lengths))

  def _embed_positions(self, positions, dtype):
    table = jnp.asarray(position_table(self.config))
    return jnp.concatenate([table[positions[..., 1]], table[positions[..., 0]]], axis=-1).astype(dtype)


def block_runs(config: DiTConfig) -> list[tuple[int, bool, bool]]:
  """(length, dual, last) of each run of equal blocks."""
  kinds = [(i in config.dual_attention_layers, i == config.num_layers - 1) for i in range(config.num_layers)]
  runs = []
  for kind in kinds:
    if runs and runs[-1][1:] == kind:
      runs[-1] = (runs[-1][0] + 1, *kind)
    else:
      runs.append((1, *kind))
  return runs
