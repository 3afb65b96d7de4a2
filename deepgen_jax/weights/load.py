"""Opens whatever `--model` and `config.init` take: a model directory, a training workdir, a diffusers-format folder, or "tiny",
the base that is shipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import jax
from etils import epath

from deepgen_jax import checkpoint, sharding
from deepgen_jax.errors import UserError
from deepgen_jax.models import lora
from deepgen_jax.models.config import DeepGenConfig
from deepgen_jax.weights import diffusers, model_dir

TINY = epath.Path(__file__).parent.parent / "assets" / "tiny"


def resolve(path) -> epath.Path:
  """The folder that a model path names; "tiny" is the shipped base. Raises UserError if it doesn't exist."""
  folder = TINY if str(path) == "tiny" else epath.Path(path)
  if not folder.is_dir():
    raise UserError(
      f"model {str(path)!r}: no such folder; give a model directory, a training workdir, a diffusers folder or 'tiny'"
    )
  return folder


def load_model(path, base=None, weights: str = "ema", parts: Sequence[str] = model_dir.PARTS):
  """-> (DeepGenConfig, parameters of `parts`, tokenizer).

  A workdir gives its newest checkpoint over the frozen parts of the model that its run started from (`base` overrides where
  those are); its EMA weights unless `weights` is "raw". LoRA stays as LoraKernel leaves. Raises UserError.
  """
  folder = resolve(path)
  if model_dir.is_model_dir(folder):
    return _load_directory(folder, parts)
  if diffusers.is_diffusers_dir(folder):
    return diffusers.load(folder, parts)
  if not (folder / "config.json").exists() or not (folder / "checkpoints").exists():
    raise UserError(
      f"model {str(path)!r} is neither a model directory (model.json), nor a training workdir (config.json, checkpoints/), "
      "nor a diffusers folder (model_index.json, transformer/)"
    )
  config = json.loads((folder / "config.json").read_text())
  trained = checkpoint.load_trained(folder, weights)
  sizes, params, tokenizer = load_model(base or config["init"], weights="raw", parts=parts)
  return sizes, lay_over(params, trained, config["lora"], parts), tokenizer


def lay_over(params: dict, trained: dict, settings: dict, parts: Sequence[str]) -> dict:
  """Parameters with the trained leaves {path: array} in their place, LoRA leaves included; parts that only training made are
  added.
  """
  added = {k: v for k, v in trained.items() if k.partition("/")[0] not in params and k.partition("/")[0] in parts}
  params = params | model_dir.unflatten(added)
  if settings["targets"] and "vlm" in params:
    params = lora.merge_lora(params)
    params = lora.add_lora(params, settings["targets"], settings["rank"], settings["alpha"], jax.random.key(0))
  return sharding.map_paths(lambda name, leaf: trained.get(name, leaf), params)


def _load_directory(folder: epath.Path, parts: Sequence[str]) -> tuple[DeepGenConfig, dict, object]:
  from deepgen_jax.data.tokens import load_tokenizer

  return model_dir.load_config(folder), model_dir.load(folder, parts), load_tokenizer(folder / "tokenizer")
