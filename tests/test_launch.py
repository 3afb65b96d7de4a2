"""The launch scripts, without the clusters: what they would run, and what they miss."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from deepgen_jax import train

ROOT = Path(__file__).parent.parent
OPTIONS = ["--config", "configs/sft.py:full", "--workdir", "gs://bucket/sft", "--config.data.pattern=('generate',)"]
SETTINGS = {
  "local": {},
  "tpu": {"PROJECT": "mine", "ZONE": "us-east5-a", "ACCELERATOR": "v5p-64"},
  "gke": {"IMAGE": "registry/deepgen:1", "HOSTS": "4", "TPU": "tpu-v5p-slice", "TOPOLOGY": "2x2x4"},
  "slurm": {"NODES": "2", "GPUS": "8", "TIME": "24:00:00"},
}


def dry_run(script, options=OPTIONS, **settings):
  first = ["--processes", "2"] if script == "local" else []
  # From another folder, by a relative path, with nothing but what is needed in the environment.
  path = os.path.relpath(ROOT / "launch" / f"{script}.sh", ROOT / "tests")
  return subprocess.run(
    ["bash", path, *first, "--dry-run", "--", *options],
    cwd=ROOT / "tests",
    env={"PATH": "/usr/bin:/bin"} | settings,
    capture_output=True,
    text=True,
    timeout=60,
  )


def trained(line: str) -> list[str]:
  """The arguments of deepgen_jax.train in a line that a shell would run."""
  words = shlex.split(line)
  return words[words.index("deepgen_jax.train") + 1 :]


@pytest.mark.parametrize("script", SETTINGS)
def test_a_dry_run_shows_the_command_of_every_process(script):
  done = dry_run(script, **SETTINGS[script])
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stdout.splitlines() if "deepgen_jax.train" in line]
  if script == "tpu":
    (line,) = lines
    assert "--worker=all" in line
    lines = [next(word for word in shlex.split(line) if word.startswith("--command="))]
  if script == "gke":
    (line,) = lines
    lines = [line.partition("bash, -c, '")[2].removesuffix("']").replace("''", "'")]
  distributed = []
  for line in lines:
    arguments, overrides = train.parse_arguments([word for word in trained(line) if word != "&"])
    assert (arguments.config, arguments.workdir) == (OPTIONS[1], OPTIONS[3])
    assert overrides[0] == "data.pattern=('generate',)"  # quoted all the way
    distributed += [word.partition("=")[2] for word in overrides[1:]]
  expected = {
    "local": [f"localhost:12765/2/{i}" for i in range(2)],
    "tpu": ["auto"],
    "gke": ["deepgen-train-0-0.deepgen:12765/4/$JOB_COMPLETION_INDEX"],
    "slurm": ["auto"],
  }
  assert distributed == expected[script]


@pytest.mark.parametrize("script, name", [(s, name) for s, needed in SETTINGS.items() for name in needed if name != "TIME"])
def test_what_is_not_set_ends_the_script_before_anything_runs(script, name):
  settings = {key: value for key, value in SETTINGS[script].items() if key != name}
  done = dry_run(script, **settings)
  missing = "GPUS" if name == "TPU" else name
  assert done.returncode == 2 and f"error: set {missing}: " in done.stderr and not done.stdout


@pytest.mark.parametrize("script", SETTINGS)
@pytest.mark.parametrize(
  "options, message",
  [
    (OPTIONS[2:], "--config among them"),
    (OPTIONS[:2], "--workdir among them"),
    ([*OPTIONS, "--config.distributed=auto"], "leave --config.distributed to this script"),
  ],
)
def test_options_of_training_are_checked(script, options, message):
  done = dry_run(script, options, **SETTINGS[script])
  assert done.returncode == 2 and message in done.stderr and not done.stdout


@pytest.mark.parametrize("script", ["tpu", "gke"])
def test_hosts_need_a_workdir_that_all_see(script):
  done = dry_run(script, [*OPTIONS[:2], "--workdir", "runs/sft"], **SETTINGS[script])
  assert done.returncode == 2 and "must be on gs://" in done.stderr


def test_the_cluster_jobs_ask_for_time_to_save():
  gke, slurm = (dry_run(script, **SETTINGS[script]).stdout for script in ("gke", "slurm"))
  assert "terminationGracePeriodSeconds: 120" in gke and "maxRestarts: 10" in gke
  assert "#SBATCH --signal=B:TERM@120" in slurm and "#SBATCH --requeue" in slurm
  subprocess.run(["bash", "-n"], input=slurm, text=True, check=True)
