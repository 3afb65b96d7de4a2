"""Pre-training of the tiny base parts, each on its own, as the paper starts from parts that others trained (design section 5).

* vae: reconstruction of emoji and rendered words.
* vlm: captioning (image -> caption) and next-token prediction on captions; nothing else.
* dit: flow matching on generation and edits, with a small causal text encoder of its own that is thrown away afterwards.

None of them sees a held-out caption or image. Each writes its part of the model directory `config.output`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data import words
from deepgen_jax.data.loader import DataSpec, MicroBatchIterator
from deepgen_jax.data.sources import EmojiGeneration
from deepgen_jax.models.config import TINY
from deepgen_jax.models.vae import VAE
from deepgen_jax.stages.stage import Report, Stage
from deepgen_jax.weights import model_dir


class Drawn:
  """Micro-batches that a function draws from a numpy generator seeded by (seed, index)."""

  def __init__(self, config, draw):
    self._seed, self._draw = config.seed, draw
    self.spec = DataSpec(batch_size=config.data.batch_size)

  def batch(self, m: int) -> dict:
    """The m-th micro-batch."""
    batch = self._draw(np.random.default_rng((self._seed, m)), self.spec.batch_size)
    return batch | {"sample_id": np.arange(self.spec.batch_size, dtype=np.uint32) + m * self.spec.batch_size}

  def iterate(self, start: int) -> MicroBatchIterator:
    return MicroBatchIterator(self, start)

  def bad_samples(self) -> list:
    return []


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """uint8 [64,64,3] -> the same, perhaps mirrored, moved by up to 4 pixels on white, with its colours exchanged."""
  if rng.random() < 0.5:
    image = image[:, ::-1]
  if rng.random() < 0.5:
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), constant_values=255)
    y, x = rng.integers(0, 9, 2)
    image = padded[y : y + 64, x : x + 64]
  if rng.random() < 0.25:
    image = image[..., rng.permutation(3)]
  return image


def to_unit(images: np.ndarray) -> np.ndarray:
  """uint8 -> float32 in [-1, 1]."""
  return images.astype(np.float32) / 127.5 - 1


def build_vae(config, mesh) -> Stage:
  """Loss: L1 + L2 on pixels + `kl_weight` x KL to N(0,1) per latent element."""
  vae = VAE(TINY.vae)
  emoji = emoji_data.prepare(config.data.dir)
  images, train = emoji.images(), np.flatnonzero(~emoji.held_out)
  written = words.combinations(held_out=False)

  def draw(rng, size):
    batch = [
      words.render(*written[rng.integers(len(written))]) if rng.random() < 0.1 else augment(images[rng.choice(train)], rng)
      for _ in range(size)
    ]
    return {"images": to_unit(np.stack(batch))}

  def loss(params, batch, keys):
    mean, logvar = vae.apply({"params": params["vae"]}, batch["images"], method="encode")
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    decoded = vae.apply({"params": params["vae"]}, mean + jnp.exp(0.5 * logvar) * noise, method="decode")
    error = decoded - batch["images"]
    reconstruction = (jnp.abs(error) + jnp.square(error)).mean((1, 2, 3))
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean((1, 2, 3))
    return reconstruction + config.kl_weight * kl, {"l2": jnp.square(error).mean(), "kl": kl.mean()}

  held_out = to_unit(images[np.flatnonzero(emoji.held_out)[:128]])
  decode = jax.jit(lambda p, x: vae.apply({"params": p}, x))

  def evaluate(params, step):
    decoded = np.clip(decode(params["vae"], held_out), -1, 1)
    psnr = 10 * np.log10(4 / np.square(decoded - held_out).mean((1, 2, 3)))
    pairs = np.concatenate([held_out[:16], decoded[:16]], axis=2).reshape(4, 4, 64, 128, 3).transpose(0, 2, 1, 3, 4)
    grid = ((pairs.reshape(256, 512, 3) + 1) * 127.5).astype(np.uint8)
    return Report({"psnr": float(psnr.mean())}, {"reconstructions": grid})

  def finish(params):
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode")[0])
    latents = np.concatenate([encode(params["vae"], to_unit(images[train[i : i + 64]])) for i in range(0, len(train) - 64, 64)])
    scaled = dataclasses.replace(TINY.vae, shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    model_dir.save(config.output, dataclasses.replace(TINY, vae=scaled), {"vae": params["vae"]}, dtype=np.float16)

  init = lambda: {"vae": jax.jit(vae.init)(jax.random.key(config.seed), jnp.zeros((1, 64, 64, 3)))["params"]}
  return Stage(init, loss, Drawn(config, draw), lambda params, batch: [batch], evaluate, finish)
