"""Rewards that a server computes: `remote`, its wire format, and the names of the usual scorers.

One request holds all items of one group, so that a reward that compares them can:

    POST URL/score   {"reward": NAME, "items": [{"prompt": TEXT, "image": PNG, "references": [PNG, ...],
                                                 "group": NUMBER, "metadata": {...}}, ...]}
    200              {"scores": [NUMBER or null, ...]}      one per item, in order; null: missing
    otherwise        {"error": TEXT}

PNG is the base64 of a PNG file; references (an edit's sources), group and metadata may be left out.

`python -m deepgen_jax.rewards.serve` answers so. So can a few lines in any other environment, which is the way to models that
don't run in this one: PickScore, HPS v2.1, ImageReward, the LAION aesthetic score, DeQA, GenEval's detector.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from deepgen_jax.rewards.http import Client, Failure, Post, encode_image, finite, scores
from deepgen_jax.rewards.reward import Item


class Remote:
  """A reward on a server. failures: how many items are missing, by reason."""

  def __init__(self, name: str, client: Client):
    self.name, self.client, self.failures = name, client, Counter()

  def __call__(self, items: Sequence[Item]) -> np.ndarray:
    groups: dict[int, list[int]] = {}
    for index, item in enumerate(items):
      groups.setdefault(item.group, []).append(index)
    answers = self.client.map(self._ask, [[items[index] for index in members] for members in groups.values()])
    results: list[float | Failure] = [math.nan] * len(items)
    for members, answer in zip(groups.values(), answers):
      for place, index in enumerate(members):
        results[index] = answer if isinstance(answer, Failure) else answer[place]
    return scores(self.name, self.failures, results)

  def _ask(self, post: Post, items: Sequence[Item]) -> list[float | Failure]:
    answer = post("/score", {"reward": self.name, "items": [to_wire(item) for item in items]})
    return read_scores(answer, len(items))


def remote(reward: str, url: str, **options) -> Remote:
  """The reward called `reward` on the server at `url`; options are Client's (token_file, timeout, limit, attempts, ...).

  Four requests in flight unless `concurrency` says otherwise: enough to send while the scorer works, and few to wait there.
  """
  return Remote(reward, Client(url, **{"concurrency": 4, **options}))


def to_wire(item: Item) -> dict:
  """An item as in the wire format above; images uint8 [H,W,3] become base64 PNG."""
  return {
    "prompt": item.prompt,
    "image": encode_image(item.image),
    "references": [encode_image(image) for image in item.references],
    "group": int(item.group),
    "metadata": dict(item.metadata),
  }


def read_scores(answer: dict, count: int) -> list[float | Failure]:
  """The scores of an answer. Raises Failure where they can't be told apart (not one per item); else each stands for itself."""
  values = answer.get("scores")
  if not isinstance(values, list) or len(values) != count:
    got = f"{len(values)} scores" if isinstance(values, list) else f"fields {sorted(answer)[:8]}"
    raise Failure("wrong answer", f"{got} for {count} items")
  return [_score(value) for value in values]


def _score(value) -> float | Failure:
  if value is None:
    return Failure("missing at the scorer")
  number = finite(value)
  return Failure("not a finite number", repr(value)[:100]) if number is None else number


pickscore = functools.partial(remote, "pickscore")
hps = functools.partial(remote, "hps")
image_reward = functools.partial(remote, "image_reward")
aesthetic = functools.partial(remote, "aesthetic")
deqa = functools.partial(remote, "deqa")
geneval = functools.partial(remote, "geneval")
