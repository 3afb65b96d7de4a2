"""Memory and speed of a config on TPUs that aren't there.

    python -m deepgen_jax.estimate --config configs/sft.py:full --topology v5p:2x2x2 [--json] [--config.KEY=VALUE ...]

Compiles the very programs that `train` runs (the step, the encoders of images, in stage 3 the rollout) and the sampler, with
libtpu's compiler, for a topology by name. Memory is what the compiler allots. Time is modelled:

    update  = sum over its micro-batches of (step + encoders), and the optimizer once; in stage 3
              rollout / updates_per_rollout + timesteps x micro-batches x step, and the supervised batch
    program = roofline of each operation x how often it runs + attention kernels + collectives that nothing hides
    MFU     = model FLOPs (real tokens, nothing recomputed, nothing padded) of VLM, SCB, DiT, encoders and a rollout's
              sampling and decoding / (update seconds x peak x chips)

Gaps, also printed: see `GAPS` and `ROLLOUT_GAPS`.
"""

from __future__ import annotations

import argparse
import json
import sys

import jax

from deepgen_jax import sharding
from deepgen_jax.cli import parse, split_overrides
from deepgen_jax.config import load_config
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.estimating.chips import Chip, topology
from deepgen_jax.estimating.inputs import bytes_per_device, sampler_inputs
from deepgen_jax.estimating.plan import Plan, make_plan
from deepgen_jax.estimating.program import OutOfMemory, Program, compile_program
from deepgen_jax.models.config import SIZES
from deepgen_jax.pipeline import jit_sampler
from deepgen_jax.stages import grpo, supervised

GIB = 2**30
GAPS = """\
how step_s is modelled, and what it leaves out:
- step_s_slow adds the compiler's cycle estimates, loops times their trips. step_s scales them to the compiler's roofline
  (optimal_seconds, which knows no trips): right where loops and the rest have the same share of it. The same work written as
  one loop or as six has been seen to differ by a tenth. Nothing ran.
- attention kernels (Pallas) have no estimate: their FLOPs, the whole score matrix and what the backward pass repeats, at
  {attention:.0%} of peak, an assumption.
- collectives cost their bytes over one axis of the torus; those that start early are hidden behind what runs meanwhile.
- on v5e and v6e an operation that the model can't cost counts as -1 s, which is added back.
- prompts have {prompt_tokens} tokens besides vision tokens, an edit one reference, images are {side}x{side}. Reading data,
  host transfers, checkpoints and evaluation are assumed to be hidden.
- the sampler leaves out the encoding of prompts."""
ROLLOUT_GAPS = """\
- a rollout's prompts have no references; their encoding, the judging of its images and what waits for it aren't counted, and
  neither is cutting a trajectory's next step out of what is kept. Of its FLOPs, those that compute old log-probabilities again
  for a second update aren't the model's."""


def estimate(config, name: str, prompt_tokens: int = 100, steps: int = 50) -> dict:
  """The report as a dict (README of its keys: `show`). Raises UserError for what can't be estimated; what doesn't fit is
  reported.
  """
  if config.stage not in ("supervised", "grpo"):
    raise UserError(f"the estimate knows stages 1 to 3 (configs/align.py, sft.py and grpo.py), not {config.stage!r}")
  chip, devices = topology(name)
  mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
  shares = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.data.batch_size % shares:
    raise UserError(f"config.data.batch_size {config.data.batch_size} must be a multiple of the {shares} devices that share it")
  if config.stage == "grpo":
    grpo.check(config, shares)
  plan = make_plan(config, mesh, prompt_tokens, chip.hbm)
  resident = sum(plan.resident.values())
  report = {"topology": name, "chips": len(devices), "hbm_gib": chip.hbm / GIB, "fits": True}
  report |= {f"{key}_gib": value / GIB for key, value in plan.resident.items()} | {"remat": plan.remat, "frozen": plan.frozen}
  report |= dict.fromkeys(("activations_gib", "peak_gib", "step_s", "step_s_slow", "mfu", "images_per_s", "model_tflops"))
  compiled: dict[str, Program] = {}
  try:
    for part, own in plan.parts.items():
      print(f"compiling {part} (at full size minutes)", file=sys.stderr, flush=True)
      compiled[part] = compile_program(own.lower(), chip)
  except OutOfMemory as error:
    needed = error.needed + own.beside + (0 if error.whole else resident)
    report |= {"fits": False, "peak_gib": needed / GIB, "peak_of": part, "sampler": None}
    return report | {"compile_s": _compile_seconds(compiled)}
  memory = {part: plan.parts[part].beside + program.temporary for part, program in compiled.items()}
  most = max(memory, key=memory.get)
  peak = resident + memory[most]
  report |= {"activations_gib": memory[most] / GIB, "peak_gib": peak / GIB, "peak_of": most, "fits": peak <= chip.hbm}
  report |= _speed(plan, compiled, chip, len(devices))
  report["compile_s"] = _compile_seconds(compiled)
  report["sampler"] = sampler(config, chip, devices, prompt_tokens, steps)
  return report


def _speed(plan: Plan, compiled: dict[str, Program], chip: Chip, chips: int) -> dict:
  """Seconds, images a second and MFU of one update."""
  runs = {name: part.runs for name, part in plan.parts.items()}
  over = lambda value: {name: runs[name] * value(program) for name, program in compiled.items()}
  # The optimizer is a branch of every micro-batch's program that is taken once an update.
  updating = [compiled[name] for name, part in plan.parts.items() if part.updates]
  skipped = lambda name, seconds: seconds if plan.parts[name].updates else 0.0
  parts = {name: runs[name] * (program.seconds - skipped(name, program.branch)) for name, program in compiled.items()}
  slow = sum(runs[name] * (program.slow_seconds - skipped(name, program.slow_branch)) for name, program in compiled.items())
  parts["optimizer"] = max(program.branch for program in updating)
  slow += max(program.slow_branch for program in updating)
  seconds = sum(parts.values())
  return {
    "step_s": seconds,
    "step_s_slow": slow,
    "mfu": plan.flops / (seconds * chip.peak * chips),
    "images_per_s": plan.images / seconds,
    "model_tflops": plan.flops / 1e12,
    "seconds": parts,
    "attention_s": sum(over(lambda program: program.kernel_seconds).values()),
    "collectives_s": sum(over(lambda program: program.exposed_seconds).values()),
  }


def sampler(config, chip: Chip, devices, prompt_tokens: int, steps: int) -> dict:
  """The sampler with guidance, one image a chip, parameters whole on each: serving is data-parallel where the model fits."""
  mesh = sharding.make_mesh({"data": -1}, devices)
  model = supervised.make_model(config, SIZES[config.size], "tpu", chip.hbm)
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
  less = {"none": "remat=dots", "dots": "remat=attention", "attention": "remat=full"}.get(report["remat"])
  tries = ["--config.frozen=fsdp"] if report["frozen"] == "whole" and config.mesh.fsdp != 1 else []
  tries += [f"--config.{less}"] if less else []
  if config.mesh.fsdp not in (-1, report["chips"]):
    tries.append(f"--config.mesh.data=1 --config.mesh.fsdp={report['chips']}")
  if config.stage == "grpo":
    key, whole = "micro_batch", config.grpo.prompts * config.grpo.group_size // config.grpo.updates_per_rollout
    if report["peak_of"] == "rollout":
      key, whole = "rollout_batch", whole * config.grpo.updates_per_rollout
    tries.append(f"--config.grpo.{key}={(config.grpo[key] or whole) // 2}")
  else:
    tries.append(f"--config.data.batch_size={config.data.batch_size // 2} with twice the pattern")
  tries.append("a larger topology")
  peak = f"peak {report['peak_gib']:.1f} GiB of {report['hbm_gib']:.1f}"
  return f"{peak}: try {' or '.join(tries[:3])} (most is needed by {report['peak_of']})"


def show(config, report: dict) -> None:
  """Prints the report for people."""
  line = lambda name, value: print(f"  {name:<28}{value}")
  print(f"{report['topology']}, {report['chips']} chips, {report['hbm_gib']:.2f} GiB each")
  line("fits", "yes" if report["fits"] else "no")
  line("remat", report["remat"])
  line("frozen parameters", report["frozen"])
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
  gaps = {"prompt_tokens": arguments.prompt_tokens, "side": supervised.at_image_size(config, SIZES[config.size]).image_size}
  print(GAPS.format(attention=topology(arguments.topology)[0].attention, **gaps))
  if config.data.precomputed:
    print("- images come precomputed: neither the VAE nor the vision tower encodes any, but both stay in memory.")
  if config.stage == "grpo":
    print(ROLLOUT_GAPS)
  if arguments.json:
    print(json.dumps(report), flush=True)
  if not report["fits"]:
    raise UserError(advice(config, report))
  return 0


if __name__ == "__main__":
  run_command(main)
