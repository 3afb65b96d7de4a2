"""Micro-batches as a pure function of (seed, m): tasks in a fixed pattern, sources mixed by weight, prefetched by Grain.

Per task, Grain runs: source -> shuffle, anew each epoch -> repeat -> mix by weight -> prepare one sample. The position in that
stream is the sample's id: every draw (wording, caption dropout) follows from seed and id, whatever the batch or the host.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import grain
import numpy as np

from deepgen_jax.data import prompts
from deepgen_jax.data.composition import text_hash
from deepgen_jax.data.encoded import EncodedImage
from deepgen_jax.data.images import fix_edit, reference_sizes
from deepgen_jax.data.prompts import Prompt
from deepgen_jax.data.sources import FILTERS, BadSample, Filters, Guarded, Sample, Source
from deepgen_jax.errors import Stalled, UserError

TASKS = ("generate", "edit")
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ID_RANGE = 2**31  # ids of "generate" start at 0, of "edit" here: uint32, disjoint; a stream wraps after 2^31 samples


@dataclass(frozen=True)
class DataSpec:
  """How samples become micro-batches. Sizes are global: all hosts together."""

  pattern: tuple[str, ...] = ("edit", "generate", "generate", "generate")  # tasks of successive micro-batches, repeated
  batch_size: int = 4
  image_size: int = 512  # each image gets about image_size^2 pixels (images.fix_pixels)
  num_think_tokens: int = 128
  text_buckets: tuple[int, ...] = prompts.TEXT_BUCKETS
  caption_dropout: float = 0.1  # generation only
  seed: int = 0
  max_bad_share: float = 0.1
  filters: Filters = FILTERS
  threads: int = THREADS  # that read and prepare samples: all cores
  prefetch: int = 4  # micro-batches read ahead, two at a time
  slow: float = 60.0  # seconds without a micro-batch until what is being read is named
  stalled: float = 1800.0  # and until the run stops


@dataclass(frozen=True)
class Example:
  """One sample, ready to be put in a batch."""

  sample_id: int
  text: str  # after dropout
  prompt: Prompt
  target: np.ndarray | EncodedImage
  references: tuple[np.ndarray | EncodedImage, ...]


def prepare(sample: Sample, sample_id: int, spec: DataSpec, tokenizer, train: bool = True) -> Example:
  """Sizes the images and tokenizes the prompt. With `train`, wording and caption dropout are drawn from seed and id."""
  target, references = sample.target, sample.references
  if not isinstance(target, EncodedImage):
    target, references = fix_edit(target, references, spec.image_size)
  sizes = reference_sizes(references)
  text = sample.texts[0]
  if train:
    text = sample.texts[int(_uniform(spec.seed, sample_id, "wording") * len(sample.texts))]
    if sample.task == "generate" and _uniform(spec.seed, sample_id, "dropout") < spec.caption_dropout:
      text = ""
  room = min(prompts.MAX_TOKENS, max(spec.text_buckets) - sum(prompts.image_tokens(*size) for size in sizes))
  prompt = prompts.tokenize(tokenizer, sample.task, text, sizes, max_tokens=room, warn=False)
  if len(prompt.ids) > max(spec.text_buckets):
    raise UserError(
      f"the largest text bucket ({max(spec.text_buckets)}) can't hold the template and image tokens of a sample "
      f"({len(prompt.ids)}): add a larger one to text_buckets"
    )
  if sample.answer:
    prompt = prompts.with_answer(tokenizer, prompt, sample.answer, max(spec.text_buckets))
  return Example(sample_id, text, prompt, target, references)


def extents(examples: Sequence[Example]) -> dict[str, int]:
  """What a micro-batch is padded to holds at least: tokens of a prompt, pixels of a target, pixels of all of a sample's
  references.
  """
  pixels = lambda images: sum(height * width for height, width in reference_sizes(images))
  return {
    "text": max(len(e.prompt.ids) for e in examples),
    "target": max(pixels([e.target]) for e in examples),
    "references": max(pixels(e.references) for e in examples),
  }


def assemble(task: str, examples: Sequence[Example], spec: DataSpec, room: Mapping[str, int] | None = None) -> dict:
  """Examples of one task -> the micro-batch dict of the data contract (numpy, host side). room: `extents` to pad to, if more
  than these examples' own.
  """
  room = room or extents(examples)
  bucket = prompts.pick_bucket(room["text"], spec.text_buckets)
  return {
    "task": task,
    "sample_id": np.array([e.sample_id for e in examples], np.uint32),
    "texts": [e.text for e in examples],
    **prompts.collate([e.prompt for e in examples], spec.num_think_tokens, (bucket,)),
    "target": [e.target for e in examples],
    "references": [list(e.references) for e in examples],
    "extents": dict(room),
  }


def host_batch(samples: Sequence[Sample], sample_ids: Sequence[int], spec: DataSpec, tokenizer) -> dict:
  """A micro-batch of given samples of one task, without any random draw: for evaluation on fixed samples."""
  examples = [prepare(sample, int(i), spec, tokenizer, train=False) for sample, i in zip(samples, sample_ids)]
  return assemble(samples[0].task, examples, spec)


class MicroBatches:
  """The training stream of one host. `batch(m)` is random access; `iterate(start)` reads ahead in threads."""

  def __init__(
    self,
    spec: DataSpec,
    sources: Mapping[str, Sequence[tuple[Source, float]]],
    tokenizer,
    rows: Sequence[int] | None = None,
    agree: Callable[[int, dict[str, int]], dict[str, int]] = lambda m, own: own,
  ):
    """sources: task -> [(source, weight)]; rows: those of each micro-batch that this host makes (None: all of them). Sample
    ids and their order don't depend on the number of hosts. agree(m, own `extents`) -> those of all hosts.

    Raises UserError for an unknown task or a task without sources.
    """
    self.spec, self.tokenizer = spec, tokenizer
    for task in spec.pattern:
      if task not in TASKS:
        raise UserError(f"config.data.pattern: unknown task {task!r}; use {' or '.join(TASKS)}")
      if not sources.get(task):
        held = ",".join(t for t in TASKS if sources.get(t))
        raise UserError(
          f"config.data.pattern has {task!r}, but no data source holds such samples: add one to config.data.sources"
          + (f", or set --config.data.pattern={held}" if held else "")
        )
    self._rows = range(spec.batch_size) if rows is None else rows
    self._agree = agree
    self._guarded: list[Guarded] = []
    self._read = functools.cache(lambda: ThreadPoolExecutor(spec.threads, "deepgen-read").map)  # made when first needed
    self._streams = {task: self._stream(task, sources[task]) for task in sorted(set(spec.pattern))}
    self._warned = False

  def _stream(self, task: str, sources: Sequence[tuple[Source, float]]) -> grain.MapDataset:
    streams, weights = [], []
    for number, (source, weight) in enumerate(sources):
      if source.task != task:
        raise UserError(f"data source {source.name!r} holds samples of task {source.task!r}, not {task!r}")
      if weight <= 0:
        continue
      guarded = Guarded(source, self.spec.max_bad_share, self.spec.filters)
      self._guarded.append(guarded)
      seed = int(_uniform(self.spec.seed, number, f"shuffle {task}") * 2**32)
      streams.append(grain.MapDataset.source(guarded).shuffle(seed=seed).repeat())
      weights.append(weight)
    if not streams:
      raise UserError(f"every data source of task {task!r} has weight 0")
    mixed = grain.MapDataset.mix(streams, weights) if len(streams) > 1 else streams[0]
    base = TASKS.index(task) * ID_RANGE
    return mixed.map_with_index(lambda place, sample: self._prepare(sample, base + place % ID_RANGE))

  def _prepare(self, sample: Sample, sample_id: int) -> Example:
    example = prepare(sample, sample_id, self.spec, self.tokenizer)
    if example.prompt.dropped and not self._warned:
      self._warned = True
      warnings.warn(f"texts longer than their bucket are cut at the end; the first: {example.text[:60]!r}...", stacklevel=2)
    return example

  def task(self, m: int) -> str:
    """Task of the m-th micro-batch."""
    return self.spec.pattern[m % len(self.spec.pattern)]

  def batch(self, m: int) -> dict:
    """This host's part of the m-th micro-batch: a pure function of the spec, the sources and m."""
    pattern, task = self.spec.pattern, self.task(m)
    rounds, place = divmod(m, len(pattern))
    earlier = rounds * pattern.count(task) + pattern[:place].count(task)  # micro-batches of this task before this one
    row_of = lambda row: self._streams[task][earlier * self.spec.batch_size + row]
    examples = list(self._read()(row_of, self._rows))
    return assemble(task, examples, self.spec, self._agree(m, extents(examples)))

  def iterate(self, start: int = 0) -> MicroBatchIterator:
    """Iterates from the start-th micro-batch on, without end."""
    return MicroBatchIterator(self, start)

  def reading(self) -> list[str]:
    """What threads of this host are reading at the moment, the longest first: "sample 7 of wds:a.tar (12 s)"."""
    found = [(seconds, index, source.name) for source in self._guarded for index, seconds in source.reading()]
    return [f"sample {index} of {name} ({seconds:.0f} s)" for seconds, index, name in sorted(found, reverse=True)]

  def bad_samples(self) -> list[BadSample]:
    """The samples replaced so far on this host (reading ahead included), once each."""
    return [bad for source in self._guarded for bad in source.bad_samples()]

  def counts(self) -> dict[str, dict]:
    """Source name -> how many of its samples were drawn on this host, were broken, and were filtered by what."""
    return {source.name: source.counts() for source in self._guarded}


class MicroBatchIterator:
  """Reads micro-batches ahead in Grain's threads. Its whole state is `consumed`: resume with `iterate(consumed)`.

  waited: seconds that `next` took so far. Storage that hangs is named in a warning every `spec.slow` seconds, and past
  `spec.stalled` raises Stalled.
  """

  def __init__(self, batches: MicroBatches, start: int = 0):
    self.consumed, self.waited = start, 0.0
    self._batches = batches
    self._ask = ThreadPoolExecutor(1, "deepgen-next")  # who asks Grain can't look at the clock
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=batches.spec.prefetch)
    self._iterator = iter(grain.MapDataset.source(_Batches(batches, start)).to_iter_dataset(ahead))

  def __iter__(self) -> MicroBatchIterator:
    return self

  def __next__(self) -> dict:
    began = time.monotonic()
    asked = self._ask.submit(next, self._iterator)
    while not wait([asked], self._batches.spec.slow).done:
      self._warn(time.monotonic() - began)
    batch = asked.result()
    self.consumed += 1
    self.waited += time.monotonic() - began
    return batch

  def _warn(self, seconds: float) -> None:
    named = ", ".join(self._batches.reading()[:3]) or "nothing: all is read, and being prepared, or another process reads"
    text = f"training has waited {seconds:.0f} s for micro-batch {self.consumed}; being read: {named}"
    if seconds >= self._batches.spec.stalled:
      raise Stalled(f"{text}. The storage seems to hang; the same command goes on from the last checkpoint")
    warnings.warn(text, stacklevel=3)

  def close(self) -> None:
    """Stops reading ahead."""
    self._ask.shutdown(wait=False)
    self._iterator.close()


class _Batches:
  """The micro-batches from `start` on as a Grain source."""

  def __init__(self, batches: MicroBatches, start: int):
    self.batches, self.start = batches, start

  def __len__(self) -> int:
    return sys.maxsize - self.start

  def __getitem__(self, index: int) -> dict:
    return self.batches.batch(self.start + index)


def _uniform(seed: int, sample_id: int, purpose: str) -> float:
  """The draw in [0, 1) of this seed, sample and purpose."""
  return text_hash(f"{seed} {sample_id} {purpose}")
