"""Stage 3, MR-GRPO: reinforcement learning of the DiT with a mixture of rewards and an auxiliary supervised loss.

In the loop that all stages share, preparing a batch is the rollout with the current weights, its rewards and advantages
(`rollouts.py`); a step is one micro-batch of the update: the samples at one of the trained timesteps, or the supervised batch.

    L = (1 - lambda) mean over timesteps and samples of (policy loss + beta KL) + lambda flow-matching loss

lambda and 1 - lambda count in updates with a supervised batch; without one the first mean is all there is. One optimizer step
an update. What this follows of the reference, and where it departs: configs/grpo.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deepgen_jax import distributed
from deepgen_jax.errors import UserError, nearest
from deepgen_jax.models import lora
from deepgen_jax.models.deepgen import PARTS, DeepGen
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.rl import objectives
from deepgen_jax.rl.advantages import KINDS as ADVANTAGES
from deepgen_jax.rl.rollout import make_velocity, replay
from deepgen_jax.rl.sde import KINDS as SAMPLERS
from deepgen_jax.stages import step as step_lib
from deepgen_jax.stages.encode import ImageEncoder, encode_batch, images_per_device
from deepgen_jax.stages.objective import sample_loss
from deepgen_jax.stages.rollouts import INPUTS, Answers, Judges, Rollouts, reward_scalars
from deepgen_jax.stages.stage import Report, Stage
from deepgen_jax.stages.supervised import load_base, make_model, micro_batches

NFT_DEVIATION = 0.1  # the reference's placeholder for the sampler's deviation in diffusion_nft's KL
FLOAT32_DIFFERENCE = 1e-5  # how far a replayed log-probability may be from the rollout's
EVAL_BATCH, GRID_ROWS = 32, 8


@dataclass(frozen=True)
class Judging:
  """prompts[i] -> the i-th prompt drawn (`rewards.prompts.Prompt`); score: a `rewards.mixture.Mixture`. The same for the
  evaluation, whose prompts are a fixed list; it may be empty.
  """

  prompts: Any
  score: Any
  held_out: Sequence = ()
  held_out_score: Any = None


def build(config, mesh, workdir, judging: Judging | None = None) -> Stage:
  """Stage 3 from a config; `judging` replaces what the config says of prompts and rewards."""
  g = config.grpo
  check(config, mesh.shape["data"] * mesh.shape["fsdp"])
  sizes, params, tokenizer = load_base(config, mesh)
  if "scb" not in params:
    raise UserError(f"config.init {config.init!r} has no SCB: it is a base for stage 1. Give the run or model of stage 2.")
  model = make_model(config, sizes)
  dtype = model.dtype
  judging = judging or load_judging(config)
  practice = micro_batches(config, sizes, tokenizer, mesh, params) if g.sft_weight else None
  loaded = [params]  # taken out once: training's own copy shall be the only one
  del params
  encoder = ImageEncoder(model, images_per_device(config.data.batch_size, mesh), cache=config.data.cache_images, mesh=mesh)
  pipes: list[DeepGenPipeline] = []  # made of the first weights that are seen

  def pipe(params) -> DeepGenPipeline:
    parts = {part: params[part] for part in PARTS}
    if not pipes:
      pipes.append(DeepGenPipeline(sizes, parts, tokenizer, dtype, mesh, model.attention))
    pipes[0].params = parts
    return pipes[0]

  rollouts = Rollouts(config, pipe, model, mesh, judging.prompts, judging.score, Answers(epath.Path(workdir) / "rewards"))

  def prepare(params, host):
    number, part = divmod(host["update"], g.updates_per_rollout)
    if part == 0:
      rollouts.make(params, number)
    supervised = host["supervised"]
    if supervised:  # while rewards are on their way
      supervised = encode_batch(model, params, encoder, supervised, config.data.token_multiple, model.scale)
    if part == 0:
      rollouts.judge(params)
    share = 1 - g.sft_weight if supervised else 1.0
    own = 0
    for batch in rollouts.micro_batches(part, share, int(supervised is not None)):
      own += 1
      yield batch
    if supervised:
      rows = len(supervised["sample_id"])
      weight = np.full(rows, g.sft_weight * (own + 1), np.float32)
      yield supervised | {"weight": weight, "micro_batches": np.full(rows, own + 1, np.int32)}

  limit = FLOAT32_DIFFERENCE if dtype == jnp.float32 else min(g.ratio_clip) / 4
  return Stage(
    init=lambda: complete(config, model, loaded.pop()),
    batches=Updates(practice, g.sft_every),
    prepare=prepare,
    evaluate=make_evaluate(g, pipe, judging, rollouts.pixels),
    summarise=lambda rows: summarise(rows, limit),
    scalars=lambda: rollouts.scalars,
    images=g.prompts * g.group_size // g.updates_per_rollout,
    evaluate_first=True,
    period=g.updates_per_rollout,
    **learning(config, model),
  )


def complete(config, model: DeepGen, params) -> dict:
  """Parameters of a base -> all that the stage has: LoRA where asked for, else the initial DiT to measure a KL from. Traceable,
  so that `jax.eval_shape` gives the shapes without weights.
  """
  params = lora.merge_lora(params)
  if config.lora.targets:
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return lora.add_lora(params, config.lora.targets, config.lora.rank, config.lora.alpha, key)
  if config.grpo.kl_weight:  # a copy of its own: buffers of what trains are given away
    params = params | {"reference": {"dit": jax.tree.map(jnp.copy, params["dit"])}}
  return params


def learning(config, model: DeepGen) -> dict[str, Any]:
  """What makes the train step of this stage (`stages.step.jit_step`), as keywords of `Stage`."""
  return {
    "loss": lambda params, batch, keys: batch_loss(model, config, params, batch, keys),
    "host_batches": 1,
    "old_decay": tuple(config.grpo.nft_old_decay) if config.grpo.objective == "diffusion_nft" else None,
    "dtype": model.dtype,
  }


def batch_loss(model: DeepGen, config, params: Mapping, batch: Mapping, keys) -> tuple[jax.Array, dict]:
  """Per-sample loss [B] of a micro-batch of either kind, and its metrics."""
  g = config.grpo
  if "latents" not in batch:
    losses = sample_loss(model, params, batch, keys, joint=False, drop=False, **config.timesteps)
    return losses, {"sft_loss": losses.mean()}
  inputs = {name: batch[name] for name in INPUTS if name in batch}
  velocity_of = lambda params: make_velocity(model, params, inputs, g.guidance)
  sigma, advantage = batch["sigma"], batch["advantage"]
  rows = lambda std: jnp.broadcast_to(std, (len(sigma), 1, 1))[:, 0, 0]
  if g.objective == "diffusion_nft":
    level, clean = sigma[:, None, None], batch["latents"]
    noise = jax.vmap(lambda key, s: jax.random.normal(_at_sigma(key, s), clean.shape[1:]))(keys, sigma)
    noisy = (1 - level) * clean + level * noise
    velocity = velocity_of(params)(noisy, sigma)
    old = jax.lax.stop_gradient(velocity_of(params["old"])(noisy, sigma))
    losses = objectives.nft_loss(velocity, old, noisy, clean, sigma, advantage, g.nft_beta, g.advantage_clip)
    metrics = {"old_policy_distance": jnp.square(velocity - old).mean()}
    deviation = jnp.full(len(sigma), NFT_DEVIATION)
  else:
    noisy = batch["latents"]
    velocity = velocity_of(params)(noisy, sigma)
    new = replay(g.sampler, g.eta, velocity, batch)
    losses, metrics = _ratio_loss(g, new, rows(new.std), batch)
    deviation = objectives.velocity_deviation(g.sampler, rows(new.std), sigma, batch["sigma_next"])
  metrics["policy_loss"] = losses.mean()
  if g.kl_weight:
    initial = params["reference"] if "reference" in params else lora.without_lora({"dit": params["dit"]})
    reference = jax.lax.stop_gradient(velocity_of(initial)(noisy, sigma))
    if g.kl_kind == "x":
      divergence = objectives.kl(new.mean, replay(g.sampler, g.eta, reference, batch).mean, rows(new.std))
    else:
      divergence = objectives.kl(velocity, reference, deviation)
    losses = losses + g.kl_weight * divergence
    metrics["kl"] = divergence.mean()
  return losses, metrics


def _ratio_loss(g, new, std, batch: Mapping) -> tuple[jax.Array, dict]:
  """flow_grpo and grpo_guard. Without old values from before the update, the policy is its own old one: the ratio is 1."""
  old = batch.get("old_log_prob", jax.lax.stop_gradient(new.log_prob))
  log_ratio = new.log_prob - old
  if g.objective == "grpo_guard":
    if g.sampler == "cps":  # its log-probability leaves out the Gaussian's scale
      log_ratio = log_ratio / (2 * jnp.square(std))
    old_mean = batch.get("old_mean", jax.lax.stop_gradient(new.mean))
    log_ratio = objectives.guard_log_ratio(log_ratio, new.mean, old_mean, std)
  ratio = jnp.exp(log_ratio)
  losses, clipped = objectives.policy_loss(ratio, batch["advantage"], tuple(g.ratio_clip))
  if g.objective == "grpo_guard":
    losses = losses / (batch["sigma"] - batch["sigma_next"])
  metrics = {
    "ratio": ratio.mean(),
    "ratio_min": ratio.min(),
    "ratio_max": ratio.max(),
    "clip_fraction": clipped.mean(),
    "replay_difference": jnp.max(jnp.abs(new.log_prob - batch["rollout_log_prob"]) * batch["fresh"]),
  }
  return losses, metrics


def _at_sigma(key, sigma):
  """A key for this noise level: each trained timestep of a sample has noise of its own."""
  return jax.random.fold_in(key, jax.lax.bitcast_convert_type(sigma, jnp.uint32))


def summarise(rows: list[dict], limit: float) -> dict[str, float]:
  """Metrics of an update. Raises RuntimeError where the replay isn't the rollout, by more than `limit`."""
  found = step_lib.summarise(rows)
  for name, extreme in (("ratio_min", min), ("ratio_max", max), ("replay_difference", max)):
    if name in found:
      found[name] = extreme(row[name] for row in rows if name in row)
  if found.get("replay_difference", 0) > limit:
    raise RuntimeError(
      f"replayed log-probabilities differ from the rollout's by {found['replay_difference']:.3g}, more than {limit:.3g}: the "
      "ratios would be noise. Set config.grpo.micro_batch to config.grpo.rollout_batch, or config.dtype to float32."
    )
  found["grad_norm_policy"] = [row["grad_norm_so_far"] for row in rows if "policy_loss" in row][-1]
  if "sft_loss" in rows[-1]:
    found["grad_norm_sft"] = rows[-1]["grad_norm_share"]
  return {name: value for name, value in found.items() if name not in ("grad_norm_so_far", "grad_norm_share", "micro_loss")}


class Updates:
  """What the loop iterates over: the update's number, and the host's supervised batch where the update has one."""

  def __init__(self, supervised, every: int):
    self._supervised, self._every = supervised, every

  def iterate(self, start: int = 0) -> UpdateIterator:
    """Without end, from update `start` on."""
    return UpdateIterator(self._supervised, self._every, start)

  def bad_samples(self) -> list:
    """Of the supervised data."""
    return self._supervised.bad_samples() if self._supervised else []

  def counts(self) -> dict:
    """Likewise, what became of it."""
    return self._supervised.counts() if self._supervised else {}


class UpdateIterator:
  """Its whole state is `consumed`, in updates."""

  def __init__(self, supervised, every: int, start: int):
    self.consumed, self._every = start, every
    self._samples = supervised.iterate(-(-start // every)) if supervised else None

  def __next__(self) -> dict:
    update = self.consumed
    self.consumed += 1
    due = self._samples is not None and update % self._every == 0
    return {"update": update, "supervised": next(self._samples) if due else None}

  @property
  def waited(self) -> float:
    """Seconds that the supervised data let wait so far."""
    return self._samples.waited if self._samples else 0.0

  def close(self) -> None:
    """Stops reading ahead."""
    if self._samples:
      self._samples.close()


def make_evaluate(g, pipe: Callable, judging: Judging, pixels: tuple[int, int]) -> Callable:
  """-> evaluate(params, step): the held-out prompts, each with the same seeds every time, judged by their own rewards."""
  prompts = [prompt for prompt in judging.held_out for _ in range(g.eval_images)]

  def evaluate(params, step) -> Report:
    if not prompts:
      return Report()
    sampler, images = pipe(params), []
    for start in range(0, len(prompts), EVAL_BATCH):
      places = np.minimum(np.arange(start, start + EVAL_BATCH), len(prompts) - 1)  # the last batch repeats the last one
      made = sampler(
        [prompts[i].text for i in places],
        image=[list(prompts[i].references) for i in places],
        height=pixels[0],
        width=pixels[1],
        num_inference_steps=g.eval_steps,
        guidance_scale=g.eval_guidance,
        seed=start,
        output_type="np",
      )
      images.extend(np.round(made.images * 255).astype(np.uint8))
    images = np.stack(images[: len(prompts)])
    judges = Judges(judging.held_out_score, g.eval_images)
    judges.submit(judging.held_out, images)
    scalars = reward_scalars(*judges.result(), [prompt.dataset for prompt in prompts], g.eval_images)
    scalars.pop("zero_std_groups", None)
    rows = images.reshape(-1, g.eval_images, *images.shape[1:])[:GRID_ROWS]
    return Report(scalars, {"prompts": np.concatenate(np.concatenate(rows, axis=1), axis=1)})

  return evaluate


def load_judging(config) -> Judging:
  """Prompts and rewards as the config names them."""
  from deepgen_jax.data import emoji as emoji_data
  from deepgen_jax.rewards import mixture, prompts, registry

  g = config.grpo

  def read(path: str, rewards: Sequence, held_out: bool):
    weights = dict(rewards) or None
    if path:
      found = prompts.load(path, weights)
    else:
      found = prompts.embedded(emoji_data.prepare(config.data.dir), held_out=held_out, rewards=weights)
    told = [(d.name, d.share, [(prompt.text, dict(prompt.weights)) for prompt in d.prompts]) for d in found.datasets]
    distributed.check_same(json.dumps(told), f"prompt set {path!r}", "give all the same files")
    return found

  def mixed(found):
    options = {"emoji_similarity": {"data_dir": config.data.dir}} | dict(g.reward_options)
    rewards = {name: registry.build(name, **options.get(name, {})) for name in found.reward_names()}
    return mixture.Mixture(rewards)

  train = read(g.prompt_set, g.rewards, held_out=False)
  if not config.eval.every:
    return Judging(train.stream(config.seed), mixed(train))
  judged = read(g.eval_prompt_set, g.eval_rewards, held_out=True)
  stream = judged.stream(0)
  held_out = [stream[i] for i in range(min(config.eval.samples, len(judged)))]
  return Judging(train.stream(config.seed), mixed(train), held_out, mixed(judged))


def check(config, devices: int) -> None:
  """Raises UserError for settings that don't go together; `devices`: that share a batch."""
  g = config.grpo
  known = {
    "objective": objectives.OBJECTIVES,
    "advantage": ADVANTAGES,
    "sampler": (*SAMPLERS, "ode"),
    "kl_kind": objectives.KL_KINDS,
  }
  for key, names in known.items():
    if g[key] not in names:
      raise UserError(f"config.grpo.{key} {g[key]!r}; use {', '.join(names)}.{nearest(g[key], names)}")
  objectives.clip_bounds(tuple(g.ratio_clip))
  nft = g.objective == "diffusion_nft"
  if nft != (g.sampler == "ode"):
    raise UserError("config.grpo: objective diffusion_nft goes with sampler ode, the others with a stochastic one")
  if nft and g.shared_noise:
    raise UserError(
      "config.grpo: sampler ode adds no noise, and from the same start a group's images are equal: set shared_noise=False"
    )
  if nft and g.kl_kind == "x" and g.kl_weight:
    raise UserError("config.grpo.kl_kind x needs a stochastic step, which diffusion_nft hasn't: use v")
  count, updates = g.prompts * g.group_size, g.updates_per_rollout
  rollout = g.rollout_batch or count
  micro = g.micro_batch or count // updates
  window = g.steps if nft else g.window or g.steps - 1
  rules = [
    (len(g.size) in (0, 2) and not any(side % 32 or side <= 0 for side in g.size), "size must be () or two multiples of 32"),
    (g.group_size > 1, "group_size must be at least 2: advantages compare the images of a prompt"),
    (g.prompts > 0 and count % rollout == 0, f"rollout_batch {rollout} must divide prompts x group_size = {count}"),
    (rollout % g.group_size == 0, f"rollout_batch {rollout} must hold whole groups of {g.group_size}"),
    (updates > 0 and count % updates == 0, f"updates_per_rollout {updates} must divide prompts x group_size = {count}"),
    (count // updates % micro == 0, f"micro_batch {micro} must divide the {count // updates} samples of an update"),
    (rollout % devices == 0, f"rollout_batch {rollout} must be a multiple of the {devices} devices that share it"),
    (micro % devices == 0, f"micro_batch {micro} must be a multiple of the {devices} devices that share it"),
    (nft or 0 < window < g.steps, f"window {window} must be from 1 to steps - 1 = {g.steps - 1}: the last step isn't in it"),
    (0 <= g.train_steps <= window, f"train_steps {g.train_steps} must be at most {window}, the steps there are to train"),
    (0 <= g.sft_weight < 1 and g.sft_every > 0, "sft_weight must be from 0 to below 1, sft_every at least 1"),
    (not config.lora.dropout or not config.lora.targets, "lora.dropout must be 0: a replay is the rollout's own computation"),
  ]
  for holds, message in rules:
    if not holds:
      raise UserError(f"config.grpo: {message}")
