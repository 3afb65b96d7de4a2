"""Advantages against the reference's numbers, against numpy, and with missing rewards."""

import jax
import numpy as np
import pytest

import deepgen_jax
from deepgen_jax.errors import UserError
from deepgen_jax.rl import advantages

REWARD = np.float32([[0.1, 0.4, 0.2, 0.9], [0.5, 0.5, 0.5, 0.5]]).reshape(8, 1)
SECOND = np.float32([[1, 0, 0, 1], [0, 0.5, 1, 0.5]]).reshape(8, 1)
GOLDEN = {
  "grpo": [-0.84269, 0, -0.561794, 1.404484, 0, 0, 0, 0],
  "grpo_global_std": [-1.254465, 0, -0.83631, 2.090775, 0, 0, 0, 0],
  "reinforce++": [-1.463543, -0.209078, -1.045388, 1.881698, *[0.209078] * 4],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_references_numbers(kind):
  np.testing.assert_allclose(advantages(kind, REWARD, np.ones((8, 1)), 4), GOLDEN[kind], rtol=1e-5, atol=1e-6)


def test_the_references_numbers_of_gdpo():
  weights = np.repeat([[0.7, 0.3], [0.2, 0.8]], 4, axis=0)
  out = deepgen_jax.rl.advantages("gdpo", np.concatenate([REWARD, SECOND], 1), weights, 4)
  expected = [-0.433053, -0.340757, -0.85663, 1.63044, -1.284983, 0, 1.284983, 0]
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*GOLDEN, "gdpo"])
def test_dropped_samples_leave_every_statistic(kind):
  """With every reward of a sample missing, the others get what they get without it."""
  rng = np.random.default_rng(0)
  rewards, weights = rng.normal(size=(12, 2)), np.tile([0.3, 0.7], (12, 1))
  rewards[[1, 5, 9]] = np.nan
  kept = [i for i in range(12) if i not in (1, 5, 9)]
  out = jax.jit(advantages, static_argnums=(0, 3))(kind, rewards, weights, 4)
  expected = advantages(kind, rewards[kept], weights[kept], 3)
  np.testing.assert_allclose(np.asarray(out)[kept], expected, rtol=1e-5, atol=1e-6)
  assert (np.asarray(out)[[1, 5, 9]] == 0).all()


@pytest.mark.parametrize("kind", [*GOLDEN, "gdpo"])
def test_a_group_with_one_valid_sample_gets_nothing(kind):
  rng = np.random.default_rng(1)
  rewards = rng.normal(size=(9, 1))
  rewards[[3, 5]] = np.nan
  out = np.asarray(advantages(kind, rewards, np.ones((9, 1)), 3))
  others = [0, 1, 2, 6, 7, 8]
  np.testing.assert_allclose(out[others], advantages(kind, rewards[others], np.ones((6, 1)), 3), rtol=1e-5, atol=1e-6)
  assert (out[3:6] == 0).all() and np.isfinite(out).all()


@pytest.mark.parametrize("kind", [*GOLDEN, "gdpo"])
def test_missing_without_weight_is_ignored(kind):
  rng = np.random.default_rng(2)
  rewards, weights = rng.normal(size=(8, 2)), np.tile([1.0, 0.0], (8, 1))
  expected = advantages(kind, rewards[:, :1], weights[:, :1], 4)
  rewards[[0, 6], 1] = np.nan
  np.testing.assert_allclose(advantages(kind, rewards, weights, 4), expected, rtol=1e-5, atol=1e-6)


def test_a_missing_reward_drops_the_sample_but_in_gdpo():
  rewards = np.random.default_rng(3).normal(size=(8, 2))
  rewards[2, 1] = np.nan
  weights = np.full((8, 2), 0.5)
  assert advantages("grpo", rewards, weights, 4)[2] == 0
  # gdpo: the first reward alone speaks for the sample; the statistics of the second are those of the other three
  part = lambda x: (x - np.nanmean(x)) / (np.nanstd(x, ddof=1) + 1e-4)
  scores = np.stack([np.concatenate([part(rewards[:4, f]), part(rewards[4:, f])]) for f in range(2)], 1)
  total = 0.5 * np.nansum(scores, 1)
  expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
  np.testing.assert_allclose(advantages("gdpo", rewards, weights, 4), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("gpo", np.ones((4, 1)), np.ones((4, 1)), 2), "unknown kind 'gpo'"),
    (("grpo", np.ones((4, 1)), np.ones((4, 2)), 2), "must both be"),
    (("grpo", np.ones((4, 1)), np.ones((4, 1)), 3), "4 samples aren't groups of 3"),
  ],
)
def test_mistakes_are_named(arguments, message):
  with pytest.raises(UserError, match=message):
    advantages(*arguments)
