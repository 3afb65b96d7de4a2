"""The rules table at full size, as a golden file, and what places arrays on a mesh.

python -m tests.test_sharding     writes the golden file anew: read its diff
"""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from configs import sft
from deepgen_jax import sharding
from deepgen_jax.errors import UserError
from deepgen_jax.models import lora
from deepgen_jax.models.config import FULL
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.stages.step import init_state, make_optimizer

GOLDEN = Path(__file__).parent / "sharding_full.txt"
MESH = AbstractMesh((2, 16, 4), sharding.AXES)
CONFIG = sft.get_config("full")


def full_params():
  """Shapes of the whole model with stage 2's LoRA."""

  def make(key):
    return lora.add_lora(DeepGen(FULL).init(key), CONFIG.lora.targets, CONFIG.lora.rank, CONFIG.lora.alpha, key)

  return jax.eval_shape(make, jax.random.key(0))


def describe() -> str:
  """One line a parameter: path, shape, axes, and which axes of the table don't divide it."""
  lines = [f"# full model with stage 2's LoRA on {dict(MESH.shape)}; written by: python -m tests.test_sharding"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(full_params()):
    name = lora.path_name(path)
    spec = ", ".join(axis or "-" for axis in sharding.partition_spec(name, leaf.shape, MESH))
    notes = sharding.undivided(name, leaf.shape, MESH)
    lines.append(f"{name}  {list(leaf.shape)}  ({spec})" + (f"  {'; '.join(notes)}" if notes else ""))
  return "\n".join(lines) + "\n"


def test_full_size_is_laid_out_as_the_golden_file_says():
  assert describe() == GOLDEN.read_text()


def test_what_mirrors_a_parameter_is_laid_out_like_it():
  """Optimizer moments, gradient sums and EMA, each in the shards of its parameter."""
  trainable, _ = sharding.partition(full_params(), CONFIG.trainable)
  optimizer, _ = make_optimizer(CONFIG.optim, 10)
  state = jax.eval_shape(lambda p: init_state(p, optimizer, ema=True), trainable)
  own = {}
  sharding.map_paths(lambda path, x: own.update({path: sharding.partition_spec(path, x.shape, MESH)}), trainable)
  assert any(spec != PartitionSpec() for spec in own.values())
  seen = dict.fromkeys(own, 0)

  def check(path, leaf):
    mirrored = [name for name in own if path.endswith(f"/{name}")]
    if not mirrored:
      assert leaf.ndim == 0, path
      return
    seen[mirrored[0]] += 1
    assert sharding.partition_spec(path, leaf.shape, MESH) == own[mirrored[0]], path

  sharding.map_paths(check, state)
  assert set(seen.values()) == {5}  # parameters, gradients, two moments, EMA


def test_frozen_parameters_are_whole_where_asked_or_where_memory_is_large():
  _, frozen = sharding.partition(full_params(), CONFIG.trainable)
  axes = lambda *args: {axis for s in jax.tree.leaves(sharding.frozen_shardings(frozen, MESH, *args)) for axis in s.spec}
  assert axes("fsdp") == {"fsdp", "tensor", None}
  assert axes("whole") == {"tensor", None}  # heads stay dealt
  auto = [sharding.frozen_layout("auto", memory) for memory in (80 * 2**30, 32 * 2**30, None)]
  assert auto == ["whole", "fsdp", "fsdp"]  # a CPU doesn't say what it has
  with pytest.raises(UserError, match=r"config\.frozen 'all' is none of auto, fsdp, whole"):
    sharding.frozen_layout("all")


def test_large_parameters_are_sharded_many_times():
  """What is left whole at full size: less than 1 % of it."""
  sizes = {"whole": 0, "all": 0}

  def count(path, leaf):
    spec = sharding.partition_spec(path, leaf.shape, MESH)
    sizes["all"] += np.prod(leaf.shape)
    sizes["whole"] += 0 if any(spec) else np.prod(leaf.shape)

  sharding.map_paths(count, full_params())
  assert sizes["whole"] < 0.01 * sizes["all"]


def test_every_path_needs_a_row():
  with pytest.raises(UserError, match=r"sharding rules: no row matches .*dit/new_thing"):
    sharding.partition_spec("dit/new_thing", (4, 4), MESH)


def devices(slices: int, count: int):
  """Stand-ins for the devices of several slices."""
  make = lambda i: SimpleNamespace(id=i, slice_index=i // count, platform="cpu", device_kind="cpu", process_index=i // count)
  return [make(i) for i in range(slices * count)]


@pytest.mark.parametrize("sizes, axis", [((4, 2, 1), 0), ((1, 4, 2), 1)])
def test_slices_follow_each_other_on_the_first_axis_that_they_divide(sizes, axis):
  grid = sharding.device_grid(dict(zip(sharding.AXES, sizes)), devices(2, 4))
  assert grid.shape == sizes
  first, second = np.split(grid, 2, axis=axis)
  assert {d.slice_index for d in first.flat} == {0} and {d.slice_index for d in second.flat} == {1}
  with pytest.raises(UserError, match="none of its axes is a multiple of the 3 slices"):
    sharding.device_grid({"data": 1, "fsdp": 4, "tensor": 2}, devices(3, 4))


@pytest.mark.parametrize("tensor, rows", [(1, range(8)), (2, range(8)), (8, range(8))])
def test_one_process_holds_all_rows(tensor, rows):
  mesh = sharding.make_mesh({"data": -1, "tensor": tensor})
  assert sharding.local_rows(mesh, 8) == list(rows)


def test_a_batch_that_devices_cannot_share_is_a_user_error():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  with pytest.raises(UserError, match=r"batch_size 12: it must be a positive multiple of the 8 devices"):
    sharding.local_rows(mesh, 12)


def test_placing_gives_each_device_its_shard():
  mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
  tree = {"scb": {"fc1": {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8), "bias": np.ones(8, np.float32)}}}
  placed = sharding.place(tree, sharding.param_shardings(tree, mesh))
  kernel = placed["scb"]["fc1"]["kernel"]
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4)}
  np.testing.assert_array_equal(kernel, tree["scb"]["fc1"]["kernel"])


@pytest.mark.parametrize("platform, sampler, threshold", [("gpu", True, "0"), ("gpu", False, None), ("cpu", True, None)])
def test_what_the_compiler_is_told(platform, sampler, threshold):
  """A GPU's samplers don't copy kernels side by side at every step."""
  devices = np.array([SimpleNamespace(platform=platform)])
  options = sharding.compiler_options(SimpleNamespace(devices=devices, shape={"fsdp": 1}), sampler) or {}
  assert options.get("xla_gpu_dot_merger_threshold_mb") == threshold


if __name__ == "__main__":
  GOLDEN.write_text(describe())
