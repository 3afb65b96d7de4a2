"""LoRA tensors under the names of PEFT and of the reference's checkpoints, read into our layout, merged, and written back.

Theirs, for a module X of the network that the name table knows as X.weight (PEFT puts `base_model.model.` in front, checkpoints
the adapter's name behind):

    X.lora_A.weight [r, in], X.lora_B.weight [out, r]                   W += s B A
    X.lora_embedding_A [r, vocab], X.lora_embedding_B [dim, r]          E += s (B A)^T

Ours is `LoraKernel`: a [.., in, r], b [.., r, out], the leaves of stacked layers stacked. What theirs fuses (q, k and v of the
vision tower) has one A there and three equal ones here; layers without LoRA have zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from etils import epath

from deepgen_jax.errors import UserError, nearest
from deepgen_jax.weights import hf_config
from deepgen_jax.weights import tensors as files
from deepgen_jax.weights.tensors import Tensor
from deepgen_jax.weights.torch_format import Row, Table

ScaleOf = Callable[[str, int], float]  # module, rank -> what B A is multiplied by
ADAPTER = "adapter_model.safetensors"
_NAME = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.(?P<adapter>(?!weight$)\w+))?(?:\.weight)?")


@dataclass(frozen=True)
class Factors:
  """The update of one of our kernels: scale * a @ b."""

  a: Tensor
  b: Tensor
  scale: float

  @property
  def rank(self) -> int:
    return self.a.shape[-1]


def is_lora(key: str) -> bool:
  """Whether a checkpoint's key is one of LoRA's."""
  return _NAME.fullmatch(key) is not None


def pair_up(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
  """LoRA tensors -> module -> (A, B) as theirs; UserError for a half, another shape, or more than one adapter."""
  halves: dict[str, dict[str, Tensor]] = {}
  problems, adapters = [], set()
  for key, tensor in state.items():
    found = _NAME.fullmatch(key)
    adapters.add(found["adapter"])
    halves.setdefault(found["module"], {})[found["side"]] = tensor
  if len(adapters) > 1:
    raise UserError(f"the LoRA tensors belong to {len(adapters)} adapters ({', '.join(map(str, sorted(map(str, adapters))))})")
  for module, sides in halves.items():
    if missing := {"A", "B"} - sides.keys():
      problems.append(f"{module}: lora_{missing.pop()} is missing")
    elif any(len(t.shape) != 2 for t in sides.values()) or sides["A"].shape[0] != sides["B"].shape[1]:
      problems.append(f"{module}: A {sides['A'].shape} and B {sides['B'].shape} have no common rank")
  if problems:
    raise UserError(f"LoRA tensors don't fit each other, {len(problems)} problem(s):\n  " + "\n  ".join(problems))
  return {module: (sides["A"], sides["B"]) for module, sides in halves.items()}


def to_factors(
  table: Table, pairs: Mapping[str, tuple[Tensor, Tensor]], shapes: Mapping[str, tuple[int, ...]], scale_of: ScaleOf
) -> dict[str, Factors]:
  """Their pairs -> factors of our leaves {path: Factors}. shapes: of every leaf.

  Raises one UserError that lists the modules that the table doesn't know, and those of another size.
  """
  rows = {key: row for row in table.rows for key in row.theirs()}
  problems = []
  for module, (a, b) in pairs.items():
    row = rows.get(f"{module}.weight")
    if row is None:
      problems.append(f"{module}: unknown module.{nearest(module, [key.removesuffix('.weight') for key in rows])}")
    elif (weight := row.torch_shape(shapes[row.path])) != (found := (_wide(row, a, b), _deep(row, a, b))):
      problems.append(f"{module}: A and B are for a weight of {found}, the model's is {weight}")
  if problems:
    raise UserError(f"LoRA doesn't fit the model, {len(problems)} problem(s):\n  " + "\n  ".join(problems))
  scale = max((scale_of(module, a.shape[0]) for module, (a, _) in pairs.items()), default=1.0)
  factors = {}
  for row in table.rows:
    modules = [key.removesuffix(".weight") if key.endswith(".weight") else "" for key in row.theirs()]
    found = [(*pairs[m], scale_of(m, pairs[m][0].shape[0]) / scale) if m in pairs else None for m in modules]
    if any(found):
      factors[row.path] = _stack(row, found, shapes[row.path], scale)
  return factors


def _is_embedding(row: Row) -> bool:
  return not row.layout.axes


def _wide(row: Row, a: Tensor, b: Tensor) -> int:
  """First dimension of the weight that a pair is for."""
  return a.shape[1] if _is_embedding(row) else b.shape[0]


def _deep(row: Row, a: Tensor, b: Tensor) -> int:
  return b.shape[0] if _is_embedding(row) else a.shape[1]


def _stack(row: Row, pairs, shape: tuple[int, ...], scale: float) -> Factors:
  """Pairs of a leaf's layers with what their B is multiplied by (None where there is none) -> its factors."""
  rank = max(pair[0].shape[0] for pair in pairs if pair)
  dtype = next(pair[0].dtype for pair in pairs if pair)
  rows, columns = shape[-2:]
  layers = shape[:-2]

  def read_a() -> np.ndarray:
    out = np.zeros((len(pairs), rows, rank), dtype)
    for i, pair in enumerate(pairs):
      if pair:
        out[i, :, : pair[0].shape[0]] = pair[0].read().T
    return out.reshape(*layers, rows, rank)

  def read_b() -> np.ndarray:
    out = np.zeros((len(pairs), rank, columns), dtype)
    for i, pair in enumerate(pairs):
      if pair:
        b = pair[1].read().T
        if row.part is not None:
          b = np.split(b, row.part[1], axis=1)[row.part[0]]
        out[i, : b.shape[0]] = b if pair[2] == 1 else b * np.asarray(pair[2], dtype)
    return out.reshape(*layers, rank, columns)

  return Factors(Tensor((*layers, rows, rank), dtype, read_a), Tensor((*layers, rank, columns), dtype, read_b), scale)


def merged(kernel: Tensor, factors: Factors) -> Tensor:
  """The kernel with its update, computed in float32, in the kernel's dtype."""

  def read() -> np.ndarray:
    base, a, b = kernel.read(), factors.a.read().astype(np.float32), factors.b.read().astype(np.float32)
    out = np.empty(base.shape, base.dtype)
    if base.ndim == 2:  # in pieces of rows: an embedding is large
      for piece in (slice(i, i + 8192) for i in range(0, len(base), 8192)):
        out[piece] = base[piece].astype(np.float32) + factors.scale * (a[piece] @ b)
    else:
      for i in range(len(base)):
        out[i] = base[i].astype(np.float32) + factors.scale * (a[i] @ b[i])
    return out

  return replace(kernel, read=read)


def to_adapter(table: Table, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
  """Inverse of `to_factors`: their tensors under PEFT's names. UserError for factors of leaves that the table doesn't know."""
  rows = {row.path: row for row in table.rows}
  if unknown := sorted(set(factors) - set(rows)):
    raise UserError("LoRA can't be exported, the name table lacks: " + ", ".join(unknown))
  out: dict[str, Tensor] = {}
  fused: dict[str, dict[int, tuple[Factors, int]]] = {}
  for path, pair in factors.items():
    row = rows[path]
    for i, key in enumerate(row.theirs()):
      module = "base_model.model." + key.removesuffix(".weight")
      at = None if row.layers is None else i
      if row.part is not None:
        fused.setdefault(module, {})[row.part[0]] = (pair, at)
      elif _is_embedding(row):
        out |= {f"{module}.lora_embedding_A": _transposed(pair.a, at), f"{module}.lora_embedding_B": _transposed(pair.b, at)}
      else:
        out |= {f"{module}.lora_A.weight": _transposed(pair.a, at), f"{module}.lora_B.weight": _transposed(pair.b, at)}
  for module, parts in fused.items():
    a, b = _fuse([parts[i] for i in sorted(parts)], module)
    out |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
  return out


def _transposed(tensor: Tensor, at: int | None) -> Tensor:
  pick = lambda: np.ascontiguousarray((tensor.read() if at is None else tensor.read()[at]).T)
  return Tensor(tensor.shape[-2:][::-1], tensor.dtype, pick)


def _fuse(parts: list[tuple[Factors, int]], module: str) -> tuple[Tensor, Tensor]:
  """q, k and v of one fused module. With one common A as it came; else the ranks side by side (a block-diagonal B)."""
  a = [pair.a.read()[at] for pair, at in parts]
  b = [pair.b.read()[at] for pair, at in parts]
  if len({pair.scale for pair, _ in parts}) > 1:
    raise UserError(f"{module}: its parts have LoRA of different scales, which one adapter can't hold; merge instead")
  if all(np.array_equal(a[0], x) for x in a):
    return files.in_memory(np.ascontiguousarray(a[0].T)), files.in_memory(np.ascontiguousarray(np.concatenate(b, axis=1).T))
  blocks = np.zeros((sum(x.shape[1] for x in b), sum(x.shape[0] for x in b)), b[0].dtype)
  row = column = 0
  for x in b:
    blocks[row : row + x.shape[1], column : column + x.shape[0]] = x.T
    row, column = row + x.shape[1], column + x.shape[0]
  return files.in_memory(np.ascontiguousarray(np.concatenate(a, axis=1).T)), files.in_memory(blocks)


def checkpoint_scale(alpha: float | None) -> ScaleOf:
  """Checkpoints don't say alpha; None: twice the rank, the reference's."""
  return lambda module, rank: 2.0 if alpha is None else alpha / rank


def open_adapter(folder, alpha: float | None = None) -> tuple[dict[str, Tensor], ScaleOf]:
  """A PEFT adapter folder -> (its tensors without PEFT's prefix, the scale of each module; `alpha` overrides the config's).

  Raises UserError for adapters that aren't plain LoRA.
  """
  folder = epath.Path(folder)
  config = hf_config.read_json(folder / "adapter_config.json")
  plain = {"peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None), "fan_in_fan_out": (False, None)}
  for key, allowed in plain.items():
    if key in config and config[key] not in allowed:
      raise UserError(f"{folder / 'adapter_config.json'}: {key} is {config[key]!r}; only plain LoRA can be read")
  for key in ("modules_to_save", "layer_replication"):
    if config.get(key):
      raise UserError(f"{folder / 'adapter_config.json'}: {key} is set, which can't be read; merge it with peft first")
  if not isinstance(config.get("lora_alpha"), int | float) or not config.get("r"):
    raise UserError(f"{folder / 'adapter_config.json'} lacks r and lora_alpha")
  patterns, power = config.get("alpha_pattern") or {}, 0.5 if config.get("use_rslora") else 1.0

  def scale_of(module: str, rank: int) -> float:
    own = next((a for name, a in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", module)), config["lora_alpha"])
    return (own if alpha is None else alpha) / rank**power

  state = {key.removeprefix("base_model.model."): tensor for key, tensor in files.open_files(folder / ADAPTER).items()}
  if strange := [key for key in state if not is_lora(key)]:
    raise UserError(f"{folder / ADAPTER} holds more than LoRA: {', '.join(strange[:5])}")
  return state, scale_of


def save_adapter(folder, table: Table, factors: Mapping[str, Factors], base: str = "") -> None:
  """Writes a PEFT adapter folder that `peft.PeftModel.from_pretrained` loads onto the network of the table."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = to_adapter(table, factors)
  scale = next(iter(factors.values())).scale
  modules = [key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors]
  ranks = {m: t.shape[0] for m, (k, t) in zip(modules, tensors.items()) if k.endswith(("lora_A.weight", "embedding_A"))}
  rank = max(ranks.values())
  config = {
    "peft_type": "LORA",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": scale * rank,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "target_modules": sorted(ranks),
    "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
    "alpha_pattern": {module: scale * r for module, r in ranks.items() if r != rank},
  }
  files.write_file(folder / ADAPTER, tensors)
  hf_config.write_json(folder / "adapter_config.json", config)
