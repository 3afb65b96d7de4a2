"""Command lines: an unknown option is an error that names the nearest one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepgen_jax.errors import UserError, nearest


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
  """Arguments of `argv`; raises UserError for what the parser doesn't know."""
  arguments, unknown = parser.parse_known_args(argv)
  if unknown:
    known = [option for action in parser._actions for option in action.option_strings]
    option = unknown[0].partition("=")[0]
    raise UserError(f"unknown option {option!r}.{nearest(option, known)} See --help.")
  return arguments
