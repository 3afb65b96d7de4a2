"""What the loop needs to know of a stage: where samples come from, how they become a batch, how a step is taken, how it is
judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Report:
  """An evaluation: numbers, and pictures uint8 [H,W,3], by name."""

  scalars: dict[str, float] = field(default_factory=dict)
  images: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
  """init() -> the full parameter tree (arrays).

  loss(params, batch, keys) -> (per-sample loss [B], metrics): pure, differentiated by the trainable leaves.
  batches: has `iterate(start)` -> iterator of host micro-batches with `.consumed`, and `bad_samples()`.
  prepare(params, host_batch) -> list of batches (dicts of arrays with a leading sample axis); params are the current ones.
  evaluate(params, step) -> Report on held-out data with fixed seeds.
  finish(params): called once after the last update.
  dtype: the compute dtype; frozen kernels are stored in it, trained ones cast to it while they are sharded.
  """

  init: Callable[[], Any]
  loss: Callable
  batches: Any
  prepare: Callable[[Any, dict], list[dict]]
  evaluate: Callable[[Any, int], Report]
  finish: Callable[[Any], None] = lambda params: None
  dtype: Any = np.float32
