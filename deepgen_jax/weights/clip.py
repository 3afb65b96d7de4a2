"""Reads a folder that transformers' CLIPModel saved: config.json, model.safetensors (or several with an index), a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping

from etils import epath

from deepgen_jax.errors import UserError, nearest
from deepgen_jax.models.clip import ACTIVATIONS, CLIPConfig, TowerConfig, abstract_params
from deepgen_jax.weights.names import clip_table
from deepgen_jax.weights.tensors import open_files
from deepgen_jax.weights.torch_format import from_torch

# What transformers assumes where a config.json leaves a size out (ViT-B/32).
_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def load(path) -> tuple[CLIPConfig, dict]:
  """-> (sizes, {"text": params, "image": params} float32 as numpy arrays). Raises UserError, naming file and key."""
  folder = epath.Path(path)
  config = read_config(folder / "config.json")
  file = folder / "model.safetensors"
  try:
    return config, from_torch(clip_table(config), open_files(file), abstract_params(config))
  except UserError as error:
    raise error if str(file) in str(error) else UserError(f"{file}: {error}") from error


def read_config(file: epath.Path) -> CLIPConfig:
  """Sizes from a CLIPModel's config.json. Raises UserError."""
  try:
    values = json.loads(file.read_text())
    text, vision = values["text_config"], values["vision_config"]
  except FileNotFoundError:
    raise UserError(f"{file} is missing; give the folder of a CLIP model as transformers saves it") from None
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{file} is no config of a CLIP model: {error!r}") from error
  return CLIPConfig(
    text=_tower({**_TEXT, **text}, file),
    vision=_tower({**_VISION, **vision}, file),
    vocab_size=text.get("vocab_size", 49408),
    max_length=text.get("max_position_embeddings", 77),
    image_size=vision.get("image_size", 224),
    patch_size=vision.get("patch_size", 32),
    projection_size=values.get("projection_dim", 512),
  )


def _tower(values: Mapping, file: epath.Path) -> TowerConfig:
  activation = values.get("hidden_act", "quick_gelu")
  if activation not in ACTIVATIONS:
    raise UserError(f"{file}: hidden_act {activation!r}; known are {', '.join(ACTIVATIONS)}.{nearest(activation, ACTIVATIONS)}")
  return TowerConfig(
    hidden_size=values["hidden_size"],
    intermediate_size=values["intermediate_size"],
    num_layers=values["num_hidden_layers"],
    num_heads=values["num_attention_heads"],
    activation=activation,
    eps=values.get("layer_norm_eps", 1e-5),
  )
