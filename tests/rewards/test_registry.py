"""Rewards by name: what is wrong with a name or an option is said before anything runs."""

import importlib

import numpy as np
import pytest

from deepgen_jax.errors import UserError
from deepgen_jax.rewards.registry import REGISTRY, build
from deepgen_jax.rewards.reward import Item, Missing, PerItem


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_name_leads_to_a_factory(name):
  module, _, factory = REGISTRY[name].partition(":")
  assert callable(getattr(importlib.import_module(module), factory))


def test_a_reward_is_called_as_it_is_registered():
  assert build("jpeg_compressibility").name == "jpeg_compressibility"
  assert build("jpeg_incompressibility").name == "jpeg_incompressibility"


def test_wrong_names_and_options():
  with pytest.raises(UserError, match=r"unknown reward 'clipsim'. Did you mean 'clip_sim'?"):
    build("clipsim")
  with pytest.raises(UserError, match=r"reward 'ocr': .*'scorin'. Did you mean 'scoring'?"):
    build("ocr", scorin="new")
  with pytest.raises(UserError, match=r"reward 'clip_sim': missing a required argument: 'path'"):
    build("clip_sim")


def test_what_keeps_a_score_from_being_is_counted_and_never_a_number():
  def score(item):
    if item.prompt == "missing":
      raise Missing("nothing to see")
    return {"broken": np.inf, "good": 0.25}[item.prompt]

  reward = PerItem("some", score)
  image = np.zeros((8, 8, 3), np.uint8)
  scores = reward([Item(prompt, image) for prompt in ("good", "missing", "broken", "unknown", "missing")])
  assert scores.dtype == np.float64
  assert np.array_equal(scores, [0.25, np.nan, np.nan, np.nan, np.nan], equal_nan=True)
  assert reward.failures == {"nothing to see": 2, "the score is inf": 1, "KeyError: 'unknown'": 1}


def test_user_errors_pass():
  def score(item):
    raise UserError("no model")

  with pytest.raises(UserError, match=r"no model"):
    PerItem("some", score)([Item("a", np.zeros((8, 8, 3), np.uint8))])
