"""The stochastic step against the reference's numbers (shared with reference/rl.md) and against what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepgen_jax
from deepgen_jax.errors import UserError
from deepgen_jax.flow.schedule import inference_sigmas
from deepgen_jax.models.config import SchedulerConfig
from deepgen_jax.rl import sde_step

SIGMAS = np.asarray(inference_sigmas(SchedulerConfig(), 10))
# Ten steps, x = 0.5, v = -0.3, next = 0.4; (step, eta) -> per kind: mean, the reference's own deviation, log-probability
GOLDEN = {
  (0, 1): [(0.26196121, 5.00810154, -0.9284659), (0.03189655, 0.96012931, -0.13550015), (0.50199353, 0.19967646, 0.56166312)],
  (0, 0.7): [(0.38946121, 3.50567108, -0.56237694), (0.24984134, 0.85548148, -0.02254762), (0.50707705, 0.13977352, 0.7553577)],
  (4, 1): [(0.43830022, 1.94171838, -0.34093645), (0.2157681, 0.70727848, -0.03394139), (0.50195067, 0.288253, 0.26243173)],
  (4, 0.7): [(0.48247984, 1.35920287, -0.0040792), (0.35612327, 0.63018974, -0.00192517), (0.51366857, 0.2017771, 0.52297865)],
  (8, 1): [(0.52791213, 0.62059257, 0.13551198), (0.57820557, 0.00892857, -0.03175723), (0.4435792, 0.51876797, -0.26616843)],
  (9, 0.7): [(0.50223122, 0.06644106, -128.39583636), (0.50267857, 0, -0.01054289), (0.45302855, 0.06614378, 1.47561191)],
}


def full(value, batch=2):
  return np.full((batch, 3, 2, 4), value, np.float32)


@pytest.mark.parametrize("kind, column", [("flow_sde", 0), ("cps", 1), ("dance", 2)])
@pytest.mark.parametrize("step, eta", GOLDEN)
def test_the_references_numbers(kind, column, step, eta):
  mean, deviation, log_prob = GOLDEN[step, eta][column]
  sigma, after = SIGMAS[step], SIGMAS[step + 1]
  out = deepgen_jax.rl.sde_step(kind, full(-0.3), full(0.5), sigma, after, eta, SIGMAS[1], next_latents=full(0.4))
  std = deviation * np.sqrt(sigma - after) if kind == "flow_sde" else deviation
  np.testing.assert_allclose(out.mean, full(mean), rtol=2e-5)
  np.testing.assert_allclose(np.broadcast_to(out.std, (2, 1, 1, 1)).ravel(), [std] * 2, rtol=2e-5, atol=1e-7)
  np.testing.assert_allclose(out.log_prob, [log_prob] * 2, rtol=2e-4, atol=2e-6)
  assert out.log_prob.shape == (2,)


@pytest.mark.parametrize("kind", ["flow_sde", "cps", "dance"])
def test_a_drawn_step_is_mean_plus_noise_and_replays(kind):
  rng = np.random.default_rng(0)
  v, x = rng.normal(size=(2, 3, 8, 8, 16)).astype(np.float32)
  sigma, after = np.float32([1.0, 0.8, 0.3]), np.float32([0.9, 0.7, 0.1])  # a level for each sample
  drawn = sde_step(kind, v, x, sigma, after, 0.7, sigma_max=0.95, key=jax.random.key(3))
  noise = (np.asarray(drawn.next_latents) - drawn.mean) / drawn.std
  assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
  replayed = sde_step(kind, v, x, sigma, after, 0.7, sigma_max=0.95, next_latents=drawn.next_latents)
  np.testing.assert_array_equal(replayed.log_prob, drawn.log_prob)
  alone = sde_step(kind, v[1:2], x[1:2], 0.8, 0.7, 0.7, next_latents=drawn.next_latents[1:2])
  np.testing.assert_allclose(alone.log_prob, drawn.log_prob[1:2], rtol=1e-5)
  fewer = sde_step(kind, v[:1], x[:1], 1.0, 0.9, 0.7, sigma_max=0.95, key=jax.random.key(3))
  np.testing.assert_allclose(fewer.next_latents, drawn.next_latents[:1], rtol=1e-5, atol=1e-6)  # others don't matter


def test_without_noise_every_kind_is_the_euler_step():
  v, x = np.random.default_rng(1).normal(size=(2, 2, 4, 4, 16)).astype(np.float32)
  for kind in ("flow_sde", "cps", "dance"):
    out = sde_step(kind, v, x, 0.8, 0.7, eta=0.0, key=jax.random.PRNGKey(0))
    np.testing.assert_allclose(out.next_latents, x - 0.1 * v, rtol=1e-5, atol=1e-5)


def test_gradient_goes_through_the_mean_alone():
  v, x = np.random.default_rng(2).normal(size=(2, 1, 2, 2, 4)).astype(np.float32)
  value = lambda v: sde_step("cps", v, x, 0.8, 0.7, key=jax.random.key(0)).log_prob.sum()
  kept = sde_step("cps", v, x, 0.8, 0.7, key=jax.random.key(0)).next_latents
  replay = lambda v: sde_step("cps", v, x, 0.8, 0.7, next_latents=kept).log_prob.sum()
  np.testing.assert_allclose(jax.grad(value)(v), jax.grad(replay)(v), rtol=1e-6)
  assert np.abs(jax.grad(value)(v)).max() > 0


def test_mistakes_are_named():
  x = jnp.zeros((1, 2, 2, 4))
  with pytest.raises(UserError, match=r"unknown kind 'flow'.*'flow_sde'"):
    sde_step("flow", x, x, 0.8, 0.7, key=jax.random.key(0))
  with pytest.raises(UserError, match="next_latents"):
    sde_step("cps", x, x, 0.8, 0.7)
  with pytest.raises(UserError, match="sigma_max"):
    sde_step("flow_sde", x, x, 1.0, 0.9, key=jax.random.key(0))
