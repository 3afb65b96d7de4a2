"""Pre-training of the tiny VAE: reconstruction of training emoji and rendered words.

The tiny base is trained part by part, as the paper starts from parts that others trained (design section 5): here the VAE, then
`pretrain_vlm` and `pretrain_dit`. None of them sees a held-out caption or image. Each writes its part of the model directory
`config.output`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data import words
from deepgen_jax.data.loader import DataSpec, MicroBatchIterator
from deepgen_jax.models.config import TINY
from deepgen_jax.models.vae import VAE
from deepgen_jax.stages.stage import Report, Stage
from deepgen_jax.weights import model_dir


class Drawn:
  """Micro-batches that a function draws: draw(m, size) -> arrays of the m-th one, a pure function."""

  def __init__(self, batch_size: int, draw: Callable[[int, int], dict]):
    self._draw = draw
    self.spec = DataSpec(batch_size=batch_size)

  def batch(self, m: int) -> dict:
    """The m-th micro-batch."""
    size = self.spec.batch_size
    return self._draw(m, size) | {"sample_id": np.arange(m * size, (m + 1) * size, dtype=np.uint32)}

  def iterate(self, start: int) -> MicroBatchIterator:
    """From the start-th micro-batch on."""
    return MicroBatchIterator(self, start)

  def reading(self) -> list:
    """Nothing: nothing here is read from files."""
    return []

  def bad_samples(self) -> list:
    """None, for the same reason."""
    return []

  def counts(self) -> dict:
    """None either."""
    return {}


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


def build(config, mesh) -> Stage:
  """Loss: L1 + L2 on pixels + `kl_weight` x KL to N(0,1) per latent element."""
  vae = VAE(TINY.vae)
  emoji = emoji_data.prepare(config.data.dir)
  images, train = emoji.images(), np.flatnonzero(~emoji.held_out)
  written = words.combinations(held_out=False)

  def draw(m, size):
    rng = np.random.default_rng((config.seed, m))
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
  return Stage(init, loss, Drawn(config.data.batch_size, draw), lambda params, batch: [batch], evaluate, finish)
