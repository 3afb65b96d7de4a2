"""Inputs of the programs that training and sampling run, as shapes with shardings: no weights, no data, no devices."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax import sharding
from deepgen_jax.data import prompts
from deepgen_jax.models.deepgen import DeepGen, param_shapes
from deepgen_jax.stages import grpo, rollouts, supervised
from deepgen_jax.stages.encode import encode_batch
from deepgen_jax.stages.stage import Stage
from deepgen_jax.stages.step import in_compute_dtype, jit_step

PIXELS = prompts.PIXELS_PER_TOKEN


def placed(tree, shardings):
  """Shapes of a tree with these shardings."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def dealt(tree, mesh):
  """Shapes of arrays with a leading sample axis, dealt to the mesh."""
  return placed(tree, jax.tree.map(lambda _: sharding.batch_sharding(mesh), tree))


def bytes_per_device(tree) -> int:
  """What one device holds of a tree of shapes with shardings."""
  leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def train_programs(config, model: DeepGen, mesh):
  """What `train` makes of a config -> (jitted step, state, frozen parameters, rng): shapes where it has arrays."""
  complete, learning = stage_parts(config)
  params = jax.eval_shape(lambda params: complete(config, model, params), param_shapes(model.config))
  trainable, frozen = sharding.partition(params, config.trainable)
  frozen = jax.eval_shape(lambda tree: in_compute_dtype(tree, model.dtype), frozen)
  stage = Stage(init=None, batches=None, prepare=None, evaluate=None, **learning(config, model))
  fresh, shardings, step = jit_step(config, stage, trainable, mesh)
  state = placed(jax.eval_shape(fresh, trainable), shardings)
  key = jax.eval_shape(lambda: jax.random.key(0))
  rng = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
  return step, state, placed(frozen, sharding.frozen_shardings(frozen, mesh, model.frozen)), rng


def stage_parts(config) -> tuple[Callable, Callable]:
  """-> (complete(config, model, parameters of a base), learning(config, model)) of the config's stage."""
  if config.stage == "grpo":
    return grpo.complete, grpo.learning
  return supervised.complete, supervised.learning


def references_of(task: str) -> int:
  """Reference images of a representative sample."""
  return int(task == "edit")


def train_batch(config, model: DeepGen, task: str, prompt_tokens: int, size: int, padded: bool = True) -> dict:
  """Shapes of a micro-batch of `size` samples such as `blank_sample`."""
  sample = blank_sample(config, model, task, prompt_tokens, padded)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), sample)


def blank_sample(config, model: DeepGen, task: str, prompt_tokens: int, padded: bool = True) -> dict:
  """A micro-batch of one, as `encode_batch` gives it: square images of the model's size, encoded as zeros, an edit with one
  reference, a prompt of `prompt_tokens` besides vision tokens. padded: to the config's buckets and multiples.
  """
  side = model.config.image_size
  image = np.zeros((side, side, 3), np.uint8)
  references = [image] * references_of(task)
  vision = len(references) * prompts.image_tokens(side, side)
  is_image = np.zeros(prompt_tokens + vision, bool)
  is_image[2 : 2 + vision] = True
  prompt = prompts.Prompt(np.zeros(len(is_image), np.int32), ((side, side),) * len(references), is_image)
  buckets = config.data.text_buckets if padded else (len(is_image),)
  texts = prompts.collate([prompt], model.config.scb.num_think_tokens, buckets)
  room = {"target": side**2, "references": len(references) * side**2}
  host = {"sample_id": np.zeros(1, np.uint32), "target": [image], "references": [references], "extents": room, **texts}
  multiple = config.data.token_multiple if padded else 1
  return encode_batch(model, {}, _Blank(model), host, multiple, lambda mean: mean)


class _Blank:
  """An ImageEncoder that gives zeros of the right shape."""

  def __init__(self, model: DeepGen):
    self._config = model.config

  def moments(self, params, images):
    c = self._config.vae
    latents = [np.zeros((*(side // c.factor for side in x.shape[:2]), c.latent_channels), np.float32) for x in images]
    return list(zip(latents, latents))

  def features(self, params, images):
    return [np.zeros((prompts.image_tokens(*x.shape[:2]), self._config.vision.out_size), np.float32) for x in images]


def sampler_inputs(model: DeepGen, mesh, batch: int, prompt_tokens: int, steps: int, padded: bool = True) -> tuple[tuple, dict]:
  """Arguments of `pipeline.jit_sampler` for `batch` images of the model's size with guidance: (positional, keywords)."""
  c = model.config
  side = c.image_size // c.vae.factor
  params = jax.eval_shape(lambda params: in_compute_dtype(params, model.dtype), param_shapes(model.config))
  inputs = _sampled(model, 2 * batch, prompt_tokens, (c.image_size,) * 2, padded)  # negative and positive branch
  tokens = inputs["target"]["mask"].shape[1]
  noise = jax.ShapeDtypeStruct((batch, tokens, c.dit.patch_dim), jnp.float32)
  cond, target, noise = dealt((inputs["cond"], inputs["target"], noise), mesh)
  params = placed(params, sharding.param_shardings(params, mesh))
  arguments = (params, noise, cond, target, None, _whole((steps + 1,), mesh), _whole((), mesh))
  return arguments, {"size": (side, side), "guided": True}


def _whole(shape: tuple[int, ...], mesh, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))


def _sampled(model: DeepGen, rows: int, prompt_tokens: int, pixels: tuple[int, int], padded: bool = True) -> dict:
  """Conditioning and target of `rows` images of these pixels without references, as the pipeline makes them."""
  c = model.config
  height, width = (side // c.vae.factor for side in pixels)
  tokens = height * width // c.dit.patch_size**2
  length = prompts.pick_bucket(prompt_tokens) if padded else prompt_tokens
  inputs = {"ids": ((rows, length), jnp.int32), "text_mask": ((rows, length), bool)}
  inputs |= {
    "position_ids": ((rows, 3, length + c.scb.num_think_tokens), jnp.int32),
    "image_index": ((rows, length), jnp.int32),
  }
  shape = lambda pair: jax.ShapeDtypeStruct(*pair)
  params = jax.eval_shape(lambda params: in_compute_dtype(params, model.dtype), param_shapes(model.config))
  return {
    "cond": jax.eval_shape(model.condition, params, {name: shape(pair) for name, pair in inputs.items()}),
    "target": {"positions": shape(((rows, tokens, 2), jnp.int32)), "mask": shape(((rows, tokens), bool))},
  }


def policy_params(state, frozen) -> dict:
  """What a rollout reads of the parameters."""
  params = sharding.merge(state.params, frozen)
  return {part: params[part] for part in ("dit", "vae")}


def rollout_arguments(config, model: DeepGen, mesh, rows: int, prompt_tokens: int, padded: bool = True) -> tuple:
  """What `rollouts.Programs.sample` takes after the parameters, for `rows` images of prompts without references."""
  g = config.grpo
  pixels, sigmas, _ = rollouts.grid(g, model)
  inputs = _sampled(model, rows, prompt_tokens, pixels, padded)
  if g.guidance > 1:
    inputs["negative"] = inputs["cond"]
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  inputs, keys = dealt((inputs, keys), mesh)
  return inputs, keys, keys, _whole(sigmas.shape, mesh), _whole((), mesh, jnp.int32)


def policy_batch(config, model: DeepGen, mesh, chunk: dict, rows: int) -> dict:
  """A micro-batch of the policy's update, cut from a chunk of a rollout (its inputs and what is kept of it)."""
  g = config.grpo
  _, sigmas, _ = rollouts.grid(g, model)

  def batch(piece):
    piece = piece | {"advantage": np.zeros(rows, np.float32), "sample_id": np.zeros(rows, np.uint32)}
    own = rollouts.step_batch(g, sigmas, 0, piece, 0, rollouts.at_step)
    return own | rollouts.weights_of(g, rows, 1.0, 1, 0, fresh=True)

  piece = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), chunk)
  return dealt(jax.eval_shape(batch, piece), mesh)
