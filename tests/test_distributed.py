"""Two processes of four devices as one run, started by launch/local.sh: they train as one process does, with rollouts too, go
on from one's checkpoint, stop together, are resumed by one, and don't outlive each other.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from deepgen_jax import checkpoint, distributed, sharding, train
from deepgen_jax.errors import UserError
from deepgen_jax.models.config import SIZES
from tests import xla
from tests.small import CONFIG, draw_params, save_model

ROOT = Path(__file__).parent.parent
LIMIT = 240  # seconds for anything below to happen, on a busy machine
ENVIRONMENT = os.environ | {"XLA_FLAGS": xla.FAST, "PYTHONUNBUFFERED": "1"}


class Pod:
  """A run of two processes, and what it prints. program: what the small model's training is, to Python."""

  def __init__(self, folder: Path, options: list[str], program: str = "-m tests.small_train"):
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"  # launch/local.sh runs the python of VENV: here one that knows the small model
    python.write_text(f'#!/usr/bin/env bash\nshift 2\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o755)
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = str(free.getsockname()[1])
    self._log = folder / f"log_{port}"
    command = ["bash", "launch/local.sh", "--processes", "2", "--devices", "4", "--port", port, "--", *options]
    with self._log.open("w") as log:
      environment = ENVIRONMENT | {"VENV": str(folder), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
      self._launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

  @property
  def output(self) -> str:
    return self._log.read_text()

  def wait_for(self, pattern: str) -> re.Match:
    """Waits until the output matches."""
    end = time.monotonic() + LIMIT
    while not (found := re.search(pattern, self.output)):
      assert self._launcher.poll() is None and time.monotonic() < end, self.output
      time.sleep(0.2)
    return found

  def kill(self, index: int, number: int) -> None:
    """Sends a signal to one process."""
    os.kill(int(self.wait_for(rf"process {index} of 2: pid (\d+)")[1]), number)

  def wait(self, limit: float = LIMIT) -> int:
    """Exit code, once all have ended."""
    try:
      return self._launcher.wait(limit)
    finally:
      for pid in re.findall(r": pid (\d+)", self.output):
        subprocess.run(["kill", "-9", pid], capture_output=True)


@pytest.fixture(scope="module")
def options(tmp_path_factory, emoji_dir):
  """options(workdir, *overrides) -> arguments of the command; what is learnt at an update doesn't depend on `steps`."""
  base = save_model(tmp_path_factory.mktemp("base"), draw_params(), ("vlm", "dit", "vae"))

  def make(workdir, *overrides):
    small = {
      "data.text_buckets": "(128,)",
      "data.pattern": "('edit',)",
      "unroll": "false",
      "eval.every": 0,
      "log.every": 1,
      "checkpoint.every": 2,
      "optim.schedule": "constant",
      "optim.warmup": 0.0,
      "data.dir": emoji_dir,
      "data.cache_images": 0,  # each process deals its images to its devices
      "init": base,
    }
    settings = [f"--config.{key}={value}" for key, value in small.items()]
    return ["--config", "configs/align.py:tiny", "--workdir", str(workdir), *settings, *overrides]

  return make


@pytest.fixture
def train_alone(monkeypatch):
  """train_alone(argv): the command in this process, which has eight devices."""
  monkeypatch.setitem(SIZES, "tiny", CONFIG)

  def run(argv):
    arguments, changed = train.parse_arguments(argv)
    train.train(train.load_config(arguments.config, changed), epath.Path(arguments.workdir))

  return run


def rows(workdir) -> list[dict]:
  return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def losses(workdir) -> dict[int, tuple]:
  return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows(workdir) if "loss" in row}


MESH = ("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")


def test_two_processes_are_one_run(options, train_alone, tmp_path):
  """They go on from update 2 of a run that one process made to its end."""
  pod_dir, alone = tmp_path / "pod", tmp_path / "alone"
  train_alone(options(alone, "--config.steps=16", "--config.checkpoint.keep=8"))
  shutil.copytree(alone, pod_dir)
  for step in range(4, 17, 2):
    shutil.rmtree(pod_dir / "checkpoints" / str(step))
  pod = Pod(tmp_path / "venv", options(pod_dir, "--config.steps=100000", *MESH))
  pod.wait_for(r"update 5/")
  pod.kill(1, signal.SIGTERM)  # one is told, both save and end
  assert pod.wait() == 0, pod.output
  stopped = int(pod.wait_for(r"stopped at update (\d+)")[1]) if "stopped at" in pod.output else None
  assert stopped, pod.output
  assert pod.output.count("stopped at") == 1
  steps = [row["step"] for row in rows(pod_dir) if "loss" in row]
  assert steps == list(range(1, stopped + 1))  # each once
  assert checkpoint.stored(epath.Path(pod_dir))[0] == stopped
  assert not (tmp_path / "venv" / "cache").exists()  # a program from disk has lost the order of its collectives

  # On as one process, with other devices along the axes.
  train_alone(options(pod_dir, f"--config.steps={stopped + 1}"))
  ours, theirs = losses(pod_dir), losses(alone)
  assert [*ours] == [*range(1, stopped + 2)] and len(theirs) == 16 > stopped
  for step, values in ours.items():
    np.testing.assert_allclose(values, theirs[step], rtol=1e-5, err_msg=f"update {step}")


# The least that a run of several processes does: update after update it votes whether to stop.
VOTERS = """
import sys
from deepgen_jax import distributed, sharding
distributed.TIMEOUT = 10
distributed.start(sys.argv[-1].partition("=")[2])
stop, mesh = distributed.Stop(), sharding.make_mesh()
while not stop:
  stop.vote(mesh)
  print("voted", flush=True)
"""


def test_what_outlives_another_process_ends(tmp_path):
  (tmp_path / "voters.py").write_text(VOTERS)
  options = ["--config", "configs/align.py:tiny", "--workdir", str(tmp_path / "run")]
  pod = Pod(tmp_path / "venv", options, str(tmp_path / "voters.py"))
  pod.wait_for("voted")
  pod.kill(1, signal.SIGKILL)
  killed = time.monotonic()
  assert pod.wait() not in (0, 2)
  assert time.monotonic() - killed < 60
  assert re.search("stopped sending heartbeats|heartbeat timeout|Connection closed by peer|Gloo.*fail", pod.output), pod.output


REINFORCE = {
  "grpo.objective": "flow_grpo",
  "grpo.sampler": "cps",
  "grpo.shared_noise": True,
  "grpo.ratio_clip": "(1e-3, 1e-3)",
  "grpo.kl_weight": 0.0,
  "unroll": "false",
  "log.every": 1,
  "checkpoint.every": 3,
  "steps": 6,
  "eval.every": 6,
  "eval.samples": 3,
  "grpo.rewards": "(('emoji', {'jpeg_compressibility': 1.0}),)",
  "grpo.eval_rewards": "(('emoji', {'jpeg_compressibility': 1.0}),)",
  "grpo.eval_images": 2,
  "grpo.eval_steps": 2,
  "grpo.prompts": 3,  # which two processes don't share evenly
  "grpo.group_size": 8,
  "grpo.rollout_batch": 8,
  "grpo.steps": 3,
  "grpo.window": 2,
  "grpo.train_steps": 1,
  "grpo.updates_per_rollout": 3,
  "grpo.micro_batch": 8,
  "grpo.sft_weight": 0.0,  # whose batches are those of stage 2
}


def test_rollouts_of_two_processes_are_those_of_one(emoji, emoji_dir, train_alone, tmp_path):
  base = save_model(tmp_path / "base", draw_params())
  pod_dir, alone = tmp_path / "pod", tmp_path / "alone"
  settings = REINFORCE | {"init": base, "data.dir": emoji_dir}
  settings = [f"--config.{key}={value}" for key, value in settings.items()]
  settings += ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
  options = lambda workdir: ["--config", "configs/grpo.py:tiny", "--workdir", str(workdir), *settings]
  pod = Pod(tmp_path / "venv", options(pod_dir))
  assert pod.wait(4 * LIMIT) == 0, pod.output

  # One learns from the answers that the other had: a pixel that rounds otherwise compresses otherwise.
  shutil.copytree(pod_dir / "rewards", alone / "rewards")
  train_alone(options(alone))
  ours, theirs = ([row for row in rows(workdir) if "loss" in row] for workdir in (pod_dir, alone))
  assert [row["step"] for row in ours] == [1, 2, 3, 4, 5, 6] and ours[0]["advantage_abs"] > 0
  for one, two in zip(ours, theirs, strict=True):
    for name in ("loss", "grad_norm", "grad_norm_policy", "reward", "advantage_abs"):
      rounding = 1e-5 * one["step"]  # weights differ by rounding after the first update
      assert one.get(name) == pytest.approx(two.get(name), rel=rounding, abs=1e-7), (one["step"], name)
  judged = [next(row for row in rows(workdir) if "eval/reward" in row) for workdir in (pod_dir, alone)]
  assert judged[0]["eval/reward"] == pytest.approx(judged[1]["eval/reward"], rel=1e-3)  # a few pixels
  assert (pod_dir / "samples" / "prompts_0000006.png").exists()


@pytest.mark.parametrize("spec", ["on", "localhost/2/0", "localhost:1/2/2", "localhost:1/0/0"])
def test_what_describes_no_run_is_a_user_error(spec):
  with pytest.raises(UserError, match="neither off, auto nor HOST:PORT/COUNT/INDEX"):
    distributed.start(spec)


def test_what_fails_on_the_main_process_fails_here():
  def fail():
    raise UserError("the folder is full")

  with pytest.raises(UserError, match="the folder is full"):
    distributed.on_main(fail)
  assert distributed.on_main(lambda: 3) == 3


# Stands for a long compilation: a wait outside Python that no signal ends.
STUCK = """
import ctypes
from deepgen_jax import distributed
stop = distributed.Stop()
print("ready", flush=True)
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
lock(mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_run_at_once_whatever_it_does(number):
  process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):  # the first one waits for the update to end
      process.wait(1)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
  finally:
    process.kill()


def test_after_a_run_signals_do_what_they_did_before():
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  stop = distributed.Stop()
  os.kill(os.getpid(), signal.SIGTERM)
  stop.vote(sharding.make_mesh())
  assert stop
  stop.close()
  assert {number: signal.getsignal(number) for number in before} == before
