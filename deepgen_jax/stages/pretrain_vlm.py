"""Pre-training of the tiny VLM: captioning and next-token prediction, in the prompt templates that it meets later.

The reply to a prompt for an image, or for an edit, is a sketch of the result: a letter for the colour of each cell of a coarse
grid. Its letters are hidden from the input (word dropout, Bowman et al. 2016, section 3.1, at rate 1): noise stands in their
place, so that what follows a prompt learns to look back at it and to see, as think tokens will have to. No held-out caption
or image enters.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data.loader import DataSpec, MicroBatches
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration, RenderedWords, Sample
from deepgen_jax.data.tokens import build_tiny_tokenizer, special_ids
from deepgen_jax.models.config import TINY
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.stages.stage import Report, Stage
from deepgen_jax.weights import model_dir
from deepgen_jax.weights.load import load_model

DESCRIBE = ("Describe the image.", "What is this?")
TEXT_BUCKET = 136  # every prompt with its reply
SIDE = 4  # a sketch has as many rows and columns
COLOURS = (  # plain ones, then Twemoji's skin tones, light to dark
  *((136, 153, 166), (41, 47, 51), (221, 46, 68), (244, 144, 12), (255, 204, 77), (119, 178, 85), (62, 114, 29)),
  *((85, 172, 238), (34, 102, 153), (170, 142, 214), (244, 171, 186), (138, 75, 56)),
  *((247, 222, 206), (243, 210, 162), (213, 171, 136), (175, 126, 87), (124, 83, 62)),
)
COVER = (0.25, 0.5, 0.75, 1.0)  # of a cell, the rest is white
PALETTE = np.array([[255.0] * 3] + [[255 + (x - 255) * cover for x in colour] for colour in COLOURS for cover in COVER])
LETTERS = [chr(ord("0") + i) for i in range(len(PALETTE))]
PROMPT_WEIGHT = 0.2  # of a token of the prompt in the loss; one of the reply has 1


def sketch(image: np.ndarray) -> str:
  """An image uint8 [H,W,3] as a text: the letter of its mean colour, then those of a 4x4 grid's cells, row by row."""
  shrink = lambda side: np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX), np.float32)
  colours = np.concatenate([shrink(1).reshape(1, 3), shrink(SIDE).reshape(-1, 3)])
  return "".join(LETTERS[i] for i in np.square(colours[:, None] - PALETTE).sum(-1).argmin(-1))


class Dialogues:
  """Samples of another source with a reply: a sketch of the target, or (describe) its caption after a question about it."""

  def __init__(self, source, describe: bool = False):
    self.name = f"{source.name}, {'described' if describe else 'sketched'}"
    self.task = "edit" if describe else source.task
    self._source, self._describe = source, describe

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Sample:
    sample = self._source[index]
    if self._describe:
      return Sample("edit", DESCRIBE, sample.target, (sample.target,), sample.texts[0])
    return dataclasses.replace(sample, answer=sketch(sample.target))


def build(config, mesh) -> Stage:
  """Next-token prediction on prompts and replies; vision tower and decoder learn together. `config.init`, if any, is a model
  whose VLM goes on.
  """
  model = DeepGen(TINY, unroll=True)
  emoji = emoji_data.prepare(config.data.dir)
  tokenizer = build_tiny_tokenizer()
  special = special_ids(tokenizer)

  def sources(held_out):
    pictures, written = EmojiGeneration(emoji, held_out), RenderedWords(held_out)
    return {
      "generate": [(Dialogues(pictures), 0.9), (Dialogues(written), 0.1)],
      "edit": [
        (Dialogues(EmojiEdits(emoji, held_out)), 0.75),
        (Dialogues(pictures, describe=True), 0.2),
        (Dialogues(written, describe=True), 0.05),
      ],
    }

  spec = DataSpec(
    pattern=tuple(config.data.pattern),
    batch_size=config.data.batch_size,
    image_size=TINY.image_size,
    num_think_tokens=TINY.scb.num_think_tokens,
    text_buckets=(TEXT_BUCKET,),
    caption_dropout=config.data.caption_dropout,
    seed=config.seed,
  )
  batches = MicroBatches(spec, sources(False), tokenizer)

  def prepare(params, host):
    batch = {k: host[k] for k in ("sample_id", "ids", "text_mask", "image_index")}
    batch["position_ids"] = host["position_ids"][:, :, : host["ids"].shape[1]]
    starts = host["ids"].shape[1] - np.argmax(host["ids"][:, ::-1] == special.im_start, axis=1) + len("assistant\n")
    batch["reply"] = host["text_mask"] & (np.arange(host["ids"].shape[1]) >= starts[:, None])
    batch["hidden"] = batch["reply"] & ~np.isin(host["texts"], DESCRIBE)[:, None]
    if host["references"][0]:
      batch["image"] = np.stack([references[0] for references in host["references"]])
    return [batch]

  def loss(params, batch, keys):
    vision = model.vision_features(params, batch["image"]) if "image" in batch else None
    run = lambda method, *args: model.text.apply({"params": params["vlm"]["text"]}, *args, method=method)
    x = run("embed", batch["ids"], vision, batch["image_index"])
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys) / np.sqrt(x.shape[-1])  # as fresh think tokens
    x = jnp.where(batch["hidden"][..., None], noise, x)
    logits = run("logits", x, batch["position_ids"], batch["text_mask"].astype(jnp.int32))[:, :-1]
    target = batch["ids"][:, 1:]
    reply, text = batch["reply"][:, 1:], batch["text_mask"][:, 1:] & (target != special.image_pad)
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    mean = lambda weight: (nll * weight).sum(1) / weight.sum(1)
    name = "edit" if "image" in batch else "generate"
    return mean(jnp.where(reply, 1, PROMPT_WEIGHT) * text), {f"{name}_reply_nll": mean(reply).mean()}

  judged = MicroBatches(dataclasses.replace(spec, seed=1), sources(True), tokenizer)
  judge_keys = jax.random.split(jax.random.key(0), spec.batch_size)
  judge = jax.jit(lambda params, batch: loss(params, batch, judge_keys)[1])

  def evaluate(params, step):
    scores = [judge(params, prepare(params, judged.batch(m))[0]) for m in range(8 * len(spec.pattern))]
    names = sorted({name for score in scores for name in score})
    return Report({f"heldout_{n}": float(np.mean([score[n] for score in scores if n in score])) for n in names})

  def init():
    if config.init:
      return load_model(config.init, weights="raw", parts=("vlm",))[1]
    return jax.jit(lambda key: model.init(key, ("vlm",)))(jax.random.key(config.seed))

  finish = lambda params: model_dir.save(
    config.output, model_dir.load_config(config.output), params, tokenizer, dtype=np.float16
  )
  return Stage(init, loss, batches, prepare, evaluate, finish)
