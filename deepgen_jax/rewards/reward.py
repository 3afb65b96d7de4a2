"""What a reward is: a function from images to one score each, where a score may be missing.

A reward never invents a number. Whatever keeps it from judging an image (a server that doesn't answer, an answer that can't be
read, a prompt without what it looks for) makes that score NaN, and NaN leaves every statistic (`rl.advantages`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


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
  reward that compares may use the items of the same group.
  """

  name: str

  def __call__(self, items: Sequence[Item]) -> np.ndarray:
    """-> float64 [len(items)], NaN where missing. Raises only for what the user set up wrongly (UserError), never for an
    item.
    """
    ...
