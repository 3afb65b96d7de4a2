"""The estimate as a command: a small model compiled for a topology that isn't there, what doesn't fit, and mistakes."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from deepgen_jax import estimate, sharding
from deepgen_jax.config import load_config
from deepgen_jax.errors import UserError
from deepgen_jax.estimating import plan as plans
from deepgen_jax.estimating.chips import topology
from deepgen_jax.estimating.flops import count_flops
from deepgen_jax.estimating.inputs import sampler_inputs, train_batch
from deepgen_jax.estimating.program import OutOfMemory, compile_program
from deepgen_jax.models.config import SIZES, VAEConfig
from deepgen_jax.models.deepgen import DeepGen, param_shapes
from deepgen_jax.stages import supervised
from deepgen_jax.stages.encode import ImageEncoder, encode_batch
from tests.small import CONFIG, draw_params

# As many latents a side, from fewer layers: compiling for a TPU takes its time for each.
VAE = VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4)
FEW = dataclasses.replace(CONFIG, vae=VAE, image_size=32)
COMMAND = ["--config", "configs/sft.py:tiny", "--topology", "v5p:2x2x1", "--json"]
SMALL = [
  "--config.unroll=False",
  "--config.attention=xla",  # heads of 8 channels are too narrow for the kernel
  "--config.data.batch_size=4",
  "--config.data.pattern=('generate','generate')",
  "--config.mesh.data=1",
  "--config.mesh.fsdp=4",
  "--config.lora.targets=['vlm/text/segments_[0-1]/(q|k|v|out|gate|up|down)/kernel']",
]


@pytest.fixture(autouse=True)
def little_effort():
  """What the compiler would make faster or smaller isn't tested here. Newer versions of JAX have no such setting."""
  efforts = ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort")
  before = {name: getattr(jax.config, name) for name in efforts if hasattr(jax.config, name)}
  for name in before:
    jax.config.update(name, -1.0)
  yield
  for name, effort in before.items():
    jax.config.update(name, effort)


def run(monkeypatch, capsys, *options):
  """-> (the JSON of the last line, everything printed)."""
  monkeypatch.setitem(SIZES, "tiny", FEW)
  monkeypatch.setattr(sys, "argv", ["estimate", *COMMAND, *SMALL, *options])
  try:
    estimate.main()
  finally:
    printed = capsys.readouterr().out
  return json.loads(printed.splitlines()[-1]), printed


def test_a_small_model_is_estimated(monkeypatch, capsys):
  report, printed = run(monkeypatch, capsys, "--config", "configs/align.py:tiny", "--config.lora.targets=[]")
  assert report["fits"] is True and report["chips"] == 4
  assert 0 < report["mfu"] < 1 and report["images_per_s"] == pytest.approx(2 * 4 / report["step_s"])
  assert report["peak_gib"] == pytest.approx(sum(report[f"{k}_gib"] for k in ("parameters", "optimizer", "activations")))
  assert report["peak_gib"] < report["hbm_gib"] and report["compile_s"] > 0 and report["step_s_slow"] >= report["step_s"] > 0
  assert report["sampler"]["fits"] and report["sampler"]["images_per_s"] > 0 and report["sampler"]["batch"] == 4
  assert "MFU" in printed and "attention kernels" in printed and jax.default_backend() == "cpu"


def test_a_block_compiles_with_its_kernels():
  """One block of the DiT with few heads of the full size, forward and backward, in bfloat16 with splash attention, sharded over
  four chips.
  """
  full = SIZES["full"]
  block = dataclasses.replace(full, dit=dataclasses.replace(full.dit, num_layers=1, num_heads=4, dual_attention_layers=(0,)))
  model = DeepGen(block, jnp.bfloat16, remat="attention", attention="splash")
  chip, devices = topology("v5p:2x2x1")
  mesh = sharding.make_mesh({"data": 1, "fsdp": 4}, devices)
  (params, noise, cond, target, *_), _ = sampler_inputs(model, mesh, 4, 100, 1)

  def loss(dit, noise, cond, target):
    noise = jnp.concatenate([noise, noise])  # conditioning holds two branches
    prepared = model.prepare({"dit": dit}, cond, target, None)
    return jnp.square(model.velocity({"dit": dit}, noise, jnp.ones(len(noise)), prepared)).mean()

  gradient = jax.jit(sharding.on_mesh(mesh, jax.grad(loss)))
  program = compile_program(gradient.lower(params["dit"], noise, cond, target), chip)
  assert 0 < program.kernel_seconds < program.seconds < 1 and 0 < program.temporary < chip.hbm
  kernels = [name for _, name, _ in program.cost.kernels]
  forward, backward = (sum(part in name for name in kernels) for part in ("fwd", "dkv"))
  assert forward == backward > 0  # what the forward kernels gave is kept: none runs again


@pytest.mark.parametrize(
  "name, remat, inside", [("v5e:2x2", "attention", True), ("v6e:2x2", "attention", False), ("v5p:2x2x1", "dots", False)]
)
def test_what_follows_the_chip(name, remat, inside):
  """remat=auto goes by memory; gathers inside products, which newer compilers refuse elsewhere, are for v5e alone."""
  chip, devices = topology(name)
  assert supervised.make_model(load_config("configs/sft.py:full"), SIZES["full"], "tpu", chip.hbm).remat == remat
  options = sharding.compiler_options(sharding.make_mesh({"data": 1, "fsdp": 4}, devices))
  assert ("xla_tpu_enable_async_collective_fusion" in options) == inside
  assert sharding.compiler_options(sharding.make_mesh({"data": 4}, devices)) is None


REINFORCE = [
  *("--config", "configs/grpo.py:tiny"),
  *(option for option in SMALL if "lora" not in option and "pattern" not in option),
  "--config.grpo.objective=flow_grpo",
  "--config.grpo.sampler=cps",
  "--config.grpo.prompts=4",
  "--config.grpo.group_size=4",
  "--config.grpo.rollout_batch=8",
  "--config.grpo.updates_per_rollout=2",
  "--config.grpo.micro_batch=4",
  "--config.grpo.steps=4",
  "--config.grpo.window=3",
  "--config.grpo.train_steps=2",
  "--config.grpo.sft_weight=0.1",
  "--config.grpo.sft_every=2",
  "--config.data.pattern=generate",
]


def test_an_update_of_stage_3_is_a_share_of_its_rollout_and_its_steps(monkeypatch, capsys):
  monkeypatch.setattr(estimate, "sampler", lambda *_: None)  # compiled above
  report, printed = run(monkeypatch, capsys, *REINFORCE, "--config.grpo.sft_weight=0")  # likewise its supervised batch
  assert report["fits"] is True and 0 < report["mfu"] < 1 and "judging" in printed
  assert report["seconds"].keys() == {"rollout", "take", "old", "policy", "optimizer"}
  assert report["step_s"] == pytest.approx(sum(report["seconds"].values())) and min(report["seconds"].values()) > 0
  assert report["images_per_s"] == pytest.approx(8 / report["step_s"])
  assert report["peak_gib"] == pytest.approx(sum(report[f"{k}_gib"] for k in ("parameters", "optimizer", "activations")))
  assert report["peak_of"] in report["seconds"]


def test_what_an_update_of_stage_3_runs(monkeypatch):
  monkeypatch.setitem(SIZES, "tiny", FEW)
  mesh = sharding.make_mesh({"data": 1, "fsdp": 4}, jax.devices()[:4])
  configure = lambda *more: load_config("configs/grpo.py:tiny", [o.removeprefix("--config.") for o in (*REINFORCE[2:], *more)])
  two, four = (plans.sample_flops(configure(f"grpo.steps={s}", "grpo.window=1", "grpo.train_steps=1"), 50) for s in (2, 4))
  forward = (four["rollout"] - two["rollout"]) / 2  # one step of the sampler
  params = param_shapes(FEW)
  decode = count_flops(DeepGen(FEW).decode, params, jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32))
  assert forward > 0 and decode < four["rollout"] - 4 * forward < 1.1 * decode  # some of it is done once for all steps
  assert 3 * forward < four["policy"] == two["policy"] < 5 * forward  # forward, backward, and forward as the KL's reference

  monkeypatch.setattr(plans, "sample_flops", lambda *_: four)
  plan = plans.make_plan(configure(), mesh, 50, 1e11)
  runs = {name: part.runs for name, part in plan.parts.items()}
  assert runs == {"rollout": 1, "take": 2, "old": 4, "policy": 4, "generate": 0.5, "moments": 0.5} and plan.images == 8
  plan.parts["generate"].lower()  # with the weights that stage 3 adds
  learned = 8 * (four["rollout"] + 2 * four["policy"]) + 0.5 * 4 * (four["generate"] + four["moments"])
  assert plan.flops == pytest.approx(learned)
  kept = 16 * (4 * 16 * 64 * 4 + 3 * 4) / 4  # four latents and three log-probabilities of a sample; a device has a quarter
  assert kept < plan.parts["policy"].beside < 2 * kept
  without = plans.make_plan(configure("grpo.sft_weight=0", "grpo.updates_per_rollout=1", "grpo.micro_batch=0"), mesh, 50, 1e11)
  assert {name: part.runs for name, part in without.parts.items()} == {"rollout": 2, "take": 1, "policy": 2}
  monkeypatch.setattr(plans, "sample_flops", lambda *_: four | {"edit": 0.0, "features": 0.0})
  in_turn = plans.make_plan(configure("data.pattern=generate,edit"), mesh, 50, 1e11)
  assert in_turn.parts["generate"].runs == in_turn.parts["edit"].runs == 0.25


def test_precomputed_images_are_not_encoded(monkeypatch):
  monkeypatch.setitem(SIZES, "tiny", FEW)
  monkeypatch.setattr(plans, "sample_flops", lambda *_: {"generate": 1.0, "edit": 10.0, "moments": 100.0, "features": 1000.0})
  mesh = sharding.make_mesh({"data": 1, "fsdp": 4}, jax.devices()[:4])
  options = [*(option.removeprefix("--config.") for option in SMALL), "data.pattern=edit,generate"]
  plan, spared = (
    plans.make_plan(load_config("configs/sft.py:tiny", [*options, f"data.precomputed={folder}"]), mesh, 50, 1e11)
    for folder in ("", "encoded")
  )
  assert plan.parts.keys() == {"generate", "edit", "moments", "features"} and plan.flops == 4 * 1311
  assert spared.parts.keys() == {"generate", "edit"} and spared.flops == 4 * 11 and spared.resident == plan.resident


def test_a_larger_image_is_more_work(monkeypatch):
  monkeypatch.setitem(SIZES, "tiny", CONFIG)
  options = ["data.pattern=generate", "data.text_buckets=(128,)"]
  small, large = (
    plans.sample_flops(load_config("configs/sft.py:tiny", [*options, f"data.image_size={side}"]), 50) for side in (64, 128)
  )
  assert 3.9 < large["moments"] / small["moments"] < 4.5 and large["generate"] > small["generate"]


def test_an_image_size_leaves_room_for_an_edits_text():
  size = lambda *options: supervised.at_image_size(load_config("configs/sft.py:full", [*options]), SIZES["full"]).image_size
  assert (size(), size("data.image_size=928"), size("data.image_size=1024", "data.pattern=generate")) == (512, 928, 1024)
  with pytest.raises(UserError, match="image_size 960: a reference of 900 tokens leaves an edit's text less than 128"):
    size("data.image_size=960")


def test_what_does_not_fit_says_what_to_try(monkeypatch, capsys):
  """The compiler refuses; the report is printed all the same, with what it asked for on top of what is resident."""

  def refuse(lowered, chip):
    raise OutOfMemory(109 * 2**30, whole=False)

  monkeypatch.setattr(estimate, "compile_program", refuse)
  tries = "--config.frozen=fsdp or --config.remat=dots or --config.data.batch_size=2"
  with pytest.raises(UserError, match=rf"peak 109\.0 GiB of 95\.7: try {tries}"):
    run(monkeypatch, capsys)


def test_the_batch_is_what_training_makes(emoji_dir, tokenizer):
  """Shapes and types of the representative micro-batches equal those that the stage prepares from real samples."""
  config = load_config("configs/sft.py:tiny", ["data.batch_size=2", f"data.dir={emoji_dir}"])
  model = DeepGen(CONFIG)
  batches, encoder = (
    supervised.micro_batches(config, CONFIG, tokenizer, sharding.make_mesh({"data": 1}, jax.devices()[:1]), {}),
    ImageEncoder(model, batch=2),
  )
  for m, task in enumerate(config.data.pattern[:2]):
    real = encode_batch(model, draw_params(), encoder, batches.batch(m), config.data.token_multiple, model.scale)
    ours = train_batch(config, model, task, 30, 2)
    shapes = lambda batch: jax.tree.map(lambda x: (x.shape, x.dtype.name), batch)
    assert shapes(ours) == shapes(real)


@pytest.mark.parametrize(
  "options, message",
  [
    (["--topology", "v5q:2x2x1"], r"v5q.* unknown.*v5p"),
    (["--topology", "v5p:many"], r"'many' is no grid.*v5e:4x4"),
    (["--topology", "v5p:9x9x9"], r"v5p:9x9x9.*no such grid"),
    (["--config.mesh.fsdp=3"], r"config.mesh"),
    (["--config.remat=some"], r"config.remat 'some' is none of auto, none, dots, attention, full"),
    (["--config.attention=flash"], r"config.attention 'flash'"),
    (["--config.stage=pretrain_vae"], r"pretrain_vae"),
    (["--jsn"], r"unknown option '--jsn'.*--json"),
  ],
)
def test_mistakes_are_one_message(monkeypatch, capsys, options, message):
  monkeypatch.setattr(sys, "argv", ["estimate", *COMMAND, *SMALL, *options])
  with pytest.raises(UserError, match=message):
    estimate.main()
