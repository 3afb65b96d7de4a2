"""Our own model directory: `model.json`, one safetensors file per part (keys are our parameter paths), `tokenizer/`.

    model.json  {"format": 1, "config": sizes, read layers, image_size, scheduler, "lora": {"scale"} with LoRA}
    vlm|scb|dit|vae.safetensors (several with an index above 5 GB), optional lora.safetensors (PART/PATH/a and /b)

A directory may lack parts: a base for stage 1 has no SCB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from deepgen_jax.errors import UserError
from deepgen_jax.models.config import DeepGenConfig
from deepgen_jax.models.deepgen import PARTS, param_shapes
from deepgen_jax.models.lora import path_name
from deepgen_jax.weights import tensors as files
from deepgen_jax.weights.lora_format import Factors
from deepgen_jax.weights.tensors import Tensor

FORMAT = 1


def save(path, config: DeepGenConfig, params: Mapping, tokenizer=None, dtype=None) -> None:
  """Writes the parts that `params` has ({"vlm": tree, ...}, plain kernels) beside those already there; `dtype` None keeps them
  as they are.
  """
  leaves = {}
  for part, tree in params.items():
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves[part] = {path_name(p): files.in_memory(np.asarray(leaf, dtype or leaf.dtype)) for p, leaf in found}
  save_leaves(path, config, leaves, tokenizer=tokenizer)


def save_leaves(
  path, config, leaves: Mapping[str, Mapping[str, Tensor]], factors: Mapping[str, Factors] | None = None, tokenizer=None
) -> None:
  """As `save`, one tensor after the other; `factors` {PART/PATH: ...} are LoRA. `model.json` comes last."""
  folder = epath.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  for part, tree in leaves.items():
    files.write_files(folder / f"{part}.safetensors", tree)
  values = {"format": FORMAT, "config": config.to_dict()}
  if factors:
    pairs = {f"{name}/{side}": getattr(pair, side) for name, pair in factors.items() for side in "ab"}
    files.write_files(folder / "lora.safetensors", pairs)
    values["lora"] = {"scale": next(iter(factors.values())).scale}
  if tokenizer is not None:
    tokenizer.save_pretrained(folder / "tokenizer")
  (folder / "model.json").write_text(json.dumps(values, indent=2) + "\n")


def is_model_dir(path) -> bool:
  """Whether the folder is one of ours."""
  return (epath.Path(path) / "model.json").exists()


def load_config(path) -> DeepGenConfig:
  """Sizes of a model directory; raises UserError if it isn't one or its format is newer."""
  return _read(path)[0]


def _read(path) -> tuple[DeepGenConfig, dict]:
  file = epath.Path(path) / "model.json"
  if not file.exists():
    raise UserError(f"{path} is no model directory: it has no model.json")
  try:
    values = json.loads(file.read_text())
    if values["format"] != FORMAT:
      raise UserError(f"{file}: format {values['format']}, this version reads {FORMAT}; upgrade deepgen_jax")
    return DeepGenConfig.from_dict(values["config"]), values.get("lora") or {}
  except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{file} is damaged: {error!r}") from error


def open_parts(path, parts=PARTS) -> dict[str, dict[str, Tensor]]:
  """{part: {path: Tensor}} for those of `parts` that are there.

  Raises UserError for a damaged file, and one that lists every tensor that the sizes in model.json ask for and the file lacks,
  that it has besides, or that has another shape.
  """
  folder = epath.Path(path)
  there = [part for part in parts if files.has_files(folder / f"{part}.safetensors")]
  expected = leaf_shapes(load_config(path))
  out, problems = {}, []
  for part in there:
    out[part] = files.open_files(folder / f"{part}.safetensors")
    where = f"{part}.safetensors"
    problems += [f"{where}: {name} is missing" for name in expected[part].keys() - out[part].keys()]
    problems += [f"{where}: {name} is unknown" for name in out[part].keys() - expected[part].keys()]
    for name in expected[part].keys() & out[part].keys():
      if out[part][name].shape != expected[part][name]:
        problems.append(f"{where}: {name} is {out[part][name].shape}, expected {expected[part][name]}")
  if problems:
    listed = "\n  ".join(sorted(problems))
    raise UserError(f"{path}: weights don't fit model.json, {len(problems)} problem(s):\n  {listed}")
  return out


def open_lora(path) -> dict[str, Factors]:
  """{PART/PATH: factors} of a directory that kept its LoRA; else nothing."""
  file, settings = epath.Path(path) / "lora.safetensors", _read(path)[1]
  if not settings:
    return {}
  found = files.open_files(file)
  names = {name.rpartition("/")[0] for name in found}
  if odd := [name for name in names if not {f"{name}/a", f"{name}/b"} <= found.keys()]:
    raise UserError(f"{file}: {odd[0]} has no complete pair a, b")
  return {name: Factors(found[f"{name}/a"], found[f"{name}/b"], float(settings["scale"])) for name in sorted(names)}


def leaf_shapes(config: DeepGenConfig) -> dict[str, dict[str, tuple[int, ...]]]:
  """{part: {path: shape}} of a model of these sizes; nothing is computed."""
  trees = param_shapes(config)
  flat = lambda tree: {path_name(p): leaf.shape for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
  return {part: flat(trees[part]) for part in PARTS}


def load(path, parts=PARTS) -> dict:
  """{"vlm": nested tree, ...} float32 for those of `parts` that are there, without LoRA. Raises what `open_parts` raises."""
  return {
    part: unflatten({name: tensor.read().astype(np.float32) for name, tensor in tree.items()})
    for part, tree in open_parts(path, parts).items()
  }


def unflatten(flat: Mapping) -> dict:
  """{"a/b": x} -> {"a": {"b": x}}."""
  tree: dict = {}
  for path, leaf in flat.items():
    node = tree
    *parents, name = path.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree
