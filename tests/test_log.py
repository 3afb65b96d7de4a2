"""Metrics, pictures and traces of a run: rows belong to updates, and none lies past a restored one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from deepgen_jax.errors import UserError
from deepgen_jax.log import Log, Profiler, SampleLog
from deepgen_jax.train import _count_program


def make_log(workdir, start=0):
  return Log(epath.Path(workdir), steps=10, start=start, every=2, images_per_step=8)


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rows_come_at_the_cadence_and_at_the_end(tmp_path, capsys):
  log = make_log(tmp_path)
  for step in range(1, 6):
    log.write(step, {"loss": step / 10}, waited=step**2)
  log.write(5, {"loss": 0.5}, waited=30, force=True)
  log.close()
  assert [row["seconds_data"] for row in rows(tmp_path)] == [2, 6, 14]  # an update, since the row before
  assert [row["step"] for row in rows(tmp_path)] == [2, 4, 5]
  assert rows(tmp_path)[0]["loss"] == 0.2 and rows(tmp_path)[0]["images_per_second"] > 0
  assert "update 4/10  loss 0.4000" in capsys.readouterr().out


def test_resuming_removes_what_lies_past_the_restored_update(tmp_path):
  log = make_log(tmp_path)
  log.record(0, {"eval/loss": 2.0})  # of the weights that a run starts with
  for step in (2, 4):
    log.write(step, {"loss": 1.0})
  log.checkpointed(4)
  log.write(6, {"loss": 1.0})
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 7, "lo')  # a crash in the middle of a line
  events = lambda: {file.name.rpartition(".from")[2] for file in (tmp_path / "tensorboard").iterdir()}
  assert events() == {"0", "4"}
  make_log(tmp_path, start=4).close()
  assert [row["step"] for row in rows(tmp_path)] == [0, 2, 4]
  assert events() == {"0", "4"}  # the later file is new
  make_log(tmp_path, start=2).close()
  assert [row["step"] for row in rows(tmp_path)] == [0, 2] and events() == {"0", "2"}
  make_log(tmp_path, start=0).close()
  assert rows(tmp_path) == []


def test_ids_of_samples_are_logged_and_cut_like_rows(tmp_path):
  file = epath.Path(tmp_path / "samples.jsonl")
  log = SampleLog(file, 0, on=True)
  for step in (1, 2, 3):
    log.write(step, step - 1, np.array([2 * step, 2 * step + 1], np.uint32))
  log.flush()
  kept = lambda: [json.loads(line) for line in file.read_text().splitlines()]
  assert kept()[1] == {"step": 2, "micro_batch": 1, "ids": [4, 5]} and len(kept()) == 3
  log.close()
  with file.open("ab") as stream:
    stream.write(b'{"step": 3, "micro_ba\xff\x00')  # a power cut
  SampleLog(file, 2, on=False).close()  # switched off since: what lies past the restart goes all the same
  assert [row["step"] for row in kept()] == [1, 2]
  assert not (tmp_path / "none.jsonl").exists()
  SampleLog(epath.Path(tmp_path / "none.jsonl"), 0, on=False).write(1, 0, [1])
  assert not (tmp_path / "none.jsonl").exists()


def test_pictures_are_files_too(tmp_path):
  log, picture = make_log(tmp_path), np.full((4, 6, 3), 7, np.uint8)
  log.image(3, "grid", picture)
  log.close()
  with Image.open(tmp_path / "samples" / "grid_0000003.png") as image:
    np.testing.assert_array_equal(np.asarray(image), picture)


def test_a_profile_covers_its_updates(tmp_path):
  profiler = Profiler("1:2", epath.Path(tmp_path / "profile"))
  profiler.at(0)
  assert not (tmp_path / "profile").exists()
  profiler.at(1)
  (jnp.ones(8) + 1).block_until_ready()
  profiler.at(2)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  profiler.close()


def test_a_wrong_span_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"config\.profile '5'"):
    Profiler("5", epath.Path(tmp_path))


def test_too_many_programs_stop_the_run():
  """A new shape counts once, in whatever leaf it is."""
  programs, batch = set(), lambda n: {"target": {"mean": np.zeros((2, n))}, "ids": np.zeros((2, 3))}
  for n in (4, 5, 4, 5):
    _count_program(programs, batch(n), 2)
  with pytest.raises(UserError, match=r"more than 2 programs.*text_buckets"):
    _count_program(programs, batch(6), 2)
