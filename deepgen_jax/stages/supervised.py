"""Stages 1 and 2: flow matching on generation and editing. They differ by config alone: what trains, which data.

`loss` is the whole objective:

    z0 ~ posterior, sigma ~ shifted grid, noise ~ N(0, 1)      drawn from the sample's own key
    v  = DiT((1 - sigma) z0 + sigma noise, 1000 sigma, SCB(VLM(prompt, references)), references)
    L  = mean over real elements of (v - (noise - z0))^2       per sample
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data.loader import DataSpec, MicroBatches, host_batch
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration, ImageFolder, RenderedWords
from deepgen_jax.errors import UserError
from deepgen_jax.flow.matching import noised, velocity_loss
from deepgen_jax.flow.schedule import draw_sigma
from deepgen_jax.models import lora
from deepgen_jax.models.config import SIZES
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.stages.encode import ImageEncoder, encode_batch
from deepgen_jax.stages.stage import Report, Stage
from deepgen_jax.weights.load import load_model


def sample_loss(model: DeepGen, params: Mapping, batch: Mapping, keys: Array, *, joint: bool, drop: bool = True) -> Array:
  """Flow-matching loss of each sample, [B] float32.

  joint: the VLM trains (LoRA), so prompt and think tokens run as one stream. drop: LoRA dropout is on.
  """
  target = batch["target"]
  fold = lambda salt: jax.vmap(lambda key: jax.random.fold_in(key, salt))(keys)
  normal = lambda salt: jax.vmap(lambda key: jax.random.normal(key, target["mean"].shape[1:]))(fold(salt))
  latents = model.scale(target["mean"] + jnp.exp(0.5 * target["logvar"]) * normal(0))
  noise = normal(1)
  sigma = jax.vmap(lambda key: draw_sigma(key, model.config.scheduler))(fold(2))
  cond = model.condition(params, batch, joint=joint, keys=fold(3) if drop else None)
  prepared = model.prepare(params, cond, target, batch.get("references"))
  velocity = model.velocity(params, noised(latents, noise, sigma), 1000 * sigma, prepared)
  return velocity_loss(velocity, latents, noise, target["mask"])


def build(config, mesh) -> Stage:
  """Stage 1 or 2 from a config."""
  sizes, loaded, tokenizer = load_base(config)
  model = DeepGen(sizes, dtype=compute_dtype(config.dtype), unroll=config.unroll)
  spec = DataSpec(
    pattern=tuple(config.data.pattern),
    batch_size=config.data.batch_size,
    image_size=sizes.image_size,
    num_think_tokens=sizes.scb.num_think_tokens,
    text_buckets=tuple(config.data.text_buckets),
    caption_dropout=config.data.caption_dropout,
    seed=config.seed,
    max_bad_share=config.data.max_bad_share,
  )
  batches = MicroBatches(spec, make_sources(config.data), tokenizer, jax.process_index(), jax.process_count())
  encoder = ImageEncoder(model, cache=config.data.cache_images)
  joint = bool(config.lora.targets)
  encode = lambda params, host: encode_batch(model, params, encoder, host, config.data.token_multiple, model.scale)

  def init():
    params = loaded
    if "scb" not in params:
      params = params | jax.jit(lambda key: model.init(key, ("scb",)))(jax.random.key(config.seed))
    if joint:
      params = lora.merge_lora(params)
      key = jax.random.fold_in(jax.random.key(config.seed), 1)
      params = lora.add_lora(params, config.lora.targets, config.lora.rank, config.lora.alpha, key, config.lora.dropout)
    return params

  def loss(params, batch, keys):
    losses = sample_loss(model, params, batch, keys, joint=joint)
    return losses, {"edit_loss" if "references" in batch else "generate_loss": losses.mean()}

  judged = HeldOut(config, spec, tokenizer)
  judge = jax.jit(lambda params, batch, keys: sample_loss(model, params, batch, keys, joint=joint, drop=False))

  def evaluate(params, step):
    losses = judged.losses(lambda host, keys: judge(params, encode(params, host), keys))
    return Report(
      {f"heldout_{task}_loss": value for task, value in losses.items()} | {"heldout_loss": np.mean([*losses.values()])}
    )

  return Stage(init, loss, batches, lambda params, host: [encode(params, host)], evaluate)


class HeldOut:
  """The held-out loss on fixed samples and fixed noise: up to `eval.samples` of each task, the same for every run."""

  def __init__(self, config, spec: DataSpec, tokenizer):
    self._batches = []
    size, count = spec.batch_size, config.eval.samples
    for task, sources in make_sources(config.data, held_out=True).items():
      source = sources[0][0]
      for start in range(0, min(len(source), count) - size + 1, size):
        samples = [source[i] for i in range(start, start + size)]
        self._batches.append((task, host_batch(samples, range(start, start + size), spec, tokenizer)))

  def losses(self, judge) -> dict[str, float]:
    """judge(host batch, keys) -> [B]; -> mean loss by task."""
    sums: dict[str, list] = {}
    for task, host in self._batches:
      keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.asarray(host["sample_id"]))
      sums.setdefault(task, []).append(judge(host, keys))
    return {task: float(np.mean(jax.device_get(values))) for task, values in sums.items()}


def load_base(config):
  """Sizes, parameters and tokenizer of `config.init`; the size must be the one that the config is for."""
  if not config.init:
    raise UserError("config.init is empty: name the model to start from, e.g. --config.init=tiny or a model directory")
  sizes, params, tokenizer = load_model(config.init, weights="raw")
  wanted = SIZES[config.size]
  if (sizes.dit, sizes.text) != (wanted.dit, wanted.text):
    raise UserError(f"config.init {config.init!r} holds another size of model than config.size={config.size!r}")
  return sizes, params, tokenizer


def make_sources(data, held_out: bool = False) -> dict:
  """task -> [(source, weight)] of the config's data block; with `held_out` what is never trained on."""
  if data.folder:
    return {"generate": [(ImageFolder(data.folder), 1.0)]}
  emoji = emoji_data.prepare(data.dir)
  generate = [(EmojiGeneration(emoji, held_out), data.weights.emoji), (RenderedWords(held_out), data.weights.words)]
  return {"generate": generate, "edit": [(EmojiEdits(emoji, held_out), data.weights.edits)]}


def compute_dtype(name: str):
  """ "auto": bfloat16 on TPU and GPU, float32 on CPU (design 3.12)."""
  if name == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  if name not in ("float32", "bfloat16"):
    raise UserError(f"config.dtype {name!r} is neither auto, float32 nor bfloat16")
  return jnp.dtype(name)
