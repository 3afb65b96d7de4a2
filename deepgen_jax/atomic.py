"""Small files written such that a reader, or the next run after a crash, finds the old text or the new one, never a piece."""

from __future__ import annotations

import os

from etils import epath


def write_text(file: epath.PathLike, text: str) -> None:
  """Replaces a file's text in one step; object stores do so by themselves."""
  file = epath.Path(file)
  if "://" in os.fspath(file):
    file.write_text(text)
    return
  new = file.with_name(f".{file.name}.new")
  with open(new, "w", encoding="utf-8") as stream:
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())  # else a power cut may leave the new name with nothing in it
  os.replace(new, file)
