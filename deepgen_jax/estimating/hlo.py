"""Time of a compiled TPU program, from the text that the compiler leaves: its own estimate for each operation, times trips.

    program seconds = sum over operations of trips x cycles / clock + attention kernels + collectives that nothing hides

XLA writes `estimated_cycles` on each operation that it schedules. A loop's body is written once, whatever its trip count, which
stands in the loop's condition; of a conditional's branches one runs. Pallas kernels carry no estimate.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z\d]*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?")


@dataclass(frozen=True)
class Instruction:
  """One line of the program; `rest` is everything after the opening parenthesis."""

  name: str
  shape: str
  opcode: str
  rest: str

  @property
  def cycles(self) -> int:
    """The compiler's estimate; 0 where it has none, which it may also write as the largest number of 64 bits."""
    found = _CYCLES.search(self.rest)
    return int(found[1]) if found and int(found[1]) < 2**62 else 0

  def attribute(self, name: str) -> str:
    """A called computation's name, as in `body=%name`."""
    return re.search(rf"\b(?:{name})=%?([\w.\-]+)", self.rest)[1]


@dataclass
class Cost:
  """Sums over a program, each operation weighted by how often it runs."""

  cycles: float = 0.0
  once: float = 0.0  # cycles with every loop's body counted a single time: what XLA's own totals do
  branch: float = 0.0  # of `cycles`: how much more a conditional's dearest branch takes than its cheapest
  collectives: dict[str, float] = field(default_factory=dict)  # kind -> bytes that cross the links, per device
  exposed: float = 0.0  # bytes of collectives less what the cycles between their start and end hide
  kernels: list[tuple[float, str, list[tuple[int, ...]]]] = field(default_factory=list)  # (runs, name, operand shapes)
  unknown_trips: int = 0  # loops whose trip count wasn't found, counted as one


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Text of a compiled module -> (computation name -> instructions in their order, the entry's name)."""
  computations: dict[str, list[Instruction]] = {}
  entry, body = "", None
  for line in re.sub(r'\n(?="|\}\})', " ", text).splitlines():  # kernels' metadata is written over several lines
    if head := _COMPUTATION.match(line):
      body = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    elif line == "}":
      body = None
    elif body is not None and (found := _INSTRUCTION.match(line)):
      body.append(Instruction(*found.groups()))
  return computations, entry


def shape_bytes(shape: str) -> int:
  """Bytes of all arrays in a shape as HLO writes it."""
  total = 0
  for kind, sizes in _ARRAY.findall(shape):
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    count = 1
    for size in filter(None, sizes.split(",")):
      count *= int(size)
    total += count * bits // 8
  return total


def trip_count(condition: list[Instruction], computations: dict[str, list[Instruction]]) -> int | None:
  """How often a loop runs: the constant that its condition compares the counter with."""
  found = []
  for one in condition:
    if one.opcode == "constant" and one.shape.startswith(("s32[]", "u32[]")):
      found.append(int(one.rest.split(")")[0]))
    elif one.opcode in ("fusion", "call"):
      found += filter(None, [trip_count(computations[one.attribute("calls|to_apply")], computations)])
  return max(found, default=None)


def program_cost(text: str, bytes_per_cycle: float) -> Cost:
  """Cost of a compiled program. bytes_per_cycle: what the links move for a device in one clock cycle."""
  computations, entry = parse(text)
  cost = Cost()
  _visit(computations, entry, 1.0, cost, bytes_per_cycle)
  return cost


def _visit(computations, name: str, runs: float, cost: Cost, speed: float, first: bool = True) -> None:
  """Adds a computation that runs `runs` times. first: it counts towards `once`."""
  started: dict[str, tuple[float, float]] = {}  # collective under way -> (bytes, cycles when it started)
  clock = 0.0

  def moves(kind: str, size: float) -> None:
    cost.collectives[kind] = cost.collectives.get(kind, 0.0) + runs * size

  def finish(key: str) -> None:
    size, since = started.pop(key)
    cost.exposed += runs * max(0.0, size - (clock - since) * speed)

  for one in computations[name]:
    if one.opcode == "while":
      trips = trip_count(computations[one.attribute("condition")], computations)
      cost.unknown_trips += trips is None
      before = cost.cycles
      _visit(computations, one.attribute("body"), runs * (trips or 1), cost, speed, first)
      clock += (cost.cycles - before) / runs
    elif one.opcode == "conditional":
      clock += _visit_branches(computations, one, runs, cost, speed, first)
    elif one.opcode == "call":
      _visit(computations, one.attribute("to_apply"), runs, cost, speed, first)
    elif kind := _COLLECTIVE.fullmatch(one.opcode):
      moved = _moved_bytes(kind[1], one)
      moves(kind[1], moved)
      if kind[2]:
        started[one.name] = (moved, clock)
      else:
        cost.exposed += runs * moved
    elif one.opcode.endswith("-done") and (operand := re.match(r"[^%]*%([\w.\-]+)", one.rest)) and operand[1] in started:
      finish(operand[1])
    elif one.opcode == "fusion" and (inner := _fused_collective(computations, one)):
      kind, moved, channel = inner
      if one.name.startswith("async-collective-start"):
        moves(kind, moved)
        started[channel] = (moved, clock)
      elif one.name.startswith("async-collective-done") and channel in started:
        finish(channel)
      elif kind == "reduce-scatter":
        moves(kind, moved)
        cost.exposed += runs * moved
    elif one.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in one.rest:
      cost.kernels.append((runs, one.name, _operand_shapes(computations[name], one)))
    cycles = one.cycles
    clock += cycles
    cost.cycles += runs * cycles
    cost.once += cycles if first else 0


def _visit_branches(computations, one: Instruction, runs: float, cost: Cost, speed: float, first: bool) -> float:
  """Adds the dearest branch, and to `branch` what it takes more than the cheapest; -> its cycles for one run."""
  names = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
  names = re.findall(r"[\w.\-]+", names[1]) if names else [one.attribute(f"{side}_computation") for side in ("true", "false")]
  costs = []
  for name in names:
    costs.append(Cost())
    _visit(computations, name, runs, costs[-1], speed, first)
  dear, cheap = max(costs, key=lambda c: c.cycles), min(costs, key=lambda c: c.cycles)
  cost.cycles, cost.once = cost.cycles + dear.cycles, cost.once + dear.once
  cost.branch += dear.cycles - cheap.cycles
  cost.exposed += dear.exposed
  cost.kernels += dear.kernels
  cost.unknown_trips += dear.unknown_trips
  for kind, moved in dear.collectives.items():
    cost.collectives[kind] = cost.collectives.get(kind, 0.0) + moved
  return dear.cycles / runs


def _fused_collective(computations, one: Instruction) -> tuple[str, float, str] | None:
  """(kind, bytes, channel) of the collective in a fusion; None without one.

  Some start in one fusion, go on inside others, beside their products, and end in a third, all on one channel. An all-reduce in
  a fusion of the name leaves each device its shard.
  """
  name = re.search(r"\bcalls=%?([\w.\-]+)", one.rest)
  for inner in computations.get(name[1], ()) if name else ():
    if kind := _COLLECTIVE.fullmatch(inner.opcode):
      moved, channel = _moved_bytes(kind[1], inner), re.search(r"channel_id=(\d+)", inner.rest)
      if name[1].startswith("all-reduce-scatter"):
        return "reduce-scatter", moved / 2, ""
      return kind[1], moved, channel[1] if channel else ""
  return None


def _moved_bytes(kind: str, one: Instruction) -> float:
  """Bytes that a device takes in: the larger side of the collective (of a start's tuple), twice for an all-reduce."""
  size = _group_size(one.rest)
  parts = [shape_bytes(part[0]) for part in re.finditer(r"\w+\[[\d,]*\]", one.shape)]
  whole = max(parts, default=0) if one.opcode.endswith("-start") else sum(parts)
  if kind == "reduce-scatter" and not one.opcode.endswith("-start"):
    whole *= size  # the result is a shard
  if kind == "collective-permute":
    return whole
  return whole * (size - 1) / max(size, 1) * (2 if kind == "all-reduce" else 1)


def _group_size(text: str) -> int:
  """Devices that take part in one group of a collective, in each of the ways that HLO writes them."""
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return len(found[1].split(","))
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
    return int(found[1])
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
  return 1


def _operand_shapes(body: list[Instruction], one: Instruction) -> list[tuple[int, ...]]:
  """Shapes of a call's operands, and of its result last."""
  shapes = {other.name: other.shape for other in body}
  operands = re.findall(r"%([\w.\-]+)", one.rest.split(")", 1)[0])
  arrays = [_ARRAY.search(shapes.get(operand, "")) for operand in operands] + [_ARRAY.search(one.shape)]
  return [tuple(int(n) for n in found[2].split(",") if n) for found in arrays if found]
