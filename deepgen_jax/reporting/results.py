"""What a report shows, read from the files that evaluations and trainings leave behind."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from deepgen_jax.errors import UserError

# Scores that the report shows: key -> (label, higher is better). Shares are 0..1, the pixel error is 0..255.
SCORES = {
  "generation_r1": ("generation R@1", True),
  "generation_r5": ("generation R@5", True),
  "edit_r1": ("edit R@1", True),
  "edit_r5": ("edit R@5", True),
  "heldout_loss": ("held-out loss", False),
  "edit_error_outside": ("pixel error outside the change", False),
  "reward": ("reward (emoji similarity)", True),
}
OPTIONAL = ("edit_error_outside", "reward")
PICTURES = {"captions": ("generated", "true"), "instructions": ("source", "edited", "edit_true")}  # texts -> images


@dataclass(frozen=True)
class Stage:
  """An evaluated model. scores: its scores.json; samples: `captions` str [N] with uint8 [N,H,W,3] `generated`, `true`, and
  `instructions` str [M] with uint8 [M,H,W,3] `source`, `edited`, `edit_true`.
  """

  name: str
  scores: dict[str, Any]
  samples: dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
  """A training. losses: "loss" (training) and "heldout..." -> float64 [K,2] of (update, loss); of reinforcement learning
  "reward" (of rollouts) and "heldout_reward" instead.
  """

  name: str
  losses: dict[str, np.ndarray]


def read_stage(name: str, folder: str) -> Stage:
  """Reads scores.json and samples.npz of an evaluation. Raises UserError for what is missing or malformed."""
  root, again = epath.Path(folder), "; evaluate this stage again (python -m deepgen_jax.evaluation)"
  for file in ("scores.json", "samples.npz"):
    if not (root / file).exists():
      raise UserError(f"stage {name}: {root / file} not found{again}")
  try:
    scores = json.loads((root / "scores.json").read_text())
    for key in SCORES.keys() - set(OPTIONAL):
      float(scores[key])
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(f"stage {name}: {root / 'scores.json'} isn't an object with a number {error}{again}") from None
  try:
    with (root / "samples.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
      samples = {key: stored[key] for texts, images in PICTURES.items() for key in (texts, *images)}
  except Exception as error:  # a damaged archive fails in many ways: zipfile, zlib, numpy
    raise UserError(f"stage {name}: {root / 'samples.npz'} can't be read: {error}{again}") from None
  for texts, images in PICTURES.items():
    for key in images:
      image, count = samples[key], len(samples[texts])
      if image.dtype != np.uint8 or image.ndim != 4 or image.shape[::3] != (count, 3):
        raise UserError(f"stage {name}: {key!r} is {image.dtype} {list(image.shape)}, not uint8 [{count}, H, W, 3]{again}")
  return Stage(name, scores | {"stage": name}, samples)


def read_metrics(name: str, workdir: str) -> list[dict[str, Any]]:
  """The rows of a workdir's metrics.jsonl, in the order of its updates. Raises UserError."""
  path = epath.Path(workdir) / "metrics.jsonl"
  if not path.exists():
    raise UserError(f"run {name}: {path} not found; is {workdir!r} the --workdir of a training?")
  rows = []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    try:
      rows.append(json.loads(line))
      rows[-1]["step"] = int(rows[-1]["step"])
    except (ValueError, KeyError, TypeError):
      raise UserError(f"run {name}: {path} line {number} is no row of metrics; resuming the run mends it") from None
  return rows


def read_run(name: str, workdir: str) -> Run:
  """Reads the losses in a workdir's metrics.jsonl. Raises UserError if there are none."""
  series: dict[str, list] = {}
  for row in read_metrics(name, workdir):
    for key, value in row.items():
      if curve := _series(key):
        series.setdefault(curve, []).append((row["step"], value))
  if not series:
    raise UserError(f"run {name}: {workdir} holds no loss yet; let the run make some updates")
  kept = [key for key in series if key.endswith("reward")] or list(series)
  return Run(name, {key: np.array(series[key], np.float64) for key in kept})


def _series(key: str) -> str:
  """The curve that a key of metrics.jsonl belongs to; '' for none."""
  if key in ("loss", "reward"):
    return key
  if key == "eval/reward":
    return "heldout_reward"
  return key.removeprefix("eval/") if key.startswith("eval/heldout") and key.endswith("loss") else ""


def check_same_samples(stages: Sequence[Stage]) -> None:
  """Raises UserError unless all stages were judged on the same captions and edits: nothing else can be compared."""
  first = stages[0]
  for stage in stages[1:]:
    for key in ("captions", "true", "instructions", "source", "edit_true"):
      if not np.array_equal(first.samples[key], stage.samples[key]):
        raise UserError(f"stages {first.name} and {stage.name} differ in {key!r}: evaluate both with the same options")


def with_change_of_reward(stages: Sequence[Stage]) -> list[dict]:
  """The stages' scores; after the first, with the reward before and after the stage where both were judged."""
  rows = [dict(stage.scores) for stage in stages]
  for before, row in itertools.pairwise(rows):
    if "reward" in before and "reward" in row:
      row |= {"reward_before": before["reward"], "reward_after": row["reward"]}
  return rows


def evenly(total: int, count: int) -> list[int]:
  """Indices of at most `count` of `total` samples, evenly spaced: nobody picks the pretty ones."""
  count = min(count, total)
  return [i * total // count for i in range(count)]


def score_text(key: str, value: float | None) -> str:
  """A score as people read it: shares in per cent, the loss with four digits."""
  if value is None or math.isnan(value):
    return "-"
  if key.endswith(("_r1", "_r5")):
    return f"{100 * value:.1f} %"
  return f"{value:.4f}" if key.endswith("loss") else f"{value:.3f}" if key == "reward" else f"{value:.1f}"


def best(key: str, stages: Sequence[Stage]) -> float | None:
  """The best value of a score over the stages, None where no stage has it."""
  values = [v for v in (stage.scores.get(key) for stage in stages) if v is not None and not math.isnan(v)]
  return (max if SCORES[key][1] else min)(values, default=None)
