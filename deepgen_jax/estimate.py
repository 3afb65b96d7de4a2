"""Memory and speed of a config on TPUs that aren't there.

    python -m deepgen_jax.estimate --config configs/sft.py:full --topology v5p:2x2x2 [--json] [--config.KEY=VALUE ...]

Compiles the very step that `train` runs, the encoders of its images and the sampler with libtpu's compiler, for a topology by
name. Memory is what the compiler allots. Time is modelled:

    update  = sum over its micro-batches of (step + encoders), and the optimizer once
    program = roofline of each operation x how often it runs + attention kernels + collectives that nothing hides
    MFU     = model FLOPs (real tokens, nothing recomputed, nothing padded) of VLM, SCB, DiT and encoders
              / (update seconds x peak x chips)

Gaps, also printed: see `GAPS`.
"""

from __future__ import annotations

import argparse
import json
import sys

import jax
import numpy as np

from deepgen_jax import sharding
from deepgen_jax.cli import parse, split_overrides
from deepgen_jax.config import load_config
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.estimating.chips import Chip, topology
from deepgen_jax.estimating.flops import count_flops
from deepgen_jax.estimating.inputs import (
  bytes_per_device,
  placed,
  references_of,
  sampler_inputs,
  train_batch,
  train_programs,
)
from deepgen_jax.estimating.program import OutOfMemory, Program, compile_program
from deepgen_jax.models.config import SIZES
from deepgen_jax.pipeline import jit_sampler
from deepgen_jax.stages import supervised
from deepgen_jax.stages.encode import ImageEncoder

GIB = 2**30
GAPS = """\
how step_s is modelled, and what it leaves out:
- each operation takes its roofline time (the compiler's optimal_seconds), weighted by how often loops run through the
  compiler's cycle estimates; step_s_slow takes those estimates themselves, higher for what memory bounds. Nothing ran.
- attention kernels (Pallas) have no estimate: their FLOPs, the whole score matrix and what the backward pass repeats, at
  {attention:.0%} of peak, an assumption.
- collectives cost their bytes over one axis of the torus; those that start early are hidden behind what runs meanwhile.
- on v5e and v6e an operation that the model can't cost counts as -1 s, which is added back.
- prompts have {prompt_tokens} tokens besides vision tokens, an edit one reference, images are {side}x{side}. Reading data,
  host transfers, checkpoints and evaluation are assumed to be hidden.
- the sampler leaves out the encoding of prompts."""


def estimate(config, name: str, prompt_tokens: int = 100, steps: int = 50) -> dict:
  """The report as a dict (README of its keys: `show`). Raises UserError for what can't be estimated; what doesn't fit is
  reported.
  """
  if config.stage != "supervised":
    raise UserError(f"the estimate knows stage 'supervised' (configs/align.py, configs/sft.py), not {config.stage!r}")
  chip, devices = topology(name)
  mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
  shares = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.data.batch_size % shares:
    raise UserError(f"config.data.batch_size {config.data.batch_size} must be a multiple of the {shares} devices that share it")
  model = supervised.make_model(config, SIZES[config.size], platform="tpu")
  step, state, frozen, rng = train_programs(config, model, mesh)
  resident = {
    "parameters": bytes_per_device((state.params, frozen)),
    "optimizer": bytes_per_device((state.opt_state, state.grads, state.ema)),
  }
  report = {"topology": name, "chips": len(devices), "hbm_gib": chip.hbm / GIB, "fits": True}
  report |= {f"{key}_gib": value / GIB for key, value in resident.items()}
  report |= dict.fromkeys(("activations_gib", "peak_gib", "step_s", "step_s_slow", "mfu", "images_per_s", "model_tflops"))
  compiled: dict[str, Program] = {}
  try:
    for task in dict.fromkeys(config.data.pattern):
      batch = train_batch(config, model, task, prompt_tokens, config.data.batch_size)
      batch = placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
      compiled[task] = compile_program(step.lower(state, frozen, batch, rng), chip)
    compiled |= _encoders(model, mesh, frozen, chip, any(map(references_of, config.data.pattern)))
  except OutOfMemory as error:
    needed = error.needed + (0 if error.whole else sum(resident.values()))
    return report | {"fits": False, "peak_gib": needed / GIB, "compile_s": _compile_seconds(compiled), "sampler": None}
  activations = max(program.temporary for program in compiled.values())
  peak = sum(resident.values()) + activations
  report |= {"activations_gib": activations / GIB, "peak_gib": peak / GIB, "fits": peak <= chip.hbm}
  report |= _speed(config, model, compiled, ImageEncoder(model, mesh=mesh).batch, chip, len(devices), prompt_tokens)
  report["compile_s"] = _compile_seconds(compiled)
  report["sampler"] = sampler(config, chip, devices, prompt_tokens, steps)
  return report


def _encoders(model, mesh, frozen, chip: Chip, references: bool) -> dict[str, Program]:
  """The VAE's encoder and, for references, the vision tower, as `ImageEncoder` runs them."""
  encoder, side = ImageEncoder(model, mesh=mesh), model.config.image_size
  images = jax.ShapeDtypeStruct((encoder.batch, side, side, 3), np.uint8, sharding=sharding.batch_sharding(mesh))
  parts = {"moments": {"vae": frozen["vae"]}}
  if references:
    parts["features"] = {"vlm": {"vision": frozen["vlm"]["vision"]}}
  return {name: compile_program(encoder.programs[name].lower(part, images), chip) for name, part in parts.items()}


def _speed(config, model, compiled: dict[str, Program], encoded: int, chip: Chip, chips: int, prompt_tokens: int) -> dict:
  """Seconds, images a second and MFU of one update."""
  size, tasks = config.data.batch_size, list(config.data.pattern)
  pictures = {"moments": sum(1 + references_of(task) for task in tasks), "features": sum(map(references_of, tasks))}
  runs = {task: tasks.count(task) for task in tasks} | {name: -(-count * size // encoded) for name, count in pictures.items()}
  parts = {name: runs[name] * program.seconds for name, program in compiled.items()}
  # The optimizer is a branch of every micro-batch's program that is taken once an update.
  skipped = [(compiled[task].branch, compiled[task].slow_branch) for task in tasks]
  slow = sum(runs[name] * program.slow_seconds for name, program in compiled.items()) - sum(s for _, s in skipped[1:])
  seconds = sum(parts.values()) - sum(s for s, _ in skipped[1:])
  flops = model_flops(config, model, prompt_tokens)
  total = size * (sum(flops[task] for task in tasks) + sum(count * flops[name] for name, count in pictures.items()))
  return {
    "step_s": seconds,
    "step_s_slow": slow,
    "mfu": total / (seconds * chip.peak * chips),
    "images_per_s": len(tasks) * size / seconds,
    "model_tflops": total / 1e12,
    "seconds": parts | {"optimizer": skipped[0][0]},
    "attention_s": sum(runs[name] * program.kernel_seconds for name, program in compiled.items()),
    "collectives_s": sum(runs[name] * program.exposed_seconds for name, program in compiled.items()),
  }


def model_flops(config, model, prompt_tokens: int) -> dict[str, float]:
  """FLOPs of one sample by task (forward and backward), of one image's VAE encoding ("moments") and vision tokens ("features").

  Counted in the gradient of the stage's own loss, for a sample without padding and without recomputation.
  """
  plain = supervised.make_model(config.copy_and_resolve_references().unlock(), SIZES[config.size], platform="tpu")
  plain = type(model)(plain.config, plain.dtype)  # no remat, attention as plain products
  params = jax.eval_shape(lambda key: supervised.complete(config, plain, plain.init(key)), jax.random.key(0))
  trainable, frozen = sharding.partition(params, config.trainable)
  loss = supervised.make_loss(config, plain)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))

  def gradient(trainable, frozen, batch, keys):
    return jax.grad(lambda part: loss(sharding.merge(part, frozen), batch, keys)[0].mean())(trainable)

  counts = {}
  for task in dict.fromkeys(config.data.pattern):
    batch = train_batch(config, plain, task, prompt_tokens, 1, padded=False)
    counts[task] = count_flops(gradient, trainable, frozen, batch, keys)
  image = jax.ShapeDtypeStruct((1, plain.config.image_size, plain.config.image_size, 3), np.uint8)
  return counts | {
    "moments": count_flops(plain.encode_moments, params, image),
    "features": count_flops(plain.vision_features, params, image),
  }


def sampler(config, chip: Chip, devices, prompt_tokens: int, steps: int) -> dict:
  """The sampler with guidance, one image a chip, parameters whole on each: serving is data-parallel where the model fits."""
  mesh = sharding.make_mesh({"data": -1}, devices)
  model = supervised.make_model(config, SIZES[config.size], platform="tpu")
  arguments, options = sampler_inputs(model, mesh, len(devices), prompt_tokens, steps)
  resident = bytes_per_device(arguments)
  report = {"steps": steps, "batch": len(devices), "fits": False}
  try:
    program = compile_program(jit_sampler(model, mesh).lower(*arguments, **options), chip)
  except OutOfMemory as error:
    return report | {"peak_gib": (error.needed + (0 if error.whole else resident)) / GIB}
  peak = resident + program.temporary
  return report | {
    "fits": peak <= chip.hbm,
    "peak_gib": peak / GIB,
    "batch_s": program.seconds,
    "batch_s_slow": program.slow_seconds,
    "images_per_s": len(devices) / program.seconds,
    "compile_s": program.compile_seconds,
  }


def _compile_seconds(compiled: dict[str, Program]) -> float:
  return sum(program.compile_seconds for program in compiled.values())


def advice(config, report: dict) -> str:
  """What to do about a step that doesn't fit."""
  less = {"none": "remat=dots", "dots": "remat=full"}.get(config.remat)
  tries = [f"--config.{less}"] if less else []
  if config.mesh.fsdp not in (-1, report["chips"]):
    tries.append(f"--config.mesh.data=1 --config.mesh.fsdp={report['chips']}")
  tries += [f"--config.data.batch_size={config.data.batch_size // 2} with twice the pattern", "a larger topology"]
  return f"peak {report['peak_gib']:.1f} GiB of {report['hbm_gib']:.1f}: try {' or '.join(tries[:3])}"


def show(config, report: dict) -> None:
  """Prints the report for people."""
  line = lambda name, value: print(f"  {name:<28}{value}")
  print(f"{report['topology']}, {report['chips']} chips, {report['hbm_gib']:.2f} GiB each")
  line("fits", "yes" if report["fits"] else "no")
  for name in ("parameters", "optimizer", "activations", "peak"):
    if (value := report[f"{name}_gib"]) is not None:
      line(f"{name}, GiB a chip", f"{value:.2f}")
  if report["step_s"] is not None:
    line("update, s", f"{report['step_s']:.3f} (slow model {report['step_s_slow']:.3f})")
    for name, value in report["seconds"].items():
      line(f"  {name}", f"{value:.3f}")
    line("  attention kernels in it", f"{report['attention_s']:.3f}")
    line("  exposed collectives in it", f"{report['collectives_s']:.3f}")
    line("model TFLOPs an update", f"{report['model_tflops']:.1f}")
    line("MFU", f"{report['mfu']:.1%}")
    line("images/s", f"{report['images_per_s']:.1f}")
  line("compile, s", f"{report['compile_s']:.0f}")
  if report["sampler"] and report["sampler"]["fits"]:
    s = report["sampler"]
    text = f"{s['batch']} images in {s['batch_s']:.2f} s ({s['images_per_s']:.2f} images/s), peak {s['peak_gib']:.1f} GiB"
    line(f"sampler, {s['steps']} steps", text)
  elif report["sampler"]:
    line("sampler", f"doesn't fit with whole parameters on each chip: peak {report['sampler']['peak_gib']:.1f} GiB")


def main() -> int:
  jax.config.update("jax_platforms", "cpu")  # whatever is attached stays free; the compiler needs no device
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.estimate",
    description="Memory, time and MFU of a config's training step and sampler on a TPU topology, without the TPUs.",
    epilog="example: python -m deepgen_jax.estimate --config configs/sft.py:full --topology v5p:2x2x2 --json",
    allow_abbrev=False,
  )
  parser.add_argument("--config", required=True, metavar="FILE.py:SIZE", help="config file and its argument")
  parser.add_argument("--topology", required=True, metavar="CHIP:GRID", help="v5p:2x2x2, v5e:4x4, v6e:4x4, ...")
  parser.add_argument("--json", action="store_true", help="the report again, as the last line")
  parser.add_argument("--prompt_tokens", type=int, default=100, help="tokens of a prompt besides vision tokens (100)")
  parser.add_argument("--steps", type=int, default=50, help="steps of the sampler (50)")
  parser.add_argument("--config.KEY", metavar="VALUE", help="overrides a key of the config, e.g. --config.remat=full")
  rest, overrides = split_overrides(sys.argv[1:])
  arguments = parse(parser, rest)
  config = load_config(arguments.config, overrides)
  report = estimate(config, arguments.topology, arguments.prompt_tokens, arguments.steps)
  show(config, report)
  gaps = {"prompt_tokens": arguments.prompt_tokens, "side": SIZES[config.size].image_size}
  print(GAPS.format(attention=topology(arguments.topology)[0].attention, **gaps))
  if arguments.json:
    print(json.dumps(report), flush=True)
  if not report["fits"]:
    raise UserError(advice(config, report))
  return 0


if __name__ == "__main__":
  run_command(main)
