"""Several processes as one run: how they find each other, what one decides for all, and how they stop together.

The same command runs on every host. JAX connects the processes and watches over them: one that dies is missed within
`TIMEOUT` seconds, and then the others end with a message instead of waiting for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed as coordination  # its key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepgen_jax.errors import UserError

TIMEOUT = 60  # seconds without a sign of life, or at the end of a run without the others
STARTUP = 300  # seconds that processes wait for the last of them
PATIENCE = 7200  # and for another one's data: longer than the loader, which gives up in good order
MESSAGE = 4096  # bytes of an error that one process tells the others

T = TypeVar("T")


def start(spec: str) -> None:
  """Joins the run that `config.distributed` describes; before anything asks JAX for its devices.

  "off": this process is the whole run. "auto": TPU pods, GKE, SLURM and Open MPI say by themselves who takes part.
  "HOST:PORT/COUNT/INDEX": process INDEX of COUNT, whose process 0 listens at HOST:PORT. Raises UserError for anything else,
  and where the others aren't found.
  """
  if spec == "off":
    return
  options: dict = {}
  if spec != "auto":
    found = re.fullmatch(r"(.+:\d+)/(\d+)/(\d+)", spec)
    if not found or int(found[3]) >= int(found[2]):
      raise UserError(
        f"config.distributed {spec!r} is neither off, auto nor HOST:PORT/COUNT/INDEX with an INDEX below COUNT, e.g. "
        "10.0.0.1:1234/8/0 for the first of eight processes"
      )
    options = {"coordinator_address": found[1], "num_processes": int(found[2]), "process_id": int(found[3])}
    options["cluster_detection_method"] = "deactivate"
  try:
    jax.distributed.initialize(
      **options,
      initialization_timeout=STARTUP,
      heartbeat_timeout_seconds=TIMEOUT,
      shutdown_timeout_seconds=TIMEOUT,
    )
  except (ValueError, RuntimeError, TypeError) as error:
    hint = "say who takes part with HOST:PORT/COUNT/INDEX" if spec == "auto" else "are all started, and is the address right?"
    raise UserError(f"config.distributed={spec}: the processes of this run don't find each other ({error}); {hint}") from error
  if jax.default_backend() == "cpu":
    # A program that XLA loads from disk for a CPU has lost the order of its collectives (each one's thunk has a communicator of
    # its own then), and those of two processes cross: "Received data size doesn't match", or a wrong sum.
    jax.config.update("jax_enable_compilation_cache", False)


def is_main() -> bool:
  """Whether this process writes what a run writes once."""
  return jax.process_index() == 0


def on_main(fn: Callable[[], T]) -> T | None:
  """fn() on the main process alone, to be called by all: what it returns there, elsewhere None. Its UserError is everyone's."""
  result, message = None, b""
  if is_main():
    try:
      result = fn()
    except UserError as error:
      message = str(error).encode()[:MESSAGE]
  if jax.process_count() > 1:
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(message.ljust(MESSAGE, b"\0"), np.uint8))
    message = bytes(told).rstrip(b"\0")
  if message:
    raise UserError(message.decode(errors="replace"))
  return result


def check_same(text: str, what: str = "config", advice: str = "start all with the same options") -> None:
  """Raises UserError, on every process, unless all call this with the same text: their configs, say."""
  digests = shared(hashlib.sha256(text.encode()).hexdigest())
  if odd := [i for i, digest in enumerate(digests) if digest != digests[0]]:
    raise UserError(f"processes {odd} have another {what} than process 0; {advice}")


def shared(text: str) -> list[str]:
  """What each process has to say, on every one, in their order; called by all."""
  if jax.process_count() == 1:
    return [text]
  own = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(own)], np.int32))[:, 0]
  told = multihost_utils.process_allgather(np.pad(own, (0, max(sizes) - len(own))))
  return [bytes(row[:size]).decode() for row, size in zip(told, sizes)]


def highest(number: int) -> int:
  """The largest of a number that each process has; called by all."""
  return max(map(int, shared(str(number))))


def gathered(tree):
  """A tree of arrays, wherever they lie, as whole numpy arrays on every process; called by all, leaf by leaf."""

  def gather(x):
    here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x) if here else multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gather, tree)


def largest(name: str, counts: Sequence[int]) -> list[int]:
  """Each count's largest value of all processes, which all ask for the same name, once: so that they pad to the same shapes.

  Goes by the service that connects the processes, not by their devices: threads that read ahead may ask. Raises RuntimeError
  if another one doesn't answer within `PATIENCE` seconds.
  """
  if jax.process_count() == 1:
    return [*counts]
  client = coordination.global_state.client
  client.key_value_set(f"{name}/{jax.process_index()}", json.dumps([*map(int, counts)]), allow_overwrite=True)
  try:
    told = [client.blocking_key_value_get(f"{name}/{other}", PATIENCE * 1000) for other in range(jax.process_count())]
  except jax.errors.JaxRuntimeError as error:
    raise RuntimeError(f"a process has nothing to say of {name} after {PATIENCE} s: its storage may hang ({error})") from error
  return [max(values) for values in zip(*map(json.loads, told))]


def forget(name: str) -> None:
  """What this process said of a name that everyone has asked for goes out of the service's memory."""
  if jax.process_count() > 1:
    coordination.global_state.client.key_value_delete(f"{name}/{jax.process_index()}")


def whole_on(tree, shardings):
  """A tree of arrays that lie on the devices of all processes, in shardings over each one's own; called by all.

  One program gathers all of them, and each device holds the whole tree for a moment: one for each leaf would compile and wait
  as often as there are leaves.
  """
  everywhere = NamedSharding(jax.tree.leaves(tree)[0].sharding.mesh, PartitionSpec())
  whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
  return jax.tree.map(lambda x, s: jax.device_put(x.addressable_data(0), s), whole, shardings)


class Stop:
  """Whether the run is to end: SIGTERM or the first Ctrl-C, on any process, ends all of them after the same update, or before
  the first one.

  With several processes, what one was told reaches the others by a vote in each update, which is read one update late, as the
  metrics are, so that nobody waits for it.

  A second signal of the same kind ends the process at once, also while the main thread compiles or waits for storage, where
  Python's own handlers would wait for it: a thread listens.
  """

  def __init__(self):
    self._told, self._agreed, self._vote = False, False, None
    self._before = {number: signal.signal(number, self._tell) for number in (signal.SIGTERM, signal.SIGINT)}
    reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._before_writer = signal.set_wakeup_fd(self._writer)
    threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

  def _tell(self, number, frame) -> None:
    self._told = True

  def _listen(self, reader: int) -> None:
    seen = set()
    while number := os.read(reader, 1):
      if number in seen:
        os._exit(128 + number[0])
      if number[0] in self._before:
        seen.add(number)
    os.close(reader)

  def close(self) -> None:
    """Signals do again what they did before."""
    for number, handler in self._before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._before_writer)
    os.close(self._writer)

  def agree(self) -> bool:
    """Whether the run is to end, the same on every process: all call this, and wait for each other. Before the first update."""
    self._agreed = bool(highest(int(self._told)))
    return self._agreed

  def vote(self, mesh: Mesh) -> None:
    """Once an update, on every process."""
    if jax.process_count() == 1:
      self._agreed = self._told
      return
    if self._vote is not None:
      self._agreed = bool(self._vote)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    votes = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.array([self._told]))
    self._vote = _any(mesh)(votes)

  def __bool__(self) -> bool:
    return self._agreed


@functools.cache
def _any(mesh: Mesh) -> Callable:
  return jax.jit(lambda votes: votes.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))
