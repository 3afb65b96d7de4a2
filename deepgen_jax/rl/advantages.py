"""Advantages from several rewards a sample, with missing ones. Statistics span all samples given: pass the global batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from deepgen_jax.errors import UserError, nearest

KINDS = ("grpo", "grpo_global_std", "reinforce++", "gdpo")
EPSILON = 1e-4  # added to a standard deviation


def advantages(kind, rewards, weights, group_size) -> Array:
  """rewards, weights [B,F], groups of `group_size` contiguous, NaN = missing -> advantages [B] float32.

    grpo              (R - mean of group) / std of group       R = sum of weight x reward
    grpo_global_std   (R - mean of group) / std of all
    reinforce++       (R - mean of all) / std of all
    gdpo              each reward as in grpo, their weighted sum standardised over all

  Standard deviations have ddof 1, and 1e-4 is added. A missing reward of weight 0 is ignored; otherwise gdpo leaves that reward
  out for the sample and the others drop the sample. Dropped samples, and groups with fewer than two that are left, get 0 and
  enter no statistic. Raises UserError.
  """
  if kind not in KINDS:
    raise UserError(f"advantages: unknown kind {kind!r}; use {', '.join(KINDS)}.{nearest(str(kind), KINDS)}")
  rewards, weights = jnp.asarray(rewards, jnp.float32), jnp.asarray(weights, jnp.float32)
  if rewards.ndim != 2 or rewards.shape != weights.shape:
    raise UserError(f"advantages: rewards {rewards.shape} and weights {weights.shape} must both be [samples, rewards]")
  if group_size < 1 or len(rewards) % group_size:
    raise UserError(f"advantages: {len(rewards)} samples aren't groups of {group_size}")
  return _advantages(kind, rewards, weights, group_size)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _advantages(kind: str, rewards: Array, weights: Array, group_size: int) -> Array:
  groups = lambda x: x.reshape(-1, group_size, *x.shape[1:])  # [G, n, ...]
  present, weighted = ~jnp.isnan(rewards), weights != 0
  rewards = jnp.where(present, rewards, 0)
  if kind == "gdpo":
    within = groups(present)
    scores = _centre(groups(rewards), within) / _scale(groups(rewards), within)
    scores = jnp.where(within, scores, 0).reshape(rewards.shape)
    valid = (present & weighted).any(1) | ~weighted.any(1)
  else:
    scores, valid = rewards, (present | ~weighted).all(1)
  total = groups((scores * weights).sum(1))
  valid = groups(valid)
  valid &= valid.sum(1, keepdims=True) > 1
  everyone = lambda x: x.reshape(1, -1)
  centred = _centre(total, valid)
  spread = _scale(total, valid)
  if kind in ("reinforce++", "gdpo"):
    centred = _centre(everyone(total), everyone(valid)).reshape(total.shape)
  if kind != "grpo":
    spread = _scale(everyone(total), everyone(valid))
  return jnp.where(valid, centred / spread, 0).reshape(-1)


def _centre(x: Array, mask: Array) -> Array:
  """x less its mean over axis 1, where mask."""
  return x - (x * mask).sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True), 1)


def _scale(x: Array, mask: Array) -> Array:
  """Standard deviation over axis 1, where mask, with ddof 1, + EPSILON."""
  square = jnp.square(_centre(x, mask)) * mask
  return jnp.sqrt(square.sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True) - 1, 1)) + EPSILON
