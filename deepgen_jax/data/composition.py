"""What an emoji is made of (skin tones, gender, hair, direction, colour x shape, hour), and the held-out compositions.

Everything is read from code points and captions; no table of images. A caption is compositional if it has at least two
factors and each of them occurs in other captions too, so that a model can reach it by recombination.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
SIGNS = {0x2640: "woman", 0x2642: "man"}
ADULTS = {0x1F469: "woman", 0x1F468: "man", 0x1F9D1: "person"}
HAIR = {0x1F9B0: "red", 0x1F9B1: "curly", 0x1F9B2: "bald", 0x1F9B3: "white"}
BLOND = 0x1F471  # a person of its own in Unicode; here: an adult with blond hair
PLAIN = (0x1F9D1,)  # base of an adult without a role
JOINER, PRESENTATION, RIGHT_ARROW = 0x200D, 0xFE0F, 0x27A1
COLOURS = ("red", "orange", "yellow", "green", "light blue", "blue", "purple", "brown", "black", "white", "grey", "pink")
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Attributes:
  """One emoji taken apart. Equal but for one field = an edit."""

  base: tuple[int, ...]  # what is left of the code points, an adult of any gender being U+1F9D1
  tones: tuple[str, ...] = ()  # one per person, or one for all of them
  gender: str = ""  # woman, man, person; "" where gender isn't a separate part
  hair: str = ""
  facing: str = ""  # "right"; "" is Twemoji's default, left
  shape: str = ""  # caption without its colour
  colour: str = ""
  hour: str = ""  # clocks: "two" ...
  half: str = ""  # "o'clock" or "thirty"

  def factors(self) -> list[tuple[str, object]]:
    """The parts that can recur in other emoji: (name, value)."""
    names = ("hair", "facing", "shape", "colour", "hour", "half")
    parts = [(name, getattr(self, name)) for name in names if getattr(self, name)]
    parts += [(f"tone {place}", tone) for place, tone in enumerate(self.tones)]
    if self.gender in ("woman", "man"):
      parts.append(("gender", self.gender))
    if self.base and self.base != PLAIN:
      parts.append(("base", self.base))
    return parts


def attributes(key: str, caption: str) -> Attributes:
  """key: code points in hex joined by '-'."""
  clock = _clock(caption)
  if clock:
    return Attributes((), hour=clock[0], half=clock[1])
  points = [int(part, 16) for part in key.split("-")]
  tones = tuple(TONES[p] for p in points[1:] if p in TONES)
  if len(set(tones)) == 1:
    tones = tones[:1]  # a pair of one tone: the caption names it once
  points = points[:1] + [p for p in points[1:] if p not in TONES and p not in (JOINER, PRESENTATION)]
  facing = ""
  if len(points) > 1 and points[-1] == RIGHT_ARROW:
    facing, points = "right", points[:-1]
  hair = next((HAIR[p] for p in points[1:] if p in HAIR), "")
  points = points[:1] + [p for p in points[1:] if p not in HAIR]
  gender = ""
  if len(points) > 1 and points[-1] in SIGNS:
    gender, points = SIGNS[points[-1]], points[:-1]
  if points[0] == BLOND:
    gender, hair, points = gender or "person", "blond", [*PLAIN, *points[1:]]
  elif points[0] in ADULTS and not any(p in ADULTS for p in points[1:]):
    gender, points = ADULTS[points[0]], [*PLAIN, *points[1:]]
  if tones or gender or hair or facing:
    return Attributes(tuple(points), tones, gender or "person", hair, facing)
  shape, colour = _colour(caption)
  return Attributes((), shape=shape, colour=colour) if colour else Attributes(tuple(points), gender="person")


def held_out(captions: Mapping[str, str], pixels: Mapping[str, str]) -> set[str]:
  """The keys that never enter training: about 10 % of the compositional captions, chosen by the hash of the caption.

  captions, pixels: key -> caption, hash of the image. Emoji with the same pixels are held out together or not at all. In hash
  order, an emoji is held out only if afterwards at least half of the captions of each of its factors, and of its variants in
  skin tone, remain in training: nothing is held out that can't be recombined.
  """
  parts = {key: attributes(key, caption) for key, caption in captions.items()}
  factors = {key: part.factors() for key, part in parts.items()}
  count = Counter(factor for found in factors.values() for factor in found)
  for key, part in parts.items():
    if part.tones:
      factors[key] = [*factors[key], ("variants", replace(part, tones=()))]
  total = Counter(factor for found in factors.values() for factor in found)
  alike = defaultdict(list)
  for key in captions:
    alike[pixels[key]].append(key)

  def compositional(key: str) -> bool:
    own = parts[key].factors()
    return len(own) >= 2 and all(count[factor] >= 2 for factor in own)

  chosen: set[str] = set()
  taken: Counter = Counter()
  for key in sorted(captions, key=lambda k: text_hash(captions[k])):
    if text_hash(captions[key]) >= HELD_OUT_SHARE:
      break
    group = alike[pixels[key]]
    if key in chosen or not all(map(compositional, group)):
      continue
    more = Counter(factor for member in group for factor in factors[member])
    if all(2 * (taken[factor] + n) <= total[factor] for factor, n in more.items()):
      chosen.update(group)
      taken.update(more)
  return chosen


def text_hash(text: str) -> float:
  """A fixed number in [0, 1) for a text: the first 8 bytes of its sha256."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _clock(caption: str) -> tuple[str, str] | None:
  for half, ending in (("o'clock", " o'clock"), ("thirty", "-thirty")):
    if caption.endswith(ending):
      return caption.removesuffix(ending), half
  return None


def _colour(caption: str) -> tuple[str, str]:
  """('heart', 'light blue') for 'light blue heart'; no colour: ('', '')."""
  for colour in COLOURS:
    if caption.startswith(colour + " "):
      return caption.removeprefix(colour + " "), colour
  words = caption.split()
  for colour in COLOURS:
    if colour in words[1:]:
      words.remove(colour)
      return " ".join(words), colour
  return "", ""
