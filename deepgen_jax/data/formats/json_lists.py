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

from deepgen_jax.data.files import find_files, missing
from deepgen_jax.data.formats.fields import as_fields, build_sample, first_task
from deepgen_jax.data.images import load_image
from deepgen_jax.data.sources import IMAGE_SUFFIXES, Sample
from deepgen_jax.errors import UserError, nearest


class JsonList:
  """The entries of .json files (a list of objects each) or .jsonl files (one object a line), in order."""

  def __init__(self, path, *, task="", images="", captions="", text="", target="", references=()):
    """path: a file, a folder of them, a glob. images: the folder that image paths start from, by default that of the first
    file; captions: the same for annotations, by default `images`. text, target, references: names of fields; for annotations
    `text` is the caption's key there (the reference's cap_source), by default "caption". task: by default, what the entries
    look like. Raises UserError for what can't be read as such a list.
    """
    self.name = f"json:{path}"
    files = find_files(path, r"\.jsonl?$")
    self._images = epath.Path(images) if images else files[0].parent
    self._captions = epath.Path(captions) if captions else self._images
    for folder in (self._images, self._captions):
      if not folder.exists():
        raise missing(folder)
    self._fields = as_fields(text, target, references)
    # As lines of text and where they start: a list of dicts would take several times the memory of the file.
    lines = [line for file in files for line in _lines(file)]
    self._text = b"".join(lines)
    self._starts = np.cumsum([0, *(len(line) for line in lines)])
    self._wanted, self.task = task, task or first_task(self._fields, self._heads(100), path)

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: int) -> Sample:
    try:
      entry = self._entry(index)
      fields, (images, texts) = self._fields, _split(entry, self._fields)
      if "annotation" in entry:
        fields, texts = self._annotated(entry["annotation"])
      return build_sample(self._wanted, fields, images, texts, lambda path: load_image(self._images / path))
    except ValueError as error:
      raise UserError(f"entry {index}: {error}") from error

  def _entry(self, index: int) -> dict:
    entry = json.loads(self._text[self._starts[index] : self._starts[index + 1]])
    if not isinstance(entry, dict):
      raise UserError(f"{str(entry)[:60]!r} is not an object with fields")
    return entry

  def _annotated(self, annotation):
    """The caption's key as the text field, and what the annotation file holds."""
    if not isinstance(annotation, str):
      raise UserError(f"the annotation {annotation!r} is no path")
    file = self._captions / annotation
    try:
      captions = json.loads(file.read_text())
    except FileNotFoundError as error:
      raise UserError(f"the annotation {file} does not exist") from error
    except ValueError as error:
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


def _lines(file: epath.Path) -> list[bytes]:
  """The entries of a file, as JSON text each."""
  data = file.read_bytes()
  if file.suffix == ".jsonl":
    return [line for line in data.splitlines() if line.strip()]
  try:
    entries = json.loads(data)
  except ValueError as error:
    raise UserError(f"{file} is not JSON: {error}. One object a line is what .jsonl is for") from error
  if not isinstance(entries, list):
    raise UserError(f"{file} must hold a list of objects, not {type(entries).__name__}")
  return [json.dumps(entry, ensure_ascii=False).encode() for entry in entries]
