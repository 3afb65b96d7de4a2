"""Stage 3 through the one loop: it is interrupted and goes on bit for bit, is evaluated on fixed prompts, and can be loaded."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from deepgen_jax import checkpoint, train
from deepgen_jax.config import load_config
from deepgen_jax.errors import UserError
from deepgen_jax.models.config import SIZES
from deepgen_jax.stages import grpo
from deepgen_jax.stages.grpo import Judging
from deepgen_jax.weights.load import load_model
from tests.small import CONFIG, draw_params, save_model
from tests.stages.test_grpo import SMALL, TEXTS, Judge

SETTINGS = SMALL | {
  "grpo.updates_per_rollout": 2,
  "grpo.prompts": 4,
  "grpo.kl_weight": 1e-3,
  "grpo.eval_images": 2,
  "grpo.eval_steps": 2,
  "optim.ema": 0.5,
  "steps": 4,
  "checkpoint.every": 2,
  "eval.every": 4,
  "log.every": 1,
}


class Moody(Judge):
  """A judge that never says the same twice."""

  def __init__(self):
    super().__init__(lambda item: float(np.random.default_rng().normal()))


class Absent(Judge):
  """A judge that must not be asked again."""

  def submit(self, items, weights):
    raise AssertionError("the answers were there")


class Interrupting:
  """Prompts that ask the run to stop while its first rollout is under way."""

  def __getitem__(self, i):
    if i == 0:
      os.kill(os.getpid(), signal.SIGTERM)
    return TEXTS[i]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """run(workdir, prompts, judge, **overrides) is the command; the evaluation asks how red its two held-out prompts came out."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(SIZES, "tiny", CONFIG)
    base = save_model(tmp_path_factory.mktemp("base"), draw_params())

    def run(workdir, prompts, judge, **overrides):
      patch.setattr(grpo, "load_judging", lambda config: Judging(prompts, judge, [TEXTS[0], TEXTS[1]], Judge()))
      values = SETTINGS | {"init": base} | {key.replace("__", "."): value for key, value in overrides.items()}
      config = load_config("configs/grpo.py:tiny", [f"{key}={value}" for key, value in values.items()])
      train.train(config, epath.Path(workdir))
      return epath.Path(workdir)

    yield SimpleNamespace(base=base, run=run)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
  """Two rollouts of two updates each, undisturbed."""
  return run.run(tmp_path_factory.mktemp("whole") / "run", TEXTS, Moody())


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_interrupted_within_a_rollout_goes_on_as_if_it_never_was(whole, run, tmp_path):
  """It stops where the rollout's updates are done; a moody judge's answers are taken from where they were kept."""
  halved = epath.Path(tmp_path / "halved")
  halved.mkdir()
  shutil.copytree(whole / "rewards", halved / "rewards")
  run.run(halved, Interrupting(), Absent())
  assert checkpoint.Checkpointer(halved, 2, 2).latest() == 2
  run.run(halved, TEXTS, Absent())
  for kind in ("raw", "ema"):
    one, two = (checkpoint.load_trained(folder, kind) for folder in (whole, halved))
    assert one.keys() == two.keys() and one
    for name in one:
      np.testing.assert_array_equal(one[name], two[name], err_msg=name)
  numbers = lambda folder: [
    {key: value for key, value in row.items() if not key.startswith(("seconds", "images_per"))} for row in rows(folder)
  ]
  assert numbers(whole) == numbers(halved)


def test_metrics_and_pictures_of_a_run(whole):
  found = rows(whole)
  assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4]
  last = next(row for row in found if row["step"] == 4 and "loss" in row)
  for name in (
    "reward",
    "zero_std_groups",
    "ratio",
    "clip_fraction",
    "kl",
    "grad_norm_policy",
    "missing/redness",
    "seconds_update",
  ):
    assert np.isfinite(last[name]), name
  judged = [row for row in found if "eval/reward" in row]
  assert [row["step"] for row in judged] == [0, 4]  # what it started with, too
  assert all("eval/reward/redness/colours" in row for row in judged)
  with Image.open(whole / "samples" / "prompts_0000004.png") as grid:
    assert grid.size == (128, 128)  # a row a prompt, two images each


def test_it_trains_the_dit_and_nothing_else_and_can_be_loaded(whole, run):
  _, before, _ = load_model(run.base)
  _, after, _ = load_model(whole)
  _, raw, _ = load_model(whole, weights="raw")
  assert not np.array_equal(before["dit"]["out"]["kernel"], after["dit"]["out"]["kernel"])
  assert not np.array_equal(raw["dit"]["out"]["kernel"], after["dit"]["out"]["kernel"])
  for part in ("vlm", "scb", "vae"):
    jax.tree.map(np.testing.assert_array_equal, after[part], before[part])


def test_steps_that_end_within_a_rollout_are_refused(run, tmp_path):
  with pytest.raises(UserError, match="updates come 2 at a time"):
    run.run(tmp_path / "odd", TEXTS, Judge(), steps=3)
  assert not (tmp_path / "odd").exists()
