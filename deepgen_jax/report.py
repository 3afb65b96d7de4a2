"""Draws what a series of stages did: `python -m deepgen_jax.report --output DIR --stage NAME=DIR ... --run NAME=WORKDIR ...`.

Reads what `deepgen_jax.evaluation` wrote for each stage (scores.json and samples.npz) and the metrics.jsonl of each run;
computes no score itself. Writes scores.json (a list, one object a stage, in the order given), report.png (one picture) and
report.html (self-contained: no script, no font and no image from outside).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from etils import epath

from deepgen_jax import atomic
from deepgen_jax.cli import named_values, parse
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.reporting.results import Run, Stage, check_same_samples, read_run, read_stage, with_change_of_reward


def write_report(output: str, stages: Sequence[Stage], runs: Sequence[Run]) -> None:
  """Writes the three files into the folder `output`; nothing unless all can be written. Raises UserError."""
  check_same_samples(stages)
  try:
    from deepgen_jax.reporting import page, picture
  except ImportError as error:
    raise UserError(f"the report needs matplotlib ({error}). Run: pip install deepgen_jax[demo]") from error
  overview, document = picture.overview(stages, runs), page.document(stages, runs)
  folder = epath.Path(output)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"--output {output!r} is a file; name a folder")
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "report.png").write_bytes(overview)
  (folder / "report.html").write_text(document, encoding="utf-8")
  atomic.write_text(folder / "scores.json", json.dumps(with_change_of_reward(stages), indent=2) + "\n")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
  """-> output, stage and run, the last two as lists of (name, folder). Raises UserError."""
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.report",
    description="Draws loss curves, scores and samples of a series of stages.",
    epilog="example: python -m deepgen_jax.report --output runs/quickstart --run sft=runs/quickstart/sft "
    "--stage start=runs/quickstart/eval/start --stage sft=runs/quickstart/eval/sft",
    allow_abbrev=False,
  )
  parser.add_argument("--output", required=True, metavar="DIR", help="report.html, report.png and scores.json go here")
  parser.add_argument(
    "--stage", action="append", required=True, metavar="NAME=DIR", help="what an evaluation wrote; repeat, in order"
  )
  parser.add_argument("--run", action="append", default=[], metavar="NAME=WORKDIR", help="a training; repeat, in order")
  arguments = parse(parser, argv)
  arguments.stage, arguments.run = named_values("--stage", arguments.stage), named_values("--run", arguments.run)
  return arguments


def main() -> None:
  """The command."""
  arguments = parse_arguments(sys.argv[1:])
  stages = [read_stage(*pair) for pair in arguments.stage]
  runs = [read_run(*pair) for pair in arguments.run]
  write_report(arguments.output, stages, runs)
  print(f"wrote report.html, report.png and scores.json to {arguments.output}")


if __name__ == "__main__":
  run_command(main)
