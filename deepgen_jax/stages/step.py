"""The train step that all stages share: one micro-batch in, gradients accumulated, an update when it completes one.

A stage brings `loss(params, batch, keys) -> (per-sample loss [B], metrics)`; this file turns it into the pure function

    train_step(state, frozen, batch, rng) -> (state, metrics)

An update is `accumulate` micro-batches, each weighing the same: clip by global norm, AdamW, EMA; only then `step` rises. An
update whose loss or gradient isn't finite changes no weight and is counted. A batch may say otherwise: "micro_batches" int [B],
how many its update has, and "weight" float [B], a factor on the samples' losses whose mean over the update's samples is 1.
Where a task never comes last in an update, train_step(..., completes=False) is its program, without the optimizer in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
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
  old: Any  # a slower policy that a stage compares with; None when not kept
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


def init_state(trainable, optimizer: optax.GradientTransformation, ema: bool, old: bool = False) -> TrainState:
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
    old=jax.tree.map(jnp.copy, trainable) if old else None,
    skipped=zero(),
    skipped_in_row=zero(),
  )


def between_updates(state: TrainState) -> TrainState:
  """The state before the update under way, whose micro-batches have changed nothing but sums."""
  zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  return state.replace(micro=zero(state.micro), grads=zero(state.grads), loss=zero(state.loss))


def full_params(state: TrainState, frozen) -> dict:
  """What a stage's functions take: the parameters as they are, and under "old" those of the slower policy where it is kept."""
  params = sharding.merge(state.params, frozen)
  return params if state.old is None else params | {"old": sharding.merge(state.old, frozen)}


def sample_keys(rng: Array, step: Array, sample_id: Array) -> Array:
  """One key per sample, [B], from the update and the sample's id alone: batch, padding and devices don't matter."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(rng, step), i))(sample_id)


def in_compute_dtype(params, dtype):
  """Kernels and embeddings as `linear` and `embed` would cast them anyway; norms, biases and think tokens stay float32.

  Done where parameters are still sharded, so that what is gathered from other devices is already small.
  """
  large = re.compile(r".*/(kernel|embedding|a|b)")
  return sharding.map_paths(lambda path, x: x.astype(dtype) if large.fullmatch(path) else x, params)


def make_train_step(
  loss: Callable,
  optimizer,
  schedule,
  *,
  accumulate: int,
  clip: float,
  ema_decay: float,
  old_decay: tuple = (0.0, 0.0),
  dtype=np.float32,
) -> Callable:
  """Builds train_step(state, frozen, batch, rng, completes=True) -> (state, metrics).  batch is a dict with "sample_id" uint32
  [B]; completes, static: whether it may be an update's last.

  old_decay (rise, most): update s keeps min(rise s, most) of the slower policy, where the state has one. A batch with weights
  reports the gradient norms of its share and of the update so far: an update of several terms is told apart by them.
  """

  def finish(state: TrainState, sums, count) -> tuple[TrainState, Array]:
    """Completes an update with the sums of its gradients -> (state, norm of its gradient)."""
    grads = jax.tree.map(lambda g: g / count, sums)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(state.loss)
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12)), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = jax.tree.map(lambda e, p: e * ema_decay + p * (1 - ema_decay), ema, params)
    old, kept = state.old, jnp.minimum(old_decay[0] * state.step, old_decay[1])
    if old is not None:
      old = jax.tree.map(lambda o, p: o * kept + p * (1 - kept), old, params)
    pick = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    done = TrainState(
      step=state.step + 1,
      micro=jnp.zeros_like(state.micro),
      params=pick(params, state.params),
      grads=jax.tree.map(jnp.zeros_like, state.grads),
      loss=jnp.zeros_like(state.loss),
      opt_state=pick(opt_state, state.opt_state),
      ema=pick(ema, state.ema),
      old=pick(old, state.old),
      skipped=state.skipped + ~good,
      skipped_in_row=jnp.where(good, 0, state.skipped_in_row + 1),
    )
    return done, norm

  def train_step(state: TrainState, frozen, batch: dict, rng: Array, completes: bool = True) -> tuple[TrainState, dict]:
    keys = sample_keys(rng, state.step, batch["sample_id"])
    count = batch["micro_batches"][0] if "micro_batches" in batch else accumulate

    def mean_loss(trainable):
      losses, metrics = loss(full_params(state.replace(params=in_compute_dtype(trainable, dtype)), frozen), batch, keys)
      return (losses * batch.get("weight", 1.0)).mean(), metrics

    (value, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    grads = sharding.keep_sharded(grads)
    alone = accumulate == 1 and "micro_batches" not in batch  # always the whole update: there is no sum to keep
    sums = grads if alone else jax.tree.map(jnp.add, state.grads, grads)
    state = state.replace(micro=state.micro + 1, loss=state.loss + value / count)
    update_loss, lr = state.loss, schedule(state.step)
    if "weight" in batch:
      metrics |= {"grad_norm_share": optax.tree.norm(grads) / count, "grad_norm_so_far": optax.tree.norm(sums) / count}
    if alone:
      zeros = state.grads
      state, norm = finish(state, sums, count)
      state = state.replace(grads=zeros)
    else:
      state, norm = state.replace(grads=sums), jnp.zeros(())
      if completes:
        state, norm = jax.lax.cond(state.micro == count, lambda s: finish(s, s.grads, count), lambda s: (s, norm), state)
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


# Metrics of the train step that belong to the update: its last micro-batch has them. Others are means over micro-batches.
OF_UPDATE = ("loss", "grad_norm", "lr", "skipped", "skipped_in_row")


def summarise(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
  """The metrics of an update from those of its micro-batches, in order: means over those that have one, and OF_UPDATE."""
  names = dict.fromkeys(name for row in metrics for name in row)
  means = {name: float(np.mean([row[name] for row in metrics if name in row])) for name in names}
  return means | {name: metrics[-1][name] for name in OF_UPDATE}


def jit_step(config, stage, trainable, mesh) -> tuple[Callable, Any, Callable]:
  """What `train` runs and `estimate` compiles: -> (fresh(trainable) -> TrainState, its shardings, the jitted step).

  stage: its loss, dtype, host_batches and old_decay take part. trainable: float32 leaves, arrays or ShapeDtypeStructs.
  """
  optim = config.optim
  optimizer, schedule = make_optimizer(optim, config.steps)
  fresh = lambda params: init_state(params, optimizer, optim.ema > 0, stage.old_decay is not None)
  shardings = sharding.state_shardings(jax.eval_shape(fresh, trainable), mesh)
  step = make_train_step(
    stage.loss,
    optimizer,
    schedule,
    accumulate=stage.host_batches or len(config.data.pattern),
    clip=optim.clip,
    ema_decay=optim.ema,
    old_decay=stage.old_decay or (0.0, 0.0),
    dtype=stage.dtype,
  )
  out = (shardings, sharding.replicated(mesh))
  return fresh, shardings, sharding.jit(step, mesh, donate_argnums=0, out_shardings=out, static_argnames="completes")


def may_complete(config, place: int) -> bool:
  """Whether the task of an update's micro-batch number `place` has the update's last one too: `completes` of its train step."""
  pattern = config.data.pattern
  return config.stage != "supervised" or pattern[place] == pattern[-1]
