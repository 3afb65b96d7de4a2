"""Inputs of the programs that training and sampling run, as shapes with shardings: no weights, no data, no devices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax import sharding
from deepgen_jax.data import prompts
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.stages import supervised
from deepgen_jax.stages.encode import encode_batch
from deepgen_jax.stages.stage import Stage
from deepgen_jax.stages.step import in_compute_dtype, jit_step

PIXELS = prompts.PIXELS_PER_TOKEN


def placed(tree, shardings):
  """Shapes of a tree with these shardings."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def bytes_per_device(tree) -> int:
  """What one device holds of a tree of shapes with shardings."""
  leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def train_programs(config, model: DeepGen, mesh):
  """What `train` makes of a config -> (jitted step, state, frozen parameters, rng): shapes where it has arrays."""
  params = jax.eval_shape(lambda key: supervised.complete(config, model, model.init(key)), jax.random.key(0))
  trainable, frozen = sharding.partition(params, config.trainable)
  frozen = jax.eval_shape(lambda tree: in_compute_dtype(tree, model.dtype), frozen)
  stage = Stage(None, supervised.make_loss(config, model), None, None, None, dtype=model.dtype)
  fresh, shardings, step = jit_step(config, stage, trainable, mesh)
  state = placed(jax.eval_shape(fresh, trainable), shardings)
  key = jax.eval_shape(lambda: jax.random.key(0))
  rng = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
  return step, state, placed(frozen, sharding.param_shardings(frozen, mesh)), rng


def references_of(task: str) -> int:
  """Reference images of a representative sample."""
  return int(task == "edit")


def train_batch(config, model: DeepGen, task: str, prompt_tokens: int, size: int, padded: bool = True) -> dict:
  """A micro-batch of `size` equal samples, as `encode_batch` gives it: square images of the model's size, an edit with one
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
  batch = encode_batch(model, {}, _Blank(model), host, multiple, lambda mean: mean)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch)


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


def sampler_inputs(model: DeepGen, mesh, batch: int, prompt_tokens: int, steps: int) -> tuple[tuple, dict]:
  """Arguments of `pipeline.jit_sampler` for `batch` images of the model's size with guidance: (positional, keywords)."""
  c = model.config
  side = c.image_size // c.vae.factor
  tokens = (side // c.dit.patch_size) ** 2
  params = jax.eval_shape(lambda key: in_compute_dtype(model.init(key), model.dtype), jax.random.key(0))
  length = prompts.pick_bucket(prompt_tokens) + c.scb.num_think_tokens
  dealt = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
  both = 2 * batch  # negative and positive branch
  inputs = jax.eval_shape(
    lambda: {
      "ids": jnp.zeros((both, length - c.scb.num_think_tokens), jnp.int32),
      "text_mask": jnp.ones((both, length - c.scb.num_think_tokens), bool),
      "position_ids": jnp.zeros((both, 3, length), jnp.int32),
      "image_index": jnp.zeros((both, length - c.scb.num_think_tokens), jnp.int32),
    }
  )
  cond = jax.tree.map(lambda x: dealt(x.shape, x.dtype), jax.eval_shape(model.condition, params, inputs))
  target = {"positions": dealt((both, tokens, 2), jnp.int32), "mask": dealt((both, tokens), bool)}
  noise = dealt((batch, tokens, c.dit.patch_dim), jnp.float32)
  whole = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.replicated(mesh))
  params = placed(params, sharding.param_shardings(params, mesh))
  arguments = (params, noise, cond, target, None, whole((steps + 1,)), whole(()))
  return arguments, {"size": (side, side), "guided": True}
