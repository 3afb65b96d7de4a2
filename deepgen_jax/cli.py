"""What commands share: an unknown option is an error that names the nearest one; compiled programs and memory are kept."""

from __future__ import annotations

import argparse
import ctypes
import glob
import os
import sys
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


def named_values(option: str, words: Sequence[str]) -> list[tuple[str, str]]:
  """NAME=VALUE words of a repeated option -> (name, value) in order; raises UserError for others and for a name given twice."""
  pairs = []
  for word in words:
    name, _, value = word.partition("=")
    if not name or not value:
      raise UserError(f"{option} {word!r}: write {option} NAME=VALUE")
    if name in dict(pairs):
      raise UserError(f"{option}: the name {name!r} stands twice; give each its own")
    pairs.append((name, value))
  return pairs


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


def start_command() -> None:
  """First thing that a command does, before JAX starts threads."""
  _keep_compiled_programs()
  if not _may_have_accelerator():
    _keep_freed_memory()


def _keep_compiled_programs() -> None:
  """Switches a persistent cache on: in JAX_COMPILATION_CACHE_DIR (empty: none), else in the user's cache folder."""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "deepgen_jax" / "xla"))


def _may_have_accelerator() -> bool:
  """Whether JAX may compute on something else than the CPU."""
  if platforms := os.environ.get("JAX_PLATFORMS"):
    return platforms != "cpu"
  return any(glob.glob(f"/dev/{name}") for name in ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd"))


# glibc's mallopt: options and values. One arena, because threads of another one can't keep large blocks.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def _keep_freed_memory() -> None:
  """Has the C library keep what is freed, where it is glibc and nobody told it otherwise by MALLOC_* variables.

  On CPU XLA asks for a program's whole working memory at every run and frees it after; to get it from the system anew, page by
  page, takes a fifth of a train step, and several times that where a virtual machine gives freed pages back to its host.
  """
  library = ctypes.CDLL(None) if sys.platform == "linux" else None
  if hasattr(library, "gnu_get_libc_version") and not any(
    name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ
  ):
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
      library.mallopt(option, value)
