"""Pre-training of the tiny VLM: next-token prediction on texts and, after an image, on its caption. Nothing else.

Texts come in the prompt templates that the model meets later. No held-out caption or image enters.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data.loader import DataSpec, MicroBatches
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration, RenderedWords, Sample
from deepgen_jax.data.tokens import build_tiny_tokenizer, special_ids
from deepgen_jax.models.config import TINY
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.stages.stage import Report, Stage
from deepgen_jax.weights import model_dir


class Captions:
  """Captioning for the VLM as samples of the edit format: an emoji or a rendered word, and the text that names it."""

  task, name = "edit", "captions"

  def __init__(self, source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Sample:
    sample = self._source[index]
    return Sample("edit", tuple(f"This is {text}." for text in sample.texts), sample.target, (sample.target,))


def build(config, mesh) -> Stage:
  """Next-token prediction on captions, edit instructions and, after an image, its caption; vision tower and decoder learn
  together.
  """
  model = DeepGen(TINY, unroll=True)
  emoji = emoji_data.prepare(config.data.dir)
  tokenizer = build_tiny_tokenizer()
  image_pad = special_ids(tokenizer).image_pad

  def sources(held_out):
    pictures = EmojiGeneration(emoji, held_out=held_out)
    return {
      "generate": [(pictures, 0.8), (RenderedWords(held_out), 0.2)],
      "edit": [
        (Captions(pictures), 0.6),
        (Captions(RenderedWords(held_out)), 0.1),
        (EmojiEdits(emoji, held_out=held_out), 0.3),
      ],
    }

  spec = DataSpec(
    tuple(config.data.pattern), config.data.batch_size, 64, TINY.scb.num_think_tokens, (64, 96, 128), 0.0, seed=config.seed
  )
  batches = MicroBatches(spec, sources(False), tokenizer)

  def prepare(params, host):
    batch = {k: host[k] for k in ("sample_id", "ids", "text_mask", "image_index")}
    batch["position_ids"] = host["position_ids"][:, :, : host["ids"].shape[1]]
    if host["references"][0]:
      batch["image"] = np.stack([references[0] for references in host["references"]])
    return [batch]

  def loss(params, batch, keys):
    vision = model.vision_features(params, batch["image"]) if "image" in batch else None
    run = lambda method, *args: model.text.apply({"params": params["vlm"]["text"]}, *args, method=method)
    x = run("embed", batch["ids"], vision, batch["image_index"])
    logits = run("logits", x, batch["position_ids"], batch["text_mask"].astype(jnp.int32))[:, :-1]
    target = batch["ids"][:, 1:]
    weight = batch["text_mask"][:, 1:] & (target != image_pad)
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    nll = (nll * weight).sum(1) / weight.sum(1)
    return nll, {"captions_nll" if "image" in batch else "text_nll": nll.mean()}

  judged = MicroBatches(dataclasses.replace(spec, seed=1), sources(True), tokenizer)
  judge = jax.jit(lambda params, batch: loss(params, batch, None)[0].mean())

  def evaluate(params, step):
    losses = {judged.task(m): float(judge(params, prepare(params, judged.batch(m))[0])) for m in range(len(spec.pattern))}
    return Report({f"heldout_{task}_nll": value for task, value in losses.items()})

  init = lambda: model.init(jax.random.key(config.seed), ("vlm",))
  finish = lambda params: model_dir.save(
    config.output, model_dir.load_config(config.output), params, tokenizer, dtype=np.float16
  )
  return Stage(init, loss, batches, prepare, evaluate, finish)
