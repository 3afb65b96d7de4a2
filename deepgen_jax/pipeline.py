"""DeepGenPipeline: the Python door. Text to image, and editing with one or several references.

    pipe = DeepGenPipeline.from_pretrained("runs/sft")
    pipe("a red apple").images[0].save("apple.png")
    pipe("make it green", image="apple.png").images[0]

Everything per sample is drawn from its own key (seed + index), text and references are padded to buckets under a mask, so a
sample doesn't depend on what else is in the call. All steps, guidance and the decoding run as one compiled program per shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from deepgen_jax import checkpoint, distributed, sharding
from deepgen_jax.data import prompts as prompting
from deepgen_jax.data.images import fix_pixels, load_image
from deepgen_jax.errors import UserError
from deepgen_jax.flow.matching import euler_sample, guide
from deepgen_jax.flow.schedule import inference_sigmas
from deepgen_jax.models import lora
from deepgen_jax.models.config import DeepGenConfig
from deepgen_jax.models.deepgen import PARTS, Conditioning, DeepGen, pad_tokens, token_budget
from deepgen_jax.models.dit import patchify, unpatchify
from deepgen_jax.models.layers import best_attention
from deepgen_jax.weights import diffusers, model_dir
from deepgen_jax.weights.load import open_weights
from deepgen_jax.weights.tensors import in_memory

UNROLLED_LAYERS = 12  # models up to this depth run unrolled on CPU; deeper ones take too long to compile that way


@dataclass(frozen=True)
class PipelineOutput:
  """images: list of PIL images; or float32 [B,H,W,3] in [0,1]; or scaled latents float32 [B,h,w,c]."""

  images: Any


class DeepGenPipeline:
  """A model with its tokenizer, ready to generate and edit. `from_pretrained` is the usual way in.

  On a mesh over several processes all of them make the same calls, and all get what these return.
  """

  def __init__(self, config: DeepGenConfig, params: Mapping, tokenizer, dtype=None, mesh=None, attention: str | None = None):
    """params: all four parts; LoRA is merged. dtype None: bfloat16 on TPU and GPU, float32 on CPU. attention: a back end
    (`layers.BACKENDS`), None: the platform's best.
    """
    if missing := [part for part in PARTS if part not in params]:
      why = " (a base for stage 1 has none: train with configs/align.py first)" if "scb" in missing else ""
      raise UserError(f"the model lacks {', '.join(missing)}{why}")
    on_cpu = jax.default_backend() == "cpu"
    self.config, self.tokenizer, self.mesh = config, tokenizer, mesh or _one_device()
    unroll = on_cpu and config.text.num_layers <= UNROLLED_LAYERS
    dtype = _dtype(dtype)
    self.model = DeepGen(config, dtype, unroll, attention=attention or best_attention(jax.default_backend(), dtype))
    merged = lora.merge_lora({part: params[part] for part in PARTS})
    self.params = sharding.place(merged, sharding.param_shardings(merged, self.mesh))
    program = lambda fn: sharding.jit(fn, self.mesh)
    self._condition = program(self.model.condition)
    self._features = program(self.model.vision_features)
    self._moments = program(self.model.encode_moments)
    self._decode = program(self.model.decode)
    self._velocity = program(self._velocity_program)
    self._sample = jit_sampler(self.model, self.mesh)

  @classmethod
  def from_pretrained(cls, path, dtype=None, mesh=None, base=None, weights: str = "ema") -> DeepGenPipeline:
    """path: a model directory, a training workdir, a diffusers folder, or a .pth checkpoint. UserError for what isn't one.

    base: one or several that have what `path` lacks (for a workdir: its frozen parts, if not where its run recorded); weights:
    of a workdir, "ema" (if kept) or "raw". Each tensor goes straight to its shards on the mesh, kernels in `dtype`.
    """
    dtype, mesh = _dtype(dtype), mesh or _one_device()
    opened = open_weights(path, base, weights).merged()
    return cls(opened.config, opened.params(dtype=dtype, mesh=mesh), opened.tokenizer(), dtype, mesh)

  def save_pretrained(self, path, format: str = "deepgen_jax") -> None:
    """Writes a model directory, or a "diffusers" folder that the PyTorch libraries load. LoRA is merged."""
    if format not in (formats := {"deepgen_jax": model_dir.save_leaves, "diffusers": diffusers.save}):
      raise UserError(f"save_pretrained: format {format!r} is neither {' nor '.join(map(repr, formats))}")
    leaves = {part: {k: in_memory(x) for k, x in checkpoint.flat(self.params[part]).items()} for part in PARTS}
    formats[format](path, self.config, leaves, tokenizer=self.tokenizer)

  def encode_prompt(self, prompts: Sequence[str], images: Sequence[Sequence] | None = None) -> Conditioning:
    """prompts: list of str, "" allowed; images: per prompt a list of uint8 [H,W,3] arrays or PIL images, sides multiples of 32.

    -> Conditioning (pooled [B,P], context [B,L,C], mask [B,L]). A prompt without images is a generation, with images an
    edit. Never resizes: ValueError for other sides.
    """
    if isinstance(prompts, str):
      raise UserError("encode_prompt takes a list of prompts; put the one you have in a list")
    images = [[] for _ in prompts] if images is None else images
    pixels = {id(image): load_image(image) for row in images for image in row}  # with guidance each comes twice
    images = [[pixels[id(image)] for image in row] for row in images]
    if len(images) != len(prompts):
      raise UserError(f"{len(prompts)} prompts but images for {len(images)}")
    rows = []
    for text, row in zip(prompts, images):
      sizes = [image.shape[:2] for image in row]
      rows.append(prompting.tokenize(self.tokenizer, "edit" if row else "generate", text, sizes))
    inputs = prompting.collate(rows, self.config.scb.num_think_tokens)
    if any(images):
      each = {id(image): image for row in images for image in row}
      encoded = {key: distributed.gathered(self._features(self.params, image[None]))[0] for key, image in each.items()}
      features = [[encoded[id(image)] for image in row] for row in images]
      vision = [np.concatenate(row) if row else np.zeros((0, self.config.vision.out_size), np.float32) for row in features]
      longest = token_budget([len(v) for v in vision], 4)
      inputs["vision"] = np.stack([np.pad(v, ((0, longest - len(v)), (0, 0))) for v in vision])
    return self._condition(self.params, self._deal(inputs))

  def encode_image(self, image) -> jax.Array:
    """uint8 [H,W,3] or PIL, sides multiples of 32 -> scaled latent [1,h,w,c] float32, the posterior's mode."""
    pixels = load_image(image)
    if any(side % 32 for side in pixels.shape[:2]):
      raise UserError(f"encode_image: an image of {pixels.shape[0]}x{pixels.shape[1]} pixels; sides must be multiples of 32")
    return self.model.scale(self._moments(self.params, pixels[None])[0])

  def decode_latents(self, latents) -> jax.Array:
    """Scaled latents [B,h,w,c] -> the decoder's own output float32 [B,H,W,3], nominally in [-1,1], not clipped."""
    return self._decode(self.params, jnp.asarray(latents, jnp.float32))

  def velocity(self, latents, timestep, cond: Conditioning, references: Sequence[Sequence] | None = None) -> jax.Array:
    """One evaluation of the DiT. latents [B,h,w,c]; timestep [B] in 0..1000; references[i]: scaled latents [h,w,c] of sample i.

    References may differ in number and size; a leading axis of 1 is accepted. -> velocity float32 [B,h,w,c].
    """
    latents = np.asarray(latents, np.float32)
    batch, height, width = latents.shape[:3]
    timestep = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), (batch,))
    cond = Conditioning(*(jnp.asarray(x) for x in (cond.pooled, cond.context, cond.mask)))
    if references is not None and len(references) != batch:
      raise UserError(f"{batch} latents but references for {len(references)} samples")
    target, extra = self.target(batch, height, width), self.references(references)
    patch = self.config.dit.patch_size
    tokens = self._velocity(self.params, patchify(latents, patch), timestep, cond, target, extra)
    return unpatchify(tokens, height, width, patch)

  def __call__(
    self,
    prompt: str | Sequence[str],
    image=None,
    negative_prompt: str | Sequence[str] = "",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 4.0,
    seed: int = 0,
    latents=None,
    output_type: str = "pil",
  ) -> PipelineOutput:
    """Generates, or edits where there are references.

    prompt: one or a list. image: None; one (path, PIL or uint8 array), for every prompt; a list, the references of the one
    prompt; or a list of lists. height, width: both or neither, multiples of 16; without them the output has the first
    reference's size after `fix_pixels`, else the model's. guidance_scale <= 1 runs no negative branch. Image i is drawn from
    seed + i; `latents` [B,h,w,c] replaces the noise. output_type: "pil", "np" or "latent".
    """
    if output_type not in ("pil", "np", "latent"):
      raise UserError(f"output_type {output_type!r} is neither 'pil', 'np' nor 'latent'")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative_prompt] * len(texts) if isinstance(negative_prompt, str) else list(negative_prompt)
    if not texts or len(negatives) != len(texts):
      raise UserError(
        f"{len(texts)} prompts and {len(negatives)} negative prompts; give at least one prompt, and one negative each"
      )
    if num_inference_steps < 1:
      raise UserError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
    area = self._check_size(height, width)
    rows = [[fix_pixels(load_image(one), area) for one in row] for row in _reference_rows(image, len(texts))]
    default = (self.config.image_size, self.config.image_size)
    sizes = [(height, width) if height else row[0].shape[:2] if row else default for row in rows]
    if len(set(sizes)) > 1 and (output_type != "pil" or latents is not None):
      raise UserError(f"the references give outputs of different sizes {sorted(set(sizes))}; set height and width")
    made: dict[int, Any] = {}
    for size in dict.fromkeys(sizes):  # one program per output size
      at = [i for i, s in enumerate(sizes) if s == size]
      pick = lambda values, at=at: [values[i] for i in at]
      noise = self._noise([seed + i for i in at], size, latents)
      out = self._run(pick(texts), pick(negatives), pick(rows), size, num_inference_steps, guidance_scale, noise)
      made |= dict(zip(at, zip(*distributed.gathered(out))))
    images, final = zip(*(made[i] for i in range(len(texts))))
    if output_type == "latent":
      return PipelineOutput(np.stack(final))
    images = [np.clip((x + 1) / 2, 0, 1) for x in images]
    if output_type == "np":
      return PipelineOutput(np.stack(images))
    return PipelineOutput([Image.fromarray(np.round(x * 255).astype(np.uint8)) for x in images])

  def _run(self, texts, negatives, rows, size, steps, guidance, noise):
    """One batch of one output size -> (decoded images [B,H,W,3], scaled latents [B,h,w,c])."""
    guided = guidance > 1
    height, width = (side // self.config.vae.factor for side in size)
    pairs = lambda negative, positive: [x for pair in zip(negative, positive) for x in pair] if guided else positive
    latents = [[self.encode_image(x) for x in row] for row in rows]
    cond = self.encode_prompt(pairs(negatives, texts), pairs(rows, rows))
    target = self.target(len(cond.pooled), height, width)
    inputs = (patchify(noise, self.config.dit.patch_size), cond, target, self.references(pairs(latents, latents)))
    sigmas = inference_sigmas(self.config.scheduler, steps, target["mask"].shape[1])
    return self._sample(self.params, *self._deal(inputs), sigmas, np.float32(guidance), size=(height, width), guided=guided)

  def _velocity_program(self, params, tokens, timestep, cond, target, references):
    return self.model.velocity(params, tokens, timestep, self.model.prepare(params, cond, target, references))

  def _deal(self, tree):
    """Arrays whose leading axis is the batch, dealt to the devices of the mesh where these divide it, else whole on each."""
    count = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    dealt = not any(len(x) % count for x in jax.tree.leaves(tree))
    where = sharding.batch_sharding(self.mesh) if dealt else sharding.replicated(self.mesh)
    return sharding.place(tree, jax.tree.map(lambda _: where, tree))

  def target(self, batch: int, height: int, width: int) -> dict:
    """Positions and mask of target latents [height, width]."""
    count = height * width // self.config.dit.patch_size**2
    blank = np.zeros((height, width, self.config.vae.latent_channels), np.float32)
    one = pad_tokens([blank], count, self.config)
    return {key: np.broadcast_to(one[key], (batch, *one[key].shape)) for key in ("positions", "mask")}

  def references(self, rows: Sequence[Sequence] | None) -> dict | None:
    """Ragged reference latents -> padded tokens, positions, mask; None where there are none."""
    if rows is None or not any(len(row) for row in rows):
      return None
    rows = [
      [x[0] if x.ndim == 4 else x for x in (np.asarray(z, np.float32) for z in row)] for row in distributed.gathered(rows)
    ]
    patch = self.config.dit.patch_size**2
    counts = [sum(x.shape[0] * x.shape[1] // patch for x in row) for row in rows]
    budget = token_budget(counts, 16 if max(counts) <= 128 else 128)
    padded = [pad_tokens(row, budget, self.config) for row in rows]
    return {key: np.stack([row[key] for row in padded]) for key in padded[0]}

  def _noise(self, seeds: Sequence[int], size, latents) -> jax.Array:
    """Initial noise [B,h,w,c]: each sample from its own seed, or what the caller gave."""
    shape = (*(side // self.config.vae.factor for side in size), self.config.vae.latent_channels)
    if latents is None:
      return jnp.stack([jax.random.normal(jax.random.key(seed), shape) for seed in seeds])
    latents = jnp.asarray(latents, jnp.float32)
    if latents.shape != (len(seeds), *shape):
      raise UserError(f"latents have shape {list(latents.shape)}; this call needs {[len(seeds), *shape]}")
    return latents

  def _check_size(self, height, width) -> float:
    """Side of the square with the output's area, which references are sized to."""
    if (height is None) != (width is None):
      raise UserError("give both height and width, or neither")
    if height is None:
      return self.config.image_size
    unit = self.config.vae.factor * self.config.dit.patch_size
    limit = self.config.dit.pos_embed_max_size * unit
    if height % unit or width % unit or not 0 < min(height, width) <= max(height, width) <= limit:
      raise UserError(f"size {height}x{width}: both sides must be multiples of {unit}, from {unit} to {limit}")
    return math.sqrt(height * width)


def jit_sampler(model: DeepGen, mesh) -> Callable:
  """The jitted `sample_images` of a model; on GPUs, as where layers are unrolled, with layers taken apart."""
  apart = model.unroll or sharding.is_gpu(mesh)
  return sharding.jit(partial(sample_images, model, apart=apart), mesh, sampler=True, static_argnames=("size", "guided"))


def sample_images(model: DeepGen, params, noise, cond, target, references, sigmas, guidance, *, size, guided, apart=False):
  """All steps and the decoding, one program -> (images float32 [B,H,W,3], scaled latents [B,h,w,c]).

  noise: tokens [B,N,patch_dim]. With guidance, cond, target and references hold each sample's negative and positive branch in
  turn.  size: (h, w) of the latents; apart: see `DiT.prepare`.
  """
  prepared = model.prepare(params, cond, target, references, apart=apart)

  def velocity(x, timestep):
    x = jnp.repeat(x, 2, axis=0) if guided else x
    v = model.velocity(params, x, jnp.full((len(x),), timestep), prepared)
    return guide(v[1::2], v[::2], guidance) if guided else v

  latents = unpatchify(euler_sample(velocity, noise, sigmas), *size, model.config.dit.patch_size)
  return model.decode(params, latents), latents


def _dtype(dtype):
  """None: bfloat16 on TPU and GPU, float32 on CPU."""
  return jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))


def _one_device():
  return sharding.make_mesh({"data": 1}, jax.devices()[:1])


def _reference_rows(image, count: int) -> list[list]:
  """The `image` argument as one list of references per prompt."""
  if image is None:
    return [[] for _ in range(count)]
  if not isinstance(image, list | tuple):
    return [[image] for _ in range(count)]
  if any(isinstance(row, list | tuple) for row in image):
    if not all(isinstance(row, list | tuple) for row in image) or len(image) != count:
      raise UserError(f"image: a list of lists needs one list for each of the {count} prompts")
    return [list(row) for row in image]
  if count != 1:
    raise UserError(f"image: a flat list is the references of one prompt; for {count} prompts give a list of lists")
  return [list(image)]
