"""Orbax behind one file: what is saved, when, and how it comes back.

A checkpoint holds three items: `state` (a flat dict path -> array), `data` (our own JSON: how many micro-batches were consumed)
and nothing else; frozen weights are referenced by the config of the workdir. Saving is asynchronous and atomic, restoring puts
every leaf straight into its sharding.
"""

from __future__ import annotations

import fcntl
import json
import os

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding

from deepgen_jax import sharding
from deepgen_jax.errors import UserError
from deepgen_jax.models.lora import path_name

# Config keys that may differ between the run that wrote a workdir and the one that resumes it (design 4.4).
MAY_CHANGE = (
  "steps",
  "mesh.",
  "remat",
  "attention",
  "log.",
  "eval.",
  "checkpoint.",
  "profile",
  "distributed",
  "data.precomputed",
)


def flat(tree) -> dict:
  """Nested tree -> {path: leaf}."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _folder(workdir) -> epath.Path:
  """Where a workdir keeps its checkpoints; Orbax wants absolute paths."""
  folder = epath.Path(workdir) / "checkpoints"
  return folder if "://" in os.fspath(folder) else folder.resolve()


class Checkpointer:
  """Saves and restores (TrainState, data state) in `workdir/checkpoints`."""

  def __init__(self, workdir: epath.Path, every: int, keep: int):
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
    self._manager = ocp.CheckpointManager(_folder(workdir), options=options)
    self._every = every

  def maybe_save(self, step: int, state, data_state: dict, force: bool = False) -> bool:
    """Saves after `every` updates (or at once with force); True when it did."""
    if step in self._manager.all_steps() or ((step == 0 or step % self._every) and not force):
      return False
    args = ocp.args.Composite(state=ocp.args.StandardSave(flat(state)), data=ocp.args.JsonSave(data_state))
    return self._manager.save(step, args=args, force=force)

  def latest(self) -> int | None:
    """Newest complete checkpoint."""
    return self._manager.latest_step()

  def restore(self, abstract_state, mesh: Mesh):
    """-> (state, data state) of the newest checkpoint; every leaf arrives in its sharding."""
    shardings = sharding.state_shardings(abstract_state, mesh)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(flat(target)), data=ocp.args.JsonRestore())
    restored = self._manager.restore(self.latest(), args=args)
    leaves = restored["state"]
    state = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], abstract_state)
    return state, restored["data"]

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()


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


def check_config(workdir: epath.Path, config_json: str) -> None:
  """Compares with the config that the workdir was made with; raises UserError for a difference that would change the run."""
  file = workdir / "config.json"
  if not file.exists():
    return
  old, new = (_flat_json(json.loads(text)) for text in (file.read_text(), config_json))
  fixed = lambda key: not key.startswith(MAY_CHANGE)
  changed = [k for k in sorted(old.keys() | new.keys()) if fixed(k) and old.get(k) != new.get(k)]
  if changed:
    shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in changed[:5])
    raise UserError(f"workdir {workdir} belongs to another config ({shown}); use another --workdir or the old values")


def _flat_json(values: dict, prefix: str = "") -> dict:
  out = {}
  for key, value in values.items():
    out |= _flat_json(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return out


def stored(workdir: epath.Path) -> tuple[int, dict]:
  """-> (step, {path: what has a shape and a dtype}) of a workdir's newest checkpoint; no value is read."""
  handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
  with ocp.CheckpointManager(_folder(workdir), item_handlers=handlers) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f"workdir {workdir} has no complete checkpoint yet")
    return step, dict(manager.item_metadata(step)["state"].items())


def load_trained(workdir: epath.Path, weights: str = "ema") -> dict:
  """The trained leaves {parameter path: numpy array} of a workdir's newest checkpoint: EMA where it is kept, unless `weights`
  is "raw".
  """
  handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
  with ocp.CheckpointManager(_folder(workdir), item_handlers=handlers) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f"workdir {workdir} has no complete checkpoint yet")
    here = SingleDeviceSharding(jax.local_devices()[0])  # whatever mesh wrote it
    stored = manager.item_metadata(step)["state"]
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in stored.items()}
    leaves = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
  kind = "ema" if weights == "ema" and any(name.startswith("ema/") for name in leaves) else "params"
  return {name.removeprefix(f"{kind}/"): jax.device_get(leaf) for name, leaf in leaves.items() if name.startswith(f"{kind}/")}
