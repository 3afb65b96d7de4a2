"""What training and serving run, at the full size: a config's train step and the sampler, with random weights and made-up
samples of the shapes that the estimate compiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax import sharding
from deepgen_jax.errors import UserError
from deepgen_jax.estimating.chips import CHIPS
from deepgen_jax.estimating.flops import count_flops
from deepgen_jax.estimating.inputs import blank_sample, sampler_inputs, train_programs
from deepgen_jax.estimating.plan import sample_flops
from deepgen_jax.flow.schedule import inference_sigmas
from deepgen_jax.models.config import SIZES
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.pipeline import jit_sampler, sample_images
from deepgen_jax.stages import supervised

FULL_CASES = ("full_generate", "full_edit", "full_sampler_1", "full_sampler_8")
PROMPT_TOKENS, STEPS, GUIDANCE = 100, 50, 4.0

# bfloat16 FLOP/s of a device, dense, by the name that JAX gives it; as their makers document them.
PEAKS = {
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
} | {name: CHIPS[chip].peak for name, chip in {"TPU v5": "v5p", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}.items()}


@dataclass(frozen=True)
class FullJob:
  """run() does the work once and returns when it is done; flops, images: of one run on all devices, FLOPs the model's own."""

  run: Callable[[], Any]
  flops: float
  images: int
  settings: dict


def build(name: str, config, devices=None) -> FullJob:
  """A case of a config of stages 1 or 2, on all devices. Training: one update, of as many micro-batches as the config has, all
  of the one task. The sampler: 1 or 8 images on each device, parameters whole on it, prompts encoded. Raises UserError.
  """
  if config.stage != "supervised":
    raise UserError(f"--config: {name} takes a config of stage 1 or 2 (configs/align.py or sft.py), not of {config.stage!r}")
  mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
  model = supervised.make_model(config, SIZES[config.size])
  _, _, kind = name.partition("_")
  dtype = np.dtype(model.dtype).name
  settings = {"attention": model.attention, "remat": model.remat, "devices": mesh.size, "dtype": dtype}
  if not kind.startswith("sampler"):
    return FullJob(*_train(config, model, mesh, kind), settings | {"batch": config.data.batch_size})
  mesh = sharding.make_mesh({"data": -1}, devices)
  batch = mesh.size * int(kind.rpartition("_")[2])
  return FullJob(*_sampler(model, mesh, batch), batch, settings | {"batch": batch, "steps": STEPS})


def _train(config, model: DeepGen, mesh, task: str) -> tuple[Callable, float, int]:
  size, micro = config.data.batch_size, len(config.data.pattern)
  sharding.local_rows(mesh, size)  # can they share it?
  config = copy.deepcopy(config)
  with config.unlocked():
    config.data.pattern = (task,) * micro
  step, state, frozen, _ = train_programs(config, model, mesh)
  state, frozen = draw((state, frozen))
  rows = jax.tree.map(lambda x: np.repeat(np.asarray(x), size, axis=0), blank_sample(config, model, task, PROMPT_TOKENS))
  rows["ids"] = np.random.default_rng(0).integers(0, model.config.text.vocab_size, rows["ids"].shape, np.int32)
  rows["sample_id"] = np.arange(size, dtype=np.uint32)
  batch = sharding.put_batch(noisy(rows), mesh)
  rng = sharding.place(jax.random.key(0), sharding.replicated(mesh))

  def run():
    nonlocal state
    for _ in range(micro):  # as in training, the next is asked for before one is done
      state, metrics = step(state, frozen, batch, rng)
    return jax.block_until_ready((state, metrics))[1]

  return run, micro * size * sample_flops(config, PROMPT_TOKENS)[task], micro * size


def _sampler(model: DeepGen, mesh, batch: int) -> tuple[Callable, float]:
  shapes, options = sampler_inputs(model, mesh, batch, PROMPT_TOKENS, STEPS)
  params, noise, cond, target, *_ = shapes
  sigmas = inference_sigmas(model.config.scheduler, STEPS, noise.shape[1])
  mask = np.ones(cond.mask.shape, bool)
  mask[:, PROMPT_TOKENS : -model.config.scb.num_think_tokens] = False
  where = sharding.batch_sharding(mesh)
  noise, cond, target = draw((noise, cond, target))
  cond = cond.replace(mask=jax.device_put(mask, where))
  target |= {"mask": jax.device_put(np.ones(target["mask"].shape, bool), where)}
  arguments = (draw(params), noise, cond, target, None, sigmas, np.float32(GUIDANCE))
  program = jit_sampler(model, mesh).lower(*arguments, **options).compile()
  plain = DeepGen(model.config, model.dtype)
  real, _ = sampler_inputs(plain, mesh, batch, PROMPT_TOKENS, STEPS, padded=False)
  flops = count_flops(partial(sample_images, plain, **options), *real)
  return lambda: jax.block_until_ready(program(*arguments)), flops


_NORMALS = 4_194_301  # a prime: rows of a kernel begin at another place each


def draw(shapes):
  """Arrays for a tree of ShapeDtypeStructs with shardings: parameters of ordinary size by their names, other floats normal; a
  train state's sums and everything that isn't a float zero. Each leaf repeats the same few million normal numbers.
  """

  def leaf(path: str, shape, normals):
    if not jnp.issubdtype(shape.dtype, jnp.floating) or "opt_state/" in path or "grads/" in path or shape.ndim == 0:
      return jnp.zeros(shape.shape, shape.dtype)
    noise = jnp.resize(normals.astype(shape.dtype), shape.shape)
    name = path.rpartition("/")[2]
    if name in ("scale", "bias"):
      return 0.1 * noise + (name == "scale")
    if name not in ("kernel", "embedding", "a", "b"):
      return noise
    conv = "vae/" in path and shape.ndim == 4
    return noise * float(np.prod(shape.shape[-4:-1] if conv else shape.shape[-2])) ** -0.5

  make = lambda normals: sharding.map_paths(lambda path, shape: leaf(path, shape, normals), shapes)
  normals = np.random.default_rng(0).standard_normal(_NORMALS, np.float32)
  return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(normals)


def noisy(tree):
  """The same arrays with normal noise where there are floats."""
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) if x.dtype == np.float32 else x, tree)
