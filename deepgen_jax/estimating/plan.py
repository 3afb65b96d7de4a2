"""What an update of a stage is made of: the programs that run, how often, what lies in memory beside them, and its model FLOPs.

Memory counts on one device. FLOPs are those of samples without padding, nothing recomputed: gradients of the stage's own loss,
and, where a rollout makes the samples, its forward passes and decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from deepgen_jax import sharding
from deepgen_jax.estimating.flops import count_flops
from deepgen_jax.estimating.inputs import (
  bytes_per_device,
  dealt,
  placed,
  policy_batch,
  policy_params,
  references_of,
  rollout_arguments,
  stage_parts,
  train_batch,
  train_programs,
)
from deepgen_jax.models.config import SIZES
from deepgen_jax.models.deepgen import DeepGen, param_shapes
from deepgen_jax.stages import rollouts, supervised
from deepgen_jax.stages.encode import ImageEncoder, images_per_device
from deepgen_jax.stages.step import may_complete


@dataclass(frozen=True)
class Part:
  """lower() -> a program that training runs. runs: of an update. beside: bytes there while it runs, besides what is resident.

  updates: the program has the optimizer as a branch, which is taken once an update.
  """

  lower: Callable[[], Any]
  runs: float
  beside: float = 0.0
  updates: bool = False


@dataclass(frozen=True)
class Plan:
  """resident: bytes throughout, "parameters" and "optimizer". images, flops: of an update. remat, frozen: what
  "auto" came to.
  """

  resident: dict[str, float]
  parts: dict[str, Part]
  images: float
  flops: float
  remat: str
  frozen: str


def make_plan(config, mesh, prompt_tokens: int, memory: float) -> Plan:
  """Of stages 1 to 3. memory: bytes that a device has."""
  model = supervised.make_model(config, SIZES[config.size], "tpu", memory)
  step, state, frozen, rng = train_programs(config, model, mesh)
  resident = {
    "parameters": bytes_per_device((state.params, frozen)),
    "optimizer": bytes_per_device((state.opt_state, state.grads, state.ema, state.old)),
  }
  size, tasks = config.data.batch_size, list(config.data.pattern)
  pictures = {} if config.data.precomputed else _pictures(tasks)

  def train(batch, completes: bool = True) -> Callable:
    return lambda: step.lower(state, frozen, dealt(batch, mesh), rng, completes=completes)

  def learned(runs: float, beside: float = 0.0) -> dict[str, Part]:
    """The supervised batches, `runs` times an update, and the encoders of their images, unless they are precomputed."""
    parts = {}
    for task in dict.fromkeys(tasks):
      batch = train_batch(config, model, task, prompt_tokens, size)
      batch |= jax.eval_shape(lambda: _weights(config, size)) if config.stage == "grpo" else {}
      updates = may_complete(config, tasks.index(task))
      parts[task] = Part(train(batch, updates), runs * tasks.count(task), beside, updates=updates)
    encoder = ImageEncoder(model, images_per_device(size, mesh), mesh=mesh)
    side = model.config.image_size
    images = dealt(jax.ShapeDtypeStruct((encoder.batch, side, side, 3), np.uint8), mesh)
    needed = {"moments": {"vae": frozen["vae"]}, "features": {"vlm": {"vision": frozen["vlm"]["vision"]}}}
    for name, count in pictures.items():
      lower = lambda name=name: encoder.programs[name].lower(needed[name], images)
      parts[name] = Part(lower, runs * count * -(-size // encoder.batch), beside)
    return parts

  flops = sample_flops(config, prompt_tokens)
  runs = {task: tasks.count(task) for task in tasks} | pictures
  supervised_flops = size * sum(count * flops[name] for name, count in runs.items())
  if config.stage == "supervised":
    return Plan(resident, learned(1.0), len(tasks) * size, supervised_flops, model.remat, model.frozen)

  g = config.grpo
  share = 1 / g.sft_every / len(tasks) if g.sft_weight else 0.0  # the pattern's micro-batches in turn, one an update
  images = g.prompts * g.group_size / g.updates_per_rollout
  parts, beside = _rollout_parts(config, model, mesh, state, frozen, prompt_tokens, train)
  parts |= learned(share, beside) if share else {}
  trained = images * (flops["rollout"] + _trained_steps(config, model) * flops["policy"])
  return Plan(resident, parts, images, trained + share * supervised_flops, model.remat, model.frozen)


def _weights(config, rows: int) -> dict:
  """What stage 3 adds to its supervised batch."""
  weights = rollouts.weights_of(config.grpo, rows, 1.0, 1, 0, fresh=True)
  return {key: weights[key] for key in ("weight", "micro_batches")}


def _pictures(tasks: list[str]) -> dict[str, int]:
  """Images of a sample of each task together, by the encoder that they go through."""
  references = sum(map(references_of, tasks))
  return {"moments": len(tasks) + references} | ({"features": references} if references else {})


def _trained_steps(config, model: DeepGen) -> int:
  """Timesteps of a sample that an update trains on."""
  nft = config.grpo.objective == "diffusion_nft"
  return config.grpo.train_steps or (config.grpo.steps if nft else rollouts.grid(config.grpo, model)[2])


def _rollout_parts(config, model, mesh, state, frozen, prompt_tokens: int, train: Callable) -> tuple[dict[str, Part], float]:
  """-> (the rollout and the policy's updates, bytes of what is kept of a rollout while updates run)."""
  g, programs = config.grpo, rollouts.Programs(config, model, mesh)
  count, updates = g.prompts * g.group_size, g.updates_per_rollout
  made, micro = g.rollout_batch or count, g.micro_batch or count // updates
  chunks, pieces = count // made, count // updates // micro
  steps = _trained_steps(config, model)
  params = policy_params(state, frozen)
  arguments = rollout_arguments(config, model, mesh, made, prompt_tokens)
  lower = lambda: programs.sample.lower(params, *arguments)
  out = placed(jax.eval_shape(programs.sample, params, *arguments), programs.shardings)
  chunk = arguments[0] | {name: getattr(out, name) for name in rollouts.kept(g)}
  inputs, outputs, kept = (bytes_per_device(tree) for tree in (arguments[0], out, chunk))

  parts = {"rollout": Part(lower, chunks / updates, chunks * inputs + (chunks - 1) * outputs)}
  beside = float(chunks * kept)
  if chunks > 1 or pieces * updates > 1:
    rows = np.zeros(micro, np.int32)
    whole = chunks * (inputs + outputs) + beside  # the rollout as it was made, and the pieces so far
    parts["take"] = Part(lambda: programs.take.lower([chunk] * chunks, rows), pieces, whole)
  own = policy_batch(config, model, mesh, chunk, micro)
  batch = {key: value for key, value in own.items() if key not in ("weight", "micro_batches", "fresh")}
  if updates > 1 and g.objective != "diffusion_nft":
    old = dealt(jax.eval_shape(programs.old, params, batch), mesh)
    parts["old"] = Part(lambda: programs.old.lower(params, batch), steps * pieces, beside + bytes_per_device(batch))
    beside += updates * pieces * steps * bytes_per_device(old)
    own |= old
  beside += bytes_per_device(own)
  parts["policy"] = Part(train(own), steps * pieces, beside, updates=True)
  return parts, beside


def sample_flops(config, prompt_tokens: int) -> dict[str, float]:
  """FLOPs of one sample by task (forward and backward), of one image's VAE encoding ("moments") and vision tokens ("features");
  in stage 3 also of making one image ("rollout") and of one timestep's gradient ("policy", with the KL's reference).
  """
  dtype = supervised.compute_dtype(config.dtype, "tpu")
  plain = DeepGen(supervised.at_image_size(config, SIZES[config.size]), dtype)  # no remat, attention as plain products
  complete, learning = stage_parts(config)
  params = jax.eval_shape(lambda params: complete(config, plain, params), param_shapes(plain.config))
  trainable, frozen = sharding.partition(params, config.trainable)
  loss = learning(config, plain)["loss"]
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))

  def gradient(trainable, frozen, batch, keys):
    def mean(part):
      full = sharding.merge(part, frozen)
      return loss(full | {"old": jax.lax.stop_gradient(full)}, batch, keys)[0].mean()

    return jax.grad(mean)(trainable)

  counts = {}
  for task in dict.fromkeys(config.data.pattern):
    batch = train_batch(config, plain, task, prompt_tokens, 1, padded=False)
    counts[task] = count_flops(gradient, trainable, frozen, batch, keys)
  image = jax.ShapeDtypeStruct((1, plain.config.image_size, plain.config.image_size, 3), np.uint8)
  counts["moments"] = count_flops(plain.encode_moments, params, image)
  counts["features"] = count_flops(plain.vision_features, params, image)
  if config.stage == "grpo":
    one = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    arguments = rollout_arguments(config, plain, one, 1, prompt_tokens, padded=False)
    sample = rollouts.sampler(config.grpo, plain)
    counts["rollout"] = count_flops(sample, params, *arguments)
    out = jax.eval_shape(sample, params, *arguments)
    chunk = arguments[0] | {name: getattr(out, name) for name in rollouts.kept(config.grpo)}
    batch = policy_batch(config, plain, one, dealt(chunk, one), 1)
    counts["policy"] = count_flops(gradient, trainable, frozen, batch, keys)
  return counts
