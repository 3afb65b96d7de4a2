"""A program compiled for TPUs that aren't there: seconds, memory, and how long the compiler took."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass

import jax

from deepgen_jax.estimating.chips import Chip
from deepgen_jax.estimating.hlo import Cost, program_cost

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
# FLOPs of an attention kernel over T x S scores of D channels, in units of T S D: products of two matrices, two each.
_KERNELS = {"dkv": 10, "": 4}  # the backward kernel, which computes the scores again, and the forward one


class OutOfMemory(Exception):
  """The compiler says that the program doesn't fit. needed: bytes that it asks for; whole: its arguments are among them."""

  def __init__(self, needed: float, whole: bool):
    super().__init__(f"{needed / 2**30:.1f} GiB")
    self.needed, self.whole = needed, whole


@dataclass(frozen=True)
class Program:
  """seconds: roofline of every operation, times trips, plus attention kernels and exposed collectives. slow_seconds: the same
  by the compiler's cycle estimates. branch, slow_branch: how much of them a conditional's dearest branch adds to the cheapest.
  temporary: bytes a device beyond the arguments.
  """

  seconds: float
  slow_seconds: float
  branch: float
  slow_branch: float
  kernel_seconds: float
  exposed_seconds: float
  temporary: int
  compile_seconds: float
  cost: Cost


def compile_program(lowered, chip: Chip) -> Program:
  """Compiles what `jax.jit(...).lower(...)` returned. Raises OutOfMemory."""
  start = time.monotonic()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    raise out_of_memory(str(error)) or error from error
  compile_seconds = time.monotonic() - start
  memory = compiled.memory_analysis()
  cost = program_cost(compiled.as_text(), chip.link / chip.clock)
  roofline = compiled.cost_analysis().get("optimal_seconds", 0.0)
  roofline -= math.floor(min(roofline, 0.0))  # on v5e and v6e an operation that the model can't cost counts as -1 s
  per_cycle = roofline / cost.once if cost.once else 0.0
  kernels = sum(runs * kernel_flops(name, shapes) for runs, name, shapes in cost.kernels) / (chip.attention * chip.peak)
  exposed = cost.exposed / chip.link
  return Program(
    seconds=cost.cycles * per_cycle + kernels + exposed,
    slow_seconds=cost.cycles / chip.clock + kernels + exposed,
    branch=cost.branch * per_cycle,
    slow_branch=cost.branch / chip.clock,
    kernel_seconds=kernels,
    exposed_seconds=exposed,
    temporary=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    compile_seconds=compile_seconds,
    cost=cost,
  )


def kernel_flops(name: str, shapes: list[tuple[int, ...]]) -> float:
  """FLOPs of one run of an attention kernel, by its name and its operands' shapes: q [B,H,D,T], then k [B,K,D,S].

  The whole score matrix counts, and what the backward kernels compute again.
  """
  arrays = [shape for shape in shapes if len(shape) >= 4][:2]
  if len(arrays) < 2:
    return 0.0
  (*heads, size, rows), (*_, columns) = arrays
  products = next(count for part, count in _KERNELS.items() if part in name)
  return float(products * math.prod(heads) * rows * columns * size)


def out_of_memory(message: str) -> OutOfMemory | None:
  """What the compiler's message says about memory; None if it is about something else."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  if found := re.search(r"Used ([\d.]+)([KMGTP]?) of", message):
    return OutOfMemory(float(found[1]) * _UNITS[found[2]], whole=True)
  found = re.search(r"\(([\d.]+)([KMGTP]?)\)", message)
  return OutOfMemory(float(found[1]) * _UNITS[found[2]], whole="temporaries" not in message) if found else None
