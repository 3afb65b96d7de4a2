"""Runs PyTorch's side of a case in a process (`torch_worker`), as installed, with fast sgemm, or compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

# MKL takes its fast path on Intel's processors alone. These two functions are how it asks; preloaded, they answer yes.
_FAST_SGEMM = "int mkl_serv_intel_cpu_true(void) { return 1; }\nint mkl_serv_intel_cpu(void) { return 1; }\n"


class WorkerError(RuntimeError):
  """A PyTorch process that ended before it should have; the message has the end of what it said."""


def build_fast_sgemm(folder: Path) -> Path | None:
  """Compiles the library that makes MKL's sgemm fast on other makers' processors; None without a C compiler."""
  compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
  if compiler is None or sys.platform != "linux":
    return None
  source, library = folder / "fast_sgemm.c", folder / "fast_sgemm.so"
  source.write_text(_FAST_SGEMM)
  subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
  return library


class TorchProcess:
  """One process. A context manager: leaving it ends the process.

  `outputs` is what the first run gave, {name: array}; `versions` those of the libraries.
  """

  def __init__(self, folder: Path, name: str, arguments: Sequence[str], preload: Path | None = None):
    """folder: weights and inputs of the case; arguments: further ones of `torch_worker`. Returns once it has run once."""
    self._log = folder / f"{name}.log"
    output, environment = folder / f"{name}.safetensors", dict(os.environ, HF_HUB_OFFLINE="1")
    if preload is not None:
      environment["LD_PRELOAD"] = ":".join(filter(None, [str(preload), environment.get("LD_PRELOAD")]))
    worker = Path(__file__).with_name("torch_worker.py")
    with self._log.open("w") as log:
      self._process = subprocess.Popen(
        [sys.executable, worker, folder, output, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
      )
    try:
      self.versions: dict[str, str] = self._answer()
      self.outputs: dict[str, np.ndarray] = load_file(output)
    except BaseException:
      self.__exit__()
      raise

  def __enter__(self) -> TorchProcess:
    return self

  def __exit__(self, *_) -> None:
    self._process.kill()
    self._process.communicate()

  def measure(self) -> dict[str, float]:
    """One more run -> its seconds, {"wall", "cpu"}."""
    self._process.stdin.write("run\n")
    self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict:
    if line := self._process.stdout.readline():
      return json.loads(line)
    lines = [line for line in self._log.read_text().splitlines() if line.strip()]
    raise WorkerError("PyTorch's process ended early: " + "\n".join(lines[-12:]))
