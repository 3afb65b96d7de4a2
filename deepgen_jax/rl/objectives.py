"""What an update of stage 3 minimises, per sample, as functions of arrays: float32, no Flax.

With A the clipped advantage, d = log p_new - log p_old of one sampler step, s the scale of its noise:

    flow_grpo       r = exp(d);                                 L = max(-A r, -A clip(r))
    grpo_guard      r = exp(s (d + |mu_new - mu_old|^2 / (2 s^2)));  L = max(-A r, -A clip(r)) / -dt
    diffusion_nft   no log-probability: A says how much of the noised sample's two implicit policies to follow

Sources: Flow-GRPO (arXiv 2505.05470), GRPO-Guard (arXiv 2510.22319), DiffusionNFT (arXiv 2509.16117). Squares and
log-probabilities are means over a sample's elements, as in `sde_step`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from deepgen_jax.errors import UserError

OBJECTIVES = ("flow_grpo", "grpo_guard", "diffusion_nft")
KL_KINDS = ("v", "x")
_TINY = 1e-8
_KL_TINY = 1e-7  # the reference's guard of the KL's denominator


def clip_bounds(clip) -> tuple[float, float]:
  """`clip`: how far the ratio may be from 1, one number or (below, above), both >= 0 -> (lowest, highest ratio)."""
  values = tuple(float(c) for c in clip) if isinstance(clip, tuple | list) else (float(clip),)
  if len(values) not in (1, 2) or min(values) < 0 or values[0] > 1:
    raise UserError(f"ratio clip {clip!r}: give one number or (below, above), from 0 on; below at most 1")
  return 1 - values[0], 1 + values[-1]


def policy_loss(ratio: Array, advantage: Array, clip) -> tuple[Array, Array]:
  """PPO's clipped loss. ratio, advantage [B]; clip as in `clip_bounds` -> (loss [B], where the clip cuts the gradient [B])."""
  clipped = jnp.clip(ratio, *clip_bounds(clip))
  plain, bounded = -advantage * ratio, -advantage * clipped
  return jnp.maximum(plain, bounded), bounded > plain


def guard_log_ratio(difference: Array, mean: Array, old_mean: Array, std: Array) -> Array:
  """GRPO-Guard's normalised log-ratio, [B]: its mean over the old policy's draws is 0 and its scale the same at every step.

  difference [B]: of Gaussian log-probabilities, new less old; mean, old_mean [B,...] of the step; std [B], scale of its noise.
  Each sample has its own bias (the reference's, by mistake, is a mean over the batch).
  """
  std = jnp.maximum(std, _TINY)
  bias = _per_sample(jnp.square(mean - old_mean)) / (2 * jnp.square(std))
  return std * (difference + bias)


def kl(value: Array, reference: Array, deviation: Array) -> Array:
  """mean (value - reference)^2 / (2 deviation^2), per sample [B]. value, reference [B,...]; deviation [B].

  With means of the step and the scale of its noise, this is the exact Gaussian KL divergence (x-based). With velocities it is
  the reference's v-based one; there deviation is what its sampler returns (`velocity_deviation`).
  """
  return _per_sample(jnp.square(value - reference)) / (2 * jnp.square(deviation) + _KL_TINY)


def velocity_deviation(kind: str, std: Array, sigma: Array, sigma_next: Array) -> Array:
  """The reference's `std_dev_t` of a step, [B], from the scale of the noise [B]: flow_sde's lacks the factor sqrt(-dt)."""
  return std / jnp.sqrt(jnp.maximum(sigma - sigma_next, _TINY)) if kind == "flow_sde" else std


def nft_loss(velocity, old_velocity, noisy, latents, sigma, advantage, beta: float, advantage_clip: float) -> Array:
  """DiffusionNFT, per sample [B].

  velocity (new policy), old_velocity, noisy (x_sigma = (1 - sigma) x_0 + sigma noise), latents (x_0, the rollout's final ones)
  [B,...]; sigma, advantage [B]. beta > 0: how far apart the two implicit policies are.
  """
  level = sigma.reshape(-1, *[1] * (latents.ndim - 1))
  old_velocity = jax.lax.stop_gradient(old_velocity)
  share = jnp.clip(jnp.clip(advantage / advantage_clip, -1, 1) / 2 + 0.5, 0, 1)

  def distance(direction):
    error = noisy - level * (old_velocity + direction * beta * (velocity - old_velocity)) - latents
    weight = jax.lax.stop_gradient(jnp.maximum(_per_sample(jnp.abs(error)), 1e-5))
    return _per_sample(jnp.square(error)) / weight

  return advantage_clip * (share * distance(1) + (1 - share) * distance(-1)) / beta


def _per_sample(x: Array) -> Array:
  return x.mean(tuple(range(1, x.ndim)))
