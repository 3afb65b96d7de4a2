"""TPUs by name: a topology that the compiler knows, without the hardware, and what a chip can do."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from deepgen_jax.errors import UserError, nearest

# What keeps libtpu from asking the network for a TPU that isn't there, or for the only right to a chip.
_OFFLINE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclass(frozen=True)
class Chip:
  """peak: bf16 FLOP/s; hbm: bytes for programs; clock: Hz of `estimated_cycles`; link: bytes/s of one axis of the torus,
  both directions together; attention: the share of `peak` that attention kernels are assumed to reach.
  """

  peak: float
  hbm: float
  clock: float
  link: float
  attention: float


# Peaks and links as Google documents them; HBM as the compiler's out-of-memory message gives it.
CHIPS = {
  "v5p": Chip(peak=459e12, hbm=95.73 * 2**30, clock=1.75e9, link=180e9, attention=0.33),
  "v5e": Chip(peak=197e12, hbm=15.75 * 2**30, clock=1.5e9, link=90e9, attention=0.33),
  "v6e": Chip(peak=918e12, hbm=31.24 * 2**30, clock=1.75e9, link=180e9, attention=0.20),
}


def topology(name: str) -> tuple[Chip, Sequence[jax.Device]]:
  """`v5p:2x2x2` -> (the chip, devices to compile for). Raises UserError for what isn't one, or without libtpu."""
  kind, _, shape = name.partition(":")
  example = "a topology is a chip and its grid, as in v5p:2x2x2, v5e:4x4 or v6e:4x4"
  if kind not in CHIPS:
    raise UserError(f"--topology {name!r}: chip {kind!r} is unknown.{nearest(kind, CHIPS)} The chips are {', '.join(CHIPS)}")
  if not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
    raise UserError(f"--topology {name!r}: {shape!r} is no grid; {example}")
  for key, value in _OFFLINE.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  try:
    return CHIPS[kind], topologies.get_topology_desc(name, platform="tpu").devices
  except (ImportError, RuntimeError) as error:
    if isinstance(error, ImportError) or "not installed" in str(error):
      raise UserError("the estimate needs libtpu, the TPU compiler: pip install 'deepgen_jax[tpu]'") from error
    raise UserError(
      f"--topology {name!r}: the compiler knows no such grid ({str(error).splitlines()[0]}); {example}"
    ) from error
