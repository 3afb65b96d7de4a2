"""Flow matching: noising, velocity loss, guidance and the Euler sampler. Functions of arrays, no Flax.

All functions work on tokens [B,N,C] in float32:

    x_sigma = (1 - sigma) x_0 + sigma noise          (noised)
    v*      = noise - x_0                            (velocity_loss)
    v_cfg   = v_neg + g (v_pos - v_neg)              (guide)
    x_next  = x + (sigma_next - sigma) v             (euler_sample)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def noised(latents: Array, noise: Array, sigma: Array) -> Array:
  """latents, noise [B,...], sigma [B] -> x_sigma [B,...] float32."""
  sigma = sigma.reshape(-1, *[1] * (latents.ndim - 1))
  return (1 - sigma) * latents.astype(jnp.float32) + sigma * noise


def velocity_loss(velocity: Array, latents: Array, noise: Array, mask: Array) -> Array:
  """Mean squared error against noise - latents, per sample.

  velocity, latents, noise [B,N,C] tokens, mask bool [B,N] (real tokens) -> [B] float32: the mean over real elements, so that a
  large image doesn't weigh more than a small one (the reference's per-sample mean).
  """
  error = jnp.square(velocity.astype(jnp.float32) - (noise - latents.astype(jnp.float32))).mean(-1)
  return (error * mask).sum(-1) / mask.sum(-1)


def guide(positive: Array, negative: Array, scale) -> Array:
  """Classifier-free guidance."""
  return negative + scale * (positive - negative)


def euler_sample(velocity: Callable[[Array, Array], Array], noise: Array, sigmas: Array) -> Array:
  """Integrates dx = v d sigma over the grid `sigmas` [S+1].

  velocity(x [B,N,C] float32, timestep scalar) -> [B,N,C]; latents stay float32 throughout.
  """

  def step(x, pair):
    sigma, sigma_next = pair
    v = velocity(x, 1000 * sigma)
    return x + (sigma_next - sigma) * v.astype(jnp.float32), None

  x, _ = jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))
  return x
