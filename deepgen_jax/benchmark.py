"""How fast we are, beside PyTorch: `python -m deepgen_jax.benchmark dit_forward_256 vae_decode --json`.

On a CPU every case runs in four ways, in turn, on the same cores: ours; diffusers or transformers as installed; the same with
the fast sgemm that MKL keeps for Intel's processors; and that with torch.compile. Weights and inputs are the same, and what
comes out is compared before anything is timed. On a GPU or TPU ours is timed alone, and there are cases of the full model: a
train step of `--config` and the sampler, with their MFU. The case `data` is the loader's, per core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.extend.backend import clear_backends
from safetensors.numpy import save_file

from deepgen_jax.benchmarking import data, full
from deepgen_jax.benchmarking.cases import ACCELERATOR, CASES, CPU, GUIDANCE, OPTIM, Job, Sizes, build, export
from deepgen_jax.benchmarking.full import FULL_CASES, PEAKS, FullJob
from deepgen_jax.benchmarking.torch_process import TorchProcess, WorkerError, build_fast_sgemm
from deepgen_jax.cli import parse, split_overrides, start_command
from deepgen_jax.config import load_config
from deepgen_jax.errors import UserError, nearest, run_command

ALL_CASES = (*CASES, "data", *FULL_CASES)
FULL_CONFIG = "configs/sft.py:full"
TOLERANCE = {"dit_train_256": 1e-3, "dit_train_1024": 1e-3, "sampler": 1e-3}  # gradients and several steps
FORWARD_TOLERANCE = 1e-4
_FLOOR = 1e-4  # an array is held to at least this share of the largest one: a gradient may be zero but for rounding


def build_parser() -> argparse.ArgumentParser:
  """The command's options (design 4.1)."""
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.benchmark",
    description="Times forward, training step, sampler, VAE and VLM beside PyTorch, with the same weights; and the loader.",
    epilog="example: python -m deepgen_jax.benchmark dit_forward_256 vae_decode --json",
    allow_abbrev=False,
  )
  parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{' '.join(ALL_CASES)}; default: all but full_*")
  parser.add_argument("--json", action="store_true", help="one JSON object a line")
  parser.add_argument("--rounds", type=int, default=5, help="each round runs every side once")
  parser.add_argument("--threads", type=int, default=1, help="cores, and threads of either side, on a CPU")
  parser.add_argument(
    "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for machines that others use too"
  )
  parser.add_argument(
    "--images_per_s", type=float, default=10.0, help="of the case data: what one chip trains on (estimate says)"
  )
  parser.add_argument("--image_size", type=int, default=512, help="of the case data: what samples are brought to, in pixels")
  parser.add_argument("--config", help=f"of the full cases: a config of stage 1 or 2 ({FULL_CONFIG})")
  parser.add_argument("--config.KEY", metavar="VALUE", help="overrides a key of it, e.g. --config.data.batch_size=16")
  return parser


def check(arguments) -> None:
  """What can be known to be wrong before anything runs."""
  for name in arguments.cases:
    if name not in ALL_CASES:
      raise UserError(f"unknown case {name!r}.{nearest(name, ALL_CASES)} The cases are: {' '.join(ALL_CASES)}")
  for name in ("images_per_s", "image_size"):
    if not 0 < (value := getattr(arguments, name)) < 1e6:
      raise UserError(f"--{name} {value}: must be a positive number")
  if arguments.rounds < 1:
    raise UserError(f"--rounds {arguments.rounds}: must be at least 1")
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
  if not 1 <= arguments.threads <= cores:
    raise UserError(f"--threads {arguments.threads}: this process may use {cores} core(s); give 1 to {cores}")


def check_torch() -> None:
  """UserError unless PyTorch's side can be imported."""
  if missing := [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]:
    raise UserError(
      f"the benchmark runs beside PyTorch, but {' and '.join(missing)} can't be imported; "
      "install what the tests use: pip install 'deepgen_jax[test]' (with Python 3.11)"
    )


def max_relative_error(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
  """Largest |difference| / max |theirs| of any array. ValueError unless names and shapes agree; NaN counts as infinite."""
  shapes = [{name: x.shape for name, x in arrays.items()} for arrays in (ours, theirs)]
  if shapes[0] != shapes[1]:
    raise ValueError(f"the two sides give different things: {shapes[0]} and {shapes[1]}")
  scales = {name: float(np.abs(x).max()) for name, x in theirs.items()}
  floor = _FLOOR * max(scales.values())
  error = max(float(np.abs(ours[name] - x).max()) / max(scales[name], floor) for name, x in theirs.items())
  return error if np.isfinite(error) else float("inf")


def measure_ours(run: Callable) -> dict[str, float]:
  """Seconds of one run, {"wall", "cpu"}."""
  wall, cpu = time.perf_counter(), time.process_time()
  run()
  return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def alternate(sides: Mapping[str, Callable[[], Mapping]], rounds: int, clock: str) -> dict[str, list[float]]:
  """Milliseconds of every side, one a round; each round starts with another side."""
  names, times = list(sides), {name: [] for name in sides}
  for i in range(rounds):
    for name in names[i % len(names) :] + names[: i % len(names)]:
      times[name].append(1000 * sides[name]()[clock])
  return times


def summarise(times: Mapping[str, list[float]]) -> dict:
  """Medians, their ratios, and the spread (smallest, largest) of every side in `times`; None for a side that didn't run."""
  median = {name: round(statistics.median(values), 3) for name, values in times.items()}
  eager = [median[name] for name in ("torch_eager", "torch_fast") if name in median]
  compiled, ours = median.get("torch_compile"), median["ours"]
  return {
    **{f"{name}_ms": median.get(name) for name in ("ours", "torch_eager", "torch_fast", "torch_compile")},
    "ratio": round(ours / min(eager), 4) if eager else None,
    "ratio_compile": round(ours / compiled, 4) if compiled else None,
    "spread_ms": {name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()},
  }


def compare_with_torch(name: str, sizes: Sizes, *, rounds: int, threads: int, clock: str) -> dict:
  """Measures one case on the CPU; -> the fields of its JSON object. RuntimeError if the outputs don't agree."""
  job, params = build(name, sizes)
  notes = []
  with tempfile.TemporaryDirectory(prefix="deepgen_benchmark_") as temporary, contextlib.ExitStack() as processes:
    folder = Path(temporary)
    export(folder, sizes.config, params)
    save_file(job.inputs, folder / "inputs.safetensors")
    del params
    arguments = [job.kind, "--threads", str(threads), "--settings", json.dumps({"optim": OPTIM, "guidance": GUIDANCE})]
    preload = build_fast_sgemm(folder)
    if preload is None:
      notes.append("torch_fast: no C compiler (cc, gcc, clang) to build the library that switches MKL's fast sgemm on")
    start = lambda side, *more, **options: processes.enter_context(TorchProcess(folder, side, [*arguments, *more], **options))
    eager = start("torch_eager")
    error = max_relative_error(job.read(job.run()), eager.outputs)
    if not error <= (allowed := TOLERANCE.get(name, FORWARD_TOLERANCE)):
      raise RuntimeError(f"{name}: ours and PyTorch's outputs differ by {error:.2g} relative, more than {allowed:.0g}")
    sides = {"ours": lambda: measure_ours(job.run), "torch_eager": eager.measure}
    if preload is not None:
      sides["torch_fast"] = start("torch_fast", preload=preload).measure
    try:
      sides["torch_compile"] = start("torch_compile", "--compile", preload=preload).measure
    except WorkerError as failure:
      notes.append(f"torch_compile: {failure}")
    times = alternate(sides, rounds, clock)
  return summarise(times) | {"max_rel_error": error, "versions": versions() | eager.versions, "notes": notes}


def measure_alone(job: Job | FullJob, rounds: int) -> dict:
  """Measures our side of one case, wherever JAX runs; -> the fields of its JSON object. A full case has the model's FLOPs of a
  run (real tokens, nothing computed twice), images a second, MFU where the device's peak is known, and the most memory that was
  in use, if nothing before used more.
  """
  memory = lambda: (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  before = memory()
  job.run()
  times = alternate({"ours": lambda: measure_ours(job.run)}, rounds, "wall")
  record = summarise(times) | {"max_rel_error": None, "versions": versions(), "notes": ["PyTorch is measured on CPUs alone"]}
  if not isinstance(job, FullJob):
    return record
  seconds = record["ours_ms"] / 1000
  peak = PEAKS.get(jax.devices()[0].device_kind) if job.settings["dtype"] == "bfloat16" else None
  mfu = None if peak is None else job.flops / seconds / peak / job.settings["devices"]
  measured = {"model_tflops": job.flops / 1e12, "images_per_s": job.images / seconds, "mfu": mfu}
  return record | job.settings | measured | {"peak_gib": None if memory() == before else memory() / 2**30}


def versions() -> dict[str, str]:
  """Of Python, JAX and Flax."""
  return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}


def processor() -> str:
  """The CPU's name, with family and model where the system tells: cloud machines don't say more than the maker."""
  try:
    text = Path("/proc/cpuinfo").read_text()
  except OSError:
    return platform.processor() or platform.machine()
  fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
  name = fields.get("model name", platform.machine())
  return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def pin(threads: int) -> list[int]:
  """Keeps this process and those it starts on the last `threads` of its cores; -> these. All arrays of JAX are lost."""
  if not hasattr(os, "sched_setaffinity"):
    raise UserError("the benchmark needs an operating system on which a process can be kept on a core; use Linux")
  cores = sorted(os.sched_getaffinity(0))[-threads:]
  os.sched_setaffinity(0, cores)
  clear_backends()  # JAX made as many threads as there were cores
  return cores


def to_line(record: Mapping) -> str:
  """A record as a person reads it."""
  if record["name"] == "data":
    stages = "  ".join(f"{stage} {value:.3g}" for stage, value in record["stages_ms"].items())
    rate, cores = record["samples_per_s_per_core"], record["cores_per_chip"]
    text = f"{record['name']:<17}{rate:.4g} samples/s a core (ms: {stages})  "
    text += f"{cores:.3g} cores feed a chip at {record['images_per_s']:g} images/s"
    return "\n".join([text, *(f"  {note}" for note in record["notes"])])
  shown = lambda key: "-" if (value := record[key]) is None else value if isinstance(value, str) else f"{value:.4g}"
  columns = ("ours_ms", "torch_eager_ms", "torch_fast_ms", "torch_compile_ms", "ratio", "ratio_compile", "max_rel_error")
  if record["name"] in FULL_CASES:
    columns = ("ours_ms", "batch", "images_per_s", "model_tflops", "mfu", "peak_gib", "devices", "attention", "remat")
  text = f"{record['name']:<17}" + "  ".join(f"{key} {shown(key)}" for key in columns)
  return "\n".join([text, *(f"  {note}" for note in record["notes"])])


def main() -> None:
  start_command()
  rest, overrides = split_overrides(sys.argv[1:])
  arguments = parse(build_parser(), rest)
  check(arguments)
  on_cpu = jax.default_backend() == "cpu"
  cases = arguments.cases or [name for name in ALL_CASES if name not in FULL_CASES]
  whole = [name for name in cases if name in FULL_CASES]
  if on_cpu and whole:
    raise UserError(f"{whole[0]} needs a GPU or TPU; here there is a CPU. `python -m deepgen_jax.estimate` models its step")
  if not whole and (arguments.config or overrides):
    raise UserError(f"--config is for the cases {', '.join(FULL_CASES)}; name one of them, or leave it out")
  config = load_config(arguments.config or FULL_CONFIG, overrides) if whole else None
  if on_cpu and set(cases) != {"data"}:
    check_torch()
  sizes = CPU if on_cpu else ACCELERATOR
  where = {
    "platform": jax.default_backend(),
    "device": processor() if on_cpu else jax.devices()[0].device_kind,
    "cores": pin(arguments.threads) if on_cpu else None,
    "threads": arguments.threads if on_cpu else None,
    "dtype": np.dtype(sizes.dtype).name,
    "clock": arguments.clock if on_cpu else "wall",
    "rounds": arguments.rounds,
  }
  if not arguments.json:
    print(json.dumps(where))
  for name in cases:
    load = os.getloadavg()[0]  # of the whole machine: above `threads`, others are at work
    if name == "data":
      clock = where["clock"]
      record = data.measure(arguments.image_size, arguments.rounds, clock, arguments.images_per_s) | {"versions": versions()}
    elif on_cpu:
      record = compare_with_torch(name, sizes, rounds=arguments.rounds, threads=arguments.threads, clock=arguments.clock)
    elif name in FULL_CASES:
      record = measure_alone(full.build(name, config), arguments.rounds)
    else:
      record = measure_alone(build(name, sizes)[0], arguments.rounds)
    record = {"name": name, **where, **record, "load_average": load}
    print(json.dumps(record) if arguments.json else to_line(record), flush=True)


if __name__ == "__main__":
  run_command(main)
