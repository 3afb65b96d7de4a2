"""The mesh, and the one table that says how every tree is laid out on it.

Axes: `data` (replicas), `fsdp` (parameters and batch), `tensor` (heads and MLP columns). A parameter takes the first row whose
regex matches its path; optimizer moments, EMA, LoRA and gradient sums take the row of the parameter they mirror, because their
paths end alike. A dimension that an axis doesn't divide stays unsharded on that axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepgen_jax.errors import UserError
from deepgen_jax.models.lora import path_name

AXES = ("data", "fsdp", "tensor")

# Path regex -> axes of the last dimensions of the leaf (leading scan axes are never sharded). First match wins.
RULES = [
  (r".*/(q|k|v|gate|up|fc1|modulation|context_modulation)/kernel(/kernel)?", ("fsdp", "tensor")),
  (r".*/(out|out2|context_out|down|fc2)/kernel(/kernel)?", ("tensor", "fsdp")),
  (r".*/embedding(/kernel)?", ("tensor", "fsdp")),
  (r".*/kernel/a", ("fsdp", None)),
  (r".*/kernel/b", (None, "tensor")),
  (r".*/embedding/a", ("tensor", None)),
  (r".*/embedding/b", (None, "fsdp")),
  (r".*/(conv\w*|downsample|upsample)/kernel", (None, None, None, "fsdp")),
  (r".*/kernel(/kernel)?", ("fsdp", None)),
  (r".*/(bias|scale)", ()),
  (r".*/think_tokens", ()),
]


def make_mesh(shape: dict[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Mesh over all devices; a size of -1 fills.  shape e.g. {"data": 1, "fsdp": -1, "tensor": 1}; the default is pure data
  parallelism.
  """
  devices = list(devices or jax.devices())
  sizes = {"data": -1, "fsdp": 1, "tensor": 1} | dict(shape or {})
  if unknown := set(sizes) - set(AXES):
    raise UserError(f"config.mesh: unknown axis {sorted(unknown)[0]!r}; the axes are {', '.join(AXES)}")
  fill = [axis for axis in AXES if sizes[axis] == -1]
  known = int(np.prod([sizes[axis] for axis in AXES if sizes[axis] != -1]))
  if len(fill) > 1 or len(devices) % known or (not fill and known != len(devices)):
    raise UserError(f"config.mesh {sizes} doesn't fit {len(devices)} devices; at most one axis may be -1 (it fills)")
  if fill:
    sizes[fill[0]] = len(devices) // known
  return jax.make_mesh(tuple(sizes[a] for a in AXES), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def lookup(table: Sequence[tuple[str, Any]], path: str, name: str) -> Any:
  """First row of `table` whose regex matches the whole path; no match is an error that names the table and the path."""
  for pattern, value in table:
    if re.fullmatch(pattern, path):
      return value
  raise UserError(f"{name}: no row matches the parameter {path!r}; add one (regex of the whole path, first match wins)")


def map_paths(fn: Callable[[str, Any], Any], tree):
  """tree.map with the leaf's path as "scb/layers/q/kernel"."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_name(path), leaf), tree)


def partition_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """The table's row for a parameter, aligned to its last dimensions, without axes that don't divide."""
  axes = lookup(RULES, path, "sharding rules")
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)[-len(shape) :] if shape else ()
  return PartitionSpec(*(a if a and mesh.shape[a] > 1 and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape)))


def param_shardings(params, mesh: Mesh):
  """NamedSharding of every leaf of a parameter tree (arrays or ShapeDtypeStructs)."""
  return map_paths(lambda path, leaf: NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)), params)


def state_shardings(state, mesh: Mesh):
  """Shardings of a train state: scalars replicated, everything else as the parameter that its path ends with."""

  def spec(path, leaf):
    return NamedSharding(mesh, partition_spec(path, leaf.shape, mesh) if leaf.ndim else PartitionSpec())

  return map_paths(spec, state)


def within(mesh: Mesh, function: Callable) -> Callable:
  """`function`, traced with `mesh` around it: kernels that XLA doesn't partition read it there (models/splash.py)."""

  def inside(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  return inside


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole."""
  return NamedSharding(mesh, PartitionSpec())


def partition(params, table: Sequence[tuple[str, bool]], name: str = "config.trainable"):
  """Splits a tree by a path table into (trainable, frozen); each has None where the other has the leaf."""
  keep = map_paths(lambda path, _: lookup(table, path, name), params)
  trainable = jax.tree.map(lambda p, k: p if k else None, params, keep)
  frozen = jax.tree.map(lambda p, k: None if k else p, params, keep)
  return trainable, frozen


def merge(trainable, frozen):
  """Inverse of `partition`."""
  return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None)
