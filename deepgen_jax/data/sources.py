"""Random-access sources of samples: emoji pairs, emoji edits, rendered words, and a user's folder of images and captions.

A source has `name`, `len()` and `source[i] -> Sample`, pure functions of i. What it can't read raises; `Guarded` replaces it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from etils import epath

from deepgen_jax.data import edits, words
from deepgen_jax.data.emoji import EmojiSet
from deepgen_jax.data.images import load_image
from deepgen_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_ASPECT = 10.0  # longer side / shorter side; the reference's limit


@dataclass(frozen=True)
class Sample:
  """One training sample. texts: the caption or instruction in one or several wordings; images uint8 [H,W,3] of any size."""

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

  def __init__(self, folder: str | os.PathLike):
    """Raises UserError if the folder (local or gs://) doesn't exist or holds no image."""
    self.name = os.fspath(folder)
    path = epath.Path(folder)
    if not path.is_dir():
      raise UserError(f"no such image folder: {path}")
    self.files = sorted((f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES), key=lambda file: file.name)
    if not self.files:
      raise UserError(f"no images in {path}: expected files like cat.png with cat.txt beside it ({' '.join(IMAGE_SUFFIXES)})")

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Sample:
    file = self.files[index]
    text_file = file.with_suffix(".txt")
    if not text_file.exists():
      raise UserError(f"{file}: no caption, {text_file.name} is missing")
    try:
      caption = text_file.read_text().strip()
    except UnicodeDecodeError as error:
      raise UserError(f"{text_file}: not UTF-8 text ({error})") from error
    if not caption:
      raise UserError(f"{text_file}: the caption is empty")
    return Sample(self.task, (caption,), load_image(file))


class BadSample(NamedTuple):
  """A sample that was replaced: its source, its index there, and why."""

  source: str
  index: int
  reason: str


class Guarded:
  """A source whose broken samples are replaced by the next good one, deterministically, and recorded.

  Raises UserError when more than `max_bad_share` of the samples drawn (counting from 100 on) were broken, or all are.
  """

  def __init__(self, source: Source, max_bad_share: float = 0.1):
    if not len(source):
      raise UserError(f"the data source {source.name!r} is empty")
    self.source, self.name, self.task = source, source.name, source.task
    self.max_bad_share = max_bad_share
    self._lock = threading.Lock()
    self._bad: dict[int, BadSample] = {}
    self._drawn = self._broken = 0

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Sample:
    with self._lock:
      self._drawn += 1
    first = None
    for step in range(len(self)):
      place = (index + step) % len(self)
      try:
        sample = self.source[place]
        check(sample)
        return sample
      except (OSError, ValueError, KeyError) as error:  # UserError is a ValueError
        bad = BadSample(self.name, place, str(error))
        first = first or bad
        self._record(bad, counts=step == 0)
    raise UserError(f"every sample of the data source {self.name!r} is broken; the first: {first.reason}")

  def _record(self, bad: BadSample, counts: bool) -> None:
    with self._lock:
      self._bad.setdefault(bad.index, bad)
      self._broken += counts
      if self._broken > self.max_bad_share * max(self._drawn, 100):
        raise UserError(
          f"data source {self.name!r}: {self._broken} of {self._drawn} samples drawn were broken, more than the share of "
          f"{self.max_bad_share:g} that is allowed. The last: index {bad.index}, {bad.reason}. Mend the data."
        )

  def bad_samples(self) -> list[BadSample]:
    """Every broken sample met so far, once each, in order of index."""
    with self._lock:
      return [self._bad[index] for index in sorted(self._bad)]


def check(sample: Sample) -> None:
  """Raises UserError for what training can't use: a blank text, an image of extreme shape, an edit without a reference."""
  if not sample.texts or not all(text.strip() for text in sample.texts):
    raise UserError("the text is empty")
  if (sample.task == "edit") != bool(sample.references):
    raise UserError(f"a sample of task {sample.task!r} has {len(sample.references)} reference images")
  for image in (sample.target, *sample.references):
    short, long = sorted(image.shape[:2])
    if short < 1 or long > MAX_ASPECT * short:
      raise UserError(f"an image of {image.shape[0]}x{image.shape[1]} pixels is too narrow (limit 1:{MAX_ASPECT:g})")


def total_bad(sources: Sequence[Guarded]) -> list[BadSample]:
  """The broken samples of several sources."""
  return [bad for source in sources for bad in source.bad_samples()]
