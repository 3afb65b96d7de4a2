"""The config files of the PyTorch libraries (diffusers, transformers, the released connector), read and written.

Reading is tolerant: what a file lacks has the library's default, older and newer spellings are known. Writing gives what the
stock libraries need, with the spellings of several releases side by side.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from etils import epath

from deepgen_jax.data.tokens import special_ids
from deepgen_jax.errors import UserError
from deepgen_jax.models.config import (
  DiTConfig,
  SCBConfig,
  SchedulerConfig,
  TextConfig,
  VAEConfig,
  VisionConfig,
  default_read_layers,
)
from deepgen_jax.weights.tensors import Tensor

# Our field -> theirs, where the names differ.
_TEXT_NAMES = {
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "rms_eps": "rms_norm_eps",
}
_VISION_NAMES = {
  "num_layers": "depth",
  "out_size": "out_hidden_size",
  "merge_size": "spatial_merge_size",
  "full_attention_layers": "fullatt_block_indexes",
}
_DIT_NAMES = {
  "num_heads": "num_attention_heads",
  "head_dim": "attention_head_dim",
  "context_size": "joint_attention_dim",
  "pooled_size": "pooled_projection_dim",
}
DIFFUSERS_VERSION = "0.35.2"  # of the release, and what its pipeline file is for


def read_json(file) -> dict:
  """A JSON table; UserError if the file is missing or none."""
  file = epath.Path(file)
  try:
    values = json.loads(file.read_text())
  except FileNotFoundError:
    raise UserError(f"{file} is missing") from None
  except ValueError as error:
    raise UserError(f"{file} is no JSON: {error}") from error
  if not isinstance(values, dict):
    raise UserError(f"{file} is no table: {str(values)[:40]}")
  return values


def write_json(file, values: Mapping) -> None:
  """A JSON table, indented."""
  epath.Path(file).write_text(json.dumps(values, indent=2) + "\n")


def read_vlm(file) -> tuple[TextConfig, VisionConfig]:
  """transformers' config.json of a Qwen2.5-VL, flat or nested."""
  values = read_json(file)
  if values.get("model_type") not in (None, "qwen2_5_vl"):
    raise UserError(f"{file} is the config of a {values['model_type']}, not of a Qwen2.5-VL (qwen2_5_vl)")
  try:
    return _text(values), _vision(values["vision_config"])
  except KeyError as error:
    raise UserError(f"{file} lacks {error}: it is no config of a Qwen2.5-VL") from None


def read_scheduler(file) -> SchedulerConfig:
  """diffusers' scheduler_config.json of a FlowMatchEulerDiscreteScheduler."""
  return _pick(SchedulerConfig, read_json(file))


def _pick(kind, values: Mapping, **renamed: str):
  """A config dataclass from the keys that it shares with `values`, or has there under another name."""
  found = {}
  for field in dataclasses.fields(kind):
    key = renamed.get(field.name, field.name)
    if values.get(key) is not None:
      found[field.name] = tuple(values[key]) if isinstance(values[key], list) else values[key]
  return kind(**found)


def _text(vlm: Mapping) -> TextConfig:
  """Older releases keep the text model's keys at the top, newer ones under `text_config`, with rope parameters of their own."""
  values = vlm.get("text_config") or vlm
  rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
  heads, hidden = values["num_attention_heads"], values["hidden_size"]
  derived = {
    "head_dim": values.get("head_dim") or hidden // heads,
    "mrope_section": list(rope.get("mrope_section") or TextConfig.mrope_section),
    "rope_theta": values.get("rope_theta") or rope.get("rope_theta"),
    "tie_word_embeddings": vlm.get("tie_word_embeddings", values.get("tie_word_embeddings", True)),
  }
  return _pick(TextConfig, {**values, **derived}, **_TEXT_NAMES)


def _vision(values: Mapping) -> VisionConfig:
  return _pick(VisionConfig, values, **_VISION_NAMES)


def read_scb(config: Mapping, tensors: Mapping[str, Tensor], where: str, num_layers: int) -> SCBConfig:
  """Sizes of the SCB from its tensors (the release's names) and what `config`, the connector's config.json or {}, adds.

  num_layers: of the text model; the hidden states that are read follow from it unless the config names them.
  """
  values = {**config, **(config.get("connector") or {})}
  for key in (think := "meta_queries", fc1 := "connector.layers.0.mlp.fc1.weight"):
    if key not in tensors or len(tensors[key].shape) != 2:
      raise UserError(f"{where} lacks the matrix {key}: it is no DeepGen connector")
  (num_think, _), (intermediate, hidden) = tensors[think].shape, tensors[fc1].shape
  layers = {int(key.split(".")[2]) for key in tensors if key.startswith("connector.layers.")}
  return SCBConfig(
    num_think_tokens=num_think,
    hidden_size=hidden,
    intermediate_size=intermediate,
    num_layers=len(layers),
    num_heads=values.get("num_attention_heads") or max(1, hidden // 64),  # the reference's heads are 64 wide
    read_layers=tuple(values.get("read_layers") or default_read_layers(num_layers)),
    layer_norm_eps=values.get("layer_norm_eps", SCBConfig.layer_norm_eps),
  )


def read_dit(file) -> DiTConfig:
  """diffusers' config.json of an SD3Transformer2DModel."""
  values = _read_class(file, "SD3Transformer2DModel")
  if values.get("qk_norm") not in (None, "rms_norm"):
    raise UserError(f"{file}: qk_norm {values['qk_norm']!r}; only 'rms_norm' or null is known")
  named = {**values, "qk_norm": values.get("qk_norm") == "rms_norm"}
  named.setdefault("dual_attention_layers", [])
  return _pick(DiTConfig, named, **_DIT_NAMES)


def read_vae(file) -> VAEConfig:
  """diffusers' config.json of an AutoencoderKL without quant convolutions."""
  values = _read_class(file, "AutoencoderKL")
  if values.get("use_quant_conv") or values.get("use_post_quant_conv"):
    raise UserError(f"{file}: this VAE has quant convolutions, SD3's has none")
  return _pick(VAEConfig, values)


def _read_class(file, kind: str) -> dict:
  values = read_json(file)
  if values.get("_class_name", kind) != kind:
    raise UserError(f"{file} is the config of a {values['_class_name']}, not of a {kind}")
  return values


def dit_json(config: DiTConfig) -> dict:
  """What `read_dit` reads."""
  kept = ("sample_size", "patch_size", "in_channels", "num_layers", "pos_embed_max_size")
  values = {key: getattr(config, key) for key in kept}
  values |= {theirs: getattr(config, ours) for ours, theirs in _DIT_NAMES.items()}
  return (
    _diffusers("SD3Transformer2DModel")
    | values
    | {
      "out_channels": config.in_channels,
      "caption_projection_dim": config.hidden_size,
      "dual_attention_layers": list(config.dual_attention_layers),
      "qk_norm": "rms_norm" if config.qk_norm else None,
    }
  )


def vae_json(config: VAEConfig) -> dict:
  """What `read_vae` reads."""
  blocks = len(config.block_out_channels)
  return _diffusers("AutoencoderKL") | {
    **dataclasses.asdict(config),
    "out_channels": config.in_channels,
    "down_block_types": ["DownEncoderBlock2D"] * blocks,
    "up_block_types": ["UpDecoderBlock2D"] * blocks,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
  }


def scheduler_json(config: SchedulerConfig) -> dict:
  """What `read_scheduler` reads."""
  return _diffusers("FlowMatchEulerDiscreteScheduler") | dataclasses.asdict(config)


def scb_json(config: SCBConfig) -> dict:
  """The connector's config.json; `read_layers` is ours, for models whose depth isn't the release's."""
  connector = {
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": config.layer_norm_eps,
    "attention_dropout": 0.0,
  }
  return {"connector": connector, "num_queries": config.num_think_tokens, "read_layers": list(config.read_layers)}


def vlm_json(text: TextConfig, vision: VisionConfig, tokenizer, dtype: str) -> dict:
  """transformers' config.json of a Qwen2.5-VL. Rotary settings stand there as releases 4 and 5 of the library want them."""
  ids, rope = special_ids(tokenizer), {"rope_type": "default", "mrope_section": list(text.mrope_section)}
  shared = {
    "vocab_size": text.vocab_size,
    "tie_word_embeddings": text.tie_word_embeddings,
    "bos_token_id": ids.endoftext,
    "eos_token_id": ids.im_end,
    "initializer_range": 0.02,
  }
  text_values = shared | {
    "model_type": "qwen2_5_vl_text",
    "hidden_size": text.hidden_size,
    "head_dim": text.head_dim,
    "hidden_act": "silu",
    "rope_theta": text.rope_theta,
    "rope_scaling": rope | {"type": "default"},
    "rope_parameters": rope | {"rope_theta": text.rope_theta},
    "intermediate_size": text.intermediate_size,
    "max_position_embeddings": 128_000,
    "use_sliding_window": False,
    **{theirs: getattr(text, ours) for ours, theirs in _TEXT_NAMES.items()},
  }
  vision_values = {
    "model_type": "qwen2_5_vl",
    "hidden_size": vision.hidden_size,
    "num_heads": vision.num_heads,
    "intermediate_size": vision.intermediate_size,
    "patch_size": vision.patch_size,
    "spatial_patch_size": vision.patch_size,
    "temporal_patch_size": vision.temporal_patch_size,
    "window_size": vision.window_size,
    "hidden_act": "silu",
    "in_channels": 3,
    "in_chans": 3,
    **{theirs: getattr(vision, ours) for ours, theirs in _VISION_NAMES.items()},
    "fullatt_block_indexes": list(vision.full_attention_layers),
  }
  tokens = {
    "image_token_id": ids.image_pad,
    "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    "vision_start_token_id": ids.vision_start,
    "vision_end_token_id": ids.vision_end,
  }
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "torch_dtype": dtype,
    **shared,
    **tokens,
    "text_config": text_values,
    "vision_config": vision_values,
  }


def _diffusers(kind: str) -> dict:
  return {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION}
