"""The train step that all stages share: one micro-batch in, gradients accumulated, an update when it completes one.

A stage brings `loss(params, batch, keys) -> (per-sample loss [B], metrics)`; this file turns it into the pure function

    train_step(state, frozen, batch, rng) -> (state, metrics)

An update is `accumulate` micro-batches, each weighing the same: clip by global norm, AdamW, EMA; only then `step` rises. An
update whose loss or gradient isn't finite changes no weight and is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from deepgen_jax import sharding

# Weight decay as in design 3.2: by name, never by number of dimensions, because layers are stacked.
DECAY = [
  (r".*/(kernel|embedding|think_tokens|a|b)", True),
  (r".*/(bias|scale)", False),
]


@flax.struct.dataclass
class TrainState:
  """Everything that changes. Trees hold the trainable leaves only (None elsewhere), all float32."""

  step: Array  # updates done
  micro: Array  # micro-batches of the update under way
  params: Any
  grads: Any  # sum over those micro-batches
  loss: Array  # likewise
  opt_state: Any
  ema: Any  # None when not kept
  skipped: Array  # updates skipped because they weren't finite
  skipped_in_row: Array


def make_optimizer(optim, steps: int) -> tuple[optax.GradientTransformation, Callable]:
  """AdamW with linear warm-up (a fraction `warmup` of all updates) and cosine decay to zero; -> (optimizer, schedule(step)).

  `lr_groups`, a table path regex -> factor, multiplies the learning rate (and with it the decay); empty: 1 everywhere.
  """
  warmup = max(1, round(optim.warmup * steps))
  if optim.schedule == "cosine":
    schedule = optax.warmup_cosine_decay_schedule(optim.lr * 1e-5, optim.lr, warmup, max(steps, warmup + 1))
  else:
    schedule = optax.warmup_constant_schedule(optim.lr * 1e-5, optim.lr, warmup)
  decay = lambda params: sharding.map_paths(lambda path, _: sharding.lookup(DECAY, path, "weight decay"), params)
  b1, b2 = optim.betas
  optimizer = optax.adamw(schedule, b1, b2, weight_decay=optim.weight_decay, mask=decay)
  if optim.lr_groups:
    factor = lambda path: sharding.lookup(optim.lr_groups, path, "config.optim.lr_groups")
    grouped = lambda updates, _: sharding.map_paths(lambda path, update: update * factor(path), updates)
    optimizer = optax.chain(optimizer, optax.stateless(grouped))
  return optimizer, schedule


def init_state(trainable, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
  """A fresh state around float32 trainable parameters."""
  zero = lambda: jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero(),
    micro=zero(),
    params=trainable,
    grads=jax.tree.map(jnp.zeros_like, trainable),
    loss=jnp.zeros(()),
    opt_state=optimizer.init(trainable),
    ema=jax.tree.map(jnp.copy, trainable) if ema else None,
    skipped=zero(),
    skipped_in_row=zero(),
  )


def sample_keys(rng: Array, step: Array, sample_id: Array) -> Array:
  """One key per sample, [B], from the update and the sample's id alone: batch, padding and devices don't matter."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(rng, step), i))(sample_id)


def make_train_step(loss: Callable, optimizer, schedule, *, accumulate: int, clip: float, ema_decay: float) -> Callable:
  """Builds train_step(state, frozen, batch, rng) -> (state, metrics).  batch is a dict with "sample_id" uint32 [B]."""

  def finish(state: TrainState) -> tuple[TrainState, dict]:
    """Completes an update."""
    grads = jax.tree.map(lambda g: g / accumulate, state.grads)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(state.loss)
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12)), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = jax.tree.map(lambda e, p: e * ema_decay + p * (1 - ema_decay), ema, params)
    pick = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    done = TrainState(
      step=state.step + 1,
      micro=jnp.zeros_like(state.micro),
      params=pick(params, state.params),
      grads=jax.tree.map(jnp.zeros_like, state.grads),
      loss=jnp.zeros_like(state.loss),
      opt_state=pick(opt_state, state.opt_state),
      ema=pick(ema, state.ema),
      skipped=state.skipped + ~good,
      skipped_in_row=jnp.where(good, 0, state.skipped_in_row + 1),
    )
    return done, norm

  def train_step(state: TrainState, frozen, batch: dict, rng: Array) -> tuple[TrainState, dict]:
    keys = sample_keys(rng, state.step, batch["sample_id"])

    def mean_loss(trainable):
      losses, metrics = loss(sharding.merge(trainable, frozen), batch, keys)
      return losses.mean(), metrics

    (value, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    grads = sharding.keep_sharded(grads)
    state = state.replace(
      micro=state.micro + 1, loss=state.loss + value / accumulate, grads=jax.tree.map(jnp.add, state.grads, grads)
    )
    update_loss, lr = state.loss, schedule(state.step)
    last = state.micro == accumulate
    state, norm = jax.lax.cond(last, finish, lambda s: (s, jnp.zeros(())), state)
    metrics = metrics | {
      "micro_loss": value,
      "loss": update_loss,
      "grad_norm": norm,
      "lr": lr,
      "skipped": state.skipped,
      "skipped_in_row": state.skipped_in_row,
    }
    return state, metrics

  return train_step
