"""The short form of tests/torture.py, and that its comparison would notice."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from tests import torture


def change_row(file, number, **values):
  lines = file.read_text().splitlines()
  lines[number] = json.dumps(json.loads(lines[number]) | values)
  file.write_text("".join(line + "\n" for line in lines))


def repeat_row(file):
  lines = file.read_text().splitlines(keepends=True)
  file.write_text("".join([*lines, lines[-1]]))


def lose_row(file):
  file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def repeat_events(folder):
  first = min(folder.iterdir())
  shutil.copy(first, folder / f"again.{first.name}")


WRONG = {
  "a sample twice": lambda run: change_row(run / "samples.jsonl", 3, ids=[23, *range(25, 32)]),
  "a micro-batch twice": lambda run: repeat_row(run / "samples.jsonl"),
  "a micro-batch lost": lambda run: lose_row(run / "samples.jsonl"),
  "another loss": lambda run: change_row(run / "metrics.jsonl", 3, loss=1.5),
  "a row twice": lambda run: repeat_row(run / "metrics.jsonl"),
  "a row lost": lambda run: lose_row(run / "metrics.jsonl"),
  "events twice": lambda run: repeat_events(run / "tensorboard"),
  "an earlier checkpoint": lambda run: shutil.rmtree(max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))),
}


def test_killed_at_random_moments_a_run_ends_as_if_undisturbed(tmp_path):
  with mock.patch.dict(os.environ):
    seen = torture.run(tmp_path, ["2"], kills=2)["2"]
  assert sum(seen["deaths"].values()) == 2 and set(seen["differences"].values()) == {0.0}
  for number, (what, spoil) in enumerate(WRONG.items()):
    copy = shutil.copytree(tmp_path / "tortured_2", tmp_path / str(number))
    spoil(copy)
    with pytest.raises(AssertionError):
      torture.compare(copy, tmp_path / "whole_2", exact=True)
      pytest.fail(what)


# A life that waits for ever where it opens its log, a pipe that nobody reads.
ABANDONED = """
import multiprocessing, sys
from tests import torture
if __name__ == "__main__":
  life = multiprocessing.get_context("forkserver").Process(target=torture._train, args=([], 1, sys.argv[1]))
  life.start()
  print(life.pid, flush=True)
  life.join()
"""


def test_what_is_tortured_does_not_outlive_the_torture(tmp_path):
  os.mkfifo(tmp_path / "log")
  (tmp_path / "abandoned.py").write_text(ABANDONED)
  command = [sys.executable, str(tmp_path / "abandoned.py"), str(tmp_path / "log")]
  environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
    life = Path("/proc") / process.stdout.readline().strip() / "stat"
    assert alive(life)
    time.sleep(0.5)
    assert alive(life)
    process.kill()
  end = time.monotonic() + 20
  while alive(life):
    assert time.monotonic() < end
    time.sleep(0.1)


def alive(stat):
  try:
    return stat.read_text().rpartition(") ")[2][0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False
