"""Reads a DeepGen folder in the diffusers format, a part in one safetensors file or in several with an index.

    model_index.json
    transformer/ vae/   config.json, diffusion_pytorch_model.safetensors     diffusers' SD3Transformer2DModel, AutoencoderKL
    vlm/                config.json, model.safetensors                       transformers' Qwen2.5-VL, LoRA merged
    connector/          config.json, model.safetensors                       SCB, projectors and think tokens
    scheduler/ tokenizer/

Which tensor is which stands in `names.py`. The connector's config is read tolerantly: what it lacks comes from the shapes of
its tensors or the reference's defaults.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath
from safetensors import safe_open

from deepgen_jax.data.tokens import load_tokenizer
from deepgen_jax.errors import UserError
from deepgen_jax.models.config import (
  DeepGenConfig,
  DiTConfig,
  SCBConfig,
  SchedulerConfig,
  TextConfig,
  VAEConfig,
  VisionConfig,
  default_read_layers,
)
from deepgen_jax.models.deepgen import PARTS, DeepGen
from deepgen_jax.weights.names import dit_table, scb_table, text_table, vae_table, vision_table
from deepgen_jax.weights.torch_format import Table, from_torch

# Part of ours -> its folder and its file there.
FILES = {
  "vlm": ("vlm", "model.safetensors"),
  "scb": ("connector", "model.safetensors"),
  "dit": ("transformer", "diffusion_pytorch_model.safetensors"),
  "vae": ("vae", "diffusion_pytorch_model.safetensors"),
}
# Older and newer spellings of the Qwen2.5-VL hierarchy -> the one of the name tables.
VLM_SPELLINGS = ((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model."))


def is_diffusers_dir(path) -> bool:
  """Whether the folder looks like a DeepGen in the diffusers format."""
  folder = epath.Path(path)
  return (folder / "model_index.json").exists() and (folder / "transformer").is_dir()


def load(path, parts: Sequence[str] = PARTS):
  """-> (DeepGenConfig, float32 parameters of `parts` as numpy arrays, tokenizer). Raises UserError, naming file and key."""
  folder = epath.Path(path)
  connector = _tensors(folder, "scb") if (folder / "connector").is_dir() else None
  config = read_config(folder, connector)
  model = DeepGen(config)
  parts = [part for part in parts if part != "scb" or connector is not None]
  abstract = jax.eval_shape(lambda key: model.init(key, parts), jax.random.key(0))
  params = {}
  for part in parts:
    file = folder / "/".join(FILES[part])
    tensors = connector if part == "scb" else _tensors(folder, part)
    try:
      params[part] = from_torch(_table(part, config), tensors, abstract[part])
    except UserError as error:
      raise UserError(f"{file}: {error}") from error
  return config, params, load_tokenizer(folder / "tokenizer")


def _table(part: str, config: DeepGenConfig) -> Table:
  if part == "vlm":
    return Table.join({"text": text_table(config.text, config.scb.read_layers), "vision": vision_table(config.vision)})
  if part == "scb":
    return scb_table(config.scb)
  return dit_table(config.dit) if part == "dit" else vae_table(config.vae)


def _tensors(folder: epath.Path, part: str) -> dict[str, np.ndarray]:
  """Every tensor of a part's file, in its stored dtype."""
  tensors = read_tensors(folder / "/".join(FILES[part]))
  if part != "vlm":
    return tensors
  for pattern, replacement in VLM_SPELLINGS:
    tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
  return tensors


def read_tensors(file: epath.Path) -> dict[str, np.ndarray]:
  """Every tensor of a safetensors file, or of those that an index in its place names, in its stored dtype. Raises UserError."""
  tensors = {}
  for one in _files(file):
    try:
      with safe_open(str(one), framework="flax") as opened:  # numpy alone knows no bfloat16
        tensors |= {key: np.asarray(opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118  not a mapping
    except Exception as error:  # safetensors raises its own and several built-in kinds
      raise UserError(f"{one} is damaged or no safetensors file: {error}") from error
  return tensors


def _files(file: epath.Path) -> list[epath.Path]:
  """The file itself or, where there is an index beside it instead, every file that the index names."""
  index = file.with_name(file.name + ".index.json")
  if file.exists():
    return [file]
  if not index.exists():
    raise UserError(f"{file} is missing, and so is {index.name}")
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f"{index} is damaged: {error!r}") from error
  if missing := [name for name in names if not (file.parent / name).exists()]:
    raise UserError(f"{index} names files that are missing: {', '.join(missing)}")
  return [file.parent / name for name in names]


def read_config(folder: epath.Path, connector: Mapping[str, np.ndarray] | None) -> DeepGenConfig:
  """Sizes of the whole model from the config files of its parts. `connector`: its tensors; None gives the default SCB."""
  vlm = _json(folder, "vlm")
  try:
    text, vision = _text(vlm), _vision(vlm["vision_config"])
  except KeyError as error:
    raise UserError(f"{folder / 'vlm' / 'config.json'} lacks {error}: it is no config of a Qwen2.5-VL") from None
  scb = dataclasses.replace(SCBConfig(), read_layers=default_read_layers(text.num_layers))
  if connector is not None:
    scb = _scb(_json(folder, "connector"), connector, scb)
  return DeepGenConfig(
    text=text,
    vision=vision,
    scb=scb,
    dit=_dit(_json(folder, "transformer")),
    vae=_vae(_json(folder, "vae")),
    scheduler=_pick(SchedulerConfig, _json(folder, "scheduler", "scheduler_config.json")),
  )


def _json(folder: epath.Path, part: str, name: str = "config.json") -> dict:
  file = folder / part / name
  try:
    return json.loads(file.read_text())
  except FileNotFoundError:
    raise UserError(f"{file} is missing; a DeepGen folder in the diffusers format has it") from None
  except ValueError as error:
    raise UserError(f"{file} is no JSON: {error}") from error


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
  return _pick(
    TextConfig,
    {**values, **derived},
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    num_kv_heads="num_key_value_heads",
    rms_eps="rms_norm_eps",
  )


def _vision(values: Mapping) -> VisionConfig:
  return _pick(
    VisionConfig,
    values,
    num_layers="depth",
    out_size="out_hidden_size",
    merge_size="spatial_merge_size",
    full_attention_layers="fullatt_block_indexes",
  )


def _scb(config: Mapping, tensors: Mapping[str, np.ndarray], default: SCBConfig) -> SCBConfig:
  values = config.get("connector", config)
  for key in (think := "meta_queries", fc1 := "connector.layers.0.mlp.fc1.weight"):
    if key not in tensors or tensors[key].ndim != 2:
      raise UserError(f"connector/model.safetensors lacks the matrix {key}: it is no DeepGen connector")
  num_think, (intermediate, hidden) = len(tensors[think]), tensors[fc1].shape
  layers = {int(key.split(".")[2]) for key in tensors if key.startswith("connector.layers.")}
  return dataclasses.replace(
    default,
    num_think_tokens=num_think,
    hidden_size=hidden,
    intermediate_size=intermediate,
    num_layers=len(layers),
    num_heads=values.get("num_attention_heads", default.num_heads),
    layer_norm_eps=values.get("layer_norm_eps", default.layer_norm_eps),
  )


def _dit(values: Mapping) -> DiTConfig:
  if values.get("qk_norm") not in (None, "rms_norm"):
    raise UserError(f"transformer/config.json: qk_norm {values['qk_norm']!r}; only 'rms_norm' or null is known")
  named = {**values, "qk_norm": values.get("qk_norm") == "rms_norm"}
  named.setdefault("dual_attention_layers", [])
  return _pick(
    DiTConfig,
    named,
    num_heads="num_attention_heads",
    head_dim="attention_head_dim",
    context_size="joint_attention_dim",
    pooled_size="pooled_projection_dim",
  )


def _vae(values: Mapping) -> VAEConfig:
  if values.get("use_quant_conv") or values.get("use_post_quant_conv"):
    raise UserError("vae/config.json: this VAE has quant convolutions, SD3's has none")
  return _pick(VAEConfig, values)
