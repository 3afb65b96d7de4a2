"""Reads and writes a network's parameters as the flat state dict of its PyTorch counterpart, from one table both ways.

A `Row` says which of our leaves is which of their tensors; a `Layout` how the axes differ. Both directions map tensors that are
read when they are needed: nothing here holds more than the leaf in hand. numpy only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deepgen_jax.errors import UserError, nearest
from deepgen_jax.weights.tensors import Tensor, in_memory


@dataclass(frozen=True)
class Layout:
  """Our leaf is their tensor with its axes permuted and, if `folded` (their sizes), all axes but the last merged into one."""

  axes: tuple[int, ...] = ()  # empty: as it is
  folded: tuple[int, ...] = ()

  def to_ours(self, x: np.ndarray) -> np.ndarray:
    x = x.transpose(self.axes) if self.axes else x
    return x.reshape(-1, x.shape[-1]) if self.folded else x

  def to_torch(self, x: np.ndarray) -> np.ndarray:
    x = x.reshape(*self.folded, x.shape[-1]) if self.folded else x
    return x.transpose(np.argsort(self.axes)) if self.axes else x

  def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of their tensor where ours has `shape`."""
    shape = (*self.folded, shape[-1]) if self.folded else tuple(shape)
    return tuple(shape[i] for i in np.argsort(self.axes)) if self.axes else shape


SAME = Layout()
LINEAR = Layout((1, 0))  # (out, in) -> [in, out]
CONV = Layout((2, 3, 1, 0))  # OIHW -> HWIO


@dataclass(frozen=True)
class Row:
  """One leaf of ours. With `layers` it is stacked: entry i along its first axis is the tensor `key.format(layer=layers[i])`."""

  path: str
  key: str
  layout: Layout = SAME
  layers: range | None = None
  part: tuple[int, int] | None = None  # (i, n): ours is the i-th of n equal parts along the first axis of their tensor

  def theirs(self) -> list[str]:
    """Keys of their tensors."""
    return [self.key] if self.layers is None else [self.key.format(layer=layer) for layer in self.layers]

  def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each of their tensors where our leaf has `shape`."""
    first, *rest = self.layout.torch_shape(shape if self.layers is None else shape[1:])
    return (first * (self.part[1] if self.part else 1), *rest)


@dataclass(frozen=True)
class Constant:
  """A tensor that follows from the config: its shape, and how it is computed (float32)."""

  shape: tuple[int, ...]
  compute: Callable[[], np.ndarray]

  def __call__(self) -> np.ndarray:
    return self.compute()


@dataclass(frozen=True)
class Table:
  """All rows of a network; what their format stores though it follows from the config; and keys that carry nothing for us."""

  rows: tuple[Row, ...]
  computed: Mapping[str, Constant] = field(default_factory=dict)
  ignored: tuple[str, ...] = ()  # regexes

  @classmethod
  def join(cls, tables: Mapping[str, Table]) -> Table:
    """One table for networks that share a file; the parameters of each sit under its name in our tree."""
    rows = tuple(replace(row, path=f"{name}/{row.path}") for name, table in tables.items() for row in table.rows)
    computed = {key: make for table in tables.values() for key, make in table.computed.items()}
    return cls(rows, computed, tuple(pattern for table in tables.values() for pattern in table.ignored))


def to_leaves(table: Table, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
  """Their tensors -> our leaves {path: Tensor} for the paths of `shapes`, in their dtype.

  Raises one UserError that lists every key of theirs that the table doesn't know, every leaf of ours that nothing fills, every
  wrong shape, and every stored constant that isn't what the config implies.
  """
  problems, leaves = [], {}
  known = set(table.computed)
  for row in table.rows:
    known.update(row.theirs())
    if row.path in shapes:
      leaves[row.path] = _leaf(row, state, shapes[row.path], problems)
  problems += [f"{path}: no row of the name table fills it" for path in shapes if path not in leaves]
  for key in state:
    if key not in known and not any(re.fullmatch(pattern, key) for pattern in table.ignored):
      problems.append(f"{key}: unknown key.{nearest(key, known - set(state))}")
  for key, make in table.computed.items():
    if key in state:
      problems += _check_constant(key, state[key], make)
  if problems:
    raise UserError(f"weights don't fit the model, {len(problems)} problem(s):\n  " + "\n  ".join(problems))
  return leaves


def to_state(table: Table, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Inverse of `to_leaves`: every key of theirs, in the dtype of our leaves. UserError for leaves missing or unknown.

  Neighbours in the result come from the same leaf: read in this order, each leaf is read once.
  """
  paths = {row.path for row in table.rows}
  problems = [f"{path}: missing" for path in sorted(paths - set(leaves))]
  problems += [f"{path}: not in the name table" for path in sorted(set(leaves) - paths)]
  if problems:
    raise UserError("parameters can't be exported:\n  " + "\n  ".join(problems))
  recent = _Recent()
  pieces: dict[str, list[tuple[Row, int]]] = {}
  for row in table.rows:
    for i, key in enumerate(row.theirs()):
      pieces.setdefault(key, []).append((row, i))
  state = {}
  for key, rows in pieces.items():
    rows = sorted(rows, key=lambda entry: entry[0].part or (0, 1))
    leaf = leaves[rows[0][0].path]

    def read(rows=rows):
      found = []
      for row, i in rows:
        x = recent.read(row.path, leaves[row.path])
        found.append(row.layout.to_torch(x if row.layers is None else x[i]))
      return found[0] if len(found) == 1 else np.concatenate(found)

    state[key] = Tensor(rows[0][0].torch_shape(leaf.shape), leaf.dtype, read)
  dtype = next(iter(leaves.values())).dtype
  for key, make in table.computed.items():
    state[key] = Tensor(make.shape, dtype, lambda make=make: make().astype(dtype))
  return state


def from_torch(table: Table, state: Mapping[str, np.ndarray], abstract_params) -> dict:
  """As `to_leaves` for arrays: -> our parameters (nested) in the shapes and dtypes of `abstract_params`; leaves that it
  lacks are skipped.
  """
  expected = flatten_dict(abstract_params, sep="/")
  leaves = to_leaves(table, {k: in_memory(v) for k, v in state.items()}, {path: leaf.shape for path, leaf in expected.items()})
  return unflatten_dict({path: leaf.read().astype(expected[path].dtype) for path, leaf in leaves.items()}, sep="/")


def to_torch(table: Table, params) -> dict[str, np.ndarray]:
  """As `to_state` for arrays."""
  state = to_state(table, {path: in_memory(leaf) for path, leaf in flatten_dict(params, sep="/").items()})
  return {key: np.ascontiguousarray(tensor.read()) for key, tensor in state.items()}


class _Recent:
  """The last few leaves that were read (q, k and v share a tensor in some formats)."""

  def __init__(self):
    self._kept: dict[str, np.ndarray] = {}

  def read(self, path: str, leaf: Tensor) -> np.ndarray:
    if path not in self._kept:
      while len(self._kept) > 2:
        self._kept.pop(next(iter(self._kept)))
      self._kept[path] = leaf.read()
    return self._kept[path]


def _leaf(row: Row, state: Mapping[str, Tensor], shape: tuple[int, ...], problems: list[str]) -> Tensor:
  """Our leaf from its tensors; what is wrong is appended to `problems`."""
  expected = row.torch_shape(shape)
  if row.layers is not None and len(row.layers) != shape[0]:
    problems.append(f"{row.path}: {shape[0]} layers, the name table has {len(row.layers)}")
  found = []
  for key in row.theirs():
    if key not in state:
      problems.append(f"{key}: missing, needed for {row.path}")
    elif state[key].shape != expected:
      problems.append(f"{key}: shape {state[key].shape}, expected {expected} for {row.path}")
    else:
      found.append(state[key])
  kinds = {tensor.dtype for tensor in found}
  dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

  def read() -> np.ndarray:
    target = np.empty(shape, dtype)
    for i, tensor in enumerate(found):
      x = tensor.read()
      if row.part is not None:
        x = np.split(x, row.part[1])[row.part[0]]
      target[... if row.layers is None else i] = row.layout.to_ours(x)
    return target

  return Tensor(tuple(shape), dtype, read)


def _check_constant(key: str, stored: Tensor, make: Constant) -> list[str]:
  """A stored constant may differ by its dtype's rounding; 1e-5 covers tables that others computed in float32."""
  if stored.shape != make.shape:
    return [f"{key}: shape {stored.shape}, expected {make.shape}"]
  values, expected = stored.read().reshape(-1), make().reshape(-1)
  pieces = [slice(i, i + 2**22) for i in range(0, values.size, 2**22)]  # the table of the full model has 0.9 GB
  difference = max(float(np.abs(values[piece].astype(np.float32) - expected[piece]).max()) for piece in pieces)
  allowed = max(float(ml_dtypes.finfo(stored.dtype).eps), 1e-5)
  return [] if difference <= allowed else [f"{key}: differs by up to {difference:.2g} from what the config implies"]
