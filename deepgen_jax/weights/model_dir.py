"""Our own model directory: `model.json`, one safetensors file per part (keys are our parameter paths), `tokenizer/`.

    model.json  {"format": 1, "config": sizes, read layers, image_size, scheduler}
    vlm|scb|dit|vae.safetensors, optional lora.safetensors

A directory may lack parts: a base for stage 1 has no SCB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from deepgen_jax.errors import UserError
from deepgen_jax.models.config import DeepGenConfig
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.lora import path_name

FORMAT = 1
PARTS = ("vlm", "scb", "dit", "vae")


def save(path, config: DeepGenConfig, params: Mapping, tokenizer=None, dtype=None) -> None:
  """Writes the parts that `params` has ({"vlm": tree, ...}, plain kernels) beside those already there; `dtype` None keeps them
  as they are.
  """
  folder = epath.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  for part, tree in params.items():
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    tensors = {path_name(p): np.ascontiguousarray(np.asarray(leaf, dtype or leaf.dtype)) for p, leaf in leaves}
    (folder / f"{part}.safetensors").write_bytes(save_tensors(tensors))
  (folder / "model.json").write_text(json.dumps({"format": FORMAT, "config": config.to_dict()}, indent=2) + "\n")
  if tokenizer is not None:
    tokenizer.save_pretrained(folder / "tokenizer")


def is_model_dir(path) -> bool:
  """Whether the folder is one of ours."""
  return (epath.Path(path) / "model.json").exists()


def load_config(path) -> DeepGenConfig:
  """Sizes of a model directory; raises UserError if it isn't one or its format is newer."""
  file = epath.Path(path) / "model.json"
  if not file.exists():
    raise UserError(f"{path} is no model directory: it has no model.json")
  try:
    values = json.loads(file.read_text())
    if values["format"] != FORMAT:
      raise UserError(f"{file}: format {values['format']}, this version reads {FORMAT}; upgrade deepgen_jax")
    return DeepGenConfig.from_dict(values["config"])
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise UserError(f"{file} is damaged: {error!r}") from error


def load(path, parts=PARTS) -> dict:
  """{"vlm": nested tree, ...} float32 for those of `parts` that are there.

  Raises UserError for a damaged file, and one that lists every tensor that the sizes in model.json ask for and the file lacks,
  that it has besides, or that has another shape.
  """
  there = [part for part in parts if (epath.Path(path) / f"{part}.safetensors").exists()]
  model = DeepGen(load_config(path))
  expected = jax.eval_shape(lambda: model.init(jax.random.key(0), there))
  out, problems = {}, []
  for part in there:
    file = epath.Path(path) / f"{part}.safetensors"
    try:
      tensors = load_tensors(file.read_bytes())
    except Exception as error:  # safetensors raises its own and several built-in kinds
      raise UserError(f"{file} is damaged or no safetensors file: {error}") from error
    shapes = {path_name(p): leaf.shape for p, leaf in jax.tree_util.tree_flatten_with_path(expected[part])[0]}
    problems += [f"{file.name}: {name} is missing" for name in shapes.keys() - tensors.keys()]
    problems += [f"{file.name}: {name} is unknown" for name in tensors.keys() - shapes.keys()]
    for name in shapes.keys() & tensors.keys():
      if tensors[name].shape != shapes[name]:
        problems.append(f"{file.name}: {name} is {tensors[name].shape}, expected {shapes[name]}")
    out[part] = unflatten({k: v.astype(np.float32) for k, v in tensors.items()})
  if problems:
    listed = "\n  ".join(sorted(problems))
    raise UserError(f"{path}: weights don't fit model.json, {len(problems)} problem(s):\n  {listed}")
  return out


def unflatten(flat: Mapping[str, np.ndarray]) -> dict:
  """{"a/b": x} -> {"a": {"b": x}}."""
  tree: dict = {}
  for path, leaf in flat.items():
    node = tree
    *parents, name = path.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree
