"""Sigma grids of flow matching, as the reference and diffusers compute them.

x_sigma = (1 - sigma) x_0 + sigma noise; sigma runs from 1 (noise) to 0 (data); the network sees timestep = 1000 sigma.

* Training draws an index into the grid that the scheduler's constructor shifts once:
  sigma(s) = shift s / (1 + (shift - 1) s), s = k/1000.
* Inference spaces its steps linearly between the ends of that shifted grid and shifts them again, as diffusers does.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepgen_jax.models.config import SchedulerConfig


def shift_sigmas(sigmas, shift: float):
  """Static time shift (SD3 paper, eq. 23)."""
  return shift * sigmas / (1 + (shift - 1) * sigmas)


def training_sigmas(config: SchedulerConfig) -> np.ndarray:
  """Grid float32 [num_train_timesteps], descending from 1."""
  n = config.num_train_timesteps
  sigmas = np.arange(n, 0, -1, dtype=np.float64) / n
  return (sigmas if config.use_dynamic_shifting else shift_sigmas(sigmas, config.shift)).astype(np.float32)


def dynamic_mu(config: SchedulerConfig, tokens: int) -> float:
  """Resolution-dependent shift parameter for an image of that many DiT tokens."""
  slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
  return config.base_shift + slope * (tokens - config.base_image_seq_len)


def inference_sigmas(config: SchedulerConfig, steps: int, tokens: int | None = None) -> np.ndarray:
  """Sigmas float32 [steps + 1], the last one 0.  tokens: DiT tokens of the image, needed for dynamic shifting only."""
  if steps < 1:
    raise ValueError(f"a sampler needs at least one step, got {steps}")
  grid = training_sigmas(config)
  scale = config.num_train_timesteps
  sigmas = np.linspace(float(grid[0]) * scale, float(grid[-1]) * scale, steps) / scale
  if config.use_dynamic_shifting:
    if tokens is None:
      raise ValueError("dynamic shifting needs the number of image tokens")
    mu = dynamic_mu(config, tokens)
    shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    sigmas = shift / (shift + (1 / sigmas - 1))
  else:
    sigmas = shift_sigmas(sigmas, config.shift)
  return np.append(sigmas, 0).astype(np.float32)


def draw_sigma(key: Array, config: SchedulerConfig, weighting: str = "none", mean: float = 0.0, std: float = 1.0) -> Array:
  """One training sigma (float32 scalar): index floor(1000 u) into the training grid, u uniform or sigmoid(N(mean, std))."""
  if weighting == "none":
    u = jax.random.uniform(key)
  elif weighting == "logit_normal":
    u = jax.nn.sigmoid(mean + std * jax.random.normal(key))
  else:
    raise ValueError(f"weighting {weighting!r} is neither 'none' nor 'logit_normal'")
  grid = jnp.asarray(training_sigmas(config))
  return grid[jnp.minimum((u * grid.shape[0]).astype(jnp.int32), grid.shape[0] - 1)]
