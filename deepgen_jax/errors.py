"""The one exception for what a user can get wrong, and the wrapper that turns it into exit code 2."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a file's largest size


class UserError(ValueError):
  """Something the user can mend. The message says what is wrong, where (file, key, line) and what to do."""


class Stalled(RuntimeError):
  """Data that doesn't come, with threads that wait for it and may do so for ever."""


def nearest(name: str, known: Iterable[str]) -> str:
  """' Did you mean X?' for the nearest of `known`, or ''."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f" Did you mean {close[0]!r}?" if close else ""


def run_command(main: Callable[[], int | None]) -> None:
  """Runs a command's main: UserError, or a full disk, prints its message and exits with 2; anything else is a failure while
  running (1). A Stalled one ends the process at once: threads that hang would keep it.
  """
  try:
    sys.exit(main() or 0)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
  except Stalled as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
  except OSError as error:
    if error.errno not in FULL:
      raise
    print(f"error: {error.filename or 'a file'} can't be written: {error.strerror}. Make room, then try again", file=sys.stderr)
  sys.exit(2)
