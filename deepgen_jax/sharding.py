"""The mesh, and the one table that says how every tree is laid out on it.

Axes: `data` (replicas), `fsdp` (parameters and batch), `tensor` (heads and MLP columns). A parameter takes the first row whose
regex matches its path; optimizer moments, EMA, LoRA and gradient sums take the row of the parameter they mirror, because their
paths end alike. A dimension that an axis doesn't divide stays unsharded on that axis.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepgen_jax.errors import UserError
from deepgen_jax.models.lora import path_name

AXES = ("data", "fsdp", "tensor")

# Path regex -> axes of the last dimensions of the leaf (leading scan axes are never sharded). First match wins.
RULES = [
  # The VLM's two key and value heads are fewer than a tensor axis usually has devices: each of these holds both.
  (r"(.*/)?vlm/text/.*/(k|v)/kernel(/kernel)?", ("fsdp", None)),
  (r"(.*/)?vlm/text/.*/(k|v)/kernel/b", (None, None)),
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
  return Mesh(device_grid(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def device_grid(sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices in the mesh's shape, neighbours along the axes that talk most.

  Slices of a TPU pod, or GPU nodes, which a slower network connects, follow each other on the first axis that they divide.
  """
  shape = [sizes[axis] for axis in AXES]
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  axis = next((i for i, size in enumerate(shape) if size % slices == 0), None)
  if axis is None:
    raise UserError(f"config.mesh {sizes}: none of its axes is a multiple of the {slices} slices or nodes; make data one")
  across, inside = [1, 1, 1], list(shape)
  across[axis], inside[axis] = slices, shape[axis] // slices
  return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


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


def undivided(path: str, shape: Sequence[int], mesh: Mesh) -> list[str]:
  """What the table would shard but can't: "tensor doesn't divide 11946" for each such dimension of a parameter."""
  axes = lookup(RULES, path, "sharding rules")[-len(shape) :]
  pairs = zip(axes, shape[len(shape) - len(axes) :])
  return [f"{axis} doesn't divide {n}" for axis, n in pairs if axis and n % mesh.shape[axis]]


def param_shardings(params, mesh: Mesh):
  """NamedSharding of every leaf of a parameter tree (arrays or ShapeDtypeStructs)."""
  return map_paths(lambda path, leaf: NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)), params)


# A device of this much memory has room for what "auto" settings would rather keep than compute or gather again. At full size:
# all that any stage keeps frozen, 12 GB in bfloat16, and the results of blocks' products, 5 GiB for a sample with a reference.
ROOMY = 64 * 2**30


def frozen_layout(layout: str, memory: float | None = None) -> str:
  """config.frozen -> "fsdp" or "whole". memory: bytes of a device, None: of those that are there. Raises UserError."""
  if layout not in ("auto", "fsdp", "whole"):
    raise UserError(f"config.frozen {layout!r} is none of auto, fsdp, whole")
  if layout == "auto":
    return "whole" if (memory or device_memory() or 0) >= ROOMY else "fsdp"
  return layout


def frozen_shardings(frozen, mesh: Mesh, layout: str):
  """NamedSharding of what doesn't train, as config.frozen says: "fsdp" like `param_shardings`; "whole" without that axis, so
  that no step gathers it.
  """
  split = param_shardings(frozen, mesh)
  if frozen_layout(layout) == "fsdp":
    return split
  without = lambda spec: PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
  return jax.tree.map(lambda sharding: NamedSharding(mesh, without(sharding.spec)), split)


def device_memory() -> int | None:
  """Bytes of one of this process's devices; None where the platform doesn't say (CPU)."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def state_shardings(state, mesh: Mesh):
  """Shardings of a train state: scalars replicated, everything else as the parameter that its path ends with."""

  def spec(path, leaf):
    return NamedSharding(mesh, partition_spec(path, leaf.shape, mesh) if leaf.ndim else PartitionSpec())

  return map_paths(spec, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole."""
  return NamedSharding(mesh, PartitionSpec())


def place(tree, shardings):
  """Arrays, the same on every process, into their shardings, leaf by leaf: a device gets its shard, nothing more."""

  def put(leaf, sharding):
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
      return jax.device_put(leaf, sharding)
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

  return jax.tree.map(put, tree, shardings)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """The rows of a batch that this process's devices hold, in order; processes that share a `tensor` axis share rows.

  Raises UserError if the devices can't share the batch evenly.
  """
  shares = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size < 1 or batch_size % shares:
    raise UserError(
      f"config.data.batch_size {batch_size}: it must be a positive multiple of the {shares} devices that share a batch "
      f"(config.mesh: data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
    )
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return sorted({row for (part,) in indices for row in range(*part.indices(batch_size))})


def put_batch(batch, mesh: Mesh):
  """A tree of arrays whose leading axis is this process's rows (`local_rows`) -> arrays of all rows, dealt to the mesh.

  What is of all processes' rows already, because a program made it, stays so.
  """
  sharding = batch_sharding(mesh)
  if sharding.is_fully_addressable:
    return jax.device_put(batch, sharding)
  shares = mesh.shape["data"] * mesh.shape["fsdp"]
  held = len(local_rows(mesh, shares))  # of these shares

  def put(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, sharding)
    size = len(x) * shares // held
    rows = local_rows(mesh, size)

    def part(index):
      start = rows.index(index[0].indices(size)[0])
      return x[start : start + size // shares]

    return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

  return jax.tree.map(put, batch)


def on_mesh(mesh: Mesh, fn: Callable) -> Callable:
  """`fn` such that `keep_dealt` finds the mesh when it is traced; goes inside jax.jit."""

  @functools.wraps(fn)
  def traced(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args, **kwargs)

  return traced


def keep_dealt(tree):
  """Activations [B, ...] stay dealt by samples, and whole otherwise, where `on_mesh` says on what (a tree of them).

  Left to itself the compiler may follow the parameters instead: split channels, and gather activations for every layer. Does
  nothing without a mesh, or where its devices don't divide the batch.
  """
  mesh = _traced_mesh()
  if mesh is None:
    return tree
  keep = lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec(("data", "fsdp")))
  return jax.tree.map(lambda x: x if len(x) % (mesh.shape["data"] * mesh.shape["fsdp"]) else keep(x), tree)


def keep_sharded(grads):
  """Gradients of a parameter tree are reduced into the shards of their parameters, where `on_mesh` says on what."""
  mesh = _traced_mesh()
  if mesh is None:
    return grads
  keep = lambda path, g: jax.lax.with_sharding_constraint(g, partition_spec(path, g.shape, mesh))
  return map_paths(keep, grads)


def splits_parameters() -> bool:
  """Whether `on_mesh` says a mesh on which a device holds a share of most parameters."""
  mesh = _traced_mesh()
  return mesh is not None and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def splits_heads() -> bool:
  """Whether `on_mesh` says a mesh on which devices share out attention heads."""
  mesh = _traced_mesh()
  return mesh is not None and mesh.shape["tensor"] > 1


# How a TPU program gathers kernels. Left to itself the compiler makes a ring of partial products of each large one, whose sums
# pass through memory at every step: whole kernels take 0.7 of its modelled time (full size, v5p:2x2x2, 64 samples, generation).
_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# On v5e gathers may run inside the products before them. On other chips newer compilers refuse that: results could be wrong.
_V5E_OPTIONS = {
  "xla_enable_async_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
  "xla_tpu_overlap_compute_collective_tc": "true",
}


# On GPUs products are cuBLAS's: nothing else was measured. The compiler makes one product of several with the same input, and
# copies their kernels side by side for it: in a sampler at every step. A rollout is compiled like its replays.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_GPU_SAMPLER_OPTIONS = _GPU_OPTIONS | {"xla_gpu_dot_merger_threshold_mb": "0"}


def is_gpu(mesh: Mesh) -> bool:
  """Whether its devices are GPUs."""
  return mesh.devices.flat[0].platform in ("gpu", "cuda")


def compiler_options(mesh: Mesh, sampler: bool = False) -> dict[str, str | bool] | None:
  """What the compiler is told about programs on a mesh. sampler: the program's steps run the same kernels again and again."""
  device = mesh.devices.flat[0]
  if is_gpu(mesh):
    return _GPU_SAMPLER_OPTIONS if sampler else _GPU_OPTIONS
  if device.platform != "tpu" or mesh.shape["fsdp"] == 1:
    return None
  return _TPU_OPTIONS | (_V5E_OPTIONS if device.device_kind in ("TPU v5 lite", "TPU v5e") else {})


def jit(fn: Callable, mesh: Mesh, *, sampler: bool = False, **options) -> Callable:
  """`jax.jit(fn, **options)` as a program on that mesh: see `on_mesh` and `compiler_options`."""
  return jax.jit(on_mesh(mesh, fn), compiler_options=compiler_options(mesh, sampler), **options)


def _traced_mesh():
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if set(AXES) <= set(mesh.shape) else None


def partition(params, table: Sequence[tuple[str, bool]], name: str = "config.trainable"):
  """Splits a tree by a path table into (trainable, frozen); each has None where the other has the leaf."""
  keep = map_paths(lambda path, _: lookup(table, path, name), params)
  trainable = jax.tree.map(lambda p, k: p if k else None, params, keep)
  frozen = jax.tree.map(lambda p, k: None if k else p, params, keep)
  return trainable, frozen


def merge(trainable, frozen):
  """Inverse of `partition`."""
  return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None)
