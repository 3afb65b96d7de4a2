"""Pre-training of the tiny VLM: captioning and next-token prediction, in the prompt templates that it meets later.

After a prompt for an image the reply repeats the caption or sketches the image in letters, so that what follows a prompt learns
to look back at it, as think tokens will have to. No held-out caption or image enters.
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

DESCRIBE = ("Describe the image.", "What is this?")
SIDE = 6  # a sketch has as many rows and columns
PALETTE = {  # letter of a sketch -> colour; lower case: plain colours, upper case: Twemoji's skin tones, light to dark
  "w": (255, 255, 255),
  "e": (136, 153, 166),
  "k": (41, 47, 51),
  "r": (221, 46, 68),
  "o": (244, 144, 12),
  "y": (255, 204, 77),
  "g": (119, 178, 85),
  "d": (62, 114, 29),
  "b": (85, 172, 238),
  "n": (34, 102, 153),
  "p": (170, 142, 214),
  "i": (244, 171, 186),
  "m": (138, 75, 56),
  "A": (247, 222, 206),
  "B": (243, 210, 162),
  "C": (213, 171, 136),
  "D": (175, 126, 87),
  "E": (124, 83, 62),
}


def sketch(image: np.ndarray) -> str:
  """An image uint8 [H,W,3] as a text: the nearest colour of each cell of a 6x6 grid, row by row, SIDE^2 letters."""
  small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
  distance = np.square(small[:, :, None] - np.array([*PALETTE.values()], np.float32)).sum(-1)
  return "".join([*PALETTE][i] for i in distance.argmin(-1).ravel())


class Dialogues:
  """Samples of another source with a reply that names, repeats or sketches.

  kind "repeat": template + caption -> caption. "sketch": template + caption -> its image as letters of colours, so that words
  mean what they look like. "describe": image -> caption. "result": image and instruction -> the caption
  of what the edit leads to.
  """

  def __init__(self, source, kind: str):
    self.name, self.task, self._source, self._kind = f"{source.name}, {kind}", "edit", source, kind
    if kind in ("repeat", "sketch"):
      self.task = "generate"

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Sample:
    sample = self._source[index]
    if self._kind == "describe":
      return Sample("edit", DESCRIBE, sample.target, (sample.target,), sample.texts[0])
    if self._kind == "result":
      return dataclasses.replace(sample, answer=self._source.emoji.captions[self._source.edits[index].target])
    return dataclasses.replace(sample, answer=sketch(sample.target) if self._kind == "sketch" else sample.texts[0])


def build(config, mesh) -> Stage:
  """Next-token prediction on captions, edit instructions and, after an image, its caption; vision tower and decoder learn
  together.
  """
  model = DeepGen(TINY, unroll=True)
  emoji = emoji_data.prepare(config.data.dir)
  tokenizer = build_tiny_tokenizer()
  image_pad = special_ids(tokenizer).image_pad

  def sources(held_out):
    pictures, written = EmojiGeneration(emoji, held_out), RenderedWords(held_out)
    return {
      "generate": [
        (Dialogues(pictures, "sketch"), 0.5),
        (Dialogues(pictures, "repeat"), 0.35),
        (Dialogues(written, "repeat"), 0.15),
      ],
      "edit": [
        (Dialogues(pictures, "describe"), 0.4),
        (Dialogues(written, "describe"), 0.1),
        (Dialogues(EmojiEdits(emoji, held_out), "result"), 0.5),
      ],
    }

  spec = DataSpec(
    pattern=tuple(config.data.pattern),
    batch_size=config.data.batch_size,
    image_size=TINY.image_size,
    num_think_tokens=TINY.scb.num_think_tokens,
    text_buckets=(128,),
    caption_dropout=0.0,
    seed=config.seed,
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

  init = lambda: jax.jit(lambda key: model.init(key, ("vlm",)))(jax.random.key(config.seed))
  finish = lambda params: model_dir.save(
    config.output, model_dir.load_config(config.output), params, tokenizer, dtype=np.float16
  )
  return Stage(init, loss, batches, prepare, evaluate, finish)
