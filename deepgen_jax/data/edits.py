"""Edit triplets on the emoji set: (source, instruction, target), where source and target differ in one attribute.

About 19,000 ordered pairs: skin tone, gender, hair, facial expression, clock, colour, direction. Every pair changes pixels.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgen_jax.data.composition import PLAIN, Attributes, attributes, text_hash

# Round faces (code points): nearly the same outline, another expression.
FACES = """
  1f600 1f601 1f602 1f603 1f604 1f605 1f606 1f609 1f60a 1f60b 1f60c 1f60e 1f60f 1f610 1f611 1f612 1f613 1f614 1f615
  1f616 1f617 1f618 1f619 1f61a 1f61b 1f61c 1f61d 1f61e 1f61f 1f620 1f621 1f622 1f623 1f626 1f627 1f628 1f629 1f62b
  1f62c 1f62e 1f62f 1f632 1f633 1f635 1f635-200d-1f4ab 1f636 1f637 1f641 1f642 1f643 1f644 1f910 1f911 1f912 1f913 1f915
  1f922 1f924 1f927 1f928 1f92a 1f972 1f974 1f978 1f979 1f97a 1fae4 2639 263a
""".split()  # noqa: SIM905

WITHOUT = {  # the attribute that a kind of edit changes, taken away
  "skin tone": {"tones": ()},
  "gender": {"gender": ""},
  "hair": {"hair": ""},
  "direction": {"facing": ""},
  "colour": {"colour": ""},
}

WORDINGS = {
  "skin tone": ("change the skin tone to {}", "make the skin tone {}", "give them a {} skin tone", "set the skin tone to {}"),
  "no skin tone": ("change the skin colour to yellow", "make the skin yellow", "give them the default yellow skin"),
  "man": ("turn them into a man", "make it a man", "change the person to a man", "replace the person with a man"),
  "woman": ("turn them into a woman", "make it a woman", "change the person to a woman", "replace the person with a woman"),
  "person": ("make them gender neutral", "turn them into a gender-neutral person", "show a person of no particular gender"),
  "hair": ("give them {} hair", "change the hair to {}", "make the hair {}", "let them have {} hair"),
  "bald": ("make them bald", "remove the hair", "shave the head"),
  "no hair": ("give them ordinary hair", "change the hair back to normal", "give them plain hair"),
  "expression": ("make it {}", "turn it into {}", "change the expression to {}", "replace it with {}", "show {} instead"),
  "clock": ("set the clock to {}", "change the time to {}", "move the hands to {}", "make the clock show {}"),
  "colour": ("make it {}", "change the colour to {}", "paint it {}", "turn the {shape} {}", "make the {shape} {}"),
  "right": ("make them face right", "turn them to the right", "let them look to the right", "flip them to face right"),
  "left": ("make them face left", "turn them to the left", "let them look to the left", "flip them to face left"),
}


@dataclass(frozen=True)
class Edit:
  """One triplet: indices into the emoji set, the kind of edit, and several wordings of the instruction."""

  source: int
  target: int
  kind: str
  instructions: tuple[str, ...]


def triplets(emoji) -> list[Edit]:
  """All ordered pairs of an EmojiSet, in a fixed order."""
  parts = [attributes(key, caption) for key, caption in zip(emoji.keys, emoji.captions)]
  found = []
  for kind, without in WITHOUT.items():
    groups = defaultdict(list)
    for i, part in enumerate(parts):
      if _has(part, kind):
        groups[dataclasses.replace(part, **without)].append(i)
    found += [(kind, a, b) for group in groups.values() for a in group for b in group]
  clocks = [i for i, part in enumerate(parts) if part.hour]
  faces = [emoji.index(key) for key in FACES]
  found += [("clock", a, b) for a in clocks for b in clocks]
  found += [("expression", a, b) for a in faces for b in faces]
  images = emoji.images()
  return [
    Edit(a, b, kind, instructions(kind, parts[b], emoji.captions[b]))
    for kind, a, b in found
    if a != b and not np.array_equal(images[a], images[b])
  ]


def instructions(kind: str, target: Attributes, caption: str) -> tuple[str, ...]:
  """Every wording of the edit of this kind that leads to the emoji with these attributes and this caption."""
  if kind == "skin tone":
    return _fill("skin tone" if target.tones else "no skin tone", "".join(target.tones))
  if kind == "gender":
    return WORDINGS[target.gender]
  if kind == "hair":
    return WORDINGS["bald"] if target.hair == "bald" else _fill("hair" if target.hair else "no hair", target.hair)
  if kind == "direction":
    return WORDINGS["right" if target.facing else "left"]
  if kind == "colour":
    return _fill("colour", target.colour, target.shape)
  return _fill(kind, caption if kind == "clock" else _with_article(caption))


def training(emoji, edits: Sequence[Edit] | None = None) -> list[Edit]:
  """The triplets that touch no held-out image, neither as source nor as target."""
  edits = triplets(emoji) if edits is None else edits
  return [e for e in edits if not emoji.held_out[e.source] and not emoji.held_out[e.target]]


def held_out(emoji, edits: Sequence[Edit] | None = None, limit: int = 500) -> list[Edit]:
  """Triplets from a training image to a held-out one: the first `limit` in the order of a hash, each with one wording.

  `instructions` has that one wording, also chosen by the hash.
  """
  edits = triplets(emoji) if edits is None else edits
  chosen = [e for e in edits if not emoji.held_out[e.source] and emoji.held_out[e.target]]
  number = {e: text_hash(f"{emoji.keys[e.source]} {emoji.keys[e.target]} {e.kind}") for e in chosen}
  chosen = sorted(chosen, key=number.__getitem__)[:limit]
  return [dataclasses.replace(e, instructions=(pick_wording(e, number[e]),)) for e in chosen]


def pick_wording(edit: Edit, number: float) -> str:
  """The wording for a number in [0, 1); it doesn't depend on the leading digits that sort `held_out`."""
  return edit.instructions[int(number * 2**32) % len(edit.instructions)]


def _has(part: Attributes, kind: str) -> bool:
  """Whether an emoji may be a side of this kind of edit (the group decides whether there is another side)."""
  if kind == "colour":
    return bool(part.colour)
  if part.hour or part.colour or len(part.tones) > 1:
    return False
  return kind != "hair" or part.base == PLAIN


def _fill(name: str, value: str, shape: str = "") -> tuple[str, ...]:
  return tuple(wording.format(value, shape=shape) for wording in WORDINGS[name])


def _with_article(caption: str) -> str:
  return ("an " if caption[0] in "aeiou" else "a ") + caption
