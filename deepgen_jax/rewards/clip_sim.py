"""Cosine of an image and its prompt under a CLIP model, as it is: no factor, no clipping; prompts are cut at 77 tokens."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.data.tokens import read_tokenizer
from deepgen_jax.errors import UserError
from deepgen_jax.models.clip import ImageTower, TextTower, preprocess
from deepgen_jax.rewards.reward import Item
from deepgen_jax.weights.clip import load

BATCH = 16  # one compiled program each for texts and images; a rest is padded


def clip_sim(path: str) -> ClipSim:
  """path: folder of a CLIP model as transformers saves it, such as openai/clip-vit-large-patch14. Raises UserError."""
  return ClipSim(path)


class ClipSim:
  """The reward; `texts` and `images` give the embeddings themselves."""

  name = "clip_sim"

  def __init__(self, path):
    """Reads the model; its parameters stay on the first local device, in float32."""
    self.config, params = load(path)
    self._tokenizer = read_tokenizer(path)
    if self._tokenizer.eos_token_id is None:
      raise UserError(f"the tokenizer in {path} has no end token: it is not CLIP's")
    self._params = jax.device_put(params, jax.local_devices()[0])
    self._text = jax.jit(lambda p, ids, ends: _unit(TextTower(self.config).apply({"params": p["text"]}, ids, ends)))
    self._image = jax.jit(lambda p, pixels: _unit(ImageTower(self.config).apply({"params": p["image"]}, pixels)))

  def __call__(self, items: Sequence[Item]) -> np.ndarray:
    prompts = list(dict.fromkeys(item.prompt for item in items))  # images of a group share theirs
    place = {prompt: i for i, prompt in enumerate(prompts)}
    texts, images = self.texts(prompts), self.images([item.image for item in items])
    return (texts[[place[item.prompt] for item in items]] * images).sum(1)

  def texts(self, prompts: Sequence[str]) -> np.ndarray:
    """-> float64 [N,P] of length 1."""
    length = self.config.max_length
    encoded = self._tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="np")
    ids = np.asarray(encoded["input_ids"], np.int32)
    ends = (ids == self._tokenizer.eos_token_id).argmax(1).astype(np.int32)  # the first: padding may be the same token
    return _in_batches(lambda *batch: self._text(self._params, *batch), ids, ends)

  def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [H,W,3] of any size -> float64 [N,P] of length 1."""
    pixels = np.stack([preprocess(image, self.config.image_size) for image in images])
    return _in_batches(lambda batch: self._image(self._params, batch), pixels)


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _in_batches(call, *arrays: np.ndarray) -> np.ndarray:
  """call on BATCH rows at a time, the last of them repeated where rows lack."""
  out = []
  for start in range(0, len(arrays[0]), BATCH):
    rows = np.minimum(np.arange(start, start + BATCH), len(arrays[0]) - 1)
    out.append(np.asarray(call(*(array[rows] for array in arrays)), np.float64))
  return np.concatenate(out)[: len(arrays[0])]
