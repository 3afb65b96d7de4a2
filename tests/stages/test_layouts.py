"""Layouts, and guesses at how they change."""

import numpy as np
import pytest

from deepgen_jax.stages.layouts import Changes, layout


@pytest.fixture(scope="module")
def seen():
  """Changes of which some directions vary a hundred times as much as others."""
  rng = np.random.default_rng(0)
  directions = np.linalg.qr(rng.standard_normal((48, 48)))[0]
  return (rng.standard_normal((4000, 48)) * np.geomspace(0.1, 10, 48) @ directions).reshape(-1, 16, 3)


@pytest.fixture(scope="module")
def changes(seen):
  return Changes(seen)


def test_layout_is_the_mean_colour_of_each_cell():
  image = np.zeros((1, 8, 8, 3), np.uint8)
  image[0, :2, 2:4] = (255, 51, 0)  # first row, second column
  image[0, 6, 6] = 255  # a quarter of the last cell
  cells = layout(image)[0]
  np.testing.assert_allclose(cells[1], [1, -0.6, -1], atol=1e-6)
  np.testing.assert_allclose(cells[15], [-0.5] * 3, atol=1e-6)
  assert (np.delete(cells, [1, 15], 0) == -1).all()


def test_a_clear_guess_is_the_truth_and_a_blind_one_nothing(changes, seen):
  rng = np.random.default_rng(0)
  np.testing.assert_allclose(changes.guess(seen, np.zeros(len(seen)), rng), seen, atol=1e-6)
  assert np.abs(changes.guess(seen, np.full(len(seen), 1e8), rng)).max() < 0.01 * seen.std()


@pytest.mark.parametrize("blur", [0.1, 1.0, 5.0])
def test_the_expected_truth_of_a_guess_is_itself(changes, seen, blur):
  components = np.linalg.svd(seen.reshape(len(seen), -1), full_matrices=False)[2].T
  guess = changes.guess(seen, np.full(len(seen), blur), np.random.default_rng(0)).reshape(len(seen), -1) @ components
  truth = seen.reshape(len(seen), -1) @ components
  slopes = (truth * guess).sum(0) / np.square(guess).sum(0)
  np.testing.assert_allclose(slopes[:12], 1, atol=0.08)
  assert 0.01 < np.square(truth - guess).sum() / np.square(truth).sum() < 0.95


def test_large_components_are_guessed_first(changes, seen):
  guess = changes.guess(seen, np.ones(len(seen)), np.random.default_rng(0)).reshape(len(seen), -1)
  components = np.linalg.svd(seen.reshape(len(seen), -1), full_matrices=False)[2]
  kept = np.square(guess @ components.T).mean(0) / np.square(seen.reshape(len(seen), -1) @ components.T).mean(0)
  assert kept[0] > 0.8 and kept[-1] < 0.01 and np.corrcoef(kept, np.arange(48))[0, 1] < -0.8


def test_each_sample_has_its_own_blur(changes, seen):
  guess = changes.guess(seen[:2], np.array([0.0, 1e8]), np.random.default_rng(0))
  np.testing.assert_allclose(guess[0], seen[0], atol=1e-6)
  assert np.abs(guess[1]).max() < 0.01


def test_pooling_keeps_all_of_a_layout(changes, seen):
  pooling = changes.pooling(128)
  pooled = seen.reshape(len(seen), -1) @ pooling
  assert pooled.shape == (len(seen), 128) and np.square(pooled).mean() == pytest.approx(1, rel=0.01)
  np.testing.assert_allclose(pooled @ np.linalg.pinv(pooling), seen.reshape(len(seen), -1), atol=1e-6)
  ranges = np.linalg.svd(pooled, compute_uv=False)[:48]
  assert ranges[0] / ranges[-1] == pytest.approx(10, rel=0.3)  # of a hundred
