"""Several rewards at once, in the background: each judges only the items whose prompt weighs it.

A score that is missing, whoever failed, is NaN and counted. Where too many of a reward's scores are missing, the run stops: it
would otherwise train on what happens to be left.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from deepgen_jax.errors import UserError, nearest
from deepgen_jax.rewards.reward import Item, Reward

MAX_MISSING, WINDOW = 0.5, 64


class Scores(NamedTuple):
  """What `rl.advantages` takes: rewards and weights float64 [B,F], columns in the order of `names`.

  NaN where a score is missing or nobody asked for it (there the weight is 0). asked, missing: how many of this call, by name.
  """

  rewards: np.ndarray
  weights: np.ndarray
  names: tuple[str, ...]
  asked: dict[str, int]
  missing: dict[str, int]


class Pending:
  """Scores that are being computed."""

  def __init__(self, finish, futures: Sequence[Future]):
    self._finish, self._futures, self._scores = finish, futures, None

  def done(self) -> bool:
    """Whether `result` returns at once."""
    return all(future.done() for future in self._futures)

  def result(self) -> Scores:
    """Waits for the scores. Raises what `Mixture` says."""
    if self._scores is None:
      self._scores = self._finish()
    return self._scores


class Mixture:
  """`submit` starts scoring and returns at once; calling the mixture waits for the scores.

  Each reward has a thread of its own, in which its calls run one after another; how many requests a remote one has in flight is
  its own affair. `asked` and `missing` count over the whole run, by name; `failures[name]` counts reasons.

  Raises RuntimeError when more than `max_missing` of the last `window` scores asked of one reward are missing (not before
  `window` were asked), and whatever UserError a reward raises; both when the result is read.
  """

  def __init__(self, rewards: Mapping[str, Reward], max_missing: float = MAX_MISSING, window: int = WINDOW):
    if not rewards:
      raise UserError("no rewards: give at least one reward a weight")
    if not 0 <= max_missing <= 1 or window < 1:
      raise UserError(f"max_missing {max_missing:g} must be a share from 0 to 1, and window {window} at least 1")
    self.rewards, self.names = dict(rewards), tuple(sorted(rewards))
    self.max_missing = max_missing
    self.asked: Counter = Counter()
    self.missing: Counter = Counter()
    self._raised: dict[str, Counter] = {name: Counter() for name in self.names}
    self._recent = {name: deque(maxlen=window) for name in self.names}
    self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=f"reward {name}") for name in self.names}

  def __call__(self, items: Sequence[Item], weights: Sequence[Mapping[str, float]]) -> Scores:
    """As `submit`, and waits."""
    return self.submit(items, weights).result()

  def submit(self, items: Sequence[Item], weights: Sequence[Mapping[str, float]]) -> Pending:
    """weights: reward name -> weight of each item; a name left out weighs 0. Raises UserError for weights that don't fit."""
    table = self._table(items, weights)
    rows = {name: np.flatnonzero(table[:, column]) for column, name in enumerate(self.names)}
    futures = {
      name: self._threads[name].submit(self._score, name, [items[i] for i in chosen])
      for name, chosen in rows.items()
      if len(chosen)
    }
    return Pending(lambda: self._collect(table, rows, futures), list(futures.values()))

  def close(self) -> None:
    """Ends the threads, without waiting for what nobody reads any more."""
    for thread in self._threads.values():
      thread.shutdown(wait=False, cancel_futures=True)

  @property
  def failures(self) -> dict[str, Counter]:
    """Why scores were missing, counted by name and reason, as far as known."""
    return {name: self._raised[name] + getattr(self.rewards[name], "failures", Counter()) for name in self.names}

  def _table(self, items: Sequence[Item], weights: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Weights [B,F]."""
    if len(items) != len(weights):
      raise UserError(f"{len(items)} items with the weights of {len(weights)}")
    table = np.zeros((len(items), len(self.names)))
    for row, own in enumerate(weights):
      for name, weight in own.items():
        if name not in self.rewards:
          raise UserError(f"a prompt weighs the reward {name!r}, which isn't built.{nearest(name, self.names)}")
        if not 0 <= weight < np.inf:
          raise UserError(f"the weight of the reward {name!r} is {weight}; it must be a number from 0 on")
        table[row, self.names.index(name)] = weight
    return table

  def _score(self, name: str, items: Sequence[Item]) -> np.ndarray:
    """Runs in the reward's thread: float64 [len(items)]; NaN for all of them where the reward breaks its promise."""
    try:
      scores = np.asarray(self.rewards[name](items), np.float64)
      if scores.shape != (len(items),):
        raise ValueError(f"{len(items)} items got scores of shape {scores.shape}")
    except UserError:
      raise
    except Exception as error:  # a reward that fails is missing, whatever the failure
      reason = f"{type(error).__name__}: {error}"
      if reason not in self._raised[name]:
        logging.getLogger(__name__).warning("reward %s fails: %s", name, reason, exc_info=error)
      self._raised[name][reason] += len(items)
      return np.full(len(items), np.nan)
    return np.where(np.isfinite(scores), scores, np.nan)

  def _collect(self, table: np.ndarray, rows: Mapping[str, np.ndarray], futures: Mapping[str, Future]) -> Scores:
    rewards = np.full(table.shape, np.nan)
    asked, missing = {}, {}
    for column, name in enumerate(self.names):
      if name in futures:
        rewards[rows[name], column] = futures[name].result()
      absent = np.isnan(rewards[rows[name], column])
      asked[name], missing[name] = len(absent), int(absent.sum())
      self._recent[name].extend(absent.tolist())
    self.asked.update(asked)
    self.missing.update(missing)
    self._check()
    return Scores(rewards, table, self.names, asked, missing)

  def _check(self) -> None:
    for name, recent in self._recent.items():
      if len(recent) < recent.maxlen or sum(recent) <= self.max_missing * len(recent):
        continue
      reasons = "; ".join(f"{reason} ({count} times)" for reason, count in self.failures[name].most_common(3))
      raise RuntimeError(
        f"reward {name!r}: {sum(recent)} of the last {len(recent)} scores are missing, more than the share of "
        f"{self.max_missing:g} that is allowed. Reasons so far: {reasons or 'none given'}. Mend the reward or its prompts."
      )
