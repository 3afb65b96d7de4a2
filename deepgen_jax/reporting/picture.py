"""The report's drawings, by matplotlib without a display: loss curves, score bars and grids of samples."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepgen_jax.reporting.results import SCORES, Run, Stage, evenly, score_text

COLOURS = ("#9aa3ad", "#2f6fba", "#d9772b", "#3c9a5f", "#8a5fbf")  # of stages, in order; then from the start again
INK, FAINT = "#1f2933", "#6b7683"
ROWS = 10  # of each grid of the overview
TEXT_WIDTH = 3.3  # of the column of texts, in sides of an image
STYLE = {
  "text.parse_math": False,  # captions are text: "$" is a dollar
  "font.size": 9,
  "text.color": INK,
  "axes.labelcolor": FAINT,
  "xtick.color": FAINT,
  "ytick.color": FAINT,
}


def overview(stages: Sequence[Stage], runs: Sequence[Run]) -> bytes:
  """One picture (PNG): loss curves, scores, held-out captions and held-out edits beside the true images."""
  import matplotlib

  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(14, 3.4 + 0.86 * ROWS), dpi=110, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.2, 0.2 + 0.86 * ROWS), hspace=0.03)
    panels = top.subplots(1, len(runs) + 1, width_ratios=[1] * len(runs) + [1.5], squeeze=False)[0]
    _loss_panels(panels[:-1], runs, stages)
    _score_bars(panels[-1], stages)
    left, right = bottom.subplots(1, 2, width_ratios=[TEXT_WIDTH + 1.12 * (len(stages) + given) for given in (1, 2)])
    columns = [("true", stages[0].samples["true"])] + [(s.name, s.samples["generated"]) for s in stages]
    _grid(left, "Held-out captions", stages[0].samples["captions"], columns)
    columns = [("source", stages[0].samples["source"]), ("true", stages[0].samples["edit_true"])]
    columns += [(s.name, s.samples["edited"]) for s in stages]
    _grid(right, "Held-out edits", stages[0].samples["instructions"], columns)
    return save(figure, "png")


def loss_curves(runs: Sequence[Run], stages: Sequence[Stage]) -> bytes:
  """The loss curves alone (SVG), one panel a run."""
  import matplotlib

  with matplotlib.rc_context(STYLE | {"svg.hashsalt": "report"}):
    figure = Figure(figsize=(5.2 * len(runs), 3), facecolor="white", layout="constrained")
    _loss_panels(figure.subplots(1, len(runs), squeeze=False)[0], runs, stages)
    return save(figure, "svg")


def stage_colour(name: str, stages: Sequence[Stage]) -> str:
  """The colour that stands for a stage, and for the run that made it."""
  names = [stage.name for stage in stages]
  return COLOURS[names.index(name) % len(COLOURS)] if name in names else INK


def save(figure: Figure, kind: str) -> bytes:
  """A figure as a file of this kind, "png" or "svg"."""
  file = io.BytesIO()
  figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
  return file.getvalue()


def _loss_panels(panels: Sequence[Axes], runs: Sequence[Run], stages: Sequence[Stage]) -> None:
  """One panel a run, losses on a common scale: held-out loss as a line with points, training loss as a pale line. Of
  reinforcement learning, the reward.
  """
  seen = [rows[:, 1] for run in runs for key, rows in run.losses.items() if key.endswith("loss")]
  finite = [values[np.isfinite(values)] for values in seen]
  values = np.concatenate(finite) if finite else np.zeros(0)
  for panel, run in zip(panels, runs):
    colour = stage_colour(run.name, stages)
    if rewards := [key for key in ("reward", "heldout_reward") if key in run.losses]:
      for key in rewards:
        held_out = key == "heldout_reward"
        style = {"linewidth": 2, "marker": "o", "markersize": 3} if held_out else {"linewidth": 1, "alpha": 0.35}
        panel.plot(*run.losses[key].T, color=colour, label="held-out prompts" if held_out else "rollouts", **style)
      panel.set_title(f"{run.name}: reward", loc="left", fontweight="bold", fontsize=10)
      panel.set_xlabel("update")
      panel.legend(frameon=False, fontsize=8, labelcolor=FAINT)
      plain(panel)
      continue
    if "loss" in run.losses:
      panel.plot(*run.losses["loss"].T, color=colour, alpha=0.35, linewidth=1, label="training")
    for key, style in (("heldout_loss", "-"), ("heldout_generate_loss", ":"), ("heldout_edit_loss", "--")):
      if key in run.losses:
        label = "held-out " + key.removeprefix("heldout_").removesuffix("loss").removesuffix("_")
        thick = 2 if key == "heldout_loss" else 1
        panel.plot(*run.losses[key].T, style, color=colour, linewidth=thick, marker="o", markersize=3, label=label.strip())
    panel.set_title(f"{run.name}: flow-matching loss", loc="left", fontweight="bold", fontsize=10)
    panel.set_xlabel("update")
    if len(values):
      low, high = np.quantile(values, (0, 0.99))  # the first updates of a fresh model would flatten everything else
      panel.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 0.08 * (high - low) + 1e-6)
    panel.legend(frameon=False, fontsize=8, labelcolor=FAINT)
    plain(panel)


def _score_bars(panel: Axes, stages: Sequence[Stage]) -> None:
  keys = [key for key in SCORES if key.endswith(("_r1", "_r5"))]
  width = 0.8 / len(stages)
  for i, stage in enumerate(stages):
    shares = [100 * stage.scores[key] for key in keys]
    places = np.arange(len(keys)) + (i - (len(stages) - 1) / 2) * width
    bars = panel.bar(places, shares, width * 0.92, color=stage_colour(stage.name, stages), label=stage.name)
    panel.bar_label(bars, fmt="%.0f", fontsize=8, color=FAINT, padding=1)
  panel.set_xticks(range(len(keys)), [SCORES[key][0].replace(" ", "\n") for key in keys])
  panel.set_ylim(0, 108)
  panel.yaxis.set_major_formatter(ticker.PercentFormatter(decimals=0))
  told = [
    (SCORES[key][0], " \u2192 ".join(score_text(key, stage.scores[key]) for stage in stages if key in stage.scores))
    for key in ("heldout_loss", "reward")
  ]
  panel.set_title("Held-out retrieval", loc="left", fontweight="bold", fontsize=10)
  panel.set_xlabel("\n".join(f"{label}: {values}" for label, values in told if values), fontsize=8)
  panel.legend(frameon=False, fontsize=8, labelcolor=FAINT, loc="upper left")
  plain(panel)


def plain(panel: Axes) -> None:
  """Leaves a panel two thin axes and faint lines."""
  panel.spines[["top", "right"]].set_visible(False)
  panel.spines[["left", "bottom"]].set_color("#c9d0d6")
  panel.grid(axis="y", color="#e8ecef", linewidth=0.8)
  panel.set_axisbelow(True)


def _grid(panel: Axes, title: str, texts: np.ndarray, columns: Sequence[tuple[str, np.ndarray]]) -> None:
  """Rows of a text and one image a column, in units of an image's side; y points down."""
  wide, gap = TEXT_WIDTH, 1.12
  chosen = evenly(len(texts), ROWS)
  for column, (name, images) in enumerate(columns):
    x = wide + column * gap
    panel.text(x + 0.5, -0.1, name, ha="center", va="bottom", color=FAINT)
    for row, index in enumerate(chosen):
      panel.imshow(images[index], extent=(x, x + 1, row * gap + 1, row * gap), interpolation="antialiased")
  for row, index in enumerate(chosen):
    panel.text(0, row * gap + 0.5, textwrap.fill(str(texts[index]), 30, max_lines=4), va="center", fontsize=9)
  panel.text(0, -0.1, title, va="bottom", fontweight="bold", fontsize=10)
  panel.set_xlim(0, wide + len(columns) * gap)
  panel.set_ylim(max(len(chosen), 1) * gap, -0.5)
  panel.set_aspect("equal")
  panel.axis("off")
