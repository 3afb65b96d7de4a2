"""What the loop needs to know of a stage: where samples come from, how they become a batch, how a step is taken, how it is
judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepgen_jax.stages.step import summarise


@dataclass
class Report:
  """An evaluation: numbers, and pictures uint8 [H,W,3], by name."""

  scalars: dict[str, float] = field(default_factory=dict)
  images: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
  """init() -> the full parameter tree (arrays).

  loss(params, batch, keys) -> (per-sample loss [B], metrics): pure, differentiated by the trainable leaves.
  batches: has `iterate(start)` -> iterator of host micro-batches with `.consumed` and `.waited`; `bad_samples()`; `counts()`.
  prepare(params, host_batch) -> batches, in order (dicts of arrays with a leading sample axis); params are the current ones.
  evaluate(params, step) -> Report on held-out data with fixed seeds.
  finish(params): called once after the last update.
  summarise(metrics of an update's micro-batches, floats) -> metrics of the update.
  scalars() -> what else the update that `prepare` just made ready has to report.
  host_batches: micro-batches from `batches` that make an update; 0: one for each task of config.data.pattern.
  images: that an update takes, for the speed; 0: host_batches x config.data.batch_size.
  evaluate_first: whether the weights that a run starts with are judged too.
  period: updates that belong together; checkpoints fall between periods.
  old_decay: how the slower policy follows (`make_train_step`); None: there is none.
  dtype: the compute dtype; frozen kernels are stored in it, trained ones cast to it while they are sharded.
  """

  init: Callable[[], Any]
  loss: Callable
  batches: Any
  prepare: Callable[[Any, dict], Iterable[dict]]
  evaluate: Callable[[Any, int], Report]
  finish: Callable[[Any], None] = lambda params: None
  summarise: Callable[[list[dict]], dict] = summarise
  scalars: Callable[[], dict] = dict
  host_batches: int = 0
  images: int = 0
  evaluate_first: bool = False
  period: int = 1
  old_decay: tuple[float, float] | None = None
  dtype: Any = np.float32
