"""Which rewards there are, by name, and how one is made."""

from __future__ import annotations

import importlib
import inspect

from deepgen_jax.errors import UserError, nearest
from deepgen_jax.rewards.reward import Reward

# name -> "module:factory"; imported when first built, so that nobody needs the packages of a reward that isn't used
REGISTRY = {
  "brisque": "deepgen_jax.rewards.brisque:brisque",
  "clip_sim": "deepgen_jax.rewards.clip_sim:clip_sim",
  "emoji_similarity": "deepgen_jax.rewards.emoji_similarity:emoji_similarity",
  "jpeg_compressibility": "deepgen_jax.rewards.jpeg:jpeg_compressibility",
  "jpeg_incompressibility": "deepgen_jax.rewards.jpeg:jpeg_incompressibility",
  "ocr": "deepgen_jax.rewards.ocr:ocr",
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


def check_name(name: str, where: str = "") -> None:
  """Raises UserError, with `where` in front, unless there is a reward of this name."""
  if name not in REGISTRY:
    known = ", ".join(sorted(REGISTRY))
    raise UserError(f"{where}unknown reward {name!r}.{nearest(str(name), REGISTRY)} Known: {known}")


def build(name: str, **options) -> Reward:
  """The reward of this name; options are the factory's. Raises UserError for an unknown name or option, and what the factory
  raises where something that the reward needs is missing.
  """
  check_name(name)
  module, _, factory = REGISTRY[name].partition(":")
  make = getattr(importlib.import_module(module), factory)
  signature = inspect.signature(make)
  try:
    signature.bind(**options)
  except TypeError as error:  # such as: missing a required argument: 'path'
    wrong = next((option for option in options if option not in signature.parameters), "")
    known = ", ".join(signature.parameters) or "none"
    raise UserError(f"reward {name!r}: {error}.{nearest(wrong, signature.parameters)} Its options: {known}") from error
  try:
    return make(**options)
  except TypeError as error:  # of a factory that hands options on
    raise UserError(f"reward {name!r}: {error}") from error
