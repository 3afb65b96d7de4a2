"""What a reward is: a function from images to one score each, where a score may be missing.

A reward never invents a number. Whatever keeps it from judging an image (a server that doesn't answer, an answer that can't be
read, a prompt without what it looks for) makes that score NaN, and NaN leaves every statistic (`rl.advantages`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from deepgen_jax.errors import UserError


@dataclass(frozen=True)
class Item:
  """One image to judge. image and references uint8 [H,W,3]; images of one `group` were made for the same prompt."""

  prompt: str  # caption or edit instruction, as the model read it
  image: np.ndarray
  references: tuple[np.ndarray, ...] = ()  # an edit's sources
  group: int = 0
  metadata: Mapping[str, Any] = field(default_factory=dict)  # what else the prompt set says about the prompt


class Reward(Protocol):
  """What a reward offers. Larger is better; scores must not depend on which other items are in the call, except that a
  reward that compares may use the items of the same group. A reward may count why scores are missing in a `failures` Counter.
  """

  name: str

  def __call__(self, items: Sequence[Item]) -> np.ndarray:
    """-> float64 [len(items)], NaN where missing. Raises only for what the user set up wrongly (UserError), never for an
    item.
    """
    ...


class Missing(Exception):
  """Raised by a `PerItem` score to say why there is none."""


class PerItem:
  """A reward that judges each image by itself: `score(item) -> float`.

  What `score` raises, and a number that isn't finite, makes the item's score missing; `failures` counts the reasons. UserError
  is passed on.
  """

  def __init__(self, name: str, score: Callable[[Item], float]):
    self.name, self._score, self.failures = name, score, Counter()

  def __call__(self, items: Sequence[Item]) -> np.ndarray:
    return np.array([self._one(item) for item in items], np.float64)

  def _one(self, item: Item) -> float:
    try:
      score = float(self._score(item))
      reason = "" if np.isfinite(score) else f"the score is {score}"
    except UserError:
      raise
    except Missing as error:
      reason = str(error)
    except Exception as error:  # one image that a library chokes on must not end a run; the mixture bounds how many may
      reason = f"{type(error).__name__}: {error}"
    if not reason:
      return score
    self.failures[reason] += 1
    return np.nan
