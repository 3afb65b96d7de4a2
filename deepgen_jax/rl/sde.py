"""One stochastic step of the sampler and its log-probability, float32.

With x0 = x - sigma v, x1 = x + (1 - sigma) v, dt = sigma' - sigma < 0, each kind is next = mean + std N(0, 1):

    flow_sde   g = eta sqrt(sigma / (1 - sigma)); mean = x + g^2 dt (x + (1 - sigma) v) / (2 sigma) + v dt; std = g sqrt(-dt)
    dance      flow_sde with g = eta; mean = x + (v + eta^2 / 2 (x - (1 - sigma) x0) / sigma^2) dt; std = eta sqrt(-dt)
    cps        mean = (1 - sigma') x0 + sigma' cos(eta pi / 2) x1; std = sigma' sin(eta pi / 2)

Sources: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818), Flow-CPS (arXiv 2509.05952).
"""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from deepgen_jax.errors import UserError, nearest

KINDS = ("flow_sde", "cps", "dance")
_TINY = 1e-8  # the reference's guard of divisions and logarithms


@flax.struct.dataclass
class SDEStep:
  """mean [B,...]; std, the scale of the noise that is added (broadcasts against mean); log_prob [B]; next_latents [B,...]."""

  mean: Array
  std: Array
  log_prob: Array
  next_latents: Array


def sde_step(kind, velocity, latents, sigma, sigma_next, eta=1.0, sigma_max=None, next_latents=None, key=None) -> SDEStep:
  """From noise level `sigma` to `sigma_next`, both in [0, 1] and scalars or [B]. velocity, latents [B,...].

  next_latents: where the step led (replaying a rollout); otherwise it is drawn with `key`, one key or [B] of them, each sample
  from its own. sigma_max: the grid's second entry, which flow_sde divides by where sigma is 1. log_prob is a mean over a
  sample's elements, Gaussian, and for cps the bare -(next - mean)^2; no gradient goes through next_latents. Raises UserError.
  """
  if kind not in KINDS:
    raise UserError(f"sde_step: unknown kind {kind!r}; use {', '.join(KINDS)}.{nearest(str(kind), KINDS)}")
  if next_latents is None and key is None:
    raise UserError("sde_step: give next_latents (to replay a step) or key (to draw one)")
  x, v = (jnp.asarray(value, jnp.float32) for value in (latents, velocity))
  level = lambda value: jnp.reshape(value, (-1,) + (1,) * (x.ndim - 1)) if jnp.ndim(value) else jnp.asarray(value)
  sigma, sigma_next = (level(jnp.asarray(value, jnp.float32)) for value in (sigma, sigma_next))
  mean, std = _MOMENTS[kind](x, v, sigma, sigma_next, eta, sigma_max)
  if next_latents is None:
    next_latents = mean + std * _noise(key, x.shape)
  next_latents = jax.lax.stop_gradient(jnp.asarray(next_latents, jnp.float32))
  square = jnp.square(next_latents - mean)
  log_prob = -square
  if kind != "cps":
    log_prob = -square / (2 * (jnp.square(std) + _TINY)) - jnp.log(std + _TINY) - math.log(math.sqrt(2 * math.pi))
  return SDEStep(mean, std, log_prob.mean(tuple(range(1, x.ndim))), next_latents)


def _flow_sde(x, v, sigma, sigma_next, eta, sigma_max):
  dt = sigma_next - sigma
  first = sigma >= 1
  if sigma_max is None and not isinstance(first, jax.core.Tracer) and first.any():
    raise UserError("sde_step: flow_sde at sigma 1 needs sigma_max, the second entry of the grid")
  below = jnp.where(first, jnp.nan if sigma_max is None else sigma_max, sigma)
  g = eta * jnp.sqrt(sigma / (1 - below))
  drift = jnp.square(g) / (2 * sigma)
  return x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt, g * jnp.sqrt(-dt)


def _dance(x, v, sigma, sigma_next, eta, sigma_max):
  dt = sigma_next - sigma
  score = (x - (x - sigma * v) * (1 - sigma)) / (jnp.square(sigma) + _TINY)
  return x + (v + 0.5 * eta**2 * score) * dt, eta * jnp.sqrt(-dt)


def _cps(x, v, sigma, sigma_next, eta, sigma_max):
  start, end = x - sigma * v, x + (1 - sigma) * v
  angle = eta * math.pi / 2
  return start * (1 - sigma_next) + end * sigma_next * abs(math.cos(angle)), sigma_next * math.sin(angle)


_MOMENTS = {"flow_sde": _flow_sde, "cps": _cps, "dance": _dance}


def _noise(key, shape) -> Array:
  """Standard normal [B,...], each sample from its own key; the i-th of one key is folded in with i."""
  keys = key
  if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
    keys = jax.random.wrap_key_data(jnp.asarray(key))
  if keys.ndim == 0:
    keys = jax.vmap(lambda i: jax.random.fold_in(keys, i))(jnp.arange(shape[0]))
  return jax.vmap(lambda one: jax.random.normal(one, shape[1:]))(keys)
