"""What is measured: sizes, weights, inputs, and our side of each case.

A case is one network and one kind of work on it. Weights are random, of ordinary size (heads that start at zero included); they
reach PyTorch in the same folder that `convert --to diffusers` writes, inputs as arrays in PyTorch's layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepgen_jax import checkpoint
from deepgen_jax.data.tokens import build_tiny_tokenizer
from deepgen_jax.flow.matching import euler_sample, guide, noised, velocity_loss
from deepgen_jax.flow.schedule import inference_sigmas
from deepgen_jax.models.config import TINY, DeepGenConfig, DiTConfig, SCBConfig, TextConfig, VAEConfig
from deepgen_jax.models.deepgen import Conditioning, DeepGen, pad_tokens, param_shapes
from deepgen_jax.models.dit import patchify, unpatchify
from deepgen_jax.stages import step
from deepgen_jax.weights import diffusers
from deepgen_jax.weights.tensors import in_memory
from deepgen_jax.weights.torch_format import to_torch

CASES = (
  "dit_forward_256",
  "dit_forward_1024",
  "dit_train_256",
  "dit_train_1024",
  "sampler",
  "vae_encode",
  "vae_decode",
  "vlm_prefill",
)
TOKENS = {"256": (32, 128), "1024": (64, 256)}  # image tokens -> side of the latents, context tokens
GUIDANCE = 4.0
OPTIM = dict(lr=1e-5, lr_groups=(), warmup=0.0, schedule="constant", betas=(0.9, 0.95), weight_decay=0.05, clip=1.0)


@dataclass(frozen=True)
class Sizes:
  """Networks and batches. dtype: of the computation; masters are float32."""

  config: DeepGenConfig
  dtype: Any = jnp.float32
  batch: int = 2  # of the DiT cases
  steps: int = 4  # of the sampler, which makes one image with guidance
  pixels: int = 256  # side of the VAE's one image
  prompt: int = 384  # tokens of the VLM's one prompt


def _config(width: int, layers: int, context: int, text: TextConfig, vae: VAEConfig) -> DeepGenConfig:
  dit = DiTConfig(
    num_layers=layers,
    num_heads=width // 64,
    context_size=context,
    pooled_size=context // 2,
    dual_attention_layers=tuple(range(layers // 2)),
    pos_embed_max_size=64,
    sample_size=64,
  )
  vision = dataclasses.replace(TINY.vision, out_size=text.hidden_size)  # exported with the text decoder, never run
  return DeepGenConfig(text=text, vision=vision, scb=SCBConfig(read_layers=(text.num_layers,)), dit=dit, vae=vae)


# Half the width of the full model and a few of its layers, so that a round takes seconds on one core; the VAE is the full one.
CPU = Sizes(
  _config(
    width=768,
    layers=6,
    context=2048,
    text=TextConfig(vocab_size=8192, hidden_size=1024, num_layers=6, num_heads=8, intermediate_size=5504),
    vae=VAEConfig(),
  )
)
# The full width on one chip; six layers stand for all, whose time is proportional.
ACCELERATOR = Sizes(
  _config(width=1536, layers=6, context=4096, text=TextConfig(vocab_size=8192, num_layers=6), vae=VAEConfig()),
  dtype=jnp.bfloat16,
  batch=16,
  steps=50,
  pixels=512,
  prompt=512,
)


@dataclass(frozen=True)
class Job:
  """Our side of a case, ready to run.

  run() does the work once and returns when it is done; read(result) gives what is compared with PyTorch, {name: array} in its
  layout. kind, part and inputs are what the other side needs (`torch_worker`).
  """

  kind: str
  part: str
  inputs: dict[str, np.ndarray]
  run: Callable[[], Any]
  read: Callable[[Any], dict[str, np.ndarray]]


def draw_params(model: DeepGen, part: str) -> dict:
  """Random float32 weights of a part, {part: tree}; the same for the same shapes."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape, np.float32)
    if (name := path[-1].key) in ("scale", "bias"):
      return 0.1 * noise + np.float32(name == "scale")
    return noise / np.float32(np.sqrt(np.prod(leaf.shape[-4:-1] if leaf.ndim == 4 else leaf.shape[-2])))

  return jax.tree_util.tree_map_with_path(draw, param_shapes(model.config, (part,)))


def export(folder, config: DeepGenConfig, params: Mapping) -> None:
  """Writes the parts of `params` as the stock libraries load them."""
  leaves = {part: {path: in_memory(leaf) for path, leaf in checkpoint.flat(tree).items()} for part, tree in params.items()}
  diffusers.save(folder, config, leaves, build_tiny_tokenizer())


def build(name: str, sizes: Sizes) -> tuple[Job, dict]:
  """Compiles the case. -> (job, its weights {part: numpy tree})."""
  model = DeepGen(sizes.config, sizes.dtype, unroll=True)
  kind, _, size = name.rpartition("_") if name.startswith("dit_") else (name, "", "256")
  part = {"vae": "vae", "vlm": "vlm"}.get(name.partition("_")[0], "dit")
  params = draw_params(model, part)
  make = {
    "dit_forward": partial(_dit_forward, size=size),
    "dit_train": partial(_dit_train, size=size),
    "sampler": partial(_sampler, size=size),
    "vae_encode": _vae_encode,
    "vae_decode": _vae_decode,
    "vlm_prefill": _vlm_prefill,
  }[kind]
  inputs, run, read = make(model, params, sizes)
  return Job(kind, part, inputs, run, read), params


def _compiled(function, *args, donate=()):
  """The program of `function` on these arguments, and the arguments on the device."""
  args = jax.device_put(args)
  return jax.jit(function, donate_argnums=donate).lower(*args).compile(), args


def _repeat(function, *args):
  """run() for a function without state."""
  program, args = _compiled(function, *args)
  return lambda: jax.block_until_ready(program(*args))


def _nchw(x) -> np.ndarray:
  return np.ascontiguousarray(np.asarray(x, np.float32).transpose(0, 3, 1, 2))


def _dit_inputs(model: DeepGen, batch: int, size: str) -> dict[str, np.ndarray]:
  side, length = TOKENS[size]
  rng, config = np.random.default_rng(1), model.config.dit
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  return {
    "latents": draw(batch, side, side, config.in_channels),
    "timestep": np.linspace(900, 100, batch, dtype=np.float32),
    "context": draw(batch, length, config.context_size),
    "pooled": draw(batch, config.pooled_size),
  }


def _dit_target(model: DeepGen, latents: np.ndarray) -> dict[str, np.ndarray]:
  """Positions and mask of whole, unpadded samples."""
  side, patch = latents.shape[1], model.config.dit.patch_size
  rows = [pad_tokens([x], side * side // patch**2, model.config) for x in latents]
  return {key: np.stack([row[key] for row in rows]) for key in ("positions", "mask")}


def _conditioning(inputs: Mapping) -> Conditioning:
  return Conditioning(inputs["pooled"], inputs["context"], np.ones(inputs["context"].shape[:2], bool))


def _as_torch(inputs: Mapping) -> dict[str, np.ndarray]:
  """Images and latents become NCHW."""
  return {key: _nchw(x) if x.ndim == 4 else x for key, x in inputs.items()}


def _dit_forward(model, params, sizes, size):
  inputs = _dit_inputs(model, sizes.batch, size)
  side = inputs["latents"].shape[1]

  def forward(params, latents, timestep, cond, target):
    prepared = model.prepare(params, cond, target)
    return unpatchify(model.velocity(params, patchify(latents), timestep, prepared), side, side)

  run = _repeat(
    forward, params, inputs["latents"], inputs["timestep"], _conditioning(inputs), _dit_target(model, inputs["latents"])
  )
  return _as_torch(inputs), run, lambda out: {"velocity": _nchw(out)}


def _dit_train(model, params, sizes, size):
  """The train step of every stage, on the DiT alone: gradients, clipping, AdamW. Compared: the loss and Adam's first moment."""
  inputs = _dit_inputs(model, sizes.batch, size)
  inputs["noise"] = np.random.default_rng(2).standard_normal(inputs["latents"].shape, np.float32)
  optimizer, schedule = step.make_optimizer(SimpleNamespace(**OPTIM), 1000)

  def loss(params, batch, keys):
    latents, noise = patchify(batch["latents"]), patchify(batch["noise"])
    prepared = model.prepare(params, batch["cond"], batch["target"])
    x = noised(latents, noise, batch["timestep"] / 1000)
    velocity = model.velocity(params, x, batch["timestep"], prepared)
    return velocity_loss(velocity, latents, noise, batch["target"]["mask"]), {}

  train_step = step.make_train_step(loss, optimizer, schedule, accumulate=1, clip=OPTIM["clip"], ema_decay=0.0)
  batch = inputs | {"cond": _conditioning(inputs), "target": _dit_target(model, inputs["latents"])}
  batch["sample_id"] = np.arange(sizes.batch, dtype=np.uint32)
  state = step.init_state(jax.tree.map(jnp.array, params), optimizer, ema=False)
  frozen = jax.tree.map(lambda _: None, params)
  program, (state, frozen, batch, rng) = _compiled(train_step, state, frozen, batch, jax.random.key(0), donate=0)

  def run():
    nonlocal state
    state, metrics = jax.block_until_ready(program(state, frozen, batch, rng))
    return metrics["micro_loss"], state

  def read(result):
    moments = optax.tree.get(result[1].opt_state, "mu")["dit"]
    names = diffusers.table("dit", model.config)
    theirs = to_torch(dataclasses.replace(names, computed={}), jax.device_get(moments))
    return {"loss": np.asarray(result[0], np.float32)} | {f"moment {key}": x for key, x in theirs.items()}

  return _as_torch(inputs), run, read


def _sampler(model, params, sizes, size):
  """Euler steps with guidance from one noise; conditioning holds the negative and the positive branch."""
  inputs = _dit_inputs(model, 2, size)
  noise, target = inputs["latents"][:1], _dit_target(model, inputs["latents"])
  side = noise.shape[1]
  sigmas = inference_sigmas(model.config.scheduler, sizes.steps, target["mask"].shape[1])

  def sample(params, noise, cond, target, sigmas):
    prepared = model.prepare(params, cond, target, apart=True)

    def velocity(x, timestep):
      v = model.velocity(params, jnp.repeat(x, 2, axis=0), jnp.full((2,), timestep), prepared)
      return guide(v[1:], v[:1], GUIDANCE)

    return unpatchify(euler_sample(velocity, patchify(noise), sigmas), side, side)

  theirs = {"noise": noise, "context": inputs["context"], "pooled": inputs["pooled"], "sigmas": sigmas}
  run = _repeat(sample, params, noise, _conditioning(inputs), target, sigmas)
  return _as_torch(theirs), run, lambda out: {"latents": _nchw(out)}


def _vae_encode(model, params, sizes):
  image = np.random.default_rng(1).integers(0, 256, (1, sizes.pixels, sizes.pixels, 3), np.uint8)
  run = _repeat(model.encode_moments, params, image)
  return {"image": _nchw(image)}, run, lambda out: {"mean": _nchw(out[0]), "log-variance": _nchw(out[1])}


def _vae_decode(model, params, sizes):
  side, config = sizes.pixels // model.config.vae.factor, model.config.vae
  latents = np.random.default_rng(1).standard_normal((1, side, side, config.latent_channels), np.float32)
  run = _repeat(model.decode, params, model.scale(latents))
  return {"latents": _nchw(latents)}, run, lambda out: {"image": _nchw(out)}


def _vlm_prefill(model, params, sizes):
  """All layers and the final norm, without logits: a prompt as a conditioning VLM reads it."""
  ids = np.random.default_rng(1).integers(0, model.config.text.vocab_size, (1, sizes.prompt), np.int32)
  positions = np.broadcast_to(np.arange(sizes.prompt, dtype=np.int32), (1, 3, sizes.prompt))

  def prefill(params, ids, positions, mask):
    def layers(decoder):
      (x,) = decoder.hidden_states((decoder.embed(ids, dtype=model.dtype),), (positions,), (mask,))
      return decoder.norm(x)

    return model.text.apply({"params": params["vlm"]["text"]}, method=layers)

  run = _repeat(prefill, params, ids, positions, np.ones_like(ids))
  return {"ids": ids}, run, lambda out: {"hidden": np.asarray(out, np.float32)}
