"""Every kind of parallelism on eight devices gives what one device gives: gradients of stage 2, the sampler, and a rollout with
its advantages and updates that learn from it. Updates of stage 1: tests/test_distributed.py; data alone: there (the run that
processes go on from) and tests/stages/test_grpo.py.
"""

import dataclasses
import functools
import os
import re

import jax
import numpy as np
import pytest

from configs import grpo, sft
from deepgen_jax import sharding
from deepgen_jax.data.loader import DataSpec, host_batch
from deepgen_jax.data.sources import Sample
from deepgen_jax.models import lora
from deepgen_jax.models.config import TINY, DiTConfig, SCBConfig, VAEConfig
from deepgen_jax.models.deepgen import Conditioning, DeepGen, pad_tokens, param_shapes
from deepgen_jax.pipeline import DeepGenPipeline, sample_images
from deepgen_jax.rl.advantages import advantages
from deepgen_jax.stages import grpo as reinforcement
from deepgen_jax.stages import rollouts
from deepgen_jax.stages.objective import sample_loss
from deepgen_jax.stages.step import init_state, make_optimizer, make_train_step
from tests import small

MESHES = {
  "fsdp": {"data": 1, "fsdp": 8},
  "tensor": {"data": 1, "tensor": 8},
  "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
REINFORCE = {"objective": "flow_grpo", "sampler": "cps", "shared_noise": True, "ratio_clip": (1e-3, 1e-3), "kl_weight": 0.0}
# What XLA gathers whole on a mesh all the same: known, and not wanted.
GATHERED = {"data x fsdp x tensor": {"vlm/text/segments_1/down/kernel"}}
# Small, with every kind of layer: one and two stacked ones that SCB reads in the VLM, two in SCB, two kinds in the DiT.
CONFIG = dataclasses.replace(
  small.VARIED,
  text=dataclasses.replace(small.VARIED.text, num_layers=4),
  scb=SCBConfig(num_think_tokens=3, hidden_size=32, intermediate_size=46, num_layers=2, num_heads=4, read_layers=(3, 1)),
  dit=DiTConfig(
    num_layers=2,
    num_heads=2,
    head_dim=8,
    context_size=24,
    pooled_size=16,
    dual_attention_layers=(0,),
    pos_embed_max_size=12,
    sample_size=8,
  ),
  vae=VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4),
)
# A policy's gradients cancel: they need sums in the order that users' programs have (tests/xla.py takes another).
EXACT = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else None
MODEL = DeepGen(CONFIG)


def make_batch(tokenizer) -> dict:
  """Eight edits with one reference each; latents and vision tokens are drawn instead of encoded."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  blank = np.zeros((64, 64, 3), np.uint8)
  samples = [Sample("edit", (f"make it {'very ' * i}red",), blank, (blank,)) for i in range(8)]
  spec = DataSpec(image_size=64, num_think_tokens=CONFIG.scb.num_think_tokens, text_buckets=(128,))
  host = host_batch(samples, range(8), spec, tokenizer)
  tokens = lambda: [pad_tokens([draw(8, 8, 16)], 24, CONFIG) for _ in range(8)]
  stacked = lambda rows: {key: np.stack([row[key] for row in rows]) for key in rows[0]}
  batch = {key: host[key] for key in ("sample_id", "ids", "text_mask", "position_ids", "image_index")}
  target, references = stacked(tokens()), stacked(tokens())
  batch["target"] = {"mean": target.pop("tokens"), "logvar": draw(8, 24, 64) - 3, **target}
  return batch | {"references": references, "vision": draw(8, 4, 32)}


def make_step(stage: str, mesh, layout: str = "fsdp"):
  """-> (compiled step, state, frozen, rng): an update is two micro-batches, of which stage 2's step is the first."""
  config = {"sft": sft, "grpo": grpo}[stage].get_config("tiny")
  if stage == "grpo":
    config.grpo.update(REINFORCE)
  params = small.draw_params(CONFIG)
  if stage == "grpo":
    params = reinforcement.complete(config, MODEL, {part: params[part] for part in ("dit", "vae")})
  if config.lora.targets:
    targets = [target.replace("segments_[0-5]", "segments_[01]") for target in config.lora.targets]
    params = lora.add_lora(params, targets, 4, 8.0, jax.random.key(1))
  trainable, frozen = sharding.partition(params, config.trainable)
  frozen = sharding.place(frozen, sharding.frozen_shardings(frozen, mesh, layout))
  trainable = sharding.place(trainable, sharding.param_shardings(trainable, mesh))
  config.optim.lr = 100.0  # of which the first update of a warm-up takes a hundred-thousandth
  optimizer, schedule = make_optimizer(config.optim, 10)
  fresh = lambda params: init_state(params, optimizer, ema=True)
  shardings = sharding.state_shardings(jax.eval_shape(fresh, trainable), mesh)
  state = jax.jit(fresh, out_shardings=shardings)(trainable)

  def loss(params, batch, keys):
    if stage == "grpo":
      return reinforcement.batch_loss(MODEL, config, params, batch, keys)
    return sample_loss(dataclasses.replace(MODEL, frozen=layout), params, batch, keys, joint=True), {}

  step = make_train_step(loss, optimizer, schedule, accumulate=2, clip=1.0, ema_decay=0.9)
  step = functools.partial(step, completes=stage == "grpo")
  out, options = (shardings, sharding.replicated(mesh)), EXACT if stage == "grpo" else None
  step = jax.jit(sharding.on_mesh(mesh, step), out_shardings=out, compiler_options=options)
  rng = jax.jit(lambda: jax.random.key(0), out_shardings=sharding.replicated(mesh))()
  return step, state, frozen, rng


def run(mesh, batch, layout: str = "fsdp"):
  """Stage 2 -> gradient sums of one micro-batch, its loss, and the program's text."""
  step, state, frozen, rng = make_step("sft", mesh, layout)
  batch = sharding.put_batch(batch, mesh)
  step = step.lower(state, frozen, batch, rng).compile()
  state, metrics = step(state, frozen, batch, rng)
  return jax.device_get(state.grads), float(metrics["micro_loss"]), step.as_text()


def one_device():
  return sharding.make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def batch(tokenizer):
  return make_batch(tokenizer)


@pytest.fixture(scope="module")
def alone(batch):
  """What one device computes."""
  return run(one_device(), batch)


@pytest.mark.parametrize("kind", MESHES)
def test_gradients_are_those_of_one_device(kind, alone, batch):
  mesh = sharding.make_mesh(MESHES[kind])
  grads, loss, program = run(mesh, batch)
  np.testing.assert_allclose(loss, alone[1], rtol=1e-5)
  same_gradients(grads, alone[0])
  assert stacked_shapes(mesh)
  joined = lambda path, shape: (3, *shape[1:]) if "segments_1" in path else shape  # one loop runs both segments of the VLM
  named = lambda shape: f"f32[{','.join(map(str, shape))}]" in program
  whole = [path for path, shape in stacked_shapes(mesh) if named(shape) or named(joined(path, shape))]
  assert set(whole) <= GATHERED.get(kind, set())  # layers are gathered one at a time; parameter and gradient stay in shards


def test_gradients_over_whole_frozen_parameters_are_those_of_one_device(alone, batch):
  grads, loss, _ = run(sharding.make_mesh(MESHES["data x fsdp x tensor"]), batch, "whole")
  np.testing.assert_allclose(loss, alone[1], rtol=1e-5)
  same_gradients(grads, alone[0])


def same_gradients(ours, theirs):
  # A key's bias has no gradient, as softmax doesn't see it: what is there is rounding, in proportion to the others.
  rounding = 1e-7 * max(np.abs(g).max() for g in jax.tree.leaves(theirs))

  def compare(path, a, b):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + rounding, lora.path_name(path)

  jax.tree_util.tree_map_with_path(compare, ours, theirs)


def stacked_shapes(mesh) -> list[tuple]:
  """(path, whole shape) of the parameters of two stacked layers that a mesh shards."""
  found = []

  def visit(path, leaf):
    if leaf.ndim == 3 and leaf.shape[0] == 2 and any(sharding.partition_spec(path, leaf.shape, mesh)):
      found.append((path, leaf.shape))

  sharding.map_paths(visit, {k: v for k, v in param_shapes(CONFIG).items() if k != "vae"})
  return [(path, shape) for path, shape in found if "vision" not in path]


def draw(pipe) -> np.ndarray:
  """Four guided latents in two steps."""
  prompts = [f"a {'very ' * i}red heart" for i in range(4)]
  program = sharding.on_mesh(pipe.mesh, functools.partial(sample_images, pipe.model))
  pipe._sample = jax.jit(program, static_argnames=("size", "guided"))
  return pipe(prompts, height=32, width=32, num_inference_steps=2, guidance_scale=3.0, output_type="latent").images


def test_a_sample_is_that_of_one_device(tokenizer):
  meshes = sharding.make_mesh(MESHES["data x fsdp x tensor"]), one_device()
  ours, theirs = (draw(DeepGenPipeline(CONFIG, small.draw_params(CONFIG), tokenizer, mesh=mesh)) for mesh in meshes)
  assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def reinforce(mesh) -> tuple[dict, dict, list]:
  """Two groups of four images of a random policy, judged by their latents, as a rounded pixel isn't the same everywhere
  -> (what came of them, gradients, losses).
  """
  config, rng = grpo.get_config("tiny"), np.random.default_rng(2)
  config.grpo.update(REINFORCE | {"prompts": 2, "group_size": 4, "steps": 3, "window": 2, "size": (32, 32)})
  g, mask = config.grpo, np.arange(6) < 5
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  cond = Conditioning(draw(2, 16), draw(2, 6, 24), np.stack([mask, mask]))
  one = pad_tokens([np.zeros((16, 16, 16), np.float32)], 64, CONFIG)
  target = {key: np.stack([one[key]] * 2) for key in ("positions", "mask")}
  inputs = {"cond": cond, "target": target}
  inputs = jax.tree.map(lambda x: x.repeat(4, axis=0), inputs)
  _, sigmas, _ = rollouts.grid(g, MODEL)
  step, state, frozen, key = make_step("grpo", mesh)
  params = sharding.merge(state.params, frozen)
  deal = lambda tree: sharding.put_batch(tree, mesh)
  sample = jax.jit(sharding.on_mesh(mesh, rollouts.sampler(g, MODEL)), compiler_options=EXACT)
  keys = jax.random.split(jax.random.key(4), 8)
  made = sample(params, deal(inputs), deal(keys), deal(keys), sigmas, np.int32(0))
  rewards = np.asarray(made.latents, np.float64)[..., ::4].mean((1, 2))[:, None]
  advantage = np.asarray(advantages("gdpo", rewards, np.ones((8, 1)), 4))
  piece = inputs | {name: np.asarray(getattr(made, name)) for name in rollouts.kept(g)}
  piece |= {"advantage": advantage, "sample_id": np.arange(8, dtype=np.uint32)}
  batch = rollouts.step_batch(g, sigmas, 0, piece, 1, rollouts.at_step)
  batch |= {"old_log_prob": batch["rollout_log_prob"]} | rollouts.weights_of(g, 8, 1.0, 2, 0, fresh=True)
  losses, batch = [], deal(batch)
  for number in range(3):
    state, metrics = step(state, frozen, batch, key)
    losses.append(float(metrics["micro_loss"]))
    if number == 0:
      grads = jax.device_get(state.grads)
  found = {name: np.asarray(getattr(made, name)) for name in ("images", "latents", "path", "log_prob")}
  return found | {"advantage": advantage}, grads, losses


def test_a_rollout_and_its_update_are_those_of_one_device():
  """On other meshes: tests/stages/test_grpo.py, data; tests/test_distributed.py, data x fsdp."""
  ours, theirs = reinforce(sharding.make_mesh(MESHES["data x fsdp x tensor"])), reinforce(one_device())
  assert np.abs(ours[0].pop("images").astype(int) - theirs[0]["images"]).max() <= 1  # of 255
  for name, value in ours[0].items():
    assert np.abs(value - theirs[0][name]).max() <= 1e-5 * np.abs(theirs[0][name]).max(), name
  same_gradients(ours[1], theirs[1])
  np.testing.assert_allclose(ours[2], theirs[2], atol=1e-5)
  assert theirs[2][0] == theirs[2][1] != theirs[2][2] and np.abs(theirs[0]["advantage"]).min() > 0


def test_the_vae_gathers_kernels_and_no_images():
  """Left to itself the compiler splits channels as the kernels are split, and every device has all images."""
  mesh, model = sharding.make_mesh({"data": 1, "fsdp": 8}), DeepGen(TINY)
  shapes = param_shapes(TINY, ("vae",))
  place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  params = jax.tree.map(place, shapes, sharding.param_shardings(shapes, mesh))
  dealt = sharding.batch_sharding(mesh)
  kernels = {x.shape for x in jax.tree.leaves(shapes)}
  latents = jax.ShapeDtypeStruct((16, 8, 8, 16), np.float32, sharding=dealt)
  images = jax.ShapeDtypeStruct((16, 64, 64, 3), np.uint8, sharding=dealt)
  for method, x in ((model.decode, latents), (model.encode_moments, images)):
    text = sharding.jit(method, mesh).lower(params, x).compile().as_text()
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* all-(?:gather|reduce|to-all)", text)
    assert moved
    assert {tuple(map(int, shape.split(","))) for shape in moved} <= kernels
