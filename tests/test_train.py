"""The loop through its command: it trains, resumes bit for bit, keeps what it must and refuses what it should."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from deepgen_jax import checkpoint, stages, train
from deepgen_jax.data.loader import MicroBatchIterator
from deepgen_jax.errors import Stalled, UserError, run_command
from deepgen_jax.models.config import SIZES
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.weights.load import load_model
from tests.small import CONFIG, draw_params, random_image, save_model


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory):
  """A base as stage 1 takes it, without an SCB: random weights of a size that compiles fast, in the place of `tiny`."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(SIZES, "tiny", CONFIG)
    yield save_model(tmp_path_factory.mktemp("base"), draw_params(), ("vlm", "dit", "vae"))


@pytest.fixture(scope="module")
def align(base, emoji_dir):
  """align(workdir, steps, *overrides) runs stage 1 with few and small programs."""

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
    small |= {"data.dir": emoji_dir, "init": base, "steps": steps}
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


def png(pixels):
  data = io.BytesIO()
  Image.fromarray(pixels).save(data, format="PNG")
  return data.getvalue()


def add(tar, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_a_workdir_holds(whole):
  for name in ("config.json", "checkpoints", "metrics.jsonl", "tensorboard"):
    assert (whole / name).exists(), name
  steps = [row["step"] for row in rows(whole) if "loss" in row]
  assert steps == [1, 2, 3, 4] and all(np.isfinite(row["loss"]) for row in rows(whole) if "loss" in row)
  assert any("eval/heldout_loss" in row for row in rows(whole))
  data, update = (sum(row.get(name, 0) for row in rows(whole)) for name in ("seconds_data", "seconds_per_update"))
  assert 0 < data < update


def test_align_trains_scb_and_think_tokens_alone(whole, base):
  _, start, _ = load_model(base)
  _, end, _ = load_model(whole)
  for part in ("vlm", "dit", "vae"):
    jax.tree.map(np.testing.assert_array_equal, end[part], start[part])
  fresh = DeepGen(CONFIG).init(jax.random.key(0), ("scb",))["scb"]
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), end["scb"], fresh)
  assert moved["think_tokens"] and moved["context_head"]["kernel"] and moved["layers"]["q"]["kernel"]


def same(run, whole):
  """Weights and rows, bit for bit."""
  one, two = (checkpoint.load_trained(epath.Path(d)) for d in (run, whole))
  assert one.keys() == two.keys() and one
  for name in one:
    np.testing.assert_array_equal(one[name], two[name], err_msg=name)
  found = [[{k: v for k, v in row.items() if "second" not in k} for row in rows(d) if "loss" in row] for d in (run, whole)]
  assert found[0] == found[1]


def test_when_data_hangs_what_is_done_is_saved_and_resume_is_bit_equal(whole, align, tmp_path, monkeypatch):
  """In the middle of the third update, of which nothing counts yet. Then two more: as if never interrupted."""
  real = MicroBatchIterator.__next__

  def hangs(samples):
    if samples.consumed == 10:
      raise Stalled("sample 9 of numbers hangs")
    return real(samples)

  monkeypatch.setattr(MicroBatchIterator, "__next__", hangs)
  with pytest.raises(Stalled, match="sample 9"):
    align(tmp_path, 4, "--config.checkpoint.every=4", "--config.log.samples=true")
  assert checkpoint.stored(tmp_path)[0] == 2
  monkeypatch.undo()
  align(tmp_path, 4, "--config.log.samples=true")
  same(tmp_path, whole)
  assert [json.loads(line)["micro_batch"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [*range(16)]


def test_when_storage_hangs_too_the_last_save_gives_up(monkeypatch, capsys):
  ended, codes = threading.Event(), []
  monkeypatch.setattr(train.os, "_exit", lambda code: codes.append(code) or ended.set())
  with train._at_most(0.1, Stalled("sample 9 hangs")):
    assert ended.wait(60)
  assert codes == [1] and "error: sample 9 hangs; what was done since couldn't be saved" in capsys.readouterr().err
  with train._at_most(0.1, Stalled("sample 9 hangs")):
    raise UserError("the disk is full")
  time.sleep(0.2)
  assert codes == [1] and "can't be saved: the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("place", [(stages, "build"), (checkpoint.Checkpointer, "restore")])
def test_told_to_stop_before_the_first_update_a_run_ends_well(whole, align, tmp_path, monkeypatch, capsys, place):
  real = getattr(*place)

  def told(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)

  monkeypatch.setattr(*place, told)
  before = signal.getsignal(signal.SIGTERM)
  align(tmp_path, 4)
  assert "stopped" in capsys.readouterr().out and signal.getsignal(signal.SIGTERM) == before
  assert not list(tmp_path.rglob("checkpoints/*")) and not list(tmp_path.rglob("bad_samples.jsonl"))


def test_a_run_on_a_user_s_own_tar(align, tmp_path, capsys):
  """Generation and edits with one and two references; a broken sample, a narrow one; nothing of the embedded set."""
  tar = str(tmp_path / "edits-{0..1}.tar")
  for shard in range(2):
    with tarfile.open(tar.replace("{0..1}", str(shard)), "w") as file:
      for n in range(6):
        for name in ("output", "input_0", "input_1")[: 2 + n % 2]:
          add(file, f"{n}.{name}.png", png(random_image(64, 64, seed=n)) if n != 2 else b"broken")
        add(file, f"{n}.txt", b"make it another")
  folder = tmp_path / "pictures"
  folder.mkdir()
  for n in range(5):
    (folder / f"{n}.png").write_bytes(png(random_image(64, 1000 if n == 3 else 64, seed=n)))
    (folder / f"{n}.txt").write_text("a picture")
  sources = f"--config.data.sources=wds:{tar},folder:{folder}"
  out = align(tmp_path / "run", 2, sources, "--config.data.max_bad_share=0.5", "--config.eval.every=1")
  assert [row["step"] for row in rows(out)] == [1, 2] and all(np.isfinite(row["loss"]) for row in rows(out))
  counts = json.loads((out / "data_counts.json").read_text())
  assert counts[f"wds:{tar}"]["drawn"] >= 16 and counts[f"wds:{tar}"]["broken"] >= 2
  assert counts[f"folder:{folder}"]["filtered"]["max_aspect"] >= 1
  bad = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
  said = capsys.readouterr().out
  assert f"3 samples couldn't be used, others took their place: {os.path.relpath(out)}" in said
  assert f"data: folder:{folder}, 5 samples to generate\n" in said and f"data: wds:{tar}, 12 samples to edit\n" in said
  assert {(b["source"][:3], b["index"], b["filter"]) for b in bad} == {("wds", 2, ""), ("wds", 8, ""), ("fol", 3, "max_aspect")}


def test_bad_data_stops_a_run_and_is_listed(align, tmp_path, capsys):
  for n in range(4):
    (tmp_path / f"{n}.png").write_bytes(b"broken" if n else png(random_image(64, 64)))
    (tmp_path / f"{n}.txt").write_text("a picture")
  with pytest.raises(UserError, match=r"were broken, more than the share of 0\.05"):
    align(tmp_path / "run", 9, f"--config.data.sources=folder:{tmp_path},emoji-edits", "--config.data.pattern=generate")
  assert re.search(r"data: emoji edits, \d+ samples to edit, unused: not in data\.pattern", capsys.readouterr().out)
  assert len((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()) >= 1


def test_sft_trains_the_dit_and_lora_and_can_be_loaded(whole, align, tmp_path):
  one_task = "--config.data.pattern=('edit',)"
  out = align(tmp_path / "sft", 1, f"--config.init={whole}", one_task, config="sft")
  _, before, _ = load_model(whole)
  _, after, _ = load_model(out, weights="raw")
  assert not np.array_equal(before["dit"]["out"]["kernel"], after["dit"]["out"]["kernel"])
  q = after["vlm"]["text"]["segments_0"]["q"]["kernel"]
  np.testing.assert_array_equal(q.kernel, before["vlm"]["text"]["segments_0"]["q"]["kernel"])
  assert np.abs(q.b).max() > 0 and q.scale == 2.0
  jax.tree.map(np.testing.assert_array_equal, after["vlm"]["vision"], before["vlm"]["vision"])


def test_it_trains_at_another_image_size_which_its_workdir_remembers(base, align, tmp_path):
  assert load_model(base)[0].image_size == 64
  workdir = align(tmp_path / "run", 1, "--config.data.image_size=96", "--config.data.pattern=('generate',)")
  assert load_model(workdir)[0].image_size == 96 and np.isfinite(rows(workdir)[0]["loss"])
  for side, problem in ((90, "image_size 90: give a multiple of 32 up to"), (64000, "image_size 64000: give")):
    with pytest.raises(UserError, match=problem):
      align(tmp_path / "other", 1, f"--config.data.image_size={side}")
  assert not (tmp_path / "other" / "config.json").exists()


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
  with pytest.raises(UserError, match=r"optim.lr: 0.002 there, 0.1 now"):
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
