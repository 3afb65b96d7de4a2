"""Where the samples of a large file lie, found once and kept beside it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
import zipfile
from collections.abc import Callable, Mapping

import numpy as np
from etils import epath


def cached_index(file: epath.Path, cache: str, scan: Callable[[epath.Path], dict]) -> Mapping[str, np.ndarray]:
  """What `scan(file)` finds, arrays by name: from an earlier scan where the file hasn't changed since, else from a new one.

  It is kept beside the file, or under the folder `cache` where the file's own can't be written; whatever is wrong with what was
  kept only costs a new scan.
  """
  stat = file.stat()  # local files tell their time to the nanosecond, and tars are padded: two often have one length
  changed = stat.mtime if "://" in os.fspath(file) else os.stat(file).st_mtime_ns
  version = np.array([stat.length, changed], np.int64)
  places = [epath.Path(f"{file}.index.npz")]
  if cache:
    places.append(epath.Path(cache) / "index" / f"{hashlib.sha256(os.fspath(file).encode()).hexdigest()[:24]}.npz")
  for place in places:
    try:
      with place.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:
        if np.array_equal(arrays["version"], version):
          return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none yet, or cut short
      continue
  index = scan(file) | {"version": version}
  for place in places:
    temporary = place.parent / f".{place.name}.{uuid.uuid4().hex[:8]}"  # other processes may be doing the same
    try:
      place.parent.mkdir(parents=True, exist_ok=True)
      with temporary.open("wb") as stored:
        np.savez(stored, **index)
      temporary.replace(place)
      break
    except Exception:  # not allowed to write there, which each file system says in its own way
      with contextlib.suppress(Exception):
        temporary.unlink(missing_ok=True)
  return index
