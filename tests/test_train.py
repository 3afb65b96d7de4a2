"""The loop through its command: it trains, resumes bit for bit, keeps what it must and refuses what it should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from deepgen_jax import checkpoint, train
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.models.config import SIZES
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.weights.load import load_model
from tests.small import CONFIG, draw_params, save_model


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory):
  """A base as stage 1 takes it, without an SCB: random weights of a size that compiles fast, in the place of `tiny`."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(SIZES, "tiny", CONFIG)
    yield save_model(tmp_path_factory.mktemp("base"), draw_params(), ("vlm", "dit", "vae"))


@pytest.fixture(scope="module")
def align(base, tmp_path_factory):
  """align(workdir, steps, *overrides) runs stage 1 with few and small programs."""
  data = tmp_path_factory.mktemp("data")

  def run(workdir, steps, *overrides, config="align"):
    small = {
      "data.text_buckets": "(128,)",
      "unroll": "false",
      "eval.every": 0,
      "eval.samples": 40,
      "eval.pictures": "false",
      "log.every": 1,
      "checkpoint.every": 2,
    }
    small |= {"data.dir": data, "init": base, "steps": steps}
    options = [f"--config.{key}={value}" for key, value in small.items()]
    # A relative path, as people type it.
    argv = ["--config", f"configs/{config}.py:tiny", "--workdir", os.path.relpath(workdir), *options, *overrides]
    arguments, changed = train.parse_arguments(argv)
    train.train(train.load_config(arguments.config, changed), epath.Path(arguments.workdir))
    return epath.Path(workdir)

  return run


@pytest.fixture(scope="module")
def whole(align, tmp_path_factory):
  """A run of four updates, undisturbed."""
  return align(tmp_path_factory.mktemp("whole"), 4, "--config.eval.every=4")


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_a_workdir_holds(whole):
  for name in ("config.json", "checkpoints", "metrics.jsonl", "tensorboard"):
    assert (whole / name).exists(), name
  steps = [row["step"] for row in rows(whole) if "loss" in row]
  assert steps == [1, 2, 3, 4] and all(np.isfinite(row["loss"]) for row in rows(whole) if "loss" in row)
  assert any("eval/heldout_loss" in row for row in rows(whole))


def test_align_trains_scb_and_think_tokens_alone(whole, base):
  _, start, _ = load_model(base)
  _, end, _ = load_model(whole)
  for part in ("vlm", "dit", "vae"):
    jax.tree.map(np.testing.assert_array_equal, end[part], start[part])
  fresh = DeepGen(CONFIG).init(jax.random.key(0), ("scb",))["scb"]
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), end["scb"], fresh)
  assert moved["think_tokens"] and moved["context_head"]["kernel"] and moved["layers"]["q"]["kernel"]


def test_resume_is_bit_equal(whole, align, tmp_path):
  """Two updates, then a change of nothing but `steps`, then two more: as if never interrupted."""
  halved = tmp_path / "halved"
  shutil.copytree(whole, halved)
  shutil.rmtree(halved / "checkpoints" / "4")
  assert checkpoint.Checkpointer(epath.Path(halved), 2, 2).latest() == 2
  align(halved, 4)
  one, two = (checkpoint.load_trained(epath.Path(d)) for d in (whole, halved))
  assert one.keys() == two.keys() and one
  for name in one:
    np.testing.assert_array_equal(one[name], two[name], err_msg=name)
  losses = lambda d: [(r["step"], r["loss"], r["grad_norm"]) for r in rows(epath.Path(d)) if "loss" in r]
  assert losses(whole) == losses(halved)


def test_sft_trains_the_dit_and_lora_and_can_be_loaded(whole, align, tmp_path):
  out = align(tmp_path / "sft", 1, f"--config.init={whole}", config="sft")
  _, before, _ = load_model(whole)
  _, after, _ = load_model(out, weights="raw")
  assert not np.array_equal(before["dit"]["out"]["kernel"], after["dit"]["out"]["kernel"])
  q = after["vlm"]["text"]["segments_0"]["q"]["kernel"]
  np.testing.assert_array_equal(q.kernel, before["vlm"]["text"]["segments_0"]["q"]["kernel"])
  assert np.abs(q.b).max() > 0 and q.scale == 2.0
  jax.tree.map(np.testing.assert_array_equal, after["vlm"]["vision"], before["vlm"]["vision"])


def test_a_workdir_opens_on_other_devices(whole):
  """Written on eight devices, read where there is one."""
  code = (
    "import sys, jax, numpy as np; from deepgen_jax import checkpoint; assert len(jax.devices()) == 1\n"
    "leaves = checkpoint.load_trained(sys.argv[1]); print(sum(float(np.abs(x).sum()) for x in leaves.values()))"
  )
  alone = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  run = subprocess.run([sys.executable, "-c", code, str(whole)], env=alone, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  here = sum(float(np.abs(x).sum()) for x in checkpoint.load_trained(whole).values())
  assert float(run.stdout) == pytest.approx(here, rel=1e-6)


def test_another_config_is_refused_and_nothing_is_written(whole, align):
  before = {path: path.stat().st_mtime_ns for path in Path(whole).rglob("*") if path.is_file()}
  with pytest.raises(UserError, match=r"optim.lr: 0.003 there, 0.1 now"):
    align(whole, 4, "--config.optim.lr=0.1")
  assert before == {path: path.stat().st_mtime_ns for path in Path(whole).rglob("*") if path.is_file()}


def test_two_runs_do_not_share_a_workdir(tmp_path):
  held = checkpoint.lock(epath.Path(tmp_path))
  with pytest.raises(UserError, match="in use by another run"):
    checkpoint.lock(epath.Path(tmp_path))
  held.close()
  checkpoint.lock(epath.Path(tmp_path)).close()


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--config", "configs/nothing.py:tiny", "--workdir", "X"], "config file 'configs/nothing.py' not found"),
    (["--config", "configs/align.py:tiny", "--workdir", "X", "--config.stepz=1"], "Did you mean 'steps'"),
    (["--config", "configs/align.py:tiny", "--wrkdir", "X"], "--workdir"),
    (["--config", "configs/align.py:tiny", "--workdir", "X", "--config.init=no/such/model"], "no such folder"),
    (["--config", "configs/align.py:tiny", "--workdir", "X", "--config.mesh.data=3"], "doesn't fit 8 devices"),
  ],
)
def test_mistakes_end_with_code_2_and_one_message(argv, message, monkeypatch, capsys, tmp_path):
  workdir = tmp_path / "new"
  monkeypatch.setattr(sys, "argv", ["train", *[str(workdir) if word == "X" else word for word in argv]])
  with pytest.raises(SystemExit) as end:
    run_command(train.main)
  error = capsys.readouterr().err
  assert end.value.code == 2 and message in error and "Traceback" not in error
  assert not workdir.exists()
