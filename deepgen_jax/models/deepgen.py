"""The five networks composed.

    prompt ids (+ vision features) --VLM--> hidden states --SCB--> pooled, context --DiT--> velocity
    images <--VAE--> latents

A parameter tree is {"vlm": {"text", "vision"}, "scb", "dit", "vae"}; a method needs only the parts that it names. The VAE and
the vision tower run outside the train step (design 3.6), per image size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepgen_jax.models import lora
from deepgen_jax.models.config import DeepGenConfig
from deepgen_jax.models.dit import DiT, Prepared, crop_positions, patchify
from deepgen_jax.models.scb import SCB
from deepgen_jax.models.text import TextDecoder
from deepgen_jax.models.vae import VAE, scale_latents, unscale_latents
from deepgen_jax.models.vision import VisionTower, patch_grid
from deepgen_jax.models.vision import patchify as patchify_image

PARTS = ("vlm", "scb", "dit", "vae")
_THINK_KEY_OFFSET = 1 << 20  # dropout keys of think tokens don't depend on how long the prompt is padded


@flax.struct.dataclass
class Conditioning:
  """What the DiT reads: pooled [B,P], context [B,L,C], mask [B,L] bool (True = real token)."""

  pooled: Array
  context: Array
  mask: Array


@dataclass(frozen=True)
class DeepGen:
  """Functions of parameters. `dtype` is the compute dtype; `unroll` writes scans out (faster on CPU); `remat` (layers.REMAT) is
  what training keeps of a block; `attention` (layers.BACKENDS) serves all but the vision tower, which trains nowhere;
  `frozen` is how what doesn't train lies on a mesh, "fsdp" or "whole".
  """

  config: DeepGenConfig
  dtype: Any = jnp.float32
  unroll: bool = False
  remat: str = "none"
  attention: str = "xla"
  frozen: str = "fsdp"

  @cached_property
  def text(self) -> TextDecoder:
    c = self.config
    return TextDecoder(c.text, c.scb.read_layers, self.unroll, self.remat, self.attention, one_loop=self.frozen == "fsdp")

  @cached_property
  def vision(self) -> VisionTower:
    return VisionTower(self.config.vision, self.unroll)

  @cached_property
  def scb(self) -> SCB:
    return SCB(self.config, self.unroll, self.remat, self.attention)

  @cached_property
  def dit(self) -> DiT:
    return DiT(self.config.dit, self.unroll, self.remat, self.attention)

  @cached_property
  def vae(self) -> VAE:
    return VAE(self.config.vae)

  def init(self, key: Array, parts: Sequence[str] = PARTS) -> dict:
    """Fresh float32 parameters of these parts; traceable. For their shapes alone: `param_shapes`."""
    c, made = self.config, {}
    keys = dict(zip(PARTS, jax.random.split(key, len(PARTS))))
    ones = jnp.ones((1, 4), jnp.int32)
    positions = jnp.zeros((1, 3, 4), jnp.int32)
    if "vlm" in parts:
      text_key, vision_key = jax.random.split(keys["vlm"])
      x = jnp.zeros((1, 4, c.text.hidden_size))
      image = jnp.zeros((1, 32, 32, 3))
      made["vlm"] = {
        "text": self.text.init(text_key, x, positions, ones, method="logits")["params"],
        "vision": self.vision.init(vision_key, patchify_image(image, c.vision), patch_grid(32, 32, c.vision))["params"],
      }
    if "scb" in parts:
      states = jnp.zeros((1, 4, len(c.scb.read_layers) * c.text.hidden_size))
      made["scb"] = self.scb.init(keys["scb"], states, ones.astype(bool))["params"]
    if "dit" in parts:
      context, mask = jnp.zeros((1, 4, c.dit.context_size)), ones.astype(bool)
      tokens, places = jnp.zeros((1, 4, c.dit.patch_dim)), jnp.zeros((1, 4, 2), jnp.int32)
      pooled = jnp.zeros((1, c.dit.pooled_size))
      made["dit"] = self.dit.init(keys["dit"], tokens, jnp.zeros(1), context, mask, pooled, places, mask)["params"]
    if "vae" in parts:
      made["vae"] = self.vae.init(keys["vae"], jnp.zeros((1, 2 * c.vae.factor, 2 * c.vae.factor, 3)))["params"]
    return made

  def vision_features(self, params: Mapping, images: Array) -> Array:
    """images uint8 [B,H,W,3], sides multiples of 32 -> vision tokens [B, H/32*W/32, C] in raster order."""
    patches = patchify_image(images, self.config.vision).astype(self.dtype)
    return self.vision.apply({"params": params["vlm"]["vision"]}, patches, patch_grid(*images.shape[1:3], self.config.vision))

  def encode_moments(self, params: Mapping, images: Array) -> tuple[Array, Array]:
    """images uint8 [B,H,W,3] -> posterior mean and log-variance of the VAE's own latents, float32 [B,h,w,c]."""
    x = (images.astype(jnp.float32) / 127.5 - 1).astype(self.dtype)
    mean, logvar = self.vae.apply({"params": params["vae"]}, x, method="encode")
    return mean.astype(jnp.float32), logvar.astype(jnp.float32)

  def scale(self, latents: Array) -> Array:
    """VAE latents -> scaled latents."""
    return scale_latents(latents, self.config.vae)

  def decode(self, params: Mapping, latents: Array) -> Array:
    """Scaled latents [B,h,w,c] -> images float32 [B,H,W,3], nominally in [-1,1]."""
    x = unscale_latents(latents.astype(jnp.float32), self.config.vae).astype(self.dtype)
    return self.vae.apply({"params": params["vae"]}, x, method="decode")

  def condition(self, params: Mapping, inputs: Mapping, *, joint: bool = False, keys: Array | None = None) -> Conditioning:
    """Prompt -> conditioning over [prompt | padding | think tokens].

    inputs: ids int [B,T], text_mask bool [B,T], position_ids int [B,3,T+K], image_index int [B,T] and, with images, vision
    [B,V,C]. joint: run prompt and think tokens as one stream (needed where the VLM trains); otherwise no gradient is built for
    the prompt. keys [B]: dropout keys for LoRA; None switches dropout off.
    """
    text_params, prompt_mask = params["vlm"]["text"], inputs["text_mask"]
    batch, length = inputs["ids"].shape
    think = params["scb"]["think_tokens"].astype(self.dtype)
    count = think.shape[0]
    if keys is not None:
      places = np.concatenate([np.arange(length), _THINK_KEY_OFFSET + np.arange(count)]).astype(np.uint32)
      fold = lambda key, place: jax.random.key_data(jax.random.fold_in(key, place))
      text_params = lora.with_dropout_keys(text_params, jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(keys, places))
    run = lambda method, *args: self.text.apply({"params": text_params}, *args, method=method)
    prompt = run("embed", inputs["ids"], inputs.get("vision"), inputs["image_index"], self.dtype)
    think = jnp.broadcast_to(think, (batch, *think.shape))
    positions = inputs["position_ids"]
    segments = (prompt_mask.astype(jnp.int32), jnp.ones((batch, count), jnp.int32))
    mask = jnp.concatenate(segments, axis=1)
    if joint:
      states = run("hidden_states", (jnp.concatenate([prompt, think], axis=1),), (positions,), (mask,))
    else:
      places = (positions[:, :, :length], positions[:, :, length:])
      states = run("hidden_states", (prompt, think), places, segments)
    mask = mask.astype(bool)
    pooled, context = self.scb.apply({"params": params["scb"]}, jnp.concatenate(states, axis=-1), mask)
    return Conditioning(pooled, context, mask)

  def prepare(
    self, params: Mapping, cond: Conditioning, target: Mapping, references: Mapping | None = None, apart: bool = False
  ) -> Prepared:
    """Everything of the DiT that no timestep changes. target: positions, mask; references: tokens, positions, mask; apart:
    see `DiT.prepare`.
    """
    extra = () if references is None else (references["tokens"].astype(self.dtype), references["positions"], references["mask"])
    args = (cond.context.astype(self.dtype), cond.mask, cond.pooled.astype(self.dtype), target["positions"], target["mask"])
    return self.dit.apply({"params": params["dit"]}, *args, *extra, apart=apart, method="prepare")

  def velocity(self, params: Mapping, tokens: Array, timestep: Array, prepared) -> Array:
    """Noisy tokens float32 [B,N,patch_dim], timestep [B] in 0..1000 -> velocity float32 of that shape."""
    v = self.dit.apply({"params": params["dit"]}, tokens.astype(self.dtype), timestep, prepared, method="velocity")
    return v.astype(jnp.float32)


@lru_cache(maxsize=64)
def _shapes(config: DeepGenConfig, part: str) -> dict:
  return jax.eval_shape(lambda: DeepGen(config).init(jax.random.key(0), (part,)))[part]


def param_shapes(config: DeepGenConfig, parts: Sequence[str] = PARTS) -> dict:
  """{part: tree of jax.ShapeDtypeStruct}, float32, of a model's fresh parameters. Nothing is computed, at any size; each part
  is traced once a process, which takes half a second.
  """
  return {part: jax.tree.map(lambda leaf: leaf, _shapes(config, part)) for part in parts}


def pad_tokens(latents: Sequence[np.ndarray], budget: int, config: DeepGenConfig) -> dict:
  """Latents of one sample, [h,w,c] each, one after the other -> tokens [budget, patch_dim], positions [budget,2], mask
  [budget].
  """
  p = config.dit.patch_size
  tokens = [patchify(np.asarray(x), p) for x in latents]
  places = [crop_positions(x.shape[0] // p, x.shape[1] // p, config.dit) for x in latents]
  count = sum(len(t) for t in tokens)
  if count > budget:
    raise ValueError(f"{count} tokens don't fit the budget of {budget}")
  channels = latents[0].shape[-1] * p * p if latents else config.dit.patch_dim
  pad = lambda rows, width, dtype: np.concatenate([*rows, np.zeros((budget - count, width), dtype)]).astype(dtype)
  return {"tokens": pad(tokens, channels, np.float32), "positions": pad(places, 2, np.int32), "mask": np.arange(budget) < count}


def token_budget(counts: Sequence[int], multiple: int) -> int:
  """The largest count, rounded up to a multiple: aspect ratios share a compiled shape."""
  return -(-max(counts) // multiple) * multiple
