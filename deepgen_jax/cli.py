"""What commands share: an unknown option is an error that names the nearest one; compiled programs are kept."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from deepgen_jax.errors import UserError, nearest


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
  """Arguments of `argv`; raises UserError for what the parser doesn't know."""
  arguments, unknown = parser.parse_known_args(argv)
  if unknown:
    known = [option for action in parser._actions for option in action.option_strings]
    option = unknown[0].partition("=")[0]
    raise UserError(f"unknown option {option!r}.{nearest(option, known)} See --help.")
  return arguments


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """-> (the other words, config overrides KEY=VALUE without their "--config." prefix)."""
  overrides, rest, expects_value = [], [], False
  for word in argv:
    if expects_value:
      overrides[-1] += f"={word}"
      expects_value = False
    elif word.startswith("--config."):
      overrides.append(word.removeprefix("--config."))
      expects_value = "=" not in word
    else:
      rest.append(word)
  return rest, overrides


def keep_compiled_programs() -> None:
  """Switches a persistent cache on: in JAX_COMPILATION_CACHE_DIR (empty: none), else in the user's cache folder."""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "deepgen_jax" / "xla"))
