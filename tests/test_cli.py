"""Commands keep what XLA frees on CPU, unless an accelerator or the user's own setting says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepgen_jax import cli

ROOT = Path(__file__).parent.parent

# Page faults of a program whose working memory is 256 MB (128 huge pages); the least of several runs.
_PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from deepgen_jax import cli
if sys.argv[1] == "keep":
  cli.start_command()
step = jax.jit(lambda x, w: (x @ w) @ w.T)
x, w = jnp.ones((2**15, 8)), jnp.ones((8, 2**11))
faults = []
for _ in range(8):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(x, w).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[3:]))
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
def test_importing_a_command_starts_no_thread_beside_those_of_jax():
  """Their arenas would be there before `start_command` allows one alone, and hand large blocks back."""
  lines = ["import os, jax", "count = lambda name: print(name, len(os.listdir('/proc/self/task')))", "count('jax')"]
  for command in ("train", "generate", "evaluation", "benchmark", "data.precompute"):
    lines.append(f"import deepgen_jax.{command}; count({command!r})")
  out = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout
  threads = dict(line.split() for line in out.splitlines())
  assert len(threads) == 6 and len(set(threads.values())) == 1, threads


def test_what_every_training_opens_leaves_pytorch_alone():
  code = (
    "import sys; from deepgen_jax import log; from deepgen_jax.data import tokens\n"
    "log._summary_writer(); tokens.load_tokenizer('deepgen_jax/assets/tiny/tokenizer'); print('torch' in sys.modules)"
  )
  out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert out.split() == ["False"]


def test_only_a_machine_without_accelerators_keeps_freed_memory(monkeypatch):
  for platforms, keeps in (("cpu", True), ("tpu,cpu", False), ("cuda", False)):
    kept = []
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(cli, "_keep_freed_memory", lambda: kept.append(True))
    cli.start_command()
    assert bool(kept) == keeps
