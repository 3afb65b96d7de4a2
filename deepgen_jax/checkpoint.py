"""Orbax behind one file: what is saved, when, and how it comes back.

A checkpoint holds two items: `state` (a flat dict path -> array) and `data` (our own JSON: how many micro-batches were
consumed, and a checksum of every array); frozen weights are referenced by the config of the workdir. Saving is asynchronous and
atomic, restoring puts every leaf straight into its sharding and verifies it. A damaged checkpoint gives way to the one before.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from deepgen_jax import distributed, sharding
from deepgen_jax.errors import FULL, UserError
from deepgen_jax.models.lora import path_name

# Config keys that may differ between the run that wrote a workdir and the one that resumes it (design 4.4).
MAY_CHANGE = (
  "steps",
  "mesh.",
  "frozen",
  "remat",
  "attention",
  "log.",
  "eval.",
  "checkpoint.",
  "profile",
  "distributed",
  "data.precomputed",
)
# Errors that say nothing about the checkpoint itself: no reason to go back to an earlier one.
_OUTSIDE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
_UNREACHABLE = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED")
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def flat(tree) -> dict:
  """Nested tree -> {path: leaf}."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _folder(workdir) -> epath.Path:
  """Where a workdir keeps its checkpoints; Orbax wants absolute paths."""
  folder = epath.Path(workdir) / "checkpoints"
  return folder if "://" in os.fspath(folder) else folder.resolve()


class Checkpointer:
  """Saves and restores (TrainState, data state) in `workdir/checkpoints`: after `every` updates; the last `keep` stay, and with
  `keep_every` those of every so many updates. Raises UserError for settings that make no sense.
  """

  def __init__(self, workdir: epath.Path, every: int, keep: int, keep_every: int = 0):
    if every < 1 or keep < 1 or keep_every < 0 or keep_every % every:
      raise UserError(
        f"config.checkpoint: every {every} and keep {keep} must be at least 1, keep_every {keep_every} 0 or a multiple of every"
      )
    kept = [LatestN(keep), *([EveryNSteps(keep_every)] if keep_every else [])]
    # What a killed run left half written goes: nobody else writes here (`lock`).
    options = ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(kept), cleanup_tmp_directories=True)
    self._folder, self._every = _folder(workdir), every
    handlers = {"state": _writer(), "data": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

  def is_due(self, step: int, force: bool = False) -> bool:
    """Whether update `step` is one to save after: every so many, or with force any that isn't saved."""
    return step > 0 and (force or step % self._every == 0) and step not in self._manager.all_steps()

  def save(self, step: int, state, data_state: dict) -> None:
    """Starts to write; what it is given may change at once. Raises UserError if the disk is full, now or during the last save,
    and if a value isn't finite.
    """
    leaves = flat(state)
    digest = _digest(leaves)
    if bad := next((name for name, (_, finite) in sorted(digest.items()) if not finite), None):
      raise UserError(
        f"after update {step} {bad} isn't finite: not saved, the checkpoint before is kept. Lower config.optim.lr, or look at "
        "the data of the last updates"
      )
    data = data_state | {"sums": {name: int(value) for name, (value, _) in digest.items()}}
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), data=ocp.args.JsonSave(data))
    self._reporting(lambda: self._manager.save(step, args=args, force=True))

  def check(self) -> None:
    """Raises what went wrong with the save under way, so far."""
    self._reporting(self._manager.check_for_errors)

  def latest(self) -> int | None:
    """Newest complete checkpoint."""
    return self._manager.latest_step()

  def restore(self, abstract_state, mesh: Mesh):
    """-> (state, data state) of the newest whole checkpoint, every leaf in its sharding; None where there is none yet.

    Damaged ones that are newer are moved aside, as STEP.damaged, and named on stderr. Raises UserError if none is whole, and
    for one that belongs to another state.
    """
    shardings = sharding.state_shardings(abstract_state, mesh)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings)
    found = _newest_whole(self._folder, lambda folder: _read_state(folder, flat(target)))
    if found is None:
      return None
    _, (leaves, data), damaged = found
    distributed.on_main(lambda: [_move_aside(self._folder / str(step)) for step in damaged])
    self._manager.reload()
    state = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], abstract_state)
    return state, {"micro_batches": data["micro_batches"]}

  def close(self) -> None:
    """Waits for what is being written; raises UserError if the disk was full."""
    self._reporting(self._manager.wait_until_finished)
    self._reporting(self._manager.close)

  def _reporting(self, act: Callable[[], Any]) -> None:
    try:
      act()
    except Exception as error:
      if not _is_full(error):
        raise
      raise UserError(
        f"{self._folder}: the last checkpoint couldn't be written, the disk is full. The ones before are whole: make room, and "
        "the same command goes on from there"
      ) from error


def _writer() -> ocp.PyTreeCheckpointHandler:
  """Orbax divides the writing of a leaf among the devices that have it, by programs of which it compiles one for each shape.
  Devices of a CPU have one memory: there the first one writes.
  """
  options: dict[str, Any] = {"save_concurrent_gb": 96}  # as StandardCheckpointHandler; without it there is no limit
  if jax.default_backend() == "cpu":
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    options["type_handler_registry"] = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
  return ocp.PyTreeCheckpointHandler(**options)


def _is_full(error: BaseException | None) -> bool:
  """Whether an error, or what caused it, is a full disk or quota."""
  if error is None:
    return False
  full = getattr(error, "errno", None) in FULL
  words = re.search("No space left on device|[Qq]uota exceeded|File too large", str(error))
  return full or bool(words) or _is_full(error.__cause__ or error.__context__)


@jax.jit
def _device_digest(leaves: dict) -> dict:
  """As `_digest`, in one program."""
  unsigned = lambda leaf: jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
  return jax.tree.map(lambda leaf: (unsigned(leaf).sum(dtype=np.uint32), jnp.isfinite(leaf).all()), leaves)


def _digest(leaves: dict) -> dict:
  """{name: leaf} -> {name: (checksum, whether all of it is finite)}. The checksum is the sum of the leaf's bits, taken as whole
  numbers, modulo 2^32: the same however it is laid out.
  """
  if jax.default_backend() != "cpu" or jax.process_count() > 1:
    return jax.device_get(_device_digest(leaves))
  host = {name: np.asarray(leaf) for name, leaf in leaves.items()}  # XLA would compile for longer than NumPy adds
  unsigned = lambda leaf: leaf.view(_UNSIGNED[leaf.dtype.itemsize])
  return {name: (unsigned(leaf).sum(dtype=np.uint32), np.isfinite(leaf).all()) for name, leaf in host.items()}


def _verify(leaves: dict, data: dict) -> None:
  """Raises ValueError, which counts as damage, for what isn't as it was saved; older checkpoints have no checksums."""
  for name, (value, finite) in sorted(_digest(leaves).items()):
    if not finite:
      raise ValueError(f"{name} isn't finite")
    if int(value) != data.get("sums", {}).get(name, int(value)):
      raise ValueError(f"{name} isn't what was saved")


def _read_data(folder: epath.Path) -> dict:
  data = json.loads((folder / "data" / "metadata").read_text())
  if not isinstance(data.get("micro_batches"), int):
    raise ValueError("its position in the data is missing")
  return data


def _metadata(folder: epath.Path) -> dict:
  """{name: what has a shape and a dtype} of a checkpoint's state."""
  return dict(ocp.StandardCheckpointHandler().metadata(folder / "state").items())


def _read_state(folder: epath.Path, target: dict) -> tuple[dict, dict]:
  """-> (leaves like `target`, data state). Raises UserError, with the first leaf that differs, if they aren't."""
  there, describe = _metadata(folder), lambda leaf: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
  for name in sorted(there.keys() | target.keys()):
    old, new = (describe(leaves[name]) if name in leaves else "missing" for leaves in (there, target))
    if old != new:
      raise UserError(
        f"checkpoint {folder} isn't of this run: {name} is {old} there, {new} here. Use another "
        "--workdir, or the version that wrote it"
      )
  data = _read_data(folder)
  return ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(target)), data


def _attempt(act: Callable, *args) -> tuple[Any, str]:
  """-> (act(*args), ""), or (None, what is damaged)."""
  try:
    return act(*args), ""
  except UserError:
    raise
  except Exception as error:
    if isinstance(error, _OUTSIDE) or _UNREACHABLE.search(str(error)):
      raise
    return None, (str(error) or type(error).__name__).splitlines()[0][:200]


def _newest_whole(folder: epath.Path, read: Callable[[epath.Path], tuple[dict, dict]], verify: Callable = _verify):
  """-> (step, read(its folder), [steps that are newer, but damaged]) of the newest checkpoint that `read` can read and
  `verify(leaves, data state)` lets pass; None if there is none at all. Called by all processes: one that fails on any is
  damaged for all. Raises UserError if all are damaged.
  """
  damaged: dict[int, str] = {}
  while True:
    found = folder.iterdir() if folder.exists() else []
    steps = [int(path.name) for path in found if path.name.isdigit() and int(path.name) not in damaged]
    step = distributed.highest(max(steps, default=-1))
    if step < 0:
      break
    result, problem = _attempt(read, folder / str(step))
    if not distributed.highest(int(bool(problem))):  # all have read their part: what follows takes all of them
      _, problem = _attempt(verify, *result)
    if distributed.highest(int(bool(problem))):
      damaged[step] = problem or "another process can't read it"
      continue
    for worse, why in damaged.items() if distributed.is_main() else ():
      print(f"checkpoint {folder / str(worse)} is damaged ({why}): using that of update {step}", file=sys.stderr, flush=True)
    return step, result, list(damaged)
  if damaged:
    listed = "; ".join(f"{step}: {why}" for step, why in damaged.items())
    raise UserError(
      f"no checkpoint in {folder} is whole ({listed}). Bring back a copy, or remove the folder and start from the beginning"
    )
  return None


def _move_aside(folder: epath.Path) -> None:
  """Gives a damaged checkpoint another name, so that its update can be saved again; nothing is deleted."""
  names = [f"{folder.name}.damaged{number or ''}" for number in range(100)]
  folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))


def lock(workdir: epath.Path):
  """Keeps two runs out of one workdir; the lock dies with its holder. Returns what must stay alive."""
  if not isinstance(workdir, os.PathLike) or "://" in os.fspath(workdir):
    return None  # object stores have no locks; the cluster's job name is what keeps runs apart there
  handle = open(workdir / ".lock", "a+")  # noqa: SIM115  held for the life of the run
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise UserError(f"workdir {workdir} is in use by another run; wait for it or choose another --workdir") from None
  return handle


def read_config(workdir: epath.Path) -> dict:
  """The config that a workdir records. Raises UserError if it can't be read."""
  file = epath.Path(workdir) / "config.json"
  try:
    values = json.loads(file.read_text())
    if not isinstance(values, dict) or not isinstance(values.get("init"), str):
      raise ValueError("no config of a run")
  except (OSError, ValueError) as error:
    raise UserError(
      f"{file} can't be read ({error}). Bring back a copy; without one, delete it and train on with the config that the run "
      "had, which writes it anew"
    ) from error
  return values


def recorded(config_json: str) -> str:
  """What a workdir records of a config: a local model that the run starts from by its whole path, so that the workdir can be
  opened from anywhere.
  """
  values = json.loads(config_json)
  init = values["init"]
  if init and init != "tiny" and "://" not in init:
    values["init"] = os.path.abspath(init)
  return json.dumps(values, indent=2, sort_keys=True)


def check_config(workdir: epath.Path, config_json: str) -> None:
  """Compares with the config that the workdir was made with; raises UserError for a difference that would change the run.

  A key that one of them lacks, being of another version, is off there: 0, False or empty.
  """
  file = workdir / "config.json"
  if not file.exists():
    return
  old, new = (_flat_json(json.loads(recorded(text))) for text in (json.dumps(read_config(workdir)), config_json))
  fixed = lambda key: not key.startswith(MAY_CHANGE)
  changed = [k for k in sorted(old.keys() | new.keys()) if fixed(k) and (old.get(k) or None) != (new.get(k) or None)]
  if changed:
    shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in changed[:5])
    moved = "init" in changed and "://" not in old["init"] and not os.path.exists(old["init"])
    hint = f" If the model that it started from was moved, write its new place as init into {file}." if moved else ""
    raise UserError(f"workdir {workdir} belongs to another config ({shown}); use another --workdir or the old values.{hint}")


def _flat_json(values: dict, prefix: str = "") -> dict:
  out = {}
  for key, value in values.items():
    out |= _flat_json(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return out


def _require(found, workdir):
  if found is None:
    raise UserError(f"workdir {workdir} has no complete checkpoint yet")
  return found


def stored(workdir: epath.Path) -> tuple[int, dict]:
  """-> (step, {path: what has a shape and a dtype}) of a workdir's newest checkpoint; no value is read."""
  found = _newest_whole(_folder(workdir), lambda folder: (_metadata(folder), {}), verify=lambda *_: None)
  step, (leaves, _), _ = _require(found, workdir)
  return step, leaves


def load_trained(workdir: epath.Path, weights: str = "ema") -> dict:
  """The trained leaves {parameter path: numpy array} of a workdir's newest whole checkpoint: EMA where it is kept, unless
  `weights` is "raw".
  """
  here = SingleDeviceSharding(jax.local_devices()[0])  # whatever mesh wrote it

  def read(folder: epath.Path) -> tuple[dict, dict]:
    there, data = _metadata(folder), _read_data(folder)
    kind = "ema" if weights == "ema" and any(name.startswith("ema/") for name in there) else "params"
    target = {name: leaf for name, leaf in there.items() if name.startswith(f"{kind}/")}
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in target.items()}
    options = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=options, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args), data

  _, (leaves, _), _ = _require(_newest_whole(_folder(workdir), read), workdir)
  return {name.partition("/")[2]: jax.device_get(leaf) for name, leaf in leaves.items()}
