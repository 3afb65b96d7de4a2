"""Which files or folders a path of the config means: one, a folder of files, a glob, or ranges in braces; local or gs://."""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
from collections.abc import Iterator

from etils import epath

from deepgen_jax.errors import UserError, nearest


def find_files(pattern: str | os.PathLike, wanted: str) -> list[epath.Path]:
  """The files of `pattern`, sorted by name: "a.tar", "dir", "dir/*.tar", "dir/{000..099}.tar", "{one,two}/*.tar".

  wanted: regex on the names of files taken from a folder, at any place in the name. Raises UserError for what doesn't exist or
  is empty.
  """
  found: list[epath.Path] = []
  for text in _braces(os.fspath(pattern)):
    path, rest = _split_glob(text)
    if not path.exists():
      raise missing(path)
    if rest:
      some = [file for file in _glob(path, rest) if file.is_file()]
    elif path.is_dir():
      some = [file for file in path.iterdir() if re.search(wanted, file.name) and file.is_file()]
    else:
      some = [path]
    if not some:
      raise UserError(f"no data files in {text}" + ("" if rest else f": expected names like {_plain(wanted)}"))
    found += sorted(some, key=os.fspath)
  return found


def find_folders(pattern: str | os.PathLike) -> list[epath.Path]:
  """The folders of `pattern`: "cats", "{cats,dogs}", "pets/*", "pets/**" (itself and all below). Raises UserError for none."""
  found: list[epath.Path] = []
  for text in _braces(os.fspath(pattern)):
    path, rest = _split_glob(text)
    if not path.exists():
      raise missing(path)
    some = sorted((folder for folder in _glob(path, rest) if folder.is_dir()), key=os.fspath) if rest else [path]
    if not some or not path.is_dir():
      raise UserError(f"{text} is no folder")
    found += some
  return found


def inside(folder: epath.Path, path: str) -> epath.Path:
  """Where a path that a data file names is, starting from `folder`; local or gs://.

  Raises UserError if that isn't in the folder: data from elsewhere must not reach other files. Links in the folder, which only
  its owner can make, are followed.
  """
  scheme, _, root = os.fspath(folder).rpartition("://")
  if scheme:
    scheme, root, path = f"{scheme}://", f"/{root}", path.replace(f"{scheme}://", "/", 1)
  root = os.path.abspath(root)
  place = posixpath.normpath(posixpath.join(root, path))
  if not place.startswith(f"{root.rstrip('/')}/"):
    raise UserError(f"the path {path!r} leaves the folder {folder}; paths that start from another need its name in the options")
  return epath.Path(scheme + place.removeprefix("/") if scheme else place)


def missing(path: epath.Path) -> UserError:
  """The error for a path that doesn't exist: up to where it does, and the nearest name there."""
  parent = path.parent
  while not parent.exists() and parent.parent != parent:
    path, parent = parent, parent.parent
  names = [child.name for child in parent.iterdir()] if parent.is_dir() else []
  return UserError(f"no such file or folder: {path}.{nearest(path.name, names)}")


def _split_glob(text: str) -> tuple[epath.Path, str]:
  """'a/b/*/c.tar' -> (a/b, '*/c.tar'); without a wildcard (path, '')."""
  parts = text.split("/")
  first = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
  return epath.Path("/".join(parts[:first]) or ("/" if text.startswith("/") else ".")), "/".join(parts[first:])


def _glob(folder: epath.Path, rest: str) -> Iterator[epath.Path]:
  if "**" not in rest:
    return folder.glob(rest)
  if "://" in os.fspath(folder):
    raise UserError(f"{folder}/{rest}: ** would ask for every folder there one by one; write */ for each level")
  return map(epath.Path, pathlib.Path(folder).glob(rest))


def _braces(text: str) -> Iterator[str]:
  """Writes out the ranges {00..99}, of equal width as the first number, and the lists {a,b} of a path."""
  group = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
  if not group:
    yield text
    return
  start, end, words = group.groups()
  choices = words.split(",") if words else [f"{n:0{len(start)}}" for n in range(int(start), int(end) + 1)]
  if not choices:
    raise UserError(f"the range {group[0]} in {text} is empty")
  for choice in choices:
    yield from _braces(text[: group.start()] + choice + text[group.end() :])


def _plain(regex: str) -> str:
  """A simple regex as people write file names."""
  return "*" + re.sub(r"[\\$?()]", "", regex).replace("|", " *")
