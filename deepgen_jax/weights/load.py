"""Opens whatever `--model`, `--source`, `--base` and `config.init` take, alone or one over the other, and reads it.

    a model directory, a training workdir, "tiny" (the base that is shipped)     ours
    a DeepGen or Stable Diffusion 3 folder in the diffusers format, a Qwen2.5-VL folder, a PEFT adapter folder, a .pth or .pt
    training checkpoint of the reference                                          theirs

A path may hold parts of a model only; `open_weights` lays several over each other, the first on top. Nothing is read before it
is needed: `Weights` is sizes, names, shapes, and how to get at the values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from deepgen_jax import checkpoint, sharding
from deepgen_jax.data.tokens import load_tokenizer
from deepgen_jax.errors import UserError
from deepgen_jax.models.config import DeepGenConfig, SCBConfig, default_read_layers
from deepgen_jax.models.deepgen import PARTS
from deepgen_jax.models.lora import LoraKernel
from deepgen_jax.weights import diffusers, hf_config, lora_format, model_dir, torch_file
from deepgen_jax.weights import tensors as files
from deepgen_jax.weights.lora_format import Factors, ScaleOf
from deepgen_jax.weights.tensors import Tensor
from deepgen_jax.weights.torch_format import to_leaves

TINY = epath.Path(__file__).parent.parent / "assets" / "tiny"
_KINDS = "a model directory, a training workdir, a diffusers folder, a Qwen2.5-VL folder, a PEFT adapter, a .pth file or 'tiny'"
_TIED = {"vlm/text/embedding", "vlm/text/head/kernel"}
_SIZES = ("text", "vision", "dit", "vae", "scheduler", "image_size")


@dataclass
class Opened:
  """What one path holds. `config`: sizes that it knows, by field of DeepGenConfig. A part is in our layout (`leaves`) or in the
  PyTorch libraries' (`states`), LoRA likewise (`factors`, or `pairs` of modules).
  """

  where: str
  kind: str
  config: dict[str, Any] = field(default_factory=dict)
  leaves: dict[str, dict[str, Tensor]] = field(default_factory=dict)
  states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
  constants: dict[str, Tensor] = field(default_factory=dict)  # of the DiT, stored though it isn't
  factors: dict[str, Factors] = field(default_factory=dict)
  pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
  scale_of: ScaleOf = field(default=lora_format.checkpoint_scale(None))
  tokenizer: epath.Path | None = None

  @property
  def parts(self) -> list[str]:
    return [part for part in PARTS if part in self.leaves or part in self.states]


@dataclass(frozen=True)
class Weights:
  """A model that can be read: {part: {path: Tensor}}, LoRA {PART/PATH: factors}, and where its tokenizer is."""

  config: DeepGenConfig
  leaves: dict[str, dict[str, Tensor]]
  factors: dict[str, Factors]
  tokenizer_dir: epath.Path | None

  def tokenizer(self):
    """Reads it; UserError if there is none."""
    if self.tokenizer_dir is None:
      raise UserError("none of the given folders has a tokenizer: add one that has with --base, e.g. the Qwen2.5-VL folder")
    return load_tokenizer(self.tokenizer_dir)

  def merged(self) -> Weights:
    """Without LoRA: kernels hold their update."""
    if not self.factors:
      return self
    apart = self.untied()
    leaves = {part: dict(tree) for part, tree in apart.leaves.items()}
    for name, factors in self.factors.items():
      part, _, path = name.partition("/")
      leaves[part][path] = lora_format.merged(leaves[part][path], factors)
    return replace(apart, leaves=leaves, factors={})

  def untied(self) -> Weights:
    """With a head of its own, if LoRA is on one of the two matrices that a tied VLM shares: the update is of that one alone."""
    if not self.config.text.tie_word_embeddings or not _TIED & self.factors.keys():
      return self
    return replace(self, config=_tie(self.config, False), leaves={**self.leaves, "vlm": _untied(self.leaves["vlm"])})

  def params(self, parts: Sequence[str] = PARTS, dtype=np.float32, mesh=None) -> dict:
    """Reads parameters, one after the other: {part: nested tree} with LoraKernel leaves where there is LoRA.

    dtype: of kernels and embeddings; biases, norms and think tokens are float32. With a mesh each goes straight to its shards
    (sharding.RULES); without, they are numpy arrays. UserError for NaN.
    """

    def put(name, tensor):
      large = name.endswith(("kernel", "embedding", "/a", "/b"))
      value = files.read_finite(name, tensor).astype(dtype if large else np.float32)
      if mesh is None:
        return value
      return sharding.place(value, NamedSharding(mesh, sharding.partition_spec(name, value.shape, mesh)))

    out: dict[str, Any] = {}
    for part in parts:
      for path, tensor in self.leaves.get(part, {}).items():
        name = f"{part}/{path}"
        out[name] = put(name, tensor)
        if name in self.factors:
          pair = self.factors[name]
          out[name] = LoraKernel(out[name], put(f"{name}/a", pair.a), put(f"{name}/b", pair.b), scale=pair.scale)
    return model_dir.unflatten(out)


def load_model(path, base=None, weights: str = "ema", parts: Sequence[str] = PARTS, dtype=np.float32, mesh=None):
  """-> (DeepGenConfig, parameters of `parts`, tokenizer); what `open_weights` opens, read."""
  opened = open_weights(path, base, weights, parts=parts)
  return opened.config, opened.params(parts, dtype, mesh), opened.tokenizer()


def open_weights(
  path, base=None, weights: str = "ema", *, parts: Sequence[str] = PARTS, lora_alpha: float | None = None
) -> Weights:
  """Opens `path` over `base` (a path or several; what the first lacks comes from the next).

  A workdir gives its newest checkpoint over the frozen parts of the model that its run started from, or of `base`; its EMA
  weights unless `weights` is "raw". lora_alpha: of LoRA whose file doesn't say it (default: twice the rank). Raises UserError
  for whatever can't be opened, and one that lists every tensor that is missing, unknown or of another shape.
  """
  bases = [base] if isinstance(base, str | os.PathLike) else list(base or ())
  layers = [_open(path, weights, parts, bases, lora_alpha)]
  if layers[0].kind != "training workdir":
    layers += [_open(one, weights, parts, [], lora_alpha) for one in bases]
  config = _compose_config(layers)
  made = Weights(config, {}, {}, None)
  for layer in reversed(layers):
    made = _lay_over(made, layer, parts)
  kept = {part: made.leaves[part] for part in parts if part in made.leaves}
  return replace(made, leaves=kept, factors={n: f for n, f in made.factors.items() if n.partition("/")[0] in kept})


def _untied(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Leaves of a VLM with a head of its own, equal to its embedding."""
  table = leaves["text/embedding"]
  return {**leaves, "text/head/kernel": Tensor(table.shape[::-1], table.dtype, lambda: np.ascontiguousarray(table.read().T))}


def _tie(config: DeepGenConfig, tied: bool) -> DeepGenConfig:
  return replace(config, text=replace(config.text, tie_word_embeddings=tied))


def _compose_config(layers: Sequence[Opened]) -> DeepGenConfig:
  """Each size from the first layer that knows it."""
  found = {}
  for layer in reversed(layers):
    found |= layer.config
    if isinstance(scb := layer.config.get("scb"), SCBConfig):  # says what the tensors of a layer above don't
      found["connector"] = hf_config.scb_json(scb)
  needed = {"text": "the VLM (a Qwen2.5-VL folder)", "dit": "the DiT and", "vae": "the VAE (a diffusers folder)"}
  if missing := [what for name, what in needed.items() if name not in found]:
    given = ", ".join(layer.where for layer in layers)
    raise UserError(f"{given}: this is no whole model. Missing: {' '.join(missing)}. Give what has it with --base.")
  config = DeepGenConfig(**{name: found[name] for name in _SIZES if name in found})
  scb = found.get("scb") or replace(SCBConfig(), read_layers=default_read_layers(config.text.num_layers))
  if not isinstance(scb, SCBConfig):  # known by its tensors alone
    scb = hf_config.read_scb(found.get("connector", {}), *scb, config.text.num_layers)
  return replace(config, scb=scb)


def _lay_over(below: Weights, layer: Opened, parts: Sequence[str]) -> Weights:
  """What a layer holds over what is below it."""
  config, leaves, factors = below.config, dict(below.leaves), dict(below.factors)
  for part in layer.parts:
    if part not in parts:
      continue
    factors = {name: pair for name, pair in factors.items() if name.partition("/")[0] != part}
    if part in layer.leaves:
      leaves[part] = layer.leaves[part]
      continue
    try:
      leaves[part] = to_leaves(diffusers.table(part, config), layer.states[part], model_dir.leaf_shapes(config)[part])
    except UserError as error:
      file = "/".join(("", *diffusers.FILES[part])) if layer.kind == "diffusers folder" else ""
      raise UserError(f"{layer.where}{file}: {error}") from error
  new = dict(layer.factors)
  try:
    to_leaves(diffusers.table("dit", config), layer.constants, {})  # they must be what the base implies
    if layer.pairs:
      new |= _to_factors(layer, _tie(config, False), leaves)  # the table of an untied model knows the head too
  except UserError as error:
    raise UserError(f"{layer.where}: {error}") from error
  if new:
    older = Weights(config, leaves, factors, None).merged()  # LoRA upon LoRA: the older one becomes part of the kernels
    config, leaves, factors = older.config, dict(older.leaves), new
    if config.text.tie_word_embeddings and "vlm/text/head/kernel" in new:  # which has nothing to be added to yet
      config, leaves["vlm"] = _tie(config, False), _untied(leaves["vlm"])
  return Weights(config, leaves, factors, layer.tokenizer or below.tokenizer_dir)


def _to_factors(layer: Opened, config: DeepGenConfig, leaves) -> dict[str, Factors]:
  """The layer's LoRA on VLM and DiT in our layout; a module belongs to the part whose table knows it."""
  of_dit = {key.removesuffix(".weight") for row in diffusers.table("dit", config).rows for key in row.theirs()}
  dit = {module: pair for module, pair in layer.pairs.items() if module in of_dit}  # no module of the VLM has such a name
  out, shapes = {}, model_dir.leaf_shapes(config)
  for part, pairs in (("vlm", {m: p for m, p in layer.pairs.items() if m not in dit}), ("dit", dit)):
    if pairs and part not in leaves:
      raise UserError(f"it holds LoRA of the {part}, whose base weights are in none of the given folders: add --base")
    found = lora_format.to_factors(diffusers.table(part, config), pairs, shapes[part], layer.scale_of) if pairs else {}
    out |= {f"{part}/{path}": pair for path, pair in found.items()}
  return out


def resolve(path) -> epath.Path:
  """The folder or file that a model path names; "tiny" is the shipped base. Raises UserError if it doesn't exist."""
  found = TINY if str(path) == "tiny" else epath.Path(path)
  if not found.exists():
    raise UserError(f"model {str(path)!r}: no such folder; give {_KINDS}")
  return found


def look_at(path) -> Opened:
  """What a path holds by itself, whatever else a whole model would need."""
  return _open(path, "ema", PARTS, [], None)


def _open(path, weights: str, parts: Sequence[str], bases: Sequence, lora_alpha: float | None) -> Opened:
  """Looks at one path. bases: where the frozen parts of a workdir are, if not where its run recorded."""
  found = resolve(path)
  if not found.is_dir():
    return _open_checkpoint(found, lora_alpha)
  if model_dir.is_model_dir(found):
    config = model_dir.load_config(found)
    sizes = {name: getattr(config, name) for name in (*_SIZES, "scb")}
    leaves = model_dir.open_parts(found, parts)
    return Opened(
      str(found), "model directory", sizes, leaves, factors=model_dir.open_lora(found), tokenizer=found / "tokenizer"
    )
  if diffusers.is_diffusers_dir(found):
    return _open_diffusers(found, parts)
  if (found / "adapter_config.json").exists():
    state, scale_of = lora_format.open_adapter(found, lora_alpha)
    state = {diffusers.respell(key): tensor for key, tensor in state.items()}
    return Opened(str(found), "PEFT adapter", pairs=lora_format.pair_up(state), scale_of=scale_of)
  if diffusers.is_vlm_dir(found):
    opened = Opened(str(found), "Qwen2.5-VL folder", tokenizer=found)
    _add_vlm(opened, found, parts)
    return opened
  if (found / "config.json").exists() and (found / "checkpoints").exists():
    return _open_workdir(found, weights, parts, bases)
  if any(found.glob("*model_states.pt")) or any(found.glob("*/*model_states.pt")):
    raise UserError(
      f"{found} is a DeepSpeed checkpoint folder, whose LoRA and weights lie in pickled optimizer shards: make one file of it "
      "with the reference's scripts/deepspeed2torch.py and give that"
    )
  raise UserError(f"model {str(path)!r} is neither {_KINDS.replace(' or ', ' nor ')}")


def _add_vlm(opened: Opened, folder: epath.Path, parts: Sequence[str]) -> None:
  """Sizes and tensors of a Qwen2.5-VL folder. One that says its head is its own, but stores none, has a tied one."""
  text, vision = hf_config.read_vlm(folder / "config.json")
  if "vlm" in parts:
    state = opened.states["vlm"] = diffusers.open_vlm(folder / "model.safetensors")
    if "lm_head.weight" not in state:
      text = replace(text, tie_word_embeddings=True)
  opened.config |= {"text": text, "vision": vision}


def _open_diffusers(folder: epath.Path, parts: Sequence[str]) -> Opened:
  opened = Opened(str(folder), "diffusers folder")
  if (folder / "vlm").is_dir():
    _add_vlm(opened, folder / "vlm", parts)
    opened.tokenizer = folder / "tokenizer"  # of Stable Diffusion's own text encoder where there is no VLM
  if (folder / "connector").is_dir():
    values = hf_config.read_json(folder / "connector" / "config.json")
    state = files.open_files(folder / "connector" / "model.safetensors")
    where = "connector/model.safetensors"
    opened.config |= {"scb": (state, where), "connector": values}
    if isinstance(values.get("image_size"), int):
      opened.config["image_size"] = values["image_size"]
    if "scb" in parts:
      opened.states["scb"] = state
  readers = {"dit": hf_config.read_dit, "vae": hf_config.read_vae}
  for part, read in readers.items():
    name, file = diffusers.FILES[part]
    opened.config[part] = read(folder / name / "config.json")
    if part in parts:
      opened.states[part] = files.open_files(folder / name / file)
  opened.config["scheduler"] = hf_config.read_scheduler(folder / "scheduler" / "scheduler_config.json")
  return opened


# Beginning of a checkpoint's keys -> part of ours; the connector's own names stay.
_CHECKPOINT_PARTS = (
  (r"(connector\.|projector_[123]\.|meta_queries$)", "scb"),
  (r"transformer\.", "dit"),
  (r"vae\.", "vae"),
  (r"lmm\.", "vlm"),
)


def _open_checkpoint(file: epath.Path, lora_alpha: float | None) -> Opened:
  """A training checkpoint of the reference: {key: tensor}, plain or under `state_dict`, with any of its prefixes."""
  if file.suffix not in (".pth", ".pt"):
    raise UserError(f"{file} is a file, but no .pth or .pt checkpoint; give {_KINDS}")
  values = torch_file.load(file)
  if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
    values = values["state_dict"]
  if not isinstance(values, Mapping) or not values or not all(isinstance(t, Tensor) for t in values.values()):
    raise UserError(f"{file} holds no state dict: it must be a table of tensors, or have one under 'state_dict'")
  states: dict[str, dict[str, Tensor]] = {}
  lora, unknown = {}, []
  for key, tensor in values.items():
    name = re.sub(r"^((module|model)\.)+", "", key)
    part = next((part for pattern, part in _CHECKPOINT_PARTS if re.match(pattern, name)), None)
    if part is None:
      unknown.append(key)
      continue
    if part != "scb":
      name = name.partition(".")[2]
    if part == "vlm":
      name = diffusers.respell(name.replace(".base_layer.", "."))
    if lora_format.is_lora(name):
      lora[name] = tensor
    else:
      states.setdefault(part, {})[name] = tensor
  if unknown:
    raise UserError(f"{file} has {len(unknown)} keys that are no part of a DeepGen checkpoint:\n  " + "\n  ".join(unknown[:20]))
  opened = Opened(str(file), "training checkpoint", scale_of=lora_format.checkpoint_scale(lora_alpha))
  try:
    opened.pairs = lora_format.pair_up(lora)
  except UserError as error:
    raise UserError(f"{file}: {error}") from error
  if states.get("dit", {}).keys() == {"pos_embed.pos_embed"}:  # after stage 1; the DiT itself is the base's
    opened.constants = states.pop("dit")
  if "scb" in states:
    opened.config["scb"] = (states["scb"], str(file))
  opened.states = states
  return opened


def _open_workdir(folder: epath.Path, weights: str, parts: Sequence[str], bases: Sequence) -> Opened:
  """A workdir of ours with what its run started from: complete."""
  config = checkpoint.read_config(folder)
  trained = {name: files.in_memory(x) for name, x in checkpoint.load_trained(folder, weights).items()}
  base, *more = bases or [config["init"]]
  if not bases and base != "tiny" and not epath.Path(base).exists():
    raise UserError(
      f"workdir {folder}: the model that its run started from, {base!r}, isn't there: no such folder. If it was moved, name "
      f"its new place with --base, or as init in {folder / 'config.json'}"
    )
  below = open_weights(base, more, "raw", parts=parts)
  settings = config["lora"]
  factors = {}
  for name in [name.removesuffix("/a") for name in trained if name.endswith(("/kernel/a", "/embedding/a"))]:
    factors[name] = Factors(trained.pop(f"{name}/a"), trained.pop(f"{name}/b"), settings["alpha"] / settings["rank"])
  if factors:
    below = below.merged()
  leaves = {part: dict(tree) for part, tree in below.leaves.items()}
  for name, tensor in trained.items():
    part, _, path = name.partition("/")
    if part in parts:
      leaves.setdefault(part, {})[path] = tensor
  sizes = {name: getattr(below.config, name) for name in (*_SIZES, "scb")}
  sizes["image_size"] = config["data"].get("image_size") or sizes["image_size"]
  kept = factors or below.factors
  return Opened(str(folder), "training workdir", sizes, leaves, factors=kept, tokenizer=below.tokenizer_dir)
