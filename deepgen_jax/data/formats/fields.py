"""Which of a record's fields are the text, the target and the references: by their names, or as the config says.

Data sets agree on few names. What is known here are those of the reference implementation's lists, of img2dataset, and of the
public edit sets (InstructPix2Pix, MagicBrush, OmniEdit and their like).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from deepgen_jax.data.sources import Sample
from deepgen_jax.errors import UserError, nearest

_IMAGE = r"([_.-]?(image|img|picture)s?)?([_.-]?(path|file)s?)?"
REFERENCE = re.compile(rf"(source|src|input|original|reference|ref|condition|cond|before){_IMAGE}[_.-]?\d*")
TARGET = re.compile(rf"(target|output|edited|after){_IMAGE}")
PLAIN = ("image_path", "image", "img", "picture", "file_name")  # the target where no name says so; best first
TEXT = ("instruction", "edit_instruction", "edit_prompt", "prompt", "caption", "text", "txt")  # best first


@dataclass(frozen=True)
class Fields:
  """Names of a record's fields; several texts are wordings of one. Empty: not known."""

  text: tuple[str, ...] = ()
  target: str = ""
  references: tuple[str, ...] = ()

  @property
  def task(self) -> str:
    return "edit" if self.references else "generate"

  def complete(self, images: Collection[str], texts: Collection[str]) -> Fields:
    """Fills what the config left open, from the names that a record has. Raises UserError if there is no text or target."""
    references = self.references or tuple(sorted((n for n in images if REFERENCE.fullmatch(n.lower())), key=_by_number))
    named = [n for n in images if TARGET.fullmatch(n.lower())]
    plain = [n for wanted in PLAIN for n in images if n.lower() == wanted]
    target = self.target or next(iter(named or plain), "")
    text = self.text or tuple(n for wanted in TEXT for n in texts if n.lower() == wanted)[:1]
    if not target or not text:
      what = "target image" if text else "text" if target else "text and no target image"
      raise UserError(
        f"no {what} among the fields {', '.join(sorted({*images, *texts})) or '(none)'}: "
        "name them with the options text, target and references"
      )
    return replace(self, text=text, target=target, references=references)


def as_fields(text="", target="", references=()) -> Fields:
  """The config's options text, target, references: a name, or several (a list, or a string with commas)."""
  if not isinstance(target, str):
    raise UserError(f"the option target names one field, not {target!r}")
  return Fields(_names(text), target, _names(references))


def first_task(fields: Fields, records: Iterable[tuple[Collection[str], Collection[str]]], name: str) -> str:
  """The task of a source: that of its first record (image names, text names) whose fields are known."""
  error = None
  for images, texts in records:
    try:
      return fields.complete(images, texts).task
    except UserError as problem:
      error = error or problem
  raise UserError(f"data source {name}: {error or 'it holds no records'}")


def build_sample(
  task: str, fields: Fields, images: Mapping[str, object], texts: Mapping[str, object], decode: Callable[..., np.ndarray]
) -> Sample:
  """The sample of a record. images: name -> what `decode` makes uint8 [H,W,3] of, or a list of such; texts: name -> a text
  or a list of wordings.

  task: "" for what the record looks like; with "generate" references are neither decoded nor kept. Raises UserError for a field
  that is missing or of another type.
  """
  fields = fields.complete(images, texts)
  task = task or fields.task

  def load(name: str) -> list[np.ndarray]:
    value = images.get(name)
    value = value if isinstance(value, list) else [value]
    if not value or any(raw is None for raw in value):
      raise UserError(f"the image {name!r} is missing.{_hint(name, images)}")
    return [decode(raw) for raw in value]

  wordings: list[str] = []
  for name in fields.text:
    value = texts.get(name)
    value = value if isinstance(value, list) else [value]
    if not value or not all(isinstance(text, str) for text in value):
      raise UserError(f"the text {name!r} is missing or no text.{_hint(name, texts)}")
    wordings += [text.strip() for text in value]
  targets = load(fields.target)
  if len(targets) != 1:
    raise UserError(f"the target {fields.target!r} has {len(targets)} images")
  references = [image for name in fields.references for image in load(name)] if task == "edit" else []
  return Sample(task, tuple(wordings), targets[0], tuple(references))


def _names(value) -> tuple[str, ...]:
  if isinstance(value, str):
    value = value.split(",") if value else ()
  if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
    raise UserError(f"{value!r} names no fields: give a name or a list of names")
  return tuple(name.strip() for name in value)


def _hint(name: str, known: Collection[str]) -> str:
  return "" if name in known else nearest(name, known)


def _by_number(name: str) -> tuple[str, int]:
  """input_2 before input_10."""
  stem, digits = re.fullmatch(r"(.*?)(\d*)", name).groups()
  return stem, int(digits or 0)
