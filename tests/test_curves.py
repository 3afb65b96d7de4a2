"""The curves of several runs: what is averaged with what, and what is said of a wrong name."""

import json

import numpy as np
import pytest

from deepgen_jax import curves
from deepgen_jax.errors import UserError

PNG = b"\x89PNG\r\n"


@pytest.fixture
def workdirs(tmp_path):
  """Two seeds of one run, the second stopped early, and another without the evaluation."""

  def write(name, updates, slope, evaluated=True):
    folder = tmp_path / name
    folder.mkdir()
    rows = [{"step": i, "loss": slope * i, "note": "text"} for i in range(1, updates + 1)]
    rows += [{"step": i, "eval/reward/ocr": slope + i} for i in range(0, updates + 1, 2)] if evaluated else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)

  return [("seeds", write("a", 6, 1.0)), ("seeds", write("b", 4, 3.0)), ("other", write("c", 6, 0.0, evaluated=False))]


def run(monkeypatch, *options):
  monkeypatch.setattr("sys.argv", ["curves", *options])
  curves.main()


def test_seeds_are_averaged_where_all_have_values(workdirs):
  seeds = [run["eval/reward/ocr"] for run in curves.read(workdirs)["seeds"]]
  updates, mean, low, high = curves.spread(seeds, smooth=20)
  assert updates.tolist() == [0, 2, 4]
  assert mean.tolist() == [2, 4, 6] and low.tolist() == [1, 3, 5] and high.tolist() == [3, 5, 7]


def test_metrics_of_every_update_are_smoothed(workdirs):
  (seed,) = curves.read(workdirs[:1])["seeds"]
  updates, mean, *_ = curves.spread([seed["loss"]], smooth=3)
  assert updates.tolist() == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(mean, [1.5, 2, 3, 4, 5, 5.5])
  np.testing.assert_allclose(curves.spread([seed["loss"]], smooth=1)[1], [1, 2, 3, 4, 5, 6])


def test_the_picture_is_written(workdirs, tmp_path, monkeypatch):
  output = tmp_path / "curves.png"
  runs = [option for name, folder in workdirs for option in ("--run", f"{name}={folder}")]
  run(monkeypatch, "--output", str(output), *runs)
  assert output.read_bytes().startswith(PNG)
  run(monkeypatch, "--output", str(output), *runs, "--metric", "loss", "--metric", "eval/reward/ocr", "--smooth", "2")
  assert output.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
  "options, told",
  [
    (["--run", "a"], "write --run NAME=WORKDIR"),
    (["--run", "a=nowhere"], "nowhere"),
    (["--run", "a={folder}", "--metric", "eval/reward/ocl"], "eval/reward/ocr"),
    (["--run", "a={folder}", "--smooth", "0"], "at least 1"),
  ],
)
def test_mistakes_are_told(workdirs, tmp_path, monkeypatch, options, told):
  output = tmp_path / "curves.png"
  with pytest.raises(UserError, match=told):
    run(monkeypatch, "--output", str(output), *(option.format(folder=workdirs[0][1]) for option in options))
  assert not output.exists()


def test_a_run_without_evaluation_names_its_metrics(workdirs, tmp_path, monkeypatch):
  with pytest.raises(UserError, match="--metric: loss"):
    run(monkeypatch, "--output", str(tmp_path / "curves.png"), "--run", f"c={workdirs[2][1]}")
