"""The rollout: all steps of the sampler, stochastic inside a window of them and Euler steps elsewhere, and the decoding, as one
program.

A trajectory is kept once, float32: the latents before each step of the window and after its last one, [B, window + 1, N, D].
The sampler's last step is never in the window: noise that it adds would stay in the image. Every draw follows from a sample's
own key, whatever else is in the batch.

`inputs` is a dict of arrays with a leading sample axis, all that a velocity needs beside the noisy latents: `cond`
(Conditioning), `target` (positions, mask), and where they exist `references` (tokens, positions, mask) and `negative`
(Conditioning of guidance's other branch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from deepgen_jax.flow.matching import guide
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.dit import patchify, unpatchify
from deepgen_jax.rl.sde import SDEStep, sde_step


@flax.struct.dataclass
class Rollout:
  """images uint8 [B,H,W,3]; latents [B,N,D], the final ones; path [B,W+1,N,D]; log_prob [B,W] of the window's steps."""

  images: Array
  latents: Array
  path: Array
  log_prob: Array


def make_velocity(model: DeepGen, params: Mapping, inputs: Mapping, guidance: float) -> Callable[[Array, Array], Array]:
  """-> velocity(latents [B,N,D], sigma [B]) -> [B,N,D] float32, guided where `inputs` has the negative branch.

  The rollout and every replay of it go through here, with the same padding and dtype.
  """
  guided = "negative" in inputs
  twice = lambda negative, positive: jax.tree.map(
    lambda n, p: jnp.stack([n, p], axis=1).reshape(-1, *p.shape[1:]), negative, positive
  )
  cond = twice(inputs["negative"], inputs["cond"]) if guided else inputs["cond"]
  double = lambda tree: twice(tree, tree) if guided else tree
  references = double(inputs["references"]) if "references" in inputs else None
  prepared = model.prepare(params, cond, double(inputs["target"]), references)

  def velocity(latents: Array, sigma: Array) -> Array:
    v = model.velocity(params, double(latents), double(1000 * sigma), prepared)
    return guide(v[1::2], v[::2], guidance) if guided else v

  return velocity


def rollout(
  model: DeepGen,
  params: Mapping,
  inputs: Mapping,
  noise_keys: Array,
  keys: Array,
  sigmas: Array,
  start: Array,
  *,
  size: tuple[int, int],
  kind: str,
  eta: float,
  window: int,
  guidance: float,
) -> Rollout:
  """Samples with the policy `params`.

  noise_keys [B]: of the initial noise, equal where it is shared; keys [B]: of the sample's stochastic steps. sigmas [S+1];
  start: the window's first step. size: latents' height and width. kind: of `sde_step`, or "ode" (then window is 0). window:
  how many steps are stochastic and kept, at most S - 1. guidance: counts where `inputs` has a negative branch.
  """
  config = model.config
  shape = (*size, config.vae.latent_channels)
  noise = patchify(jax.vmap(lambda key: jax.random.normal(key, shape))(noise_keys), config.dit.patch_size)
  velocity = make_velocity(model, params, inputs, guidance)
  path = jnp.zeros((len(noise), window + 1, *noise.shape[1:]))
  log_probs = jnp.zeros((len(noise), window))

  def keep(path, latents, step):  # what is outside the window falls off the end
    place = step - start
    return path.at[:, jnp.where(place < 0, window + 1, place)].set(latents, mode="drop")

  def advance(carry, step):
    x, path, log_probs = carry
    sigma, after = sigmas[step], sigmas[step + 1]
    v = velocity(x, jnp.full(len(x), sigma))
    x_next = x + (after - sigma) * v
    if window:
      step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
      drawn = sde_step(kind, v, x, sigma, after, eta, sigmas[1], key=step_keys)
      inside = (step >= start) & (step < start + window)
      x_next = jnp.where(inside, drawn.next_latents, x_next)
      log_probs = log_probs.at[:, jnp.where(inside, step - start, window)].set(drawn.log_prob, mode="drop")
    return (x_next, keep(path, x_next, step + 1), log_probs), None

  carry = (noise, keep(path, noise, 0), log_probs)
  (latents, path, log_probs), _ = jax.lax.scan(advance, carry, jnp.arange(len(sigmas) - 1))
  images = model.decode(params, unpatchify(latents, *size, config.dit.patch_size))
  images = jnp.round(jnp.clip((images + 1) / 2, 0, 1) * 255).astype(jnp.uint8)
  return Rollout(images, latents, path, log_probs)


def replay(kind: str, eta: float, velocity: Array, batch: Mapping) -> SDEStep:
  """The step that a rollout took, seen from another velocity. batch: latents, next [B,N,D]; sigma, sigma_next, sigma_max
  [B].
  """
  sigma_max = batch["sigma_max"][:, None, None]
  return sde_step(
    kind, velocity, batch["latents"], batch["sigma"], batch["sigma_next"], eta, sigma_max, next_latents=batch["next"]
  )


def sample_keys(key: Array, rollout: int, count: int, group_size: int, shared: bool) -> tuple[Array, Array]:
  """Keys of the samples of a rollout: (of their initial noise [count], of their steps [count]).

  A sample's keys follow from `key`, the rollout and its place in the global batch. shared: samples of a group start from the
  same noise.
  """
  base = jax.random.fold_in(key, rollout)
  places = jnp.arange(count, dtype=jnp.uint32)
  fold = lambda place, salt: jax.random.fold_in(jax.random.fold_in(base, place), salt)
  starts = places - places % group_size if shared else places
  return jax.vmap(lambda i: fold(i, 0))(starts), jax.vmap(lambda i: fold(i, 1))(places)
