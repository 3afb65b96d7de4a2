"""Commands keep what XLA frees on CPU, unless an accelerator or the user's own setting says otherwise."""

import os
import subprocess
import sys

import pytest

from deepgen_jax import cli

# Page faults of a program whose working memory is 256 MB (128 huge pages); the least of several runs.
_PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from deepgen_jax import cli
if sys.argv[1] == "keep":
  cli.start_command()
step = jax.jit(lambda x, w: (x @ w) @ w.T)
x, w = jnp.ones((2**15, 32)), jnp.ones((32, 2**11))
faults = []
for _ in range(12):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(x, w).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[4:]))
"""


def _faults(how: str, **environment: str) -> int:
  clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
  command = [sys.executable, "-c", _PROGRAM, how]
  out = subprocess.run(command, env=clean | {"JAX_PLATFORMS": "cpu"} | environment, capture_output=True, text=True, check=True)
  return int(out.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_for_the_next_run():
  assert _faults("keep") < 16 < 64 <= _faults("leave")
  assert _faults("keep", MALLOC_MMAP_MAX_="65536") >= 64  # the user's own setting stands


@pytest.mark.skipif(sys.platform != "linux", reason="lists threads by /proc")
@pytest.mark.parametrize("command", ["train", "generate", "evaluation", "benchmark", "data.precompute"])
def test_importing_a_command_starts_no_thread_beside_those_of_jax(command):
  """Their arenas would be there before `start_command` allows one alone, and hand large blocks back."""
  count = "len(os.listdir('/proc/self/task'))"
  program = f"import os, jax; before = {count}; import deepgen_jax.{command}; print(before, {count})"
  out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
  assert out[0] == out[1]


def test_only_a_machine_without_accelerators_keeps_freed_memory(monkeypatch):
  for platforms, keeps in (("cpu", True), ("tpu,cpu", False), ("cuda", False)):
    kept = []
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(cli, "_keep_freed_memory", lambda: kept.append(True))
    cli.start_command()
    assert bool(kept) == keeps
