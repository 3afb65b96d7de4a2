"""Reads and writes a network's parameters as the flat state dict of its PyTorch counterpart, from one table both ways.

A `Row` says which of our leaves is which of their tensors; a `Layout` how the axes differ. Both are data: whoever needs another
access pattern (streaming, shards) walks the same rows. numpy only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deepgen_jax.errors import UserError, nearest


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

  def keys(self) -> list[str]:
    return [self.key] if self.layers is None else [self.key.format(layer=layer) for layer in self.layers]

  def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each of their tensors where our leaf has `shape`."""
    first, *rest = self.layout.torch_shape(shape if self.layers is None else shape[1:])
    return (first * (self.part[1] if self.part else 1), *rest)


@dataclass(frozen=True)
class Table:
  """All rows of a network; what their format stores though it follows from the config; and keys that carry nothing for us."""

  rows: tuple[Row, ...]
  computed: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
  ignored: tuple[str, ...] = ()  # regexes

  @classmethod
  def join(cls, tables: Mapping[str, Table]) -> Table:
    """One table for networks that share a file; the parameters of each sit under its name in our tree."""
    rows = tuple(replace(row, path=f"{name}/{row.path}") for name, table in tables.items() for row in table.rows)
    computed = {key: make for table in tables.values() for key, make in table.computed.items()}
    return cls(rows, computed, tuple(pattern for table in tables.values() for pattern in table.ignored))


def from_torch(table: Table, state: Mapping[str, np.ndarray], abstract_params) -> dict:
  """Their state dict -> our parameters, in the shapes and dtypes of `abstract_params` (a nested dict).

  Leaves that `abstract_params` leaves out are skipped. Raises one UserError that lists every key of theirs that the table
  doesn't know, every leaf of ours that nothing fills, every wrong shape, and every stored constant that isn't what the config
  implies.
  """
  leaves = flatten_dict(abstract_params, sep="/")
  problems, filled = [], {}
  known = set(table.computed)
  for row in table.rows:
    known.update(row.keys())
    if row.path in leaves:
      filled[row.path] = _read(row, state, leaves[row.path], problems)
  problems += [f"{path}: no row of the name table fills it" for path in leaves if path not in filled]
  for key in state:
    if key not in known and not any(re.fullmatch(pattern, key) for pattern in table.ignored):
      problems.append(f"{key}: unknown key.{nearest(key, known - set(state))}")
  for key, make in table.computed.items():
    if key in state:
      problems += _check_constant(key, np.asarray(state[key]), make())
  if problems:
    raise UserError(f"weights don't fit the model, {len(problems)} problem(s):\n  " + "\n  ".join(problems))
  return unflatten_dict(filled, sep="/")


def to_torch(table: Table, params) -> dict[str, np.ndarray]:
  """Inverse of `from_torch`: every key of theirs, in the dtype of our leaves. UserError for leaves missing or unknown."""
  leaves = flatten_dict(params, sep="/")
  paths = {row.path for row in table.rows}
  problems = [f"{path}: missing" for path in sorted(paths - set(leaves))]
  problems += [f"{path}: not in the name table" for path in sorted(set(leaves) - paths)]
  if problems:
    raise UserError("parameters can't be exported:\n  " + "\n  ".join(problems))
  state, parts = {}, {}
  for row in table.rows:
    leaf = np.asarray(leaves[row.path])
    for key, x in zip(row.keys(), leaf[None] if row.layers is None else leaf):
      x = row.layout.to_torch(x)
      if row.part is None:
        state[key] = np.ascontiguousarray(x)
      else:
        parts.setdefault(key, {})[row.part[0]] = x
  state |= {key: np.concatenate([p for _, p in sorted(pieces.items())]) for key, pieces in parts.items()}
  return state | {key: make() for key, make in table.computed.items()}


def _read(row: Row, state, leaf, problems: list[str]) -> np.ndarray:
  """Our leaf from its tensors; what is wrong is appended to `problems`."""
  target = np.empty(leaf.shape, leaf.dtype)
  expected = row.torch_shape(leaf.shape)
  if row.layers is not None and len(row.layers) != leaf.shape[0]:
    problems.append(f"{row.path}: {leaf.shape[0]} layers, the name table has {len(row.layers)}")
    return target
  for i, key in enumerate(row.keys()):
    if key not in state:
      problems.append(f"{key}: missing, needed for {row.path}")
      continue
    x = np.asarray(state[key])
    if x.shape != expected:
      problems.append(f"{key}: shape {x.shape}, expected {expected} for {row.path}")
      continue
    if row.part is not None:
      x = np.split(x, row.part[1])[row.part[0]]
    target[... if row.layers is None else i] = row.layout.to_ours(x)
  return target


def _check_constant(key: str, stored: np.ndarray, expected: np.ndarray) -> list[str]:
  """A stored constant may differ by its dtype's rounding; 1e-5 covers tables that others computed in float32."""
  if stored.shape != expected.shape:
    return [f"{key}: shape {stored.shape}, expected {expected.shape}"]
  difference = float(np.abs(stored.astype(np.float32) - expected).max())
  allowed = max(float(ml_dtypes.finfo(stored.dtype).eps), 1e-5)
  return [] if difference <= allowed else [f"{key}: differs by up to {difference:.2g} from what the config implies"]
