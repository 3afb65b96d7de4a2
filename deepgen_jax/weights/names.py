"""Which of our parameters is which in the PyTorch libraries (diffusers, transformers) and in the released connector."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from deepgen_jax.models.clip import CLIPConfig
from deepgen_jax.models.config import DiTConfig, SCBConfig, TextConfig, VAEConfig, VisionConfig
from deepgen_jax.models.dit import block_runs, position_table
from deepgen_jax.weights.torch_format import CONV, LINEAR, SAME, Constant, Layout, Row, Table

_TRANSFORMERS_IGNORED = (r".*rotary.*inv_freq",)  # buffers that some releases of the library store


def text_table(config: TextConfig, read_layers: tuple[int, ...], prefix: str = "model.language_model.") -> Table:
  """transformers' Qwen2.5-VL text model. read_layers: as given to `TextDecoder`, they cut the layers into its segments."""
  rows = [
    Row("embedding", f"{prefix}embed_tokens.weight"),
    *_norm("norm", f"{prefix}norm", bias=False),
  ]
  cuts = sorted({0, *read_layers, config.num_layers})
  for i, (start, end) in enumerate(pairwise(cuts)):
    ours, theirs, layers = f"segments_{i}", prefix + "layers.{layer}", range(start, end)
    rows += _norm(f"{ours}/input_norm", f"{theirs}.input_layernorm", bias=False, layers=layers)
    rows += _norm(f"{ours}/post_norm", f"{theirs}.post_attention_layernorm", bias=False, layers=layers)
    for name in "qkv":
      rows += _linear(f"{ours}/{name}", f"{theirs}.self_attn.{name}_proj", layers=layers)
    rows += _linear(f"{ours}/out", f"{theirs}.self_attn.o_proj", bias=False, layers=layers)
    for name in ("gate", "up", "down"):
      rows += _linear(f"{ours}/{name}", f"{theirs}.mlp.{name}_proj", bias=False, layers=layers)
  if config.tie_word_embeddings:
    return Table(tuple(rows), ignored=(*_TRANSFORMERS_IGNORED, r"lm_head\.weight"))
  return Table((*rows, *_linear("head", "lm_head", bias=False)), ignored=_TRANSFORMERS_IGNORED)


def vision_table(config: VisionConfig, prefix: str = "model.visual.") -> Table:
  """transformers' Qwen2.5-VL vision tower; q, k and v are fused there."""
  ours, theirs, layers = "blocks", prefix + "blocks.{layer}", range(config.num_layers)
  patch = Layout((1, 2, 3, 4, 0), folded=(3, config.temporal_patch_size, config.patch_size, config.patch_size))
  rows = [
    Row("patch_embed/kernel", f"{prefix}patch_embed.proj.weight", patch),
    *_norm(f"{ours}/norm1", f"{theirs}.norm1", bias=False, layers=layers),
    *_norm(f"{ours}/norm2", f"{theirs}.norm2", bias=False, layers=layers),
    *_linear(f"{ours}/out", f"{theirs}.attn.proj", layers=layers),
    *_norm("merge_norm", f"{prefix}merger.ln_q", bias=False),
    *_linear("merge_fc1", f"{prefix}merger.mlp.0"),
    *_linear("merge_fc2", f"{prefix}merger.mlp.2"),
  ]
  for i, name in enumerate("qkv"):
    rows += _linear(f"{ours}/{name}", f"{theirs}.attn.qkv", layers=layers, part=(i, 3))
  for name in ("gate", "up", "down"):
    rows += _linear(f"{ours}/{name}", f"{theirs}.mlp.{name}_proj", layers=layers)
  return Table(tuple(rows), ignored=_TRANSFORMERS_IGNORED)


def clip_table(config: CLIPConfig) -> Table:
  """transformers' CLIPModel; its scale of the logits has no part in a cosine."""
  patch = Layout((2, 3, 1, 0), folded=(config.patch_size, config.patch_size, 3))
  theirs = "vision_model.embeddings"
  rows = [
    Row("text/tokens", "text_model.embeddings.token_embedding.weight"),
    Row("text/positions", "text_model.embeddings.position_embedding.weight"),
    *_norm("text/norm", "text_model.final_layer_norm"),
    *_linear("text/projection", "text_projection", bias=False),
    Row("image/class_token", f"{theirs}.class_embedding"),
    Row("image/positions", f"{theirs}.position_embedding.weight"),
    Row("image/patch_embed/kernel", f"{theirs}.patch_embedding.weight", patch),
    *_norm("image/norm_in", "vision_model.pre_layrnorm"),
    *_norm("image/norm_out", "vision_model.post_layernorm"),
    *_linear("image/projection", "visual_projection", bias=False),
  ]
  for ours, tower, size in (("text", "text_model", config.text), ("image", "vision_model", config.vision)):
    ours, theirs, layers = f"{ours}/layers", tower + ".encoder.layers.{layer}", range(size.num_layers)
    for name in ("q", "k", "v", "out"):
      rows += _linear(f"{ours}/{name}", f"{theirs}.self_attn.{name}_proj", layers=layers)
    for i in (1, 2):
      rows += _norm(f"{ours}/norm{i}", f"{theirs}.layer_norm{i}", layers=layers)
      rows += _linear(f"{ours}/fc{i}", f"{theirs}.mlp.fc{i}", layers=layers)
  return Table(tuple(rows), ignored=("logit_scale", r".*\.position_ids"))


def scb_table(config: SCBConfig, prefix: str = "") -> Table:
  """The released connector/model.safetensors."""
  theirs, layers = prefix + "connector.layers.{layer}", range(config.num_layers)
  rows = [Row("think_tokens", f"{prefix}meta_queries")]
  for name, number in (("projector", 1), ("pooled_head", 2), ("context_head", 3)):
    rows += _linear(name, f"{prefix}projector_{number}")
  for name in ("q", "k", "v", "out"):
    rows += _linear(f"layers/{name}", f"{theirs}.self_attn.{name}_proj", layers=layers)
  for i in (1, 2):
    rows += _norm(f"layers/norm{i}", f"{theirs}.layer_norm{i}", layers=layers)
    rows += _linear(f"layers/fc{i}", f"{theirs}.mlp.fc{i}", layers=layers)
  return Table(tuple(rows))


def dit_table(config: DiTConfig, prefix: str = "") -> Table:
  """diffusers' SD3Transformer2DModel. Its position table is a buffer there and computed here."""
  patch = Layout((2, 3, 1, 0), folded=(config.patch_size, config.patch_size, config.in_channels))
  embedders = f"{prefix}time_text_embed."
  rows = [
    Row("patch_embed/kernel", f"{prefix}pos_embed.proj.weight", patch),
    Row("patch_embed/bias", f"{prefix}pos_embed.proj.bias"),
    *_linear("context_embed", f"{prefix}context_embedder"),
    *_linear("out_modulation", f"{prefix}norm_out.linear"),
    *_linear("out", f"{prefix}proj_out"),
  ]
  for i in (1, 2):
    rows += _linear(f"time_fc{i}", f"{embedders}timestep_embedder.linear_{i}")
    rows += _linear(f"pooled_fc{i}", f"{embedders}text_embedder.linear_{i}")
  start = 0
  for i, (length, dual, last) in enumerate(block_runs(config)):
    rows += _dit_blocks(f"blocks_{i}", prefix + "transformer_blocks.{layer}", range(start, start + length), config, dual, last)
    start += length
  size = config.pos_embed_max_size
  table = Constant((1, size * size, config.hidden_size), lambda: _full_position_table(config))
  return Table(tuple(rows), computed={f"{prefix}pos_embed.pos_embed": table})


def _dit_blocks(ours: str, theirs: str, layers: range, config: DiTConfig, dual: bool, last: bool) -> list[Row]:
  linears = {
    "modulation": "norm1.linear",
    "context_modulation": "norm1_context.linear",
    "out": "attn.to_out.0",
    "mlp/fc1": "ff.net.0.proj",
    "mlp/fc2": "ff.net.2",
  }
  norms = {}
  streams = {"attn": ("attn.to_{}", "attn.norm_{}"), "context_attn": ("attn.add_{}_proj", "attn.norm_added_{}")}
  if dual:
    streams["attn2"] = ("attn2.to_{}", "attn2.norm_{}")
    linears["out2"] = "attn2.to_out.0"
  if not last:
    linears |= {
      "context_out": "attn.to_add_out",
      "context_mlp/fc1": "ff_context.net.0.proj",
      "context_mlp/fc2": "ff_context.net.2",
    }
  for stream, (projection, norm) in streams.items():
    linears |= {f"{stream}/{x}": projection.format(x) for x in "qkv"}
    if config.qk_norm:
      norms |= {f"{stream}/{x}_norm": norm.format(x) for x in "qk"}
  rows = []
  for path, key in linears.items():
    rows += _linear(f"{ours}/{path}", f"{theirs}.{key}", layers=layers)
  for path, key in norms.items():
    rows += _norm(f"{ours}/{path}", f"{theirs}.{key}", bias=False, layers=layers)
  return rows


def _full_position_table(config: DiTConfig) -> np.ndarray:
  """[1, size*size, hidden] float32, as diffusers stores it; 0.9 GB at full size."""
  axis, size = position_table(config), config.pos_embed_max_size
  table = np.empty((size, size, 2, axis.shape[1]), np.float32)
  table[:, :, 0], table[:, :, 1] = axis[None], axis[:, None]  # column first
  return table.reshape(1, size * size, -1)


def vae_table(config: VAEConfig, prefix: str = "") -> Table:
  """diffusers' AutoencoderKL without quant convolutions."""
  rows = []
  sides = (
    ("encoder", "down", "downsample", config.layers_per_block, config.block_out_channels),
    ("decoder", "up", "upsample", config.layers_per_block + 1, config.block_out_channels[::-1]),
  )
  for side, block, resample, count, widths in sides:
    theirs = f"{prefix}{side}"
    rows += _conv(f"{side}/conv_in", f"{theirs}.conv_in") + _conv(f"{side}/conv_out", f"{theirs}.conv_out")
    rows += _norm(f"{side}/norm_out", f"{theirs}.conv_norm_out")
    rows += _norm(f"{side}/mid/norm", f"{theirs}.mid_block.attentions.0.group_norm")
    for ours, key in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
      rows += _linear(f"{side}/mid/{ours}", f"{theirs}.mid_block.attentions.0.{key}")
    for j in range(2):
      rows += _res_block(f"{side}/mid/res_{j}", f"{theirs}.mid_block.resnets.{j}")
    for i, width in enumerate(widths):
      ours, key = f"{side}/{block}_{i}", f"{theirs}.{block}_blocks.{i}"
      for j in range(count):
        widens = i > 0 and j == 0 and width != widths[i - 1]
        rows += _res_block(f"{ours}/res_{j}", f"{key}.resnets.{j}", shortcut=widens)
      if i < len(widths) - 1:
        rows += _conv(f"{ours}/{resample}", f"{key}.{resample}rs.0.conv")
  return Table(tuple(rows))


def _res_block(path: str, key: str, shortcut: bool = False) -> list[Row]:
  rows = _conv(f"{path}/shortcut", f"{key}.conv_shortcut") if shortcut else []
  for i in (1, 2):
    rows += _norm(f"{path}/norm{i}", f"{key}.norm{i}") + _conv(f"{path}/conv{i}", f"{key}.conv{i}")
  return rows


def _linear(path: str, key: str, bias: bool = True, layers: range | None = None, part: tuple[int, int] | None = None):
  rows = [Row(f"{path}/kernel", f"{key}.weight", LINEAR, layers, part)]
  return [*rows, Row(f"{path}/bias", f"{key}.bias", SAME, layers, part)] if bias else rows


def _norm(path: str, key: str, bias: bool = True, layers: range | None = None):
  rows = [Row(f"{path}/scale", f"{key}.weight", SAME, layers)]
  return [*rows, Row(f"{path}/bias", f"{key}.bias", SAME, layers)] if bias else rows


def _conv(path: str, key: str):
  return [Row(f"{path}/kernel", f"{key}.weight", CONV), Row(f"{path}/bias", f"{key}.bias")]
