"""Lists in JSON that name image files: the layouts of the DeepGen reference, and others whose fields can be told.

{"image_path": "a.png", "txt": "a red cat"}                                            generation, caption in the list
{"image": "a.png", "annotation": "a.json"}                                             generation, captions in files
{"input_image": ["a.png", "b.png"], "output_image": "c.png", "instruction": "..."}     edits, with all their references
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from etils import epath

from deepgen_jax.data.files import find_files, inside, missing
from deepgen_jax.data.formats.fields import as_fields, build_sample, first_task
from deepgen_jax.data.formats.index import cached_index
from deepgen_jax.data.images import load_image
from deepgen_jax.data.sources import IMAGE_SUFFIXES, Sample
from deepgen_jax.errors import UserError, nearest

CHUNK = 16 * 2**20  # bytes that are looked at together
LARGE = 64 * 2**20  # bytes of a .jsonl file whose index is kept: scanning takes a second for every 500 MB or so


class JsonList:
  """The entries of .json files (a list of objects each) or .jsonl files (one object a line), in order."""

  def __init__(self, path, *, task="", images="", captions="", text="", target="", references=(), cache=""):
    """path: a file, a folder of them, a glob. images: the folder that image paths start from, by default that of the first
    file; captions: the same for annotations, by default `images`. text, target, references: names of fields; for annotations
    `text` is the caption's key there (the reference's cap_source), by default "caption". task: by default, what the entries
    look like. cache: a folder for the index of large .jsonl files where their own can't be written. Raises UserError for what
    can't be read as such a list. Paths in the entries can't leave their folder.
    """
    self.name = f"json:{path}"
    files = find_files(path, r"\.jsonl?$")
    self._images = epath.Path(images) if images else files[0].parent
    self._captions = epath.Path(captions) if captions else self._images
    for folder in (self._images, self._captions):
      if not folder.exists():
        raise missing(folder)
    self._fields = as_fields(text, target, references)
    self._lists = [_Lines(file, cache) if file.suffix == ".jsonl" else _List(file) for file in files]
    self._first = np.cumsum([0, *map(len, self._lists)])  # entry of each file
    self._wanted, self.task = task, task or first_task(self._fields, self._heads(100), path)

  def __len__(self) -> int:
    return int(self._first[-1])

  def __getitem__(self, index: int) -> Sample:
    try:
      entry = self._entry(index)
      fields, (images, texts) = self._fields, _split(entry, self._fields)
      if "annotation" in entry:
        fields, texts = self._annotated(entry["annotation"])
      return build_sample(self._wanted, fields, images, texts, lambda path: load_image(inside(self._images, path)))
    except ValueError as error:
      raise UserError(f"entry {index}: {error}") from error

  def _entry(self, index: int) -> dict:
    number = int(np.searchsorted(self._first, index, side="right")) - 1
    line = self._lists[number][index - int(self._first[number])]
    try:
      entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
      raise UserError(f"the line is not UTF-8 text ({error})") from error
    except (ValueError, RecursionError) as error:
      raise UserError(f"the line is not JSON ({error}): {line[:60]!r}") from error
    if not isinstance(entry, dict):
      raise UserError(f"{str(entry)[:60]!r} is not an object with fields")
    return entry

  def _annotated(self, annotation):
    """The caption's key as the text field, and what the annotation file holds."""
    if not isinstance(annotation, str):
      raise UserError(f"the annotation {annotation!r} is no path")
    file = inside(self._captions, annotation)
    try:
      captions = json.loads(file.read_bytes())
    except FileNotFoundError as error:
      raise UserError(f"the annotation {file} does not exist") from error
    except (ValueError, RecursionError) as error:
      raise UserError(f"the annotation {file} is not JSON: {error}") from error
    fields = as_fields(self._fields.text or "caption", self._fields.target, self._fields.references)
    if not isinstance(captions, dict) or not all(name in captions for name in fields.text):
      raise UserError(f"the annotation {file} has no {' '.join(fields.text)!r}.{nearest(fields.text[0], captions)}")
    return fields, captions

  def _heads(self, count: int) -> Iterator[tuple[list[str], list[str]]]:
    for index in range(min(len(self), count)):
      try:
        entry = self._entry(index)
      except ValueError:  # broken entries are for training to count
        continue
      images, texts = _split(entry, self._fields)
      yield list(images), [*texts, *(self._fields.text or ["caption"] if "annotation" in entry else ())]


def _split(entry: dict, fields) -> tuple[dict, dict]:
  """(images, texts) of an entry. What isn't said to be an image is one if it has an image's suffix: "source" may be a URL."""
  named = {fields.target, *fields.references}
  images = {}
  for name, value in entry.items():
    paths = value if isinstance(value, list) else [value]
    if (
      paths
      and all(isinstance(path, str) and path for path in paths)
      and (name in named or all(path.lower().endswith(IMAGE_SUFFIXES) for path in paths))
    ):
      images[name] = value
  return images, {name: value for name, value in entry.items() if name not in images}


class _Lines:
  """The lines of a .jsonl file that aren't blank. They stay in the file: 8 bytes of memory each, whatever their length."""

  def __init__(self, file: epath.Path, cache: str):
    self._file = file
    index = cached_index(file, cache, _scan) if file.stat().length >= LARGE else _scan(file)
    self._starts = index["starts"]

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: int) -> bytes:
    start, end = (int(place) for place in self._starts[index : index + 2])
    with self._file.open("rb") as file:
      file.seek(start)
      return file.read(end - start)


class _List:
  """The entries of a .json file, as JSON text each: a list of dicts would take several times the memory of the file."""

  def __init__(self, file: epath.Path):
    try:
      entries = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
      raise UserError(f"{file} is not JSON: {error}. One object a line is what .jsonl is for") from error
    if not isinstance(entries, list):
      raise UserError(f"{file} must hold a list of objects, not {type(entries).__name__}")
    lines = [json.dumps(entry, ensure_ascii=False).encode() for entry in entries]
    self._text, self._starts = b"".join(lines), np.cumsum([0, *map(len, lines)])

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: int) -> bytes:
    return self._text[self._starts[index] : self._starts[index + 1]]


def _scan(file: epath.Path) -> dict[str, np.ndarray]:
  """{"starts": int64 [lines + 1]}: where the lines that aren't blank start, and the end of the file."""
  starts, done, rest = [], 0, b""
  with file.open("rb") as stream:
    while chunk := stream.read(CHUNK):
      whole, line, rest = (rest + chunk).rpartition(b"\n")
      if line:
        starts.append(done + _line_starts(whole + line))
        done += len(whole) + 1
  if rest:
    starts.append(done + _line_starts(rest))
  return {"starts": np.concatenate([*starts, np.array([done + len(rest)])])}


def _line_starts(data: bytes) -> np.ndarray:
  """Where the lines of `data`, which ends with one, start; without those of white space alone."""
  characters = np.frombuffer(data, np.uint8)
  starts = np.concatenate([[0], np.flatnonzero(characters[:-1] == ord("\n")) + 1])
  return starts[np.logical_or.reduceat(characters > ord(" "), starts)]
