"""Rewards by name. A reward's module is imported when it is built."""

from __future__ import annotations

import importlib

from deepgen_jax.errors import UserError, nearest
from deepgen_jax.rewards.reward import Reward

REGISTRY = {
  # judges: a vision-language model behind an OpenAI-compatible endpoint
  "unifiedreward_think": "deepgen_jax.rewards.judges:unifiedreward_think",
  "unifiedreward": "deepgen_jax.rewards.judges:unifiedreward",
  "ocr_vllm": "deepgen_jax.rewards.judges:ocr_vllm",
  "editreward": "deepgen_jax.rewards.judges:editreward",
  # scorers on a server (deepgen_jax.rewards.serve, or anything that answers the same way)
  "remote": "deepgen_jax.rewards.remote:remote",
  "pickscore": "deepgen_jax.rewards.remote:pickscore",
  "hps": "deepgen_jax.rewards.remote:hps",
  "image_reward": "deepgen_jax.rewards.remote:image_reward",
  "aesthetic": "deepgen_jax.rewards.remote:aesthetic",
  "deqa": "deepgen_jax.rewards.remote:deqa",
  "geneval": "deepgen_jax.rewards.remote:geneval",
}


def build(name: str, **options) -> Reward:
  """The reward called `name`. Raises UserError for a name or an option that doesn't exist."""
  if name not in REGISTRY:
    raise UserError(f"no reward is called {name!r}.{nearest(name, REGISTRY)} Rewards: {', '.join(sorted(REGISTRY))}")
  module, _, factory = REGISTRY[name].partition(":")
  try:
    return getattr(importlib.import_module(module), factory)(**options)
  except TypeError as error:
    raise UserError(f"reward {name!r}: {error}") from error
