"""Pre-training of the tiny DiT: flow matching on generation and edits, with a text encoder of its own.

The text encoder, a small causal decoder over bytes, is thrown away at the end: the base DiT has never seen the VLM or an SCB.
No held-out caption or image enters, as source or target.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.data import edits, words
from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.flow.matching import noised, velocity_loss
from deepgen_jax.flow.schedule import draw_sigma
from deepgen_jax.models.deepgen import Conditioning, DeepGen
from deepgen_jax.models.dit import crop_positions, patchify
from deepgen_jax.models.layers import Linear
from deepgen_jax.models.text import TextDecoder
from deepgen_jax.stages.pretrain_vae import Drawn
from deepgen_jax.stages.stage import Report, Stage
from deepgen_jax.weights import model_dir

WORDS = 1500  # rendered words that take part
SORTED = 4  # micro-batches drawn together and dealt by length of text

BYTE_BUCKETS = (32, 64, 128)


def byte_ids(texts) -> tuple[np.ndarray, np.ndarray]:
  """Texts -> ids int32 [B,T] (0 begins every text, byte b is b + 1) and mask bool [B,T], padded to a bucket."""
  rows = [np.frombuffer(b"\0" + text.encode(), np.uint8).astype(np.int32) + 1 for text in texts]
  length = next(b for b in BYTE_BUCKETS if b >= max(map(len, rows)))
  ids = np.zeros((len(rows), length), np.int32)
  for row, out in zip(rows, ids):
    out[: len(row)] = row
    out[0] = 0
  return ids, np.arange(length) < np.array([[len(row)] for row in rows])


class Latents:
  """Posterior moments of all images that take part, as tokens: emoji by index, then rendered words."""

  def __init__(self, model: DeepGen, params, emoji, seed: int):
    encode = jax.jit(model.encode_moments)
    rng = np.random.default_rng(seed)
    written = words.combinations(held_out=False)
    self.words = [written[i] for i in rng.choice(len(written), WORDS, replace=False)]
    images = np.concatenate([emoji.images(), np.stack([words.render(*word) for word in self.words])])
    moments = [encode(params, images[i : i + 64]) for i in range(0, len(images), 64)]
    self.mean, self.logvar = (patchify(np.concatenate([np.asarray(m[k]) for m in moments])) for k in range(2))


def make_draw(config, emoji, latents: Latents):
  """draw(m, size) -> a micro-batch of one task with texts of similar length. Half of the edits are drawn evenly over their
  kinds.
  """
  generation = np.flatnonzero(~emoji.held_out)
  triplets = edits.training(emoji)
  by_kind = [[t for t in triplets if t.kind == kind] for kind in sorted({t.kind for t in triplets})]

  def sample(rng, task):
    """-> text, index of the target, index of the reference."""
    drop = rng.random() < config.drop
    if task == "edit":
      pool = by_kind[rng.integers(len(by_kind))] if rng.random() < 0.5 else triplets
      edit = pool[rng.integers(len(pool))]
      return "" if drop else edit.instructions[rng.integers(len(edit.instructions))], edit.target, edit.source
    if rng.random() < config.words_share:
      i = rng.integers(WORDS)
      return "" if drop else words.caption(*latents.words[i]), len(emoji) + i, -1
    i = rng.choice(generation)
    return "" if drop else emoji.captions[i], i, -1

  def draw(m, size):
    rng = np.random.default_rng((config.seed, m // SORTED))
    task = "edit" if rng.random() < config.edit_share else "generate"
    place = rng.permutation(SORTED)[m % SORTED]
    drawn = sorted((sample(rng, task) for _ in range(size * SORTED)), key=lambda s: len(s[0]))
    texts, targets, references = (list(column) for column in zip(*drawn[size * place : size * (place + 1)]))
    ids, mask = byte_ids(texts)
    batch = {"ids": ids, "mask": mask, "mean": latents.mean[targets], "logvar": latents.logvar[targets]}
    return batch | ({"reference": latents.mean[references]} if task == "edit" else {})

  return draw


class TextEncoder:
  """Bytes -> conditioning of the DiT: a causal decoder of two layers, a head for the context, one for the pooled vector."""

  def __init__(self, config):
    self._decoder = TextDecoder(dataclasses.replace(config.text, vocab_size=257, num_layers=2), (2,), unroll=True)
    self._heads = {"context": Linear(config.dit.context_size), "pooled": Linear(config.dit.pooled_size)}
    self._hidden = config.text.hidden_size

  def init(self, key) -> dict:
    x = jnp.zeros((1, 4, self._hidden))
    args = (x, jnp.zeros((1, 3, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
    return {
      "decoder": self._decoder.init(key, *args, method="logits")["params"],
      **{name: head.init(jax.random.fold_in(key, i), x)["params"] for i, (name, head) in enumerate(self._heads.items())},
    }

  def __call__(self, params, ids, mask) -> Conditioning:
    run = lambda method, *args: self._decoder.apply({"params": params["decoder"]}, *args, method=method)
    positions = jnp.broadcast_to(jnp.arange(mask.shape[1])[None, None], (mask.shape[0], 3, mask.shape[1]))
    (x,) = run("hidden_states", (run("embed", ids),), (positions,), (mask.astype(jnp.int32),))
    average = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    head = lambda name, value: self._heads[name].apply({"params": params[name]}, value)
    return Conditioning(head("pooled", average), head("context", x), mask)


def build(config, mesh) -> Stage:
  """The stage; it reads the VAE and its scale from `config.output`, where it adds the DiT."""
  sizes = model_dir.load_config(config.output)
  model = DeepGen(sizes, unroll=True)
  encoder = TextEncoder(sizes)
  emoji = emoji_data.prepare(config.data.dir)
  latents = Latents(model, {"vae": model_dir.load(config.output, ("vae",))["vae"]}, emoji, config.seed)
  side = sizes.image_size // sizes.vae.factor // sizes.dit.patch_size
  grid = crop_positions(side, side, sizes.dit)

  def loss(params, batch, keys):
    mean, logvar = batch["mean"], batch["logvar"]
    normal = lambda salt: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, salt), mean.shape[1:]))(keys)
    target = model.scale(mean + jnp.exp(0.5 * logvar) * normal(0))
    noise = normal(1)
    sigma = jax.vmap(lambda key: draw_sigma(jax.random.fold_in(key, 2), sizes.scheduler))(keys)
    mask = jnp.ones(mean.shape[:2], bool)
    positions = jnp.broadcast_to(grid, (len(mean), *grid.shape))
    references = None
    if "reference" in batch:
      references = {"tokens": model.scale(batch["reference"]), "positions": positions, "mask": mask}
    cond = encoder(params["text_encoder"], batch["ids"], batch["mask"])
    prepared = model.prepare(params, cond, {"positions": positions, "mask": mask}, references)
    velocity = model.velocity(params, noised(target, noise, sigma), 1000 * sigma, prepared)
    losses = velocity_loss(velocity, target, noise, mask)
    return losses, {"edit_loss" if references else "generate_loss": losses.mean()}

  held_out = np.flatnonzero(emoji.held_out)
  ids, mask = byte_ids([emoji.captions[i] for i in held_out])
  judged = {"ids": ids, "mask": mask, "mean": latents.mean[held_out], "logvar": latents.logvar[held_out]}
  judge_keys = jax.random.split(jax.random.key(1), len(held_out))
  judge = jax.jit(lambda params: loss(params, judged, judge_keys)[0].mean())

  def init():
    key = jax.random.key(config.seed)
    return {"text_encoder": encoder.init(key), **model.init(key, ("dit",))}

  finish = lambda params: model_dir.save(config.output, sizes, {"dit": params["dit"]}, dtype=np.float16)
  evaluate = lambda params, step: Report({"heldout_loss": float(judge(params))})
  draw = make_draw(config, emoji, latents)
  return Stage(init, loss, Drawn(config.data.batch_size, draw), lambda params, batch: [batch], evaluate, finish)
