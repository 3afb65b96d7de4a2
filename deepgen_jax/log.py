"""What a person sees of a run: progress bar or plain lines, metrics.jsonl, TensorBoard scalars and pictures.

Rows belong to updates. On resume, what lies past the restored step is removed: metrics.jsonl is cut, and TensorBoard starts a
new event file at every checkpoint, so that later files can be deleted whole.
"""

from __future__ import annotations

import json
import os
import sys
import time

import jax
import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from deepgen_jax import atomic
from deepgen_jax.errors import UserError


def _summary_writer() -> type:
  """tensorboardX's. It would import PyTorch where that is installed, seconds and hundreds of megabytes, to take its tensors."""
  hide = not {"torch", "tensorboardX"} & sys.modules.keys()
  if hide:
    sys.modules["torch"] = None
  try:
    from tensorboardX import SummaryWriter
  finally:
    if hide:
      del sys.modules["torch"]
  return SummaryWriter


class Log:
  """write(step, scalars), images(step, name, array); `checkpointed(step)` after each save."""

  def __init__(self, workdir: epath.Path, steps: int, start: int, every: int, images_per_step: int):
    self._workdir, self._steps, self._every, self._images_per_step = workdir, steps, every, images_per_step
    self._tensorboard = workdir / "tensorboard"
    self._cut(start)
    self._jsonl = open(workdir / "metrics.jsonl", "a")  # noqa: SIM115  open for the life of the run
    self._writer = self._event_file(start)
    self._bar = tqdm(total=steps, initial=start, unit="update", smoothing=0.05) if sys.stderr.isatty() else None
    self._clock, self._clock_step, self._clock_waited = time.monotonic(), start, 0.0

  def write(self, step: int, scalars: dict[str, float], waited: float = 0.0, force: bool = False) -> None:
    """One row for update `step`; written every `log.every` updates and at the end. waited: seconds for data since the start."""
    if self._bar:
      self._bar.update(step - self._bar.n)
      self._bar.set_postfix(loss=f"{scalars.get('loss', float('nan')):.4f}", refresh=False)
    if not force and step % self._every and step != self._steps:
      return
    now = time.monotonic()
    if step > self._clock_step:
      seconds = (now - self._clock) / (step - self._clock_step)
      data = (waited - self._clock_waited) / (step - self._clock_step)
      speed = {"seconds_per_update": seconds, "seconds_data": data, "images_per_second": self._images_per_step / seconds}
      scalars = scalars | speed
      self._clock, self._clock_step, self._clock_waited = now, step, waited
      if not self._bar:
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self._steps - step)))
        rate = scalars["images_per_second"]
        print(f"update {step}/{self._steps}  loss {scalars.get('loss', 0):.4f}  {rate:.1f} images/s  {left} left", flush=True)
    self.record(step, scalars)

  def record(self, step: int, scalars: dict[str, float]) -> None:
    """One row, at once and without the speed."""
    self._jsonl.write(json.dumps({"step": step} | {k: float(v) for k, v in scalars.items()}) + "\n")
    self._jsonl.flush()
    for name, value in scalars.items():
      self._writer.add_scalar(name, float(value), step)

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """picture uint8 [H,W,3], to TensorBoard and as samples/NAME_STEP.png."""
    self._writer.add_image(name, picture, step, dataformats="HWC")
    folder = self._workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}_{step:07d}.png").open("wb") as file:
      Image.fromarray(picture).save(file, format="png")

  def say(self, text: str) -> None:
    """A line for people, above the bar."""
    (self._bar.write if self._bar else print)(text)

  def checkpointed(self, step: int) -> None:
    """All rows up to update `step` are on disk afterwards."""
    os.fsync(self._jsonl.fileno())
    self._writer.close()
    self._writer = self._event_file(step)

  def close(self) -> None:
    if self._bar:
      self._bar.close()
    self._writer.close()
    self._jsonl.close()

  def _event_file(self, step: int):
    return _summary_writer()(str(self._tensorboard), filename_suffix=f".from{step}", flush_secs=30)

  def _cut(self, start: int) -> None:
    """Removes every row past update `start`."""
    _cut_rows(self._workdir / "metrics.jsonl", start)
    if self._tensorboard.exists():
      for events in self._tensorboard.iterdir():
        if int(events.name.rpartition(".from")[2] or 0) >= start:
          events.unlink()


class Silent:
  """A Log that keeps to itself: of several processes one writes."""

  def __init__(self, *args):
    """Takes what `Log` takes."""

  def __getattr__(self, name: str):
    return lambda *args, **kwargs: None


class SampleLog:
  """Which samples each update was made of, a row for each batch that a step took; off, it only removes what lies past a start.

  Ids are places in the stream of a task (deepgen_jax/data/loader.py): a run that went well has each once, without a gap.
  """

  def __init__(self, file: epath.Path, start: int, on: bool):
    _cut_rows(file, start)
    self._file = open(file, "a") if on else None  # noqa: SIM115  open for the life of the run

  def write(self, step: int, micro_batch: int, ids) -> None:
    """ids [B]: the samples of a batch of update `step`, made of the stream's micro-batch of that number."""
    if self._file:
      self._file.write(json.dumps({"step": step, "micro_batch": micro_batch, "ids": np.asarray(ids).tolist()}) + "\n")

  def flush(self) -> None:
    """All rows are on disk afterwards."""
    if self._file:
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file:
      self._file.close()


class Profiler:
  """Traces updates START to END (exclusive) into a folder that TensorBoard and Perfetto read; "" traces nothing."""

  def __init__(self, span: str, folder: epath.Path):
    try:
      self._start, self._end = (int(part) for part in span.split(":")) if span else (-1, -1)
    except ValueError:
      raise UserError(f"config.profile {span!r}: write START:END, e.g. 10:13") from None
    self._folder, self._on = folder, False

  def at(self, step: int) -> None:
    """Called before each update."""
    if step == self._start:
      jax.profiler.start_trace(str(self._folder))
      self._on = True
    elif step == self._end:
      self.close()

  def close(self) -> None:
    """Ends the trace, if one is under way."""
    if self._on:
      jax.profiler.stop_trace()
      self._on = False


def _step_of(line: str) -> float:
  """The row's update; a line that a crash cut short counts as past any restored step."""
  try:
    return json.loads(line)["step"]
  except (json.JSONDecodeError, KeyError, TypeError):
    return float("inf")


def _cut_rows(file: epath.Path, start: int) -> None:
  """Removes every row past update `start` (from 0: all), and what a crash left of one."""
  if file.exists():
    lines = file.read_bytes().decode(errors="replace").splitlines()
    atomic.write_text(file, "".join(line + "\n" for line in lines if _step_of(line) <= (start or -1)))
