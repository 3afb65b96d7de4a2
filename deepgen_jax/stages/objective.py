"""The objective of stages 1 and 2, one function of parameters and a batch.

z0 ~ posterior, sigma ~ shifted grid, noise ~ N(0, 1)      drawn from the sample's own key
v  = DiT((1 - sigma) z0 + sigma noise, 1000 sigma, SCB(VLM(prompt, references)), references)
L  = mean over real elements of (v - (noise - z0))^2       per sample
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from deepgen_jax.flow.matching import noised, velocity_loss
from deepgen_jax.flow.schedule import draw_sigma
from deepgen_jax.models.deepgen import DeepGen


def sample_loss(
  model: DeepGen,
  params: Mapping,
  batch: Mapping,
  keys: Array,
  *,
  joint: bool,
  drop: bool = True,
  weighting: str = "none",
  logit_mean: float = 0.0,
  logit_std: float = 1.0,
) -> Array:
  """Flow-matching loss of each sample, [B] float32.

  joint: the VLM trains (LoRA), so prompt and think tokens run as one stream. drop: LoRA dropout is on. weighting, logit_mean,
  logit_std: how sigma is drawn (flow/schedule.py).
  """
  target = batch["target"]
  fold = lambda salt: jax.vmap(lambda key: jax.random.fold_in(key, salt))(keys)
  normal = lambda salt: jax.vmap(lambda key: jax.random.normal(key, target["mean"].shape[1:]))(fold(salt))
  latents = model.scale(target["mean"] + jnp.exp(0.5 * target["logvar"]) * normal(0))
  noise = normal(1)
  sigma = jax.vmap(lambda key: draw_sigma(key, model.config.scheduler, weighting, logit_mean, logit_std))(fold(2))
  cond = model.condition(params, batch, joint=joint, keys=fold(3) if drop else None)
  prepared = model.prepare(params, cond, target, batch.get("references"))
  velocity = model.velocity(params, noised(latents, noise, sigma), 1000 * sigma, prepared)
  return velocity_loss(velocity, latents, noise, target["mask"])
