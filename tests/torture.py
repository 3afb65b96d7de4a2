"""Kills training at random moments, again and again, and compares with a run that nobody disturbed:

    python -m tests.torture --kills 30 --devices 1 2 8 changing

A life of the run ends with SIGKILL while it starts, after an update, or while it writes a checkpoint. With 1, 2 or 8
(simulated) devices all that it leaves must then equal the undisturbed run bit for bit: parameters, optimizer, EMA, losses,
TensorBoard, the ids of every micro-batch. "changing" starts each life on another mesh: ids exact, values within `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tests import xla

TOLERANCE = 1e-5  # of a leaf's largest value: sums in another order
# Attention doesn't depend on it: its gradient is zero but for rounding, which Adam blows up to whole steps. Exact on one mesh.
ROUNDING = re.compile(r".*/k/bias")
LIMIT = 900  # seconds until something that is waited for happens, on a busy machine
MISSED = 6  # updates that a run has left after the last moment; half of them until a save that nobody saw is given up
MICRO_BATCHES, BATCH = 2, 8  # of an update, samples of one
MESHES = {"1": (1, 1, 1, 1), "2": (2, 2, 1, 1), "8": (8, 2, 2, 2)}  # devices; data, fsdp, tensor
CHANGING = [(8, 2, 2, 2), (1, 1, 1, 1), (8, 8, 1, 1), (2, 1, 2, 1), (4, 1, 2, 2), (2, 1, 1, 2)]
# Compiled once, and the same in every life.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONUNBUFFERED": "1"}
# What each life would import: it is forked from a process that has.
PRELOAD = ["deepgen_jax.train", "deepgen_jax.stages.supervised", "tests.small", "transformers.models.qwen2.tokenization_qwen2"]


def _train(argv: list[str], devices: int, log: str) -> None:
  """The training command, in a process of its own that has imported it already and that doesn't outlive the one that asked."""
  threading.Thread(target=_end_with_parent, daemon=True).start()
  output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(output, 1)
  os.dup2(output, 2)
  os.environ["XLA_FLAGS"] = xla.flags(devices)
  from deepgen_jax import train
  from deepgen_jax.errors import run_command
  from deepgen_jax.models.config import SIZES
  from tests.small import CONFIG

  SIZES["tiny"] = CONFIG
  sys.argv = ["train", *argv]
  run_command(train.main)


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


class Torture:
  """A base, pictures, and the runs on them, in one folder."""

  def __init__(self, folder: Path, steps: int):
    self.folder, self.steps = folder, steps
    os.environ.update(ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")})
    from tests.small import draw_params, save_model  # and JAX, which reads the environment

    self._processes = multiprocessing.get_context("forkserver")
    self._processes.set_forkserver_preload(PRELOAD)
    rng = np.random.default_rng(0)
    for name, count in (("one", 24), ("two", 13)):
      (folder / name).mkdir()
      for number in range(count):
        pixels = rng.integers(0, 255, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
        (folder / name / f"{number}.txt").write_text(f"picture {number} of {name}")
    save_model(folder / "base", draw_params(), ("vlm", "dit", "vae"))

  def start(self, workdir: Path, mesh: tuple[int, ...]):
    """Starts or resumes a run -> its process."""
    devices, *sizes = mesh
    settings = {
      "init": self.folder / "base",
      "steps": self.steps,
      "data.sources": f"({{'uri': 'folder:{self.folder}/one', 'weight': 2}}, 'folder:{self.folder}/two')",
      "data.pattern": ",".join(["generate"] * MICRO_BATCHES),
      "data.batch_size": BATCH,
      "data.text_buckets": "(128,)",
      "unroll": "false",
      "optim.ema": 0.9,
      "optim.schedule": "constant",
      "eval.every": 0,
      "log.every": 1,
      "log.samples": "true",
      "checkpoint.every": 2,
      **{f"mesh.{axis}": size for axis, size in zip(("data", "fsdp", "tensor"), sizes)},
    }
    argv = ["--config", "configs/align.py:tiny", "--workdir", str(workdir)]
    argv += [f"--config.{key}={value}" for key, value in settings.items()]
    log = Path(str(workdir) + ".log")
    log.write_text("")
    process = self._processes.Process(target=_train, args=(argv, devices, str(log)))
    process.start()
    return process

  def whole(self, name: str, mesh: tuple[int, ...]) -> Path:
    """A run that nobody disturbs; made once."""
    workdir = self.folder / f"whole_{name}"
    if not workdir.exists():
      self.finish(workdir, mesh)
    return workdir

  def finish(self, workdir: Path, mesh: tuple[int, ...]) -> None:
    """Runs to the end."""
    process = self.start(workdir, mesh)
    process.join()
    assert process.exitcode == 0, self.log(workdir)

  def log(self, workdir: Path) -> str:
    """The end of what its last life has said."""
    return Path(str(workdir) + ".log").read_text()[-4000:]

  def tortured(self, name: str, meshes: list[tuple[int, ...]], kills: int, rng: random.Random) -> tuple[Path, Counter]:
    """A run that dies `kills` times, each life on the next of `meshes` -> (workdir, what it was at when it died)."""
    workdir, deaths = self.folder / f"tortured_{name}", Counter()
    moments = sorted(rng.uniform(0, self.steps - MISSED) for _ in range(kills))
    kinds = [("saving", "updating", "saving", "starting")[life % 4] for life in range(kills)]
    rng.shuffle(kinds)
    start = 5.0  # seconds that a life takes to its first update: measured
    for life, (moment, kind) in enumerate(zip(moments, kinds)):
      older, began = _halves(workdir), time.monotonic()
      early = began + rng.uniform(0, start)
      process = self.start(workdir, meshes[life % len(meshes)])
      try:
        happened = {
          "starting": lambda early=early: time.monotonic() > early or _last_update(workdir) > 0,
          "updating": lambda moment=moment: _last_update(workdir) >= moment,
          "saving": lambda moment=moment, older=older: (
            any(step >= moment for step, _ in _halves(workdir) - older) or _last_update(workdir) > moment + MISSED / 2
          ),
        }[kind]
        while process.is_alive() and not happened():
          assert time.monotonic() - began < LIMIT, f"no further:\n{self.log(workdir)}"
          time.sleep(0.001)
        if kind != "starting":
          start = 0.8 * (time.monotonic() - began)
          time.sleep(rng.uniform(0, 0.05 if kind == "saving" else 0.5))
        assert process.is_alive(), self.log(workdir)
      finally:
        process.kill()
        process.join()
      deaths["saving" if _halves(workdir) - older else "updating" if _last_update(workdir) else "starting"] += 1
      print(f"{name}: killed {life + 1} times, last while {kind}, at update {_last_update(workdir)}", flush=True)
    self.finish(workdir, meshes[kills % len(meshes)])
    return workdir, deaths


def _halves(workdir: Path) -> set[tuple[int, int]]:
  """(update, when it was begun) of the checkpoints that are being written, or were when a life ended."""
  found = set()
  for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
    with contextlib.suppress(FileNotFoundError):  # it has just got its name
      found.add((int(path.name.partition(".")[0]), path.stat().st_ino))
  return found


def _last_update(workdir: Path) -> int:
  """What the life under way has said that it has done; 0: nothing yet."""
  log = Path(str(workdir) + ".log")
  done = re.findall(r"update (\d+)/", log.read_text()) if log.exists() else []
  return int(done[-1]) if done else 0


def rows(file: Path) -> list[dict]:
  """Of a .jsonl file."""
  return [json.loads(line) for line in file.read_text().splitlines()]


def drawn(workdir: Path) -> list[tuple]:
  """(update, micro-batch, ids) of all that a run trained on, in order; an AssertionError if a sample is missing or twice."""
  found = [(row["step"], row["micro_batch"], row["ids"]) for row in rows(workdir / "samples.jsonl")]
  count = len(found)
  assert [(step, batch) for step, batch, _ in found] == [(1 + i // MICRO_BATCHES, i) for i in range(count)]
  assert [i for _, _, ids in found for i in ids] == list(range(count * BATCH))
  return found


def scalars(workdir: Path) -> list[dict]:
  """The rows of metrics.jsonl without what depends on the clock."""
  return [{k: v for k, v in row.items() if "second" not in k} for row in rows(workdir / "metrics.jsonl")]


def tensorboard(workdir: Path) -> dict[int, float]:
  """Update -> loss, of the event files; an AssertionError if an update is there twice."""
  from tensorboardX.proto.event_pb2 import Event

  found: dict[int, float] = {}
  for file in sorted((workdir / "tensorboard").iterdir(), key=lambda file: int(file.name.rpartition(".from")[2])):
    data, place = file.read_bytes(), 0
    while place + 12 <= len(data):  # length, its checksum, event, its checksum
      length = struct.unpack_from("<Q", data, place)[0]
      event = Event.FromString(data[place + 12 : place + 12 + length])
      place += length + 16
      for value in event.summary.value:
        if value.tag == "loss":
          assert event.step not in found, f"update {event.step} is twice in TensorBoard"
          found[event.step] = value.simple_value
  return found


def state(workdir: Path) -> dict[str, np.ndarray]:
  """All of a run's last checkpoint."""
  import jax
  import orbax.checkpoint as ocp
  from jax.sharding import SingleDeviceSharding

  from deepgen_jax import checkpoint

  step, leaves = checkpoint.stored(workdir)
  here = SingleDeviceSharding(jax.local_devices()[0])
  target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in leaves.items()}
  folder = checkpoint._folder(workdir) / str(step) / "state"
  restored = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(target))
  return {name: np.asarray(leaf) for name, leaf in restored.items()}


def difference(one: np.ndarray, two: np.ndarray) -> float:
  """Largest difference, in units of the largest value."""
  return float(np.abs(one - two).max() / max(np.abs(two).max(), 1e-30)) if one.size else 0.0


def compare(tortured: Path, whole: Path, exact: bool) -> dict[str, float]:
  """Raises AssertionError unless both runs are the same; -> the largest differences."""
  assert drawn(tortured) == drawn(whole)
  ours, theirs = scalars(tortured), scalars(whole)
  steps = [row["step"] for row in theirs]
  assert [row["step"] for row in ours] == steps == list(range(1, steps[-1] + 1))
  for events in (tensorboard(tortured), tensorboard(whole)):
    assert list(events) == steps, f"TensorBoard has updates {list(events)}"
  losses = [[row["loss"] for row in run] for run in (ours, theirs)]
  if exact:
    assert ours == theirs and tensorboard(tortured) == tensorboard(whole)
  ours, theirs = state(tortured), state(whole)
  assert ours.keys() == theirs.keys()
  found = {name: difference(ours[name], theirs[name]) for name in theirs}
  if exact:
    assert not [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()]
  groups = {"losses": difference(*map(np.array, losses))}
  for kind in ("params", "ema", "opt_state"):
    groups[kind] = max(value for name, value in found.items() if name.startswith(kind) and not ROUNDING.fullmatch(name))
  worst = {kind: value for kind, value in groups.items() if kind != "opt_state" and value > TOLERANCE}
  assert not worst, f"more than {TOLERANCE} apart: {worst}"
  return groups


def run(folder: Path, devices: list[str], kills: int, seed: int = 0) -> dict[str, dict]:
  """Tortures a run in each way that `devices` names -> what was seen; AssertionError where it isn't as it must be."""
  torture, seen = Torture(folder, kills + 6), {}
  for name in devices:
    rng, began = random.Random(f"{seed} {name}"), time.monotonic()
    meshes = CHANGING if name == "changing" else [MESHES[name]]
    workdir, deaths = torture.tortured(name, meshes, kills, rng)
    whole = torture.whole("8" if name == "changing" else name, meshes[0])
    seen[name] = {"deaths": dict(deaths), "differences": compare(workdir, whole, name != "changing")}
    print(f"{name}: {time.monotonic() - began:.0f} s, {seen[name]}", flush=True)
  return seen


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--kills", type=int, default=30, metavar="N", help="of each run")
  parser.add_argument("--devices", nargs="+", default=[*MESHES, "changing"], choices=[*MESHES, "changing"])
  parser.add_argument("--seed", type=int, default=int(time.time()), help="when it is killed; printed")
  arguments = parser.parse_args()
  print(f"seed {arguments.seed}")
  with tempfile.TemporaryDirectory() as folder:
    run(Path(folder), arguments.devices, arguments.kills, arguments.seed)


if __name__ == "__main__":
  main()
