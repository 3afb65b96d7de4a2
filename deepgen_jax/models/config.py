"""Sizes of the five networks, as frozen dataclasses, and the two named sizes `tiny` and `full`.

A size is data: the networks are the same code for both. `to_dict` / `from_dict` are what `model.json` stores.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TextConfig:
  """Qwen2.5 text decoder."""

  vocab_size: int = 151936
  hidden_size: int = 2048
  num_layers: int = 36
  num_heads: int = 16
  num_kv_heads: int = 2
  head_dim: int = 128
  intermediate_size: int = 11008
  rope_theta: float = 1e6
  mrope_section: tuple[int, ...] = (16, 24, 24)  # rotary pairs that follow (time, row, column); sums to head_dim / 2
  rms_eps: float = 1e-6
  tie_word_embeddings: bool = True


@dataclass(frozen=True)
class VisionConfig:
  """Qwen2.5-VL vision tower."""

  num_layers: int = 32
  hidden_size: int = 1280
  num_heads: int = 16
  intermediate_size: int = 3420
  out_size: int = 2048
  patch_size: int = 14
  temporal_patch_size: int = 2
  merge_size: int = 2
  window_size: int = 112  # pixels
  full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)


@dataclass(frozen=True)
class SCBConfig:
  """Stacked channel bridging: think tokens, projectors and a bidirectional encoder."""

  num_think_tokens: int = 128
  hidden_size: int = 2048
  intermediate_size: int = 11946
  num_layers: int = 6
  num_heads: int = 32
  read_layers: tuple[int, ...] = (35, 29, 23, 17, 11, 5)  # hidden state after this many decoder layers, deepest first
  layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class DiTConfig:
  """SD3.5 MMDiT."""

  in_channels: int = 16
  patch_size: int = 2
  num_layers: int = 24
  num_heads: int = 24
  head_dim: int = 64
  context_size: int = 4096
  pooled_size: int = 2048
  dual_attention_layers: tuple[int, ...] = tuple(range(13))
  qk_norm: bool = True
  pos_embed_max_size: int = 384  # rows and columns of the position table
  sample_size: int = 128  # latent side at which positions step by one

  @property
  def hidden_size(self) -> int:
    return self.num_heads * self.head_dim

  @property
  def patch_dim(self) -> int:
    """Channels of one token: patch row, patch column, latent channel."""
    return self.patch_size**2 * self.in_channels


@dataclass(frozen=True)
class VAEConfig:
  """SD3 autoencoder (no quant convolutions)."""

  in_channels: int = 3
  latent_channels: int = 16
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  scaling_factor: float = 1.5305
  shift_factor: float = 0.0609

  @property
  def factor(self) -> int:
    """Pixels per latent, along a side."""
    return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class SchedulerConfig:
  """diffusers' FlowMatchEulerDiscreteScheduler, the fields that change a sigma."""

  num_train_timesteps: int = 1000
  shift: float = 3.0
  use_dynamic_shifting: bool = False
  base_shift: float = 0.5
  max_shift: float = 1.15
  base_image_seq_len: int = 256
  max_image_seq_len: int = 4096
  time_shift_type: str = "exponential"


@dataclass(frozen=True)
class DeepGenConfig:
  """The whole model."""

  text: TextConfig = field(default_factory=TextConfig)
  vision: VisionConfig = field(default_factory=VisionConfig)
  scb: SCBConfig = field(default_factory=SCBConfig)
  dit: DiTConfig = field(default_factory=DiTConfig)
  vae: VAEConfig = field(default_factory=VAEConfig)
  scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
  image_size: int = 512

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict) -> DeepGenConfig:
    """Inverse of `to_dict`; lists become tuples. Unknown keys raise TypeError."""
    parts = {f.name: f.default_factory for f in dataclasses.fields(cls) if f.name != "image_size"}
    built = {}
    for name, value in values.items():
      if name in parts:
        value = parts[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
      built[name] = value
    return cls(**built)


def default_read_layers(num_layers: int) -> tuple[int, ...]:
  """The reference's rule: every sixth hidden state counted back from the last but one."""
  return tuple(range(num_layers - 1, 0, -6))[:6]


FULL = DeepGenConfig()

TINY = DeepGenConfig(
  text=TextConfig(
    vocab_size=272,
    hidden_size=128,
    num_layers=7,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=352,
    mrope_section=(4, 6, 6),
  ),
  vision=VisionConfig(
    num_layers=4,
    hidden_size=128,
    num_heads=4,
    intermediate_size=352,
    out_size=128,
    window_size=28,
    full_attention_layers=(1, 3),
  ),
  scb=SCBConfig(
    num_think_tokens=16,
    hidden_size=256,
    intermediate_size=768,
    num_layers=1,
    num_heads=8,
    read_layers=(6, 5, 4, 3, 2, 1),
  ),
  dit=DiTConfig(
    num_layers=6,
    num_heads=4,
    head_dim=32,
    context_size=128,
    pooled_size=128,
    dual_attention_layers=(0, 1),
    pos_embed_max_size=24,
    sample_size=8,
  ),
  vae=VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8),
  image_size=64,
)

SIZES = {"tiny": TINY, "full": FULL}
