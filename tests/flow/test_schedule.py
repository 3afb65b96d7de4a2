"""Sigma grids against diffusers' scheduler, and the draws of training."""

import jax
import numpy as np
import pytest

from deepgen_jax.flow.schedule import draw_sigma, dynamic_mu, inference_sigmas, training_sigmas
from deepgen_jax.models.config import SchedulerConfig


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 6, 50])
def test_static_grids_equal_diffusers(shift, steps):
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
  config = SchedulerConfig(shift=shift)
  np.testing.assert_allclose(training_sigmas(config), scheduler.sigmas.numpy(), rtol=1e-6)
  scheduler.set_timesteps(steps)
  np.testing.assert_allclose(inference_sigmas(config, steps), scheduler.sigmas.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1120, 4096])
def test_dynamic_shift_equals_diffusers(kind, tokens):
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, max_shift=1.15)
  config = SchedulerConfig(use_dynamic_shifting=True, time_shift_type=kind)
  scheduler.set_timesteps(7, mu=dynamic_mu(config, tokens))
  np.testing.assert_allclose(inference_sigmas(config, 7, tokens), scheduler.sigmas.numpy(), rtol=1e-5)


def test_reference_values_for_shift_3_and_50_steps():
  sigmas = inference_sigmas(SchedulerConfig(), 50)
  np.testing.assert_allclose(sigmas[:4], [1.0, 0.993124, 0.986057, 0.978790], atol=1e-6)
  np.testing.assert_allclose(sigmas[-4:], [0.120533, 0.066900, 0.008929, 0], atol=1e-6)


def test_dynamic_shift_needs_the_image_size():
  with pytest.raises(ValueError, match="number of image tokens"):
    inference_sigmas(SchedulerConfig(use_dynamic_shifting=True), 5)
  with pytest.raises(ValueError, match="at least one step"):
    inference_sigmas(SchedulerConfig(), 0)


def test_drawn_sigmas_lie_on_the_shifted_grid():
  """Shift 3: mean 0.677 and median 0.75 (reference, section 2.6)."""
  config = SchedulerConfig()
  drawn = np.asarray(jax.vmap(lambda key: draw_sigma(key, config))(jax.random.split(jax.random.key(0), 20_000)))
  assert np.isin(drawn, training_sigmas(config)).all()
  assert abs(drawn.mean() - 0.677) < 0.01 and abs(np.median(drawn) - 0.75) < 0.01


def test_logit_normal_weighting_draws_from_the_middle():
  config = SchedulerConfig(shift=1.0)
  keys = jax.random.split(jax.random.key(0), 5000)
  drawn = np.asarray(jax.vmap(lambda key: draw_sigma(key, config, "logit_normal", 0.0, 0.5))(keys))
  assert abs(np.median(drawn) - 0.5) < 0.02 and np.mean((drawn > 0.2) & (drawn < 0.8)) > 0.95
  with pytest.raises(ValueError, match="weighting"):
    draw_sigma(keys[0], config, "cosmap")
