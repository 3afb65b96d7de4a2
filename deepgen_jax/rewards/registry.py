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
  return make(**options)
