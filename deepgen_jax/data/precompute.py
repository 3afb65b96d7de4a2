"""Encodes a config's images once, so that training only reads what the VAE and the vision tower made of them:

    python -m deepgen_jax.data.precompute --config configs/sft.py:full --output /data/encoded --config.init=... [--shard 3/8]
    python -m deepgen_jax.train --config configs/sft.py:full --config.data.precomputed=/data/encoded --config.init=... ...

The same command goes on where it was interrupted: finished shards are kept, a partial one is done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace

import grain
import jax
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jax.experimental import multihost_utils

from deepgen_jax import distributed, sharding
from deepgen_jax.cli import parse, split_overrides, start_command
from deepgen_jax.config import load_config
from deepgen_jax.data.encoded import (
  Layout,
  check_layout,
  encode_samples,
  encoder_facts,
  new_layout,
  pack,
  pack_error,
  read_layout,
)
from deepgen_jax.data.images import fix_edit
from deepgen_jax.data.loader import THREADS
from deepgen_jax.data.mixture import open_sources
from deepgen_jax.data.sources import BROKEN, BadSample, Filters, Sample, Source, read_usable
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.stages.encode import ImageEncoder
from deepgen_jax.stages.step import in_compute_dtype
from deepgen_jax.stages.supervised import load_base, make_model

SHARD_SIZE = 1024  # samples: of the full model at 512 pixels, edits are about 1.5 MB each
WINDOW = 4  # batches of the encoder that are read together, so that images of one size share programs


def precompute(config, output: epath.Path, part: tuple[int, int] | None = None, shard_size: int = SHARD_SIZE) -> None:
  """Writes the shards that fall to this process, `part` = (index, count), that aren't there yet.

  shard_size: samples of a file; of a source that was begun, what it was begun with. Raises UserError where `output` holds what
  was made by other networks, sizes or filters, or of other data.
  """
  mesh = sharding.make_mesh(config.mesh.to_dict())
  sizes, params, _ = load_base(config, mesh)
  model = make_model(config, sizes)
  params = {"vae": params["vae"], "vlm": {"vision": params["vlm"]["vision"]}}
  filters = Filters(**config.data.filters)
  facts = encoder_facts(params, sizes.image_size, model.dtype, filters)
  sources = []
  open_sources(config.data.sources, config.data.dir, lambda source, entry: sources.append((source, entry)) or source)
  layouts = distributed.on_main(lambda: [_begin(output, entry, source, shard_size, facts) for source, entry in sources])
  layouts = layouts or [read_layout(output, entry) for _, entry in sources]

  params = in_compute_dtype(params, model.dtype)  # as training holds frozen parameters
  encoder = ImageEncoder(model, cache=config.data.cache_images, mesh=mesh)
  encoder.gather(params)
  encode = lambda samples, shapes: encode_samples(samples, shapes, encoder, params)
  index, count = part or (jax.process_index(), jax.process_count())
  units = [(number, shard) for number, layout in enumerate(layouts) for shard in range(layout.shards)]
  finished = [layout.finished() for layout in layouts]
  own = [(number, shard) for number, shard in units[index::count] if shard not in finished[number]]
  print(f"{len(own)} of {len(units)} shards to do (part {index}/{count})", flush=True)
  for number, shard in own:
    (source, _), layout = sources[number], layouts[number]
    started = time.monotonic()
    items = _Items(source, layout.rows(shard), filters, sizes.image_size)
    bad = write_shard(layout.file(shard), items, encode, WINDOW * encoder.batch, config.data.max_bad_share)
    speed = len(items) / (time.monotonic() - started)
    print(f"{source.name}: shard {shard + 1} of {layout.shards}, {bad} unusable, {speed:.1f} samples/s", flush=True)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("precompute")  # whoever is done first waits, however long it takes


def write_shard(file: epath.Path, items: _Items, encode: Callable, window: int, max_bad_share: float) -> int:
  """Writes one file, which appears when it is whole; -> how many of its samples can't be used. They are listed beside it.

  encode(samples, shapes) -> samples of EncodedImages; it gets at most `window` at a time. Raises UserError where more than
  `max_bad_share` of the samples are broken: data that can't be reached for a while must not be written down as broken.
  """
  bad: list[BadSample] = []
  remote = "://" in os.fspath(file)
  # ArrayRecord writes local files; on a remote file system, a copy appears at once anyway
  folder = epath.Path(tempfile.gettempdir()) if remote else file.parent
  temporary = folder / f".{file.name}.{uuid.uuid4().hex[:8]}"
  ahead = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=window)
  stream = iter(grain.MapDataset.source(items).to_iter_dataset(ahead))
  writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
  try:
    for start in range(0, len(items), window):
      part = list(itertools.islice(stream, window))
      good = [item for item in part if not isinstance(item, Exception)]
      encoded = iter(encode(*zip(*good)) if good else ())
      for row, item in enumerate(part, items.rows.start + start):
        if isinstance(item, Exception):
          bad.append(BadSample(items.source.name, row, str(item), getattr(item, "filter", "")))
        writer.write(pack_error(item) if isinstance(item, Exception) else pack(next(encoded)))
      broken = [sample for sample in bad if not sample.filter]
      if len(broken) > max_bad_share * max(len(items), 100):
        raise UserError(
          f"{items.source.name}: {len(broken)} of samples {items.rows.start} to {row} are broken, more than the share of "
          f"{max_bad_share:g} that is allowed (config.data.max_bad_share). The last: {broken[-1].reason}"
        )
    writer.close()
    if bad:
      listed = file.parent / f"{file.name.partition('.')[0]}.bad_samples.jsonl"
      listed.write_text("".join(json.dumps(sample._asdict()) + "\n" for sample in bad))
    _publish(temporary, file, remote)
  finally:
    stream.close()
    if writer.is_open():
      writer.close()
    for left in {temporary, *folder.glob(f".{file.name}.*")}:  # of runs that were killed, too
      left.unlink(missing_ok=True)
  return len(bad)


class _Items:
  """The samples of some rows with sized images, each with its images' shapes as they were read; or why one can't be used."""

  def __init__(self, source: Source, rows: range, filters: Filters, image_size: int):
    self.source, self.rows, self._filters, self._image_size = source, rows, filters, image_size

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, place: int) -> tuple[Sample, list[tuple]] | Exception:
    try:
      sample = read_usable(self.source, self.rows[place], self._filters)
    except BROKEN as error:
      return error
    shapes = [image.shape for image in (sample.target, *sample.references)]
    target, references = fix_edit(sample.target, sample.references, self._image_size)
    return replace(sample, target=target, references=references), shapes


def _begin(output: epath.Path, entry: Mapping, source: Source, shard_size: int, facts: dict) -> Layout:
  """The layout of a source: what there is, if it fits, else a new one, written."""
  layout = read_layout(output, entry)
  if layout is not None:
    check_layout(layout, source, facts)
    return layout
  layout = new_layout(output, entry, source, shard_size, facts)
  layout.write()
  return layout


def _publish(temporary: epath.Path, file: epath.Path, remote: bool) -> None:
  """Moves a whole file to its place, so that also a power cut leaves all of it or nothing."""
  if remote:
    temporary.copy(file, overwrite=True)
    return
  with open(temporary, "rb") as whole:
    os.fsync(whole.fileno())
  temporary.replace(file)


def _part(text: str | None) -> tuple[int, int] | None:
  """ "3/8" -> (3, 8)."""
  if text is None:
    return None
  found = re.fullmatch(r"(\d+)/(\d+)", text)
  if not found or int(found[1]) >= int(found[2]):
    raise UserError(f"--shard {text}: write INDEX/COUNT with an INDEX from 0 and below COUNT, e.g. 0/8 for the first of eight")
  return int(found[1]), int(found[2])


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """-> (arguments, config overrides without their "--config." prefix); raises UserError for anything unknown."""
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.data.precompute",
    description="Encodes a config's images once; training reads them with --config.data.precomputed=DIR.",
    epilog="example: python -m deepgen_jax.data.precompute --config configs/align.py:tiny --output runs/encoded",
    allow_abbrev=False,
  )
  parser.add_argument("--config", required=True, metavar="FILE.py:SIZE", help="as of training")
  parser.add_argument("--output", required=True, metavar="DIR", help="where precomputed samples go; local or gs://")
  parser.add_argument("--shard", metavar="I/N", help="does the I-th of N parts; default: that of this process of the run")
  parser.add_argument("--shard_size", type=int, default=SHARD_SIZE, help="samples of a file")
  parser.add_argument("--config.KEY", metavar="VALUE", help="overrides a key of the config, as in training")
  rest, overrides = split_overrides(argv)
  return parse(parser, rest), overrides


def main() -> None:
  start_command()
  arguments, overrides = parse_arguments(sys.argv[1:])
  part = _part(arguments.shard)
  if arguments.shard_size < 1:
    raise UserError(f"--shard_size {arguments.shard_size}: must be at least 1")
  config = load_config(arguments.config, overrides)
  distributed.start(config.distributed)
  if part and jax.process_count() > 1:
    raise UserError(
      "--shard is for processes that don't know each other; those of config.distributed share the work by themselves"
    )
  precompute(config, epath.Path(arguments.output), part, arguments.shard_size)


if __name__ == "__main__":
  run_command(main)
