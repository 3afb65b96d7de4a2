"""The report as one HTML file that needs nothing else: style and images are inside, every text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from deepgen_jax.reporting import picture
from deepgen_jax.reporting.results import SCORES, Run, Stage, best, evenly, score_text

CARDS = 24  # samples shown of each kind

STYLE = """
:root { --ink: #1f2933; --faint: #5f6b78; --line: #e1e6ea; --paper: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; }
p, li { max-width: 46rem; }
p.note { color: var(--faint); margin: .1rem 0 1rem; }
.panel, .card { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.panel { padding: 1rem 1.25rem; overflow-x: auto; }
.panel img { display: block; width: 100%; min-width: 36rem; max-width: 74rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 600; } thead th { color: var(--faint); font-size: .85rem; vertical-align: bottom; }
th:first-child { text-align: left; white-space: nowrap; }
td { white-space: nowrap; }
td.best { font-weight: 700; }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr)); }
.card { padding: .7rem .85rem .6rem; }
.card h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.row { display: flex; gap: .5rem; }
figure { margin: 0; flex: 1 1 0; min-width: 0; text-align: center; }
figure img { display: block; width: 100%; aspect-ratio: 1; border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: .75rem; color: var(--faint); padding-top: .15rem; }
figure.given img { border-color: #9aa3ad; } figure.given figcaption { font-weight: 600; }
footer { color: var(--faint); font-size: .85rem; margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
"""


def document(stages: Sequence[Stage], runs: Sequence[Run]) -> str:
  """The page, as HTML."""
  first = stages[0].samples
  captions = _cards(
    first["captions"], [("true", first["true"])], [(stage.name, stage.samples["generated"]) for stage in stages]
  )
  edits = _cards(
    first["instructions"],
    [("source", first["source"]), ("true", first["edit_true"])],
    [(stage.name, stage.samples["edited"]) for stage in stages],
  )
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>deepgen_jax: {escape(" → ".join(stage.name for stage in stages))}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>deepgen_jax: {escape(" → ".join(stage.name for stage in stages))}</h1>
<p class="note">{escape(_headline(stages))}</p>
<h2>Scores</h2>
<p class="note">On captions and edits that no training has seen; the best of each column is bold.</p>
<div class="panel">{_table(stages)}</div>
{_losses(stages, runs)}
<h2>Held-out captions</h2>
<p class="note">{_shown(first["captions"], "captions")} One image each, its seed is the caption's number.</p>
<div class="cards">{captions}</div>
<h2>Held-out edits</h2>
<p class="note">{_shown(first["instructions"], "edits")} The model sees the source and the instruction.</p>
<div class="cards">{edits}</div>
<h2>What was measured, and how</h2>
{_method(stages)}
<footer>Emoji graphics (source and true images): Twemoji, © Twitter, Inc and other contributors, CC-BY 4.0, scaled and put on
white. The other images were made by models trained on them.</footer>
</main>
</body>
</html>
"""


def _headline(stages: Sequence[Stage]) -> str:
  first, last = stages[0], stages[-1]
  parts = [
    f"{SCORES[key][0]} {score_text(key, first.scores[key])} → {score_text(key, last.scores[key])}"
    for key in ("generation_r5", "edit_r1", "heldout_loss")
  ]
  return f"From {first.name} to {last.name}: " + ", ".join(parts) + "." if len(stages) > 1 else f"The model {first.name}."


def _table(stages: Sequence[Stage]) -> str:
  keys = [key for key in SCORES if best(key, stages) is not None]
  head = "".join(f"<th>{escape(SCORES[key][0])}</th>" for key in keys)
  rows = []
  for stage in stages:
    dot = f'<span class="dot" style="background:{picture.stage_colour(stage.name, stages)}"></span>'
    cells = []
    for key in keys:
      value = stage.scores.get(key)
      kind = ' class="best"' if len(stages) > 1 and value is not None and value == best(key, stages) else ""
      cells.append(f"<td{kind}>{score_text(key, value)}</td>")
    rows.append(f"<tr><th>{dot}{escape(stage.name)}</th>{''.join(cells)}</tr>")
  return f"<table><thead><tr><th>stage</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _losses(stages: Sequence[Stage], runs: Sequence[Run]) -> str:
  if not runs:
    return ""
  source = _inline(picture.loss_curves(runs, stages), "svg+xml")
  names = escape(" and ".join(run.name for run in runs))
  return f"""<h2>Loss curves</h2>
<p class="note">Flow-matching loss of {names} on one scale: in training, and on held-out samples with fixed noise.</p>
<div class="panel"><img alt="Loss curves of {names}" src="{source}"></div>"""


def _shown(texts: np.ndarray, kind: str) -> str:
  shown = min(CARDS, len(texts))
  return (
    f"All {shown} {kind}." if shown == len(texts) else f"{shown} of {len(texts)} {kind}, evenly spaced, none picked by hand."
  )


def _cards(texts: np.ndarray, given: Sequence[tuple[str, np.ndarray]], made: Sequence[tuple[str, np.ndarray]]) -> str:
  cards = []
  for i in evenly(len(texts), CARDS):
    text = escape(str(texts[i]))
    figures = [_figure(images[i], name, f"{text}: {escape(name)}", "given") for name, images in given]
    figures += [_figure(images[i], name, f"{text}: {escape(name)}", "made") for name, images in made]
    cards.append(f'<div class="card"><h3>{text}</h3><div class="row">{"".join(figures)}</div></div>')
  return "\n".join(cards)


def _figure(image: np.ndarray, name: str, alt: str, kind: str) -> str:
  file = io.BytesIO()
  Image.fromarray(image).save(file, format="png", optimize=True)
  source = _inline(file.getvalue(), "png")
  return f'<figure class="{kind}"><img alt="{alt}" src="{source}"><figcaption>{escape(name)}</figcaption></figure>'


def _inline(data: bytes, kind: str) -> str:
  return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _method(stages: Sequence[Stage]) -> str:
  scores, samples = stages[-1].scores, stages[-1].samples
  sampler = ""
  if "sampler_steps" in scores and "guidance" in scores:
    sampler = f" Images were sampled in {scores['sampler_steps']:g} steps with a guidance scale of {scores['guidance']:g}."
  return f"""<ul>
<li><b>Retrieval.</b> The model makes one image for each of {len(samples["captions"])} held-out captions and each of
{len(samples["instructions"])} held-out edits. R@1 is the share of these for which the true emoji is the nearest of all
captioned emoji, R@5 the share for which it is among the nearest five. Nearness is the L2 distance between RGB pixels on white,
averaged over blocks of 2 by 2; emoji with the same pixels count as one. No learned model judges.{escape(sampler)}</li>
<li><b>Held-out loss.</b> The flow-matching loss on held-out samples, with the same noise and times for every stage; the mean
of generation and editing.</li>
<li><b>Pixel error outside the change.</b> The mean absolute error (of 255) of edits where source and true target agree: what
an edit should have left alone.</li>
<li><b>Held out</b> are compositions, such as a skin tone with a hair style and a role, chosen by a hash of the caption, and
every edit that leads to one. Neither these stages nor the base that they start from were trained on them.</li>
</ul>"""
