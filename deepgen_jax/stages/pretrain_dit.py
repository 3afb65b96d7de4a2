"""Pre-training of the tiny DiT: flow matching on generation and edits, with a text encoder of its own.

The text encoder, a small causal decoder over words, is thrown away at the end: the base DiT has never seen the VLM or an SCB.
In the pooled vector it is told a layout: of the target, or what an edit changes. No held-out caption or image enters, as source
or target.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.data import edits, words
from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data.retrieval import Retrieval
from deepgen_jax.flow.matching import euler_sample, guide, noised, velocity_loss
from deepgen_jax.flow.schedule import draw_sigma, inference_sigmas
from deepgen_jax.models.deepgen import Conditioning, DeepGen
from deepgen_jax.models.dit import crop_positions, patchify, unpatchify
from deepgen_jax.models.layers import Linear, rms_norm
from deepgen_jax.models.text import TextDecoder
from deepgen_jax.stages.layouts import Changes, layout
from deepgen_jax.stages.pretrain_vae import Drawn
from deepgen_jax.stages.stage import Report, Stage
from deepgen_jax.weights import model_dir
from deepgen_jax.weights.load import load_model

WORDS = 1500  # rendered words that take part
MAX_WORDS = 16  # of a text; what is longer loses its end
SLOTS = MAX_WORDS + 24  # of the context in a short micro-batch
PER_KIND = 500  # edits, at most, that say how much an edit changes: none of their kinds shall outweigh the others
BLANK = 0.75  # share of spare context slots that say nothing
SAMPLER_STEPS, GUIDANCE = 10, 2.5  # of the evaluation


def split(text: str) -> list[str]:
  """Words of a text; a quoted word is spelled, letter by letter.

  >>> split('the word "UP" in light-blue')
  ['the', 'word', '"U', '"P', 'in', 'light', 'blue']
  """
  pieces = re.findall(r'"[^"]*"|[^\s"-]+', text)
  return [word for piece in pieces for word in ([f'"{c}' for c in piece[1:-1]] if piece[0] == '"' else [piece.lower()])]


class Vocabulary:
  """Words of the training texts -> ids from 1; 0 begins every text, and stands for a word that none of them has."""

  def __init__(self, texts: Iterable[str]):
    self._ids = {word: i for i, word in enumerate(sorted({word for text in texts for word in split(text)}), 1)}

  def __len__(self) -> int:
    return len(self._ids) + 1

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """-> ids int32 [B, MAX_WORDS + 1] and mask bool of that shape."""
    ids, mask = np.zeros((len(texts), MAX_WORDS + 1), np.int32), np.zeros((len(texts), MAX_WORDS + 1), bool)
    for row, text in enumerate(texts):
      found = [self._ids.get(word, 0) for word in split(text)[:MAX_WORDS]]
      ids[row, 1 : len(found) + 1], mask[row, : len(found) + 1] = found, True
    return ids, mask


def spread(shown: np.ndarray, slots: int, rng: np.random.Generator) -> dict:
  """Deals what is shown of each sample to context slots: each once, then again or nothing at all, up to a drawn count.

  shown bool [B, T]; -> "slots" int32 [B, slots], places in T, T itself for nothing, and "slot_mask" bool. An SCB sends a token
  for every byte of a prompt and every think token: the DiT must not mind how many say the same, or nothing.
  """
  count = shown.sum(1, keepdims=True)
  order = np.argsort(~shown, axis=1, kind="stable")
  own = np.arange(slots)[None]
  again = rng.integers(0, count, (len(shown), slots))
  places = np.take_along_axis(order, np.where(own < count, np.minimum(own, shown.shape[1] - 1), again), axis=1)
  nothing = (own >= count) & (rng.random((len(shown), slots)) < BLANK)
  slot_mask = own < rng.integers(count, slots + 1)
  return {"slots": np.where(nothing, shown.shape[1], places).astype(np.int32), "slot_mask": slot_mask}


class Latents:
  """Posterior moments, as tokens, and layouts of all images that take part: emoji by index, then rendered words.

  Layouts are relative to the average training emoji, with a standard deviation of one.
  """

  def __init__(self, model: DeepGen, params, emoji, seed: int):
    encode = jax.jit(model.encode_moments)
    rng = np.random.default_rng(seed)
    written = words.combinations(held_out=False)
    self.words = [written[i] for i in rng.choice(len(written), WORDS, replace=False)]
    images = np.concatenate([emoji.images(), np.stack([words.render(*word) for word in self.words])])
    moments = [encode(params, images[i : i + 64]) for i in range(0, len(images), 64)]
    self.mean, self.logvar = (patchify(np.concatenate([np.asarray(m[k]) for m in moments])) for k in range(2))
    layouts = layout(images)
    seen = layouts[np.flatnonzero(~emoji.held_out)]
    self.layout = (layouts - seen.mean(0)) / seen.std((0, 1))


class Data:
  """Draws micro-batches of one task. Half of the edits are drawn evenly over their kinds."""

  def __init__(self, config, emoji, latents: Latents, pooled_size: int):
    self._config, self._latents, self._emoji = config, latents, emoji
    self._generation = np.flatnonzero(~emoji.held_out)
    self._edits = edits.training(emoji)
    self._by_kind = [[t for t in self._edits if t.kind == kind] for kind in sorted({t.kind for t in self._edits})]
    change = lambda triplets: latents.layout[[t.target for t in triplets]] - latents.layout[[t.source for t in triplets]]
    self.changes = {
      "generate": Changes(latents.layout[self._generation]),
      "edit": Changes(np.concatenate([change(kind[:PER_KIND]) for kind in self._by_kind])),
    }
    self._pooling = self.changes["generate"].pooling(pooled_size)
    texts = [emoji.captions[i] for i in self._generation] + [words.caption(*word) for word in latents.words]
    self.vocabulary = Vocabulary(texts + [text for edit in self._edits for text in edit.instructions])

  def draw(self, m: int, size: int) -> dict:
    """The m-th micro-batch, a pure function."""
    rng = np.random.default_rng((self._config.seed, m))
    task = "edit" if rng.random() < self._config.edit_share else "generate"
    texts, targets, references = (list(column) for column in zip(*(self._sample(rng, task) for _ in range(size))))
    share = rng.random(size) - self._config.drop
    has_words = share >= self._config.layout_only
    has_layout = (share >= 0) & (share < 1 - self._config.drop - self._config.words_only)
    ids, mask = self.vocabulary([text if has else "" for text, has in zip(texts, has_words)])
    long = rng.random() < self._config.long_share
    change = self._latents.layout[targets] - (self._latents.layout[references] if task == "edit" else 0)
    blur = np.exp(rng.uniform(*np.log(self._config.layout_blur), size))
    told = self.told(self.changes[task].guess(change, blur, rng) * has_layout[:, None, None])
    batch = {"ids": ids, "mask": mask, "layout": told}
    batch |= {"mean": self._latents.mean[targets], "logvar": self._latents.logvar[targets]}
    batch |= spread(mask, self._config.context_slots if long else SLOTS, rng)
    return batch | ({"reference": self._latents.mean[references]} if task == "edit" else {})

  def told(self, changes: np.ndarray) -> np.ndarray:
    """Changes of layouts [B,16,3] -> pooled vectors float32 [B,P], linear."""
    return (changes.reshape(len(changes), -1) @ self._pooling).astype(np.float32)

  def _sample(self, rng, task) -> tuple[str, int, int]:
    """-> text, index of the target, index of the reference."""
    if task == "edit":
      pool = self._by_kind[rng.integers(len(self._by_kind))] if rng.random() < 0.5 else self._edits
      edit = pool[rng.integers(len(pool))]
      return edit.instructions[rng.integers(len(edit.instructions))], edit.target, edit.source
    if rng.random() < self._config.words_share:
      i = rng.integers(WORDS)
      return words.caption(*self._latents.words[i]), len(self._emoji) + i, -1
    i = rng.choice(self._generation)
    return self._emoji.captions[i], i, -1


class TextEncoder:
  """Words and layout -> conditioning of the DiT: a causal decoder of two layers over the words with a head for the context and
  one for the pooled vector, to which the layout is added as it is. A slot without a word is zero, as is the pooled vector
  without words or layout: what an SCB sends when it is new.

  Words have a fixed size, so that the noise that training adds to the context can't be outgrown: the DiT learns to do with
  conditioning that is only nearly right, as that of a young SCB will be.
  """

  def __init__(self, config, vocabulary: int):
    self._decoder = TextDecoder(dataclasses.replace(config.text, vocab_size=vocabulary, num_layers=2), (2,), unroll=True)
    self._heads = {"context": Linear(config.dit.context_size), "pooled": Linear(config.dit.pooled_size)}
    self._hidden = config.text.hidden_size

  def init(self, key) -> dict:
    x = jnp.zeros((1, 4, self._hidden))
    args = (x, jnp.zeros((1, 3, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
    inputs = {"context": x, "pooled": x}
    return {
      "decoder": self._decoder.init(key, *args, method="logits")["params"],
      **{n: head.init(jax.random.fold_in(key, i), inputs[n])["params"] for i, (n, head) in enumerate(self._heads.items())},
    }

  def __call__(self, params, batch: Mapping) -> Conditioning:
    """batch: ids int [B,T], mask bool [B,T], layout [B,P] of `Data.told`, slots int [B,S], slot_mask bool [B,S] -> context of
    S tokens.
    """
    mask = batch["mask"]
    run = lambda method, *args: self._decoder.apply({"params": params["decoder"]}, *args, method=method)
    positions = jnp.broadcast_to(jnp.arange(mask.shape[1])[None, None], (mask.shape[0], 3, mask.shape[1]))
    (x,) = run("hidden_states", (run("embed", batch["ids"]),), (positions,), (mask.astype(jnp.int32),))
    average = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    head = lambda name, value: rms_norm(self._heads[name].apply({"params": params[name]}, value), jnp.float32(1))
    words = head("context", x)
    context = jnp.concatenate([words, jnp.zeros_like(words[:, :1])], axis=1)
    context = jnp.take_along_axis(context, batch["slots"][..., None], axis=1)
    pooled = head("pooled", average) * (mask.sum(1, keepdims=True) > 1) + batch["layout"]
    return Conditioning(pooled, context, batch["slot_mask"])


def _normal(keys, salt: int, shape) -> jax.Array:
  """[B, *shape], each row from its own key."""
  return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, salt), shape))(keys)


def build(config, mesh) -> Stage:
  """The stage; it reads the VAE and its scale from `config.output`, where it adds the DiT."""
  sizes = model_dir.load_config(config.output)
  model = DeepGen(sizes, unroll=config.unroll)
  emoji = emoji_data.prepare(config.data.dir)
  vae = model_dir.load(config.output, ("vae",))
  latents = Latents(model, vae, emoji, config.seed)
  data = Data(config, emoji, latents, sizes.dit.pooled_size)
  encoder = TextEncoder(sizes, len(data.vocabulary))
  side = sizes.image_size // sizes.vae.factor // sizes.dit.patch_size
  grid = crop_positions(side, side, sizes.dit)

  def loss(params, batch, keys):
    mean, logvar = batch["mean"], batch["logvar"]
    target = model.scale(mean + jnp.exp(0.5 * logvar) * _normal(keys, 0, mean.shape[1:]))
    noise = _normal(keys, 1, mean.shape[1:])
    sigma = jax.vmap(lambda key: draw_sigma(jax.random.fold_in(key, 2), sizes.scheduler))(keys)
    mask = jnp.ones(mean.shape[:2], bool)
    positions = jnp.broadcast_to(grid, (len(mean), *grid.shape))
    references = None
    if "reference" in batch:
      references = {"tokens": model.scale(batch["reference"]), "positions": positions, "mask": mask}
    cond = encoder(params["text_encoder"], batch)
    if config.condition_noise:

      def drawn(salt, *shape):  # noise, of a strength for each sample
        strength = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, salt)))(keys)
        return config.condition_noise * jnp.expand_dims(strength**2, range(1, len(shape) + 1)) * _normal(keys, salt + 1, shape)

      tokens, size = cond.context.shape[1:]
      disturbance = drawn(3, tokens, size) + drawn(5, 1, size)  # each token's own, and one for all
      cond = cond.replace(context=cond.context + disturbance)
    prepared = model.prepare(params, cond, {"positions": positions, "mask": mask}, references)
    velocity = model.velocity(params, noised(target, noise, sigma), 1000 * sigma, prepared)
    losses = velocity_loss(velocity, target, noise, mask)
    return losses, {"edit_loss" if references else "generate_loss": losses.mean()}

  held_out = np.flatnonzero(emoji.held_out)
  texts = [emoji.captions[i] for i in held_out]
  triplets = edits.held_out(emoji, limit=len(held_out))

  def shown(texts, changes: np.ndarray) -> dict:
    """Captions, of which "" stands for none, and changes of layouts, as they are; edits have a "reference" to come."""
    ids, mask = data.vocabulary(texts)
    rng = np.random.default_rng(0)
    return {"ids": ids, "mask": mask, "layout": data.told(changes)} | spread(mask, config.context_slots, rng)

  nothing, change = [""] * len(texts), latents.layout[held_out]
  guess = data.changes["generate"].guess(change, np.ones(len(texts)), np.random.default_rng(0))
  source, target = ([getattr(triplet, which) for triplet in triplets] for which in ("source", "target"))
  edited = latents.layout[target] - latents.layout[source]
  judged = shown(nothing, change) | {"mean": latents.mean[held_out], "logvar": latents.logvar[held_out]}
  judge_keys = jax.random.split(jax.random.key(1), len(held_out))
  judge = jax.jit(lambda params: loss(params, judged, judge_keys)[0].mean())
  retrieval = Retrieval(emoji.images())

  @jax.jit
  def sample(params, batch):
    """Images of the second half of a batch, guided away from the first, whose noise is the same."""
    count = len(batch["ids"]) // 2
    positions = jnp.broadcast_to(grid, (2 * count, *grid.shape))
    seen = {"positions": positions, "mask": jnp.ones(positions.shape[:2], bool)}
    references = seen | {"tokens": model.scale(batch["reference"])} if "reference" in batch else None
    prepared = model.prepare(params, encoder(params["text_encoder"], batch), seen, references)

    def velocity(x, timestep):
      v = model.velocity(params, jnp.concatenate([x, x]), jnp.full((2 * count,), timestep), prepared)
      return guide(*reversed(jnp.split(v, 2)), GUIDANCE)

    noise = jax.random.normal(jax.random.key(2), (count, side * side, sizes.dit.patch_dim))
    tokens = euler_sample(velocity, noise, inference_sigmas(sizes.scheduler, SAMPLER_STEPS))
    return model.decode(vae, unpatchify(tokens, 2 * side, 2 * side))

  def evaluate(params, step):
    """What alignment can hope for: held-out captions in words, by layout and by a guess at it, and edits by what changes."""
    report = Report({"heldout_loss": float(judge(params))})
    cases = {"words": (texts, 0 * change), "layout": (nothing, change), "guess": (nothing, guess), "edit": (nothing, edited)}
    for name, (captions, changes) in cases.items():
      true = target if name == "edit" else held_out
      batch = jax.tree.map(lambda a, b: np.concatenate([a, b]), shown(nothing, 0 * changes), shown(captions, changes))
      if name == "edit":
        batch["reference"] = np.tile(latents.mean[source], (2, 1, 1))
      made = np.asarray(sample(params, batch))
      made = np.round((np.clip(made, -1, 1) + 1) * 127.5).astype(np.uint8)
      report.scalars |= {f"heldout_{name}_{score}": value for score, value in retrieval.recall(made, true).items()}
      pairs = np.concatenate([emoji.images()[true[:32]], made[:32]], axis=2)
      drawn = pairs.reshape(8, 4, *pairs.shape[1:]).transpose(0, 2, 1, 3, 4)
      report.images[f"from_{name}"] = drawn.reshape(8 * pairs.shape[1], -1, 3)
    return report

  def init():
    key = jax.random.key(config.seed)
    started = load_model(config.init, weights="raw", parts=("dit",))[1] if config.init else model.init(key, ("dit",))
    return {"text_encoder": encoder.init(key), **started}

  finish = lambda params: model_dir.save(config.output, sizes, {"dit": params["dit"]}, dtype=np.float16)
  batches = Drawn(config.data.batch_size, data.draw)
  return Stage(init, loss, batches, lambda params, batch: [batch], evaluate, finish)
