"""Images of a micro-batch -> what the train step takes: latent moments as tokens, reference latents, vision features.

The VAE and the vision tower run here, outside the train step, once per image size. Precomputed data (data/encoded.py) holds
what this returns, and passes through. With `cache` > 0 the results are also kept in memory per image (a small data set is
encoded once).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np

from deepgen_jax import distributed, sharding
from deepgen_jax.data.encoded import EncodedImage
from deepgen_jax.data.prompts import PIXELS_PER_TOKEN
from deepgen_jax.models.deepgen import DeepGen, pad_tokens, token_budget


class ImageEncoder:
  """Encodes uint8 images [H,W,3] by size, in programs of a fixed batch, so that an image's result doesn't depend on its
  neighbours. With a cache it depends on history which images are encoded together and in which rows, and rows may differ in the
  last bit: there each image has a device to itself in a program's run.

  Of several processes each encodes its own samples, however many that are, on its own devices. These, and an encoder that
  deals nothing over a mesh, copy the parameters at the first call: they never train outside of their pre-training.
  """

  def __init__(self, model: DeepGen, batch: int = 8, cache: int = 0, mesh=None):
    """batch: images of a program, or of each device in it where a mesh deals them (of several processes: each's own devices).
    With a cache it's one, and `batch` what a caller does well to bring at a time.
    """
    if jax.process_count() > 1:
      mesh = sharding.make_mesh({"data": 1, "fsdp": -1}, jax.local_devices())
    self._mesh, self._dealt = mesh, mesh is not None
    devices = mesh.shape["data"] * mesh.shape["fsdp"] if self._dealt else 1
    self._sharding = sharding.batch_sharding(mesh) if self._dealt else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    self.batch, self._rows = batch * devices, devices if cache else batch * devices
    self._cache_size = cache
    self._cache: dict[tuple, tuple[np.ndarray, ...]] = {}
    self._copies: dict[str, Mapping] = {}
    features = lambda params, images: (model.vision_features(params, images),)
    program = partial(sharding.jit, mesh=mesh) if self._dealt else jax.jit
    self.programs = {"moments": program(model.encode_moments), "features": program(features)}

  def moments(self, params: Mapping, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """-> (mean, log-variance) of each image, [h,w,c]."""
    return self._run("moments", {"vae": params["vae"]}, images)

  def features(self, params: Mapping, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """-> vision tokens [V,C] of each image."""
    return [rows for (rows,) in self._run("features", {"vlm": {"vision": params["vlm"]["vision"]}}, images)]

  def _run(self, program: str, params, images):
    if any(isinstance(image, EncodedImage) for image in images):
      pixels = [image for image in images if not isinstance(image, EncodedImage)]
      rest = iter(self._run(program, params, pixels) if pixels else ())
      return [getattr(image, program) if isinstance(image, EncodedImage) else next(rest) for image in images]
    keys = [(program, image.shape, hashlib.blake2b(image.tobytes(), digest_size=16).digest()) for image in images]
    found = {key: self._cache[key] for key in keys if key in self._cache}
    missing = {key: image for key, image in zip(keys, images) if key not in found}
    params, ran = self._here(program, params), []
    for shape in {image.shape for image in missing.values()}:
      group = [(key, image) for key, image in missing.items() if image.shape == shape]
      for start in range(0, len(group), self._rows):
        part = group[start : start + self._rows]
        stacked = np.stack([image for _, image in part])
        stacked = np.concatenate([stacked, np.zeros((self._rows - len(part), *shape), np.uint8)])
        stacked = jax.device_put(stacked, self._sharding)
        ran.append((part, self.programs[program](params, stacked)))
    for part, outputs in ran:
      outputs = [np.asarray(x) for x in outputs]
      found |= {key: tuple(x[row] for x in outputs) for row, (key, _) in enumerate(part)}
    room = self._cache_size - len(self._cache)
    self._cache |= {key: found[key] for key in list(missing)[: max(room, 0)]}
    return [found[key] for key in keys]

  def gather(self, params: Mapping) -> None:
    """Takes this process's copies now; called by all, where later some may have nothing to encode."""
    self._here("moments", {"vae": params["vae"]})
    self._here("features", {"vlm": {"vision": params["vlm"]["vision"]}})

  def _here(self, program: str, params):
    """The parameters where this process can run a program by itself: on several devices all of them would do the same."""
    if self._dealt and jax.process_count() == 1:
      return params
    if program not in self._copies:
      rules = sharding.param_shardings(params, self._mesh) if self._dealt else jax.tree.map(lambda _: self._sharding, params)
      self._copies[program] = distributed.whole_on(params, rules) if jax.process_count() > 1 else jax.device_put(params, rules)
    return self._copies[program]


def images_per_device(batch_size: int, mesh) -> int:
  """Images of an encoder's program on each device: the share of a micro-batch that it holds, up to 8."""
  return max(1, min(8, batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])))


def encode_batch(
  model: DeepGen, params: Mapping, encoder: ImageEncoder, host: Mapping, token_multiple: int, scale: Callable
) -> dict:
  """A host micro-batch (data/loader.py) -> the batch of the train step.

  Adds target: mean, logvar [B,N,D], positions, mask; and for edits references: tokens (scaled posterior mode), positions, mask,
  and vision [B,V,C]. N and R are padded to multiples of `token_multiple`, V to a quarter of it, from the batch's `extents`.
  """
  batch = {key: host[key] for key in ("sample_id", "ids", "text_mask", "position_ids", "image_index")}
  config = model.config
  moments = encoder.moments(params, host["target"])
  room, token = host["extents"], (config.vae.factor * config.dit.patch_size) ** 2  # pixels that a token stands for
  budget = token_budget([room["target"] // token], token_multiple)
  mean = _stack([pad_tokens([m], budget, config) for m, _ in moments])
  logvar = _stack([pad_tokens([v], budget, config) for _, v in moments])
  batch["target"] = {"mean": mean["tokens"], "logvar": logvar["tokens"], "positions": mean["positions"], "mask": mean["mask"]}
  if any(host["references"]):
    flat = [image for images in host["references"] for image in images]
    modes = iter([scale(mean) for mean, _ in encoder.moments(params, flat)])
    features = iter(encoder.features(params, flat))
    rows = [[next(modes) for _ in images] for images in host["references"]]
    budget = token_budget([room["references"] // token], token_multiple)
    batch["references"] = _stack([pad_tokens(row, budget, config) for row in rows])
    vision = [np.concatenate([next(features) for _ in images]) for images in host["references"]]
    longest = token_budget([room["references"] // PIXELS_PER_TOKEN**2], max(1, token_multiple // 4))
    batch["vision"] = np.stack([np.pad(v, ((0, longest - len(v)), (0, 0))) for v in vision])
  return batch


def _stack(rows: Sequence[dict]) -> dict:
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
