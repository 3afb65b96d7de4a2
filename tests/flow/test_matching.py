"""Noising, loss, guidance and the sampler on cases with known answers."""

import jax.numpy as jnp
import numpy as np

from deepgen_jax.flow.matching import euler_sample, guide, noised, velocity_loss


def test_noising_is_the_straight_line():
  rng = np.random.default_rng(0)
  x, noise = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
  out = noised(jnp.array(x), jnp.array(noise), jnp.array([0.0, 0.25, 1.0]))
  np.testing.assert_allclose(out[0], x[0], rtol=1e-6)
  np.testing.assert_allclose(out[1], 0.75 * x[1] + 0.25 * noise[1], rtol=1e-6)
  np.testing.assert_allclose(out[2], noise[2], rtol=1e-6)


def test_loss_is_a_mean_per_sample_over_real_tokens():
  rng = np.random.default_rng(0)
  v, x, noise = rng.normal(size=(3, 2, 6, 4)).astype(np.float32)
  mask = np.array([[True] * 6, [True] * 2 + [False] * 4])
  v[1, 2:] = 1e6  # garbage in pads
  loss = velocity_loss(jnp.array(v), jnp.array(x), jnp.array(noise), jnp.array(mask))
  error = np.square(v - (noise - x))
  np.testing.assert_allclose(loss, [error[0].mean(), error[1, :2].mean()], rtol=1e-5)


def test_guidance_scales_the_difference():
  assert guide(jnp.array(3.0), jnp.array(1.0), 4.0) == 9.0
  assert guide(jnp.array(3.0), jnp.array(1.0), 1.0) == 3.0


def test_euler_is_exact_for_a_constant_velocity_and_sees_timesteps():
  noise, data = jnp.full((1, 2, 3), 5.0), jnp.full((1, 2, 3), -1.0)
  sigmas = jnp.array([1.0, 0.6, 0.1, 0.0])
  np.testing.assert_allclose(euler_sample(lambda x, t: noise - data, noise, sigmas), data, rtol=1e-5)
  seen = euler_sample(lambda x, t: jnp.full_like(x, t), jnp.zeros((1, 1, 1)), sigmas)  # v = timestep
  np.testing.assert_allclose(seen, -(0.4 * 1000 + 0.5 * 600 + 0.1 * 100), rtol=1e-5)
