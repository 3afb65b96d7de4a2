"""Random-access sources of samples: emoji pairs, emoji edits, rendered words, and a user's folder of images and captions.
Other formats are in `formats/`, and `mixture.py` opens what a config lists.

A source has `name`, `len()` and `source[i] -> Sample`, pure functions of i. What it can't read raises; `Guarded` replaces it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from etils import epath

from deepgen_jax.data import edits, words
from deepgen_jax.data.emoji import EmojiSet
from deepgen_jax.data.files import find_folders
from deepgen_jax.data.images import load_image
from deepgen_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MAX_CAPTION = 2**20  # bytes of a caption's file: more isn't even read
TRIES = 1000  # samples in a row that may be broken or filtered
BROKEN = (OSError, ValueError, KeyError)  # what a broken sample raises; UserError is a ValueError
LISTED = 10_000  # bad samples that are kept of a source; past that they are only counted


@dataclass(frozen=True)
class Sample:
  """One training sample. texts: the caption or instruction in one or several wordings; images uint8 [H,W,3] of any size, or
  what was precomputed of them (encoded.EncodedImage).
  """

  task: str  # "generate" or "edit"
  texts: tuple[str, ...]
  target: np.ndarray
  references: tuple[np.ndarray, ...] = ()
  answer: str = ""  # what a language model should reply; only its own pre-training has one


class Source(Protocol):
  """What a source offers: a pure function of the index."""

  name: str
  task: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Sample: ...


class EmojiGeneration:
  """Caption -> emoji, of training or of the held-out captions; in the order of the emoji set."""

  task = "generate"

  def __init__(self, emoji: EmojiSet, held_out: bool = False):
    self.name = "emoji held out" if held_out else "emoji"
    self.emoji = emoji
    self.indices = np.flatnonzero(emoji.held_out == held_out)  # positions in the emoji set

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Sample:
    i = int(self.indices[index])
    return Sample(self.task, (self.emoji.captions[i],), self.emoji.image(i))


class EmojiEdits:
  """Instruction and source emoji -> target emoji, of training or of the held-out triplets (at most `limit` of these)."""

  task = "edit"

  def __init__(self, emoji: EmojiSet, held_out: bool = False, limit: int = 500):
    self.name = "emoji edits held out" if held_out else "emoji edits"
    self.emoji = emoji
    self.edits = edits.held_out(emoji, limit=limit) if held_out else edits.training(emoji)

  def __len__(self) -> int:
    return len(self.edits)

  def __getitem__(self, index: int) -> Sample:
    edit = self.edits[index]
    return Sample(self.task, edit.instructions, self.emoji.image(edit.target), (self.emoji.image(edit.source),))


class RenderedWords:
  """`the word "STOP" in white on a red background` -> its picture."""

  task = "generate"

  def __init__(self, held_out: bool = False, size: int = words.IMAGE_SIZE):
    self.name = "words held out" if held_out else "words"
    self.size = size
    self.combinations = words.combinations(held_out)

  def __len__(self) -> int:
    return len(self.combinations)

  def __getitem__(self, index: int) -> Sample:
    word = self.combinations[index]
    return Sample(self.task, (words.caption(*word),), words.render(*word, size=self.size))


class ImageFolder:
  """A user's own data: images with a caption in a text file of the same name (`cat.png`, `cat.txt`), in order of name."""

  task = "generate"

  def __init__(self, path: str | os.PathLike):
    """path: a folder, or several in braces or as a glob (`find_folders`); local or gs://. Raises UserError if there is none, or
    no image in them.
    """
    self.name = f"folder:{os.fspath(path)}"
    self._folders = find_folders(path)
    lists = [sorted(file.name for file in folder.iterdir() if _is_image(file)) for folder in self._folders]
    self._first = np.cumsum([0, *map(len, lists)])  # image of each folder
    if not self._first[-1]:
      kinds = " ".join(IMAGE_SUFFIXES)
      raise UserError(
        f"no images in {path}: expected files like cat.png with cat.txt beside it ({kinds}). Folders in it aren't looked "
        f"into, unless you write folder:{path}/**"
      )
    # A tenth of what objects would take.
    self.names = np.array([os.fsencode(name) for names in lists for name in names])

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> Sample:
    folder = self._folders[int(np.searchsorted(self._first, index, "right")) - 1]
    file = folder / os.fsdecode(self.names[index])
    text_file = file.with_suffix(".txt")
    if not text_file.exists():
      raise UserError(f"{file}: no caption, {text_file.name} is missing")
    if (length := text_file.stat().length) > MAX_CAPTION:
      raise Filtered("max_text", f"{text_file}: the text has {length} bytes (limit {MAX_CAPTION})")
    try:
      caption = text_file.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
      raise UserError(f"{text_file}: not UTF-8 text ({error})") from error
    if not caption:
      raise UserError(f"{text_file}: the caption is empty")
    return Sample(self.task, (caption,), load_image(file))


def _is_image(file: epath.Path) -> bool:
  return file.suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Filters:
  """What training leaves out on purpose. The reference has the first two, with 80 and 10, for its pre-training images alone."""

  min_side: int = 0  # pixels of the shorter side
  max_aspect: float = 10.0  # longer side / shorter side
  max_text: int = 8000  # characters


FILTERS = Filters()


class Filtered(UserError):
  """A whole sample that a filter leaves out; `filter` names it."""

  def __init__(self, name: str, message: str):
    super().__init__(message)
    self.filter = name


class BadSample(NamedTuple):
  """A sample that was replaced: its source, its index there, why, and the filter that did it ("" for a broken one)."""

  source: str
  index: int
  reason: str
  filter: str = ""


class Guarded:
  """A source whose broken and filtered samples are replaced by the next good one, deterministically, and recorded.

  Raises UserError when more than `max_bad_share` of the samples drawn (counting from 100 on) were broken, or `TRIES` in a row.
  """

  def __init__(self, source: Source, max_bad_share: float = 0.1, filters: Filters = FILTERS):
    if not len(source):
      raise UserError(f"the data source {source.name!r} is empty")
    self.source, self.name, self.task = source, source.name, source.task
    self.max_bad_share, self.filters = max_bad_share, filters
    self._lock = threading.Lock()
    self._bad: dict[int, BadSample] = {}
    self._drawn = self._broken = 0
    self._reading: dict[int, tuple[int, float]] = {}  # thread -> sample, since when
    self._filtered: Counter[str] = Counter()

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Sample:
    with self._lock:
      self._drawn += 1
    first, tries = None, min(len(self), TRIES)
    for step in range(tries):
      place = (index + step) % len(self)
      self._reading[threading.get_ident()] = place, time.monotonic()
      try:
        return read_usable(self.source, place, self.filters)
      except BROKEN as error:
        bad = BadSample(self.name, place, str(error), getattr(error, "filter", ""))
        first = first or bad
        self._record(bad, counts=step == 0)
      finally:
        del self._reading[threading.get_ident()]
    raise UserError(f"{tries} samples in a row of the data source {self.name!r} can't be used; the first: {first.reason}")

  def _record(self, bad: BadSample, counts: bool) -> None:
    with self._lock:
      if len(self._bad) < LISTED:
        self._bad.setdefault(bad.index, bad)
      if bad.filter:
        self._filtered[bad.filter] += counts
        return
      self._broken += counts
      if self._broken > self.max_bad_share * max(self._drawn, 100):
        raise UserError(
          f"data source {self.name!r}: {self._broken} of {self._drawn} samples drawn were broken, more than the share of "
          f"{self.max_bad_share:g} that is allowed. The last: index {bad.index}, {bad.reason}. Mend the data."
        )

  def reading(self) -> list[tuple[int, float]]:
    """The samples that threads are reading at the moment, and for how many seconds."""
    now = time.monotonic()
    return [(place, now - since) for place, since in self._reading.copy().values()]

  def bad_samples(self) -> list[BadSample]:
    """Broken and filtered samples met so far, once each, in order of index; the first `LISTED` that were met."""
    with self._lock:
      return [self._bad[index] for index in sorted(self._bad)]

  def counts(self) -> dict:
    """How often a sample was drawn, and was replaced because it was broken or by which filter."""
    with self._lock:
      return {"drawn": self._drawn, "broken": self._broken, "filtered": dict(sorted(self._filtered.items()))}


def read_usable(source: Source, index: int, filters: Filters) -> Sample:
  """A sample that training can use; raises one of BROKEN, and Filtered for one that a filter leaves out."""
  sample = source[index]
  if sample.task != source.task:
    raise UserError(f"a sample of task {sample.task!r} in a source of task {source.task!r}: give each its own source")
  check(sample, filters)
  return sample


def check(sample: Sample, filters: Filters) -> None:
  """Raises UserError for a sample that is broken (a blank text, an edit without a reference), Filtered for an unwanted one."""
  if not sample.texts or not all(text.strip() for text in sample.texts):
    raise UserError("the text is empty")
  if (sample.task == "edit") != bool(sample.references):
    raise UserError(f"a sample of task {sample.task!r} has {len(sample.references)} reference images")
  longest = max(len(text) for text in sample.texts)
  if longest > filters.max_text:
    raise Filtered("max_text", f"the text has {longest} characters (limit {filters.max_text})")
  for image in (sample.target, *sample.references):
    short, long = sorted(image.shape[:2])
    shape = f"an image of {image.shape[0]}x{image.shape[1]} pixels (height x width)"
    if short < max(filters.min_side, 1):
      raise Filtered("min_side", f"{shape} is too small (limit {filters.min_side})")
    if long > filters.max_aspect * short:
      raise Filtered("max_aspect", f"{shape} is too narrow (limit 1:{filters.max_aspect:g})")
