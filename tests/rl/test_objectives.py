"""The objectives against formulas written in PyTorch (values and gradients), and against what they promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.errors import UserError
from deepgen_jax.flow.schedule import inference_sigmas
from deepgen_jax.models.config import SchedulerConfig
from deepgen_jax.rl import objectives, sde_step

torch = pytest.importorskip("torch")
SHAPE = (4, 6, 8)
SIGMAS = np.asarray(inference_sigmas(SchedulerConfig(), 10))


def draw(count, seed=0, shape=SHAPE):
  return list(np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32))


def check(ours, theirs, variable, rtol=2e-5):
  """ours(v) and theirs(v) -> [B]; values, and gradients of the weighted sum."""
  weights = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
  tensor = torch.tensor(variable, dtype=torch.float64, requires_grad=True)
  expected = theirs(tensor)
  (expected * torch.tensor(weights)).sum().backward()
  value = ours(variable)
  gradient = jax.grad(lambda v: (ours(v) * weights).sum())(variable)
  np.testing.assert_allclose(value, expected.detach().numpy(), rtol=rtol, atol=1e-7)
  scale = np.abs(tensor.grad.numpy()).max()
  np.testing.assert_allclose(gradient / scale, tensor.grad.numpy() / scale, rtol=0, atol=rtol)


@pytest.mark.parametrize("clip, low, high", [(0.1, 0.9, 1.1), ((0.1,), 0.9, 1.1), ((0.05, 0.3), 0.95, 1.3)])
def test_policy_loss_clips_on_the_side_that_gains(clip, low, high):
  ratio = np.array([0.5, 0.5, 1.0, 1.5, 1.5, 0.97], np.float32)
  advantage = np.array([1.0, -1.0, 2.0, 1.0, -1.0, 1.0], np.float32)
  loss, clipped = objectives.policy_loss(ratio, advantage, clip)
  np.testing.assert_allclose(loss, [-0.5, low, -2.0, -high, 1.5, -0.97], rtol=1e-6)
  np.testing.assert_array_equal(clipped, [False, True, False, True, False, False])
  gradient = jax.grad(lambda r: objectives.policy_loss(r, advantage, clip)[0].sum())(ratio)
  np.testing.assert_allclose(gradient, np.where(clipped, 0, -advantage))


@pytest.mark.parametrize("clip", [-0.1, (0.1, -0.2), (1, 2, 3), (1.5, 0.1)])
def test_a_clip_that_makes_no_sense_is_named(clip):
  with pytest.raises(UserError, match="ratio clip"):
    objectives.clip_bounds(clip)


@pytest.mark.parametrize("kind", ["flow_sde", "dance"])
def test_guard_is_the_papers_ratio_for_each_sample(kind):
  """exp((log-ratio + |dmu|^2 / (2 s^2)) s), where the sum over a sample's own elements stays its own."""
  x, v, old_v, noise = draw(4)
  sigma, after = SIGMAS[[1, 3, 5, 7]], SIGMAS[[2, 4, 6, 8]]
  old = sde_step(kind, old_v, x, sigma, after, 0.7, next_latents=x)
  drawn = np.asarray(old.mean + old.std * noise)
  old = sde_step(kind, old_v, x, sigma, after, 0.7, next_latents=drawn)

  def ours(v):
    new = sde_step(kind, v, x, sigma, after, 0.7, next_latents=drawn)
    difference = new.log_prob - old.log_prob
    return jnp.exp(objectives.guard_log_ratio(difference, new.mean, old.mean, jnp.broadcast_to(new.std, (4, 1, 1))[:, 0, 0]))

  def theirs(v):
    one = lambda values: torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)
    s, s1, x_, drawn_ = one(sigma), one(after), torch.tensor(x).double(), torch.tensor(drawn).double()
    dt, out = s1 - s, []
    for velocity in (v, torch.tensor(old_v).double()):
      g = 0.7 * torch.sqrt(s / (1 - s)) if kind == "flow_sde" else torch.full_like(s, 0.7)
      out.append(x_ * (1 + g**2 / (2 * s) * dt) + velocity * (1 + g**2 * (1 - s) / (2 * s)) * dt)
    scale = g * torch.sqrt(-dt)
    mean, old_mean = out
    log_prob = lambda mu: (-((drawn_ - mu) ** 2) / (2 * scale**2)).mean((1, 2))
    bias = ((mean - old_mean) ** 2).mean((1, 2)) / (2 * scale.flatten() ** 2)
    return torch.exp((log_prob(mean) - log_prob(old_mean) + bias) * scale.flatten())

  check(ours, theirs, v, rtol=2e-4)  # float32 log-probabilities against float64
  alone = ours(v)[2]
  others = np.array(v)
  others[[0, 1, 3]] *= 5
  np.testing.assert_allclose(ours(others)[2], alone, rtol=1e-6)


def test_guard_centres_what_the_old_policy_draws():
  """Over the old policy's own draws the log-ratio has mean 0, where the plain one is below it."""
  rng = np.random.default_rng(1)
  shape = (2000, 1, 4)
  mean, old_mean = np.broadcast_to(0.3, shape), np.zeros(shape)
  std = np.full(2000, 0.5)
  drawn = 0.5 * rng.normal(size=shape)
  log_prob = lambda mu: (-((drawn - mu) ** 2) / (2 * 0.25)).mean((1, 2))
  difference = log_prob(mean) - log_prob(old_mean)
  assert difference.mean() < -0.15
  assert abs(np.asarray(objectives.guard_log_ratio(difference, mean, old_mean, std)).mean()) < 0.02


@pytest.mark.parametrize("beta, clip", [(0.1, 5.0), (1.0, 2.0)])
def test_nft_loss_against_pytorch(beta, clip):
  v, old_v, x0, noise = draw(4, seed=2)
  t = np.array([0.9, 0.6, 0.3, 0.05], np.float32)
  advantage = np.array([1.5, -7.0, 0.0, 9.0], np.float32)
  level = t[:, None, None]
  noisy = (1 - level) * x0 + level * noise

  def theirs(v):
    old, clean, x_t, t_ = (torch.tensor(a).double() for a in (old_v, x0, noisy, level))
    share = torch.clamp(torch.clamp(torch.tensor(advantage).double(), -clip, clip) / clip / 2 + 0.5, 0, 1)
    positive, negative = beta * v + (1 - beta) * old, (1 + beta) * old - beta * v
    losses = []
    for implicit in (positive, negative):
      error = x_t - t_ * implicit - clean
      with torch.no_grad():
        weight = error.abs().mean((1, 2)).clamp(min=1e-5)
      losses.append((error**2).mean((1, 2)) / weight)
    return clip * (share * losses[0] + (1 - share) * losses[1]) / beta

  check(lambda v: objectives.nft_loss(v, old_v, noisy, x0, t, advantage, beta, clip), theirs, v, rtol=1e-4)


def test_nft_follows_the_sign_of_the_advantage():
  """A good sample pulls the prediction towards it, a bad one pushes it away, an average one leaves it."""
  x0, noise = draw(2, seed=3)
  sigma = np.full(4, 0.5, np.float32)
  old_v = 0.5 * (noise - x0)
  noisy = 0.5 * x0 + 0.5 * noise
  advantage = np.array([5.0, -5.0, 0.0, 5.0], np.float32)
  gradient = jax.grad(lambda v: objectives.nft_loss(v, old_v, noisy, x0, sigma, advantage, 0.1, 5.0).sum())(old_v)
  towards = ((noise - x0 - old_v) * -np.asarray(gradient)).mean((1, 2))
  assert towards[0] > 0 and towards[1] < 0 and towards[3] > 0
  assert abs(towards[2]) < 1e-4 * abs(towards[0])


@pytest.mark.parametrize("kind", ["flow_sde", "cps", "dance"])
def test_x_based_kl_is_the_gaussian_divergence_of_the_step(kind):
  x, v, ref_v = draw(3, seed=4)
  sigma, after = SIGMAS[[1, 3, 5, 7]], SIGMAS[[2, 4, 6, 8]]
  new, ref = (sde_step(kind, each, x, sigma, after, 0.7, next_latents=x) for each in (v, ref_v))
  std = np.broadcast_to(new.std, (4, 1, 1))[:, 0, 0]
  normal = lambda mean: torch.distributions.Normal(torch.tensor(np.asarray(mean)), torch.tensor(std).reshape(-1, 1, 1))
  expected = torch.distributions.kl_divergence(normal(new.mean), normal(ref.mean)).mean((1, 2))
  np.testing.assert_allclose(objectives.kl(new.mean, ref.mean, std), expected, rtol=1e-4)


def test_v_based_kl_divides_by_the_references_deviation():
  """Ten steps: the reference's std_dev_t at step 4 is 1.941718 for flow_sde (eta 1), 0.707278 for cps."""
  v, ref_v, x = draw(3, seed=5)
  for kind, deviation in (("flow_sde", 1.941718), ("cps", 0.707278), ("dance", 0.288253)):
    sigma, after = np.full(4, SIGMAS[4]), np.full(4, SIGMAS[5])
    step = sde_step(kind, v, x, sigma, after, 1.0, next_latents=x)
    std = np.broadcast_to(step.std, (4, 1, 1))[:, 0, 0]
    found = objectives.velocity_deviation(kind, std, sigma, after)
    np.testing.assert_allclose(found, [deviation] * 4, rtol=1e-5)
    expected = ((v - ref_v) ** 2).mean((1, 2)) / (2 * deviation**2 + 1e-7)
    np.testing.assert_allclose(objectives.kl(v, ref_v, found), expected, rtol=1e-5)
  assert math.isclose(float(objectives.kl(v, v, std).max()), 0.0)
