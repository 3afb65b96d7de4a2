"""Stages 1 and 2: flow matching on generation and editing. They differ by config alone: what trains, which data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax import distributed, sharding
from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data import prompts
from deepgen_jax.data.encoded import Precomputed, encoder_facts
from deepgen_jax.data.loader import DataSpec, MicroBatches
from deepgen_jax.data.mixture import is_embedded, open_sources
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration, Filters
from deepgen_jax.errors import UserError
from deepgen_jax.heldout import HeldOut
from deepgen_jax.models import lora
from deepgen_jax.models.config import SIZES
from deepgen_jax.models.deepgen import DeepGen, param_shapes
from deepgen_jax.models.layers import REMAT, best_attention
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.stages.encode import ImageEncoder, encode_batch, images_per_device
from deepgen_jax.stages.objective import sample_loss
from deepgen_jax.stages.stage import Report, Stage
from deepgen_jax.weights.load import load_model


def build(config, mesh) -> Stage:
  """Stage 1 or 2 from a config."""
  sizes, params, tokenizer = load_base(config, mesh)
  model = make_model(config, sizes)
  batches = micro_batches(config, sizes, tokenizer, mesh, params)
  loaded = [params]  # taken out once: training's own copy shall be the only one
  del params
  encoder = ImageEncoder(model, images_per_device(config.data.batch_size, mesh), cache=config.data.cache_images, mesh=mesh)
  encode = lambda params, host: encode_batch(model, params, encoder, host, config.data.token_multiple, model.scale)

  held_out = None  # a user's own data has none
  if config.eval.every and is_embedded(config.data.sources):
    held_out = HeldOut(model, tokenizer, make_held_out(config.data), config.eval.samples, mesh)
  pipe = None

  def evaluate(params, step):
    nonlocal pipe
    if held_out is None:
      return Report()
    losses = held_out.losses(params)
    scalars = {f"heldout_{task}_loss": value for task, value in losses.items()}
    scalars["heldout_loss"] = float(np.mean([*losses.values()]))
    if not config.eval.pictures:
      return Report(scalars)
    pipe = pipe or DeepGenPipeline(sizes, params, tokenizer, model.dtype, mesh, model.attention)
    return Report(scalars, held_out.pictures(pipe, params))

  return Stage(
    init=lambda: complete(config, model, loaded.pop(), mesh),
    batches=batches,
    prepare=lambda params, host: [encode(params, host)],
    evaluate=evaluate,
    **learning(config, model),
  )


_KERNELS = {"splash": "tpu", "cudnn": "gpu"}  # an attention kernel -> the platform that it is for


def make_model(config, sizes, platform: str | None = None, memory: float | None = None) -> DeepGen:
  """The networks as training runs them on a platform ("cpu", "gpu", "tpu") whose devices have that many bytes of memory; None:
  what is there.
  """
  platform = platform or jax.default_backend()
  remat = config.remat
  if remat == "auto":
    memory = memory or sharding.device_memory()
    remat = "attention" if memory and memory < sharding.ROOMY else "dots"
  if remat not in REMAT:
    raise UserError(f"config.remat {remat!r} is none of auto, {', '.join(REMAT)}")
  dtype = compute_dtype(config.dtype, platform)
  attention = best_attention(platform, dtype) if config.attention == "auto" else config.attention
  if attention not in ("xla", *_KERNELS):
    raise UserError(f"config.attention {config.attention!r} is none of auto, xla, {', '.join(_KERNELS)}")
  if platform != _KERNELS.get(attention, platform):
    where = _KERNELS[attention].upper()
    raise UserError(f"config.attention={attention} runs on {where} alone, not on {platform}; use auto or xla")
  if attention == "cudnn" and dtype != jnp.bfloat16:
    raise UserError(f"config.attention=cudnn computes in bfloat16, and config.dtype is {config.dtype}; use auto or xla")
  frozen = sharding.frozen_layout(config.frozen, memory)
  return DeepGen(at_image_size(config, sizes), dtype, config.unroll, remat, attention, frozen)


def complete(config, model: DeepGen, params, mesh=None) -> dict:
  """Parameters of a base -> all that the stage has: a fresh SCB where there is none, LoRA where asked for. Traceable, so that
  `jax.eval_shape` gives the shapes without weights. With a mesh a fresh SCB is made in its shards.
  """
  if "scb" not in params:
    fresh = lambda: model.init(jax.random.key(config.seed), ("scb",))
    shardings = None if mesh is None else sharding.param_shardings(param_shapes(model.config, ("scb",)), mesh)
    params = params | jax.jit(fresh, out_shardings=shardings)()
  if config.lora.targets:
    params = lora.merge_lora(params)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    params = lora.add_lora(params, config.lora.targets, config.lora.rank, config.lora.alpha, key, config.lora.dropout)
  return params


def make_loss(config, model: DeepGen) -> Callable:
  """-> loss(params, batch, keys) of a stage."""
  joint = bool(config.lora.targets)

  def loss(params, batch, keys):
    losses = sample_loss(model, params, batch, keys, joint=joint, **config.timesteps)
    return losses, {"edit_loss" if "references" in batch else "generate_loss": losses.mean()}

  return loss


def learning(config, model: DeepGen) -> dict:
  """What makes the train step of stages 1 and 2 (`stages.step.jit_step`), as keywords of `Stage`."""
  return {"loss": make_loss(config, model), "dtype": model.dtype}


def micro_batches(config, sizes, tokenizer, mesh, params) -> MicroBatches:
  """The training stream of the config's data block: the rows that this process's devices of the mesh hold. params: of
  `config.init`, which data that was precomputed has to come from.
  """
  spec = DataSpec(
    pattern=tuple(config.data.pattern),
    batch_size=config.data.batch_size,
    image_size=sizes.image_size,
    num_think_tokens=sizes.scb.num_think_tokens,
    text_buckets=tuple(config.data.text_buckets),
    caption_dropout=config.data.caption_dropout,
    seed=config.seed,
    max_bad_share=config.data.max_bad_share,
    filters=Filters(**config.data.filters),
  )
  wrap = lambda source, entry: source
  if config.data.precomputed:
    facts = encoder_facts(params, sizes.image_size, compute_dtype(config.dtype), spec.filters)
    wrap = lambda source, entry: Precomputed(source, config.data.precomputed, entry, facts)
  sources = open_sources(config.data.sources, config.data.dir, wrap)
  for task, source, weight in [(task, *pair) for task, pairs in sources.items() for pair in pairs]:
    unused = "" if task in spec.pattern and weight else ", unused: " + ("not in data.pattern" if weight else "its weight is 0")
    if distributed.is_main():
      print(f"data: {source.name}, {len(source)} samples to {task}{unused}", flush=True)
  return MicroBatches(spec, sources, tokenizer, sharding.local_rows(mesh, spec.batch_size), _agree)


def _agree(m: int, own: dict[str, int]) -> dict[str, int]:
  """The largest extents of a micro-batch on all hosts. Those of the hundredth before it are in nobody's hands any more."""
  distributed.forget(f"micro_batch/{m - 100}")
  return dict(zip(own, distributed.largest(f"micro_batch/{m}", [*own.values()])))


def load_base(config, mesh):
  """Sizes, parameters (float32, each gone straight to its shards on the mesh) and tokenizer of `config.init`; the size must be
  the one that the config is for.
  """
  if not config.init:
    raise UserError("config.init is empty: name the model to start from, e.g. --config.init=tiny or a model directory")
  sizes, params, tokenizer = load_model(config.init, weights="raw", mesh=mesh)
  wanted = SIZES[config.size]
  tied = lambda text: dataclasses.replace(text, tie_word_embeddings=True)  # training never reads the head
  if (sizes.dit, tied(sizes.text)) != (wanted.dit, tied(wanted.text)):
    raise UserError(f"config.init {config.init!r} holds another size of model than config.size={config.size!r}")
  return at_image_size(config, sizes), params, tokenizer


_TEXT = 128  # tokens of an edit's prompt besides its vision tokens, that there must be room for: template and instruction


def at_image_size(config, sizes):
  """Sizes of a model with the side that the config trains at. Raises UserError for a side that it can't have, or at which a
  reference leaves an edit's prompt no room for its text.
  """
  side = config.data.image_size
  limit = sizes.dit.pos_embed_max_size * sizes.dit.patch_size * sizes.vae.factor
  if side % 32 or not 0 <= side <= limit:
    raise UserError(
      f"config.data.image_size {side}: give a multiple of 32 up to {limit}, or 0 for the model's {sizes.image_size}"
    )
  tokens = prompts.image_tokens(side, side)
  if "edit" in config.data.pattern and tokens + _TEXT > prompts.MAX_TOKENS:
    raise UserError(
      f"config.data.image_size {side}: a reference of {tokens} tokens leaves an edit's text less than {_TEXT} of a prompt's "
      f"{prompts.MAX_TOKENS}; train at a smaller one, or without edits (--config.data.pattern=generate)"
    )
  return dataclasses.replace(sizes, image_size=side) if side else sizes


def make_held_out(data) -> dict:
  """task -> source of what is never trained on."""
  emoji = emoji_data.prepare(data.dir)
  return {"generate": EmojiGeneration(emoji, held_out=True), "edit": EmojiEdits(emoji, held_out=True)}


def compute_dtype(name: str, platform: str | None = None):
  """ "auto": bfloat16 on TPU and GPU, float32 on CPU (design 3.12)."""
  if name == "auto":
    return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16
  if name not in ("float32", "bfloat16"):
    raise UserError(f"config.dtype {name!r} is neither auto, float32 nor bfloat16")
  return jnp.dtype(name)
