"""Draws metrics of several runs, those of equal name with their spread.

    python -m deepgen_jax.curves --output curves.png --run A=runs/seed0 --run A=runs/seed1 --run B=runs/other [--metric kl ...]

One panel a metric. A name's runs are its seeds: the line is their mean at the updates that all of them have, the band reaches
from the lowest to the highest. A metric of every update is first averaged over the updates around it (--smooth).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from deepgen_jax.cli import parse
from deepgen_jax.errors import UserError, nearest, run_command
from deepgen_jax.reporting.results import read_metrics

COLUMNS = 3


def read(runs: Sequence[tuple[str, str]]) -> dict[str, list[dict[str, dict[int, float]]]]:
  """(name, workdir) pairs -> name -> its runs, each metric -> {update: value}. Raises UserError."""
  found: dict[str, list] = {}
  for name, workdir in runs:
    series: dict[str, dict[int, float]] = {}
    for row in read_metrics(name, workdir):
      for key, value in row.items():
        if isinstance(value, (int, float)) and key != "step":
          series.setdefault(key, {})[row["step"]] = float(value)
    found.setdefault(name, []).append(series)
  return found


def spread(seeds: Sequence[Mapping[int, float]], smooth: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """A metric of several seeds -> (updates that all have, and there the mean, lowest and highest of them)."""
  updates = sorted(set.intersection(*(set(seed) for seed in seeds)))
  values = np.array([[seed[update] for update in updates] for seed in seeds], np.float64)
  if len(updates) > 1 and smooth > 1 and updates[1] - updates[0] == 1:
    values = np.stack([_around(row, smooth) for row in values])
  return np.array(updates), values.mean(0), values.min(0), values.max(0)


def _around(values: np.ndarray, count: int) -> np.ndarray:
  """Means of the `count` values around each, of fewer at the ends."""
  weights = np.ones(min(count, len(values)))
  return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")


def draw(runs: Mapping[str, Sequence[Mapping]], metrics: Sequence[str], smooth: int) -> bytes:
  """The picture (PNG). Raises UserError for a metric that no run has."""
  import matplotlib
  from matplotlib.figure import Figure

  from deepgen_jax.reporting.picture import COLOURS, FAINT, STYLE, plain, save

  have = sorted({key for seeds in runs.values() for seed in seeds for key in seed})
  for metric in metrics:
    if metric not in have:
      raise UserError(f"--metric {metric}: none of the runs has it.{nearest(metric, have)} They have {', '.join(have)}")
  rows = -(-len(metrics) // COLUMNS)
  columns = -(-len(metrics) // rows)
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.4), dpi=110, facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, metric in zip(panels, metrics):
      for (name, seeds), colour in zip(runs.items(), COLOURS[1:] + COLOURS[:1]):
        seeds = [seed[metric] for seed in seeds if metric in seed]
        if not seeds:
          continue
        updates, mean, low, high = spread(seeds, smooth)
        marker = "o" if len(updates) < 50 else None
        label = f"{name} ({len(seeds)})" if len(seeds) > 1 else name
        panel.plot(updates, mean, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label)
        panel.fill_between(updates, low, high, color=colour, alpha=0.18, linewidth=0)
      panel.set_title(metric.removeprefix("eval/"), loc="left", fontweight="bold", fontsize=10)
      plain(panel)
    for panel in panels[len(metrics) :]:
      panel.axis("off")
    figure.supxlabel("update", fontsize=9, color=FAINT)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles), frameon=False)
    return save(figure, "png")


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.curves",
    description="Draws metrics of several runs; runs of equal name are seeds, drawn as their mean and spread.",
    epilog="example: python -m deepgen_jax.curves --output curves.png --run grpo=runs/seed0 --run grpo=runs/seed1 --metric kl",
    allow_abbrev=False,
  )
  parser.add_argument("--output", required=True, metavar="FILE.png", help="the picture")
  parser.add_argument("--run", action="append", required=True, metavar="NAME=WORKDIR", help="a training; repeat")
  parser.add_argument("--metric", action="append", metavar="KEY", help="of metrics.jsonl; repeat (every eval/ metric, and kl)")
  parser.add_argument("--smooth", type=int, default=20, metavar="N", help="updates that a value is averaged over (20)")
  arguments = parse(parser, sys.argv[1:])
  pairs = [value.partition("=")[::2] for value in arguments.run]
  for value, (name, workdir) in zip(arguments.run, pairs):
    if not name or not workdir:
      raise UserError(f"--run {value!r}: write --run NAME=WORKDIR")
  if arguments.smooth < 1:
    raise UserError(f"--smooth {arguments.smooth} must be at least 1")
  runs = read(pairs)
  keys = dict.fromkeys(key for seeds in runs.values() for seed in seeds for key in seed)
  metrics = arguments.metric or [key for key in keys if key.startswith("eval/") or key == "kl"]
  if not metrics:
    raise UserError(f"no run has an evaluation yet; name metrics with --metric: {', '.join(sorted(keys))}")
  try:
    picture = draw(runs, metrics, arguments.smooth)
  except ImportError as error:
    raise UserError(f"curves need matplotlib ({error}). Run: pip install deepgen_jax[demo]") from error
  epath.Path(arguments.output).write_bytes(picture)
  print(f"wrote {arguments.output}")


if __name__ == "__main__":
  run_command(main)
