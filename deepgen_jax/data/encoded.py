"""Precomputed data: samples whose images are already latents and vision features, in ArrayRecord files.

FOLDER/NAME-HASH/ is one source: `source.json` says of what and by which networks, `00000-of-00012.array_record` holds the
samples of a shard in the order of the source. A record is safetensors: "0.mean", "0.logvar" of the target, "1.mean",
"1.logvar", "1.features" ... of the references, and "json" with the texts, or with why the sample can't be used. Texts are kept
as they are: wordings and dropout are drawn in training, as is the noise of the posterior.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from safetensors.numpy import load, save

from deepgen_jax.data.sources import Filtered, Filters, Sample, Source
from deepgen_jax.errors import UserError

FORMAT = 1
OPEN_FILES = 128  # of a source: readers of more shards are opened anew
COMMAND = "python -m deepgen_jax.data.precompute"


@dataclass(frozen=True)
class EncodedImage:
  """An image as the VAE and, where it is a reference, the vision tower see it.

  shape: (H, W, 3) of the image as it was read, which filters judge; height, width: pixels that it was encoded at; moments: mean
  and log-variance [h,w,c] float32; features: (vision tokens [V,C],), or () for a target.
  """

  shape: tuple[int, int, int]
  height: int
  width: int
  moments: tuple[np.ndarray, np.ndarray]
  features: tuple[np.ndarray, ...] = ()


def pack(sample: Sample) -> bytes:
  """The record of a sample of EncodedImages."""
  arrays, images = {}, []
  for place, image in enumerate((sample.target, *sample.references)):
    images.append({"shape": image.shape, "size": (image.height, image.width)})
    for name, array in zip(("mean", "logvar", "features"), (*image.moments, *image.features)):
      # Networks that compute in bfloat16 give nothing else: half the bytes, and the same numbers.
      narrow = array.astype(ml_dtypes.bfloat16)
      same = np.array_equal(narrow.astype(np.float32), array.astype(np.float32))
      arrays[f"{place}.{name}"] = np.ascontiguousarray(narrow.view(np.uint16) if same else array)
      images[-1][name] = array.dtype.name
  described = {"task": sample.task, "texts": sample.texts, "answer": sample.answer, "images": images}
  return save(arrays | {"json": _json_bytes(described)})


def pack_error(error: Exception) -> bytes:
  """The record of a sample that is broken or filtered."""
  return save({"json": _json_bytes({"error": str(error), "filter": getattr(error, "filter", "")})})


def unpack(record: bytes) -> Sample:
  """Inverse of `pack`; raises the error that `pack_error` was given, as UserError or Filtered."""
  arrays = load(record)
  described = json.loads(arrays["json"].tobytes())
  if "error" in described:
    raise Filtered(described["filter"], described["error"]) if described["filter"] else UserError(described["error"])
  images = []
  for place, image in enumerate(described["images"]):

    def array(name, place=place, image=image):
      stored = arrays[f"{place}.{name}"]
      return stored.view(ml_dtypes.bfloat16).astype(image[name]) if stored.dtype == np.uint16 else stored

    features = (array("features"),) if "features" in image else ()
    images.append(EncodedImage(tuple(image["shape"]), *image["size"], (array("mean"), array("logvar")), features))
  return Sample(described["task"], tuple(described["texts"]), images[0], tuple(images[1:]), described["answer"])


def encoder_facts(params: Mapping, image_size: int, dtype, filters: Filters) -> dict:
  """What precomputed samples depend on besides their source: params are those of the VAE and of the vision tower."""
  return {
    "weights": weights_digest({"vae": params["vae"], "vision": params["vlm"]["vision"]}),
    "image_size": image_size,
    "dtype": np.dtype(dtype).name,
    "filters": asdict(filters),
  }


def weights_digest(params) -> str:
  """A hash of the values of a tree, the same however devices hold them: sums of bits by place, which are exact."""
  sums = [np.asarray(_bit_sums(jnp.asarray(leaf, jnp.float32))) for leaf in jax.tree.leaves(params)]
  return hashlib.sha256(np.concatenate(sums).tobytes()).hexdigest()[:32]


@jax.jit
def _bit_sums(x):
  """float32 array -> two uint32 sums (modulo 2^32) of its bits, each place with an odd factor of its own."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
  place = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
  mixed = (bits ^ (bits >> 15)) * jnp.uint32(2654435761)
  return jnp.stack([jnp.sum(bits * place, dtype=jnp.uint32), jnp.sum((mixed ^ (mixed >> 13)) * place, dtype=jnp.uint32)])


@dataclass(frozen=True)
class Layout:
  """Where a source's samples are, and what `source.json` says of them. entry: the config's, without its weight."""

  folder: epath.Path
  entry: dict
  length: int
  shard_size: int
  encoder: dict

  @property
  def shards(self) -> int:
    return -(-self.length // self.shard_size)

  def file(self, shard: int) -> epath.Path:
    """The ArrayRecord file of a shard."""
    return self.folder / f"{shard:05}-of-{self.shards:05}.array_record"

  def rows(self, shard: int) -> range:
    """The samples of a shard."""
    return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.length))

  def finished(self) -> set[int]:
    """Shards that are there, whole."""
    names = {file.name for file in self.folder.iterdir()}
    return {shard for shard in range(self.shards) if self.file(shard).name in names}

  def write(self) -> None:
    """Writes `source.json`, at once or not at all."""
    self.folder.mkdir(parents=True, exist_ok=True)
    described = {"format": FORMAT, "entry": self.entry, "length": self.length, "shard_size": self.shard_size}
    temporary = self.folder / f".source.json.{uuid.uuid4().hex[:8]}"
    temporary.write_text(json.dumps(described | {"encoder": self.encoder}, indent=2) + "\n")
    temporary.replace(self.folder / "source.json")


def read_layout(root: epath.Path, entry: Mapping) -> Layout | None:
  """What there is of a source under `root`; None: nothing. Raises UserError for a `source.json` that can't be read."""
  folder = root / _folder_name(entry)
  file = folder / "source.json"
  if not file.exists():
    return None
  try:
    found = json.loads(file.read_text())
    if found["format"] != FORMAT:
      raise ValueError(f"format {found['format']}, not {FORMAT}")
    return Layout(folder, found["entry"], found["length"], found["shard_size"], found["encoder"])
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{file} can't be read ({error!r}); delete {folder} and run {COMMAND} again") from error


def new_layout(root: epath.Path, entry: Mapping, source: Source, shard_size: int, encoder: dict) -> Layout:
  """The layout of a source of which nothing is there yet."""
  return Layout(root / _folder_name(entry), dict(entry), len(source), shard_size, encoder)


def check_layout(layout: Layout, source: Source, encoder: dict) -> None:
  """Raises UserError, with what to do, where precomputed samples aren't what encoding the source now would give."""
  if layout.length != len(source):
    raise UserError(
      f"precomputed data in {layout.folder}: {layout.length} samples were precomputed of {source.name}, which now has "
      f"{len(source)}; delete the folder and run {COMMAND} again"
    )
  says = {
    "weights": "config.init has another VAE or vision tower",
    "image_size": f"for images of {layout.encoder.get('image_size')} pixels, not {encoder['image_size']}",
    "dtype": f"computed in {layout.encoder.get('dtype')}, not {encoder['dtype']} (config.dtype)",
    "filters": f"with filters {layout.encoder.get('filters')}, not {encoder['filters']} (config.data.filters)",
  }
  if differences := [text for key, text in says.items() if layout.encoder.get(key) != encoder[key]]:
    raise UserError(
      f"precomputed data in {layout.folder} isn't for this config: {'; '.join(differences)}. Use the config it was made with, "
      f"or run {COMMAND} into another folder"
    )


class Precomputed:
  """A source whose images are read from what was precomputed of it; broken and filtered samples are the same."""

  def __init__(self, source: Source, root: str | os.PathLike, entry: Mapping, encoder: dict):
    """root: config.data.precomputed. Raises UserError for what is missing there or was made otherwise."""
    self.name, self.task = source.name, source.task
    layout = read_layout(epath.Path(root), entry)
    if layout is None:
      raise UserError(
        f"config.data.precomputed: {os.fspath(root)} holds nothing of the data source {source.name}; run {COMMAND} "
        f"--output {os.fspath(root)} with this run's --config and options"
      )
    check_layout(layout, source, encoder)
    missing = set(range(layout.shards)) - layout.finished()
    if missing:
      raise UserError(
        f"config.data.precomputed: {len(missing)} of {layout.shards} shards of {source.name} are missing, the first: "
        f"{layout.file(min(missing))}; run {COMMAND} to the end (all of its --shard)"
      )
    self._layout = layout
    self._reader = functools.lru_cache(OPEN_FILES)(self._open)

  def __len__(self) -> int:
    return self._layout.length

  def __getitem__(self, index: int) -> Sample:
    shard, place = divmod(index, self._layout.shard_size)
    try:
      record = self._reader(shard).read([place])[0]
    except UserError:
      raise
    except Exception as error:  # array_record has no error of its own for a damaged file
      raise UserError(f"record {place} of {self._layout.file(shard)} can't be read: {error}") from error
    return unpack(record)

  def _open(self, shard: int) -> ArrayRecordReader:
    file = self._layout.file(shard)
    reader = ArrayRecordReader(os.fspath(file), options="readahead_buffer_size:0", file_reader_buffer_size=32768)
    if reader.num_records() != len(self._layout.rows(shard)):
      raise UserError(f"{file} is cut short: delete it and run {COMMAND} again")
    return reader


def encode_samples(samples: Sequence[Sample], shapes: Sequence[Sequence[tuple]], encoder, params: Mapping) -> list[Sample]:
  """Samples of sized images -> the same of EncodedImages. shapes: of each sample's images as they were read, target first;
  encoder: a stages.encode.ImageEncoder.
  """
  targets = [sample.target for sample in samples]
  references = [image for sample in samples for image in sample.references]
  moments = encoder.moments(params, [*targets, *references])
  features = encoder.features(params, references) if references else []
  pairs = iter(zip(references, moments[len(targets) :], features))
  encoded = []
  for sample, own, target_moments in zip(samples, shapes, moments):
    target = EncodedImage(own[0], *sample.target.shape[:2], target_moments)
    rows = [next(pairs) for _ in sample.references]
    others = [EncodedImage(shape, *image.shape[:2], m, (f,)) for shape, (image, m, f) in zip(own[1:], rows)]
    encoded.append(replace(sample, target=target, references=tuple(others)))
  return encoded


def _json_bytes(values) -> np.ndarray:
  return np.frombuffer(json.dumps(values).encode(), np.uint8)


def _folder_name(entry: Mapping) -> str:
  """Of an entry of config.data.sources: a few words of it that people recognise, and a hash of all."""
  text = json.dumps(entry, sort_keys=True, default=list)
  words = re.sub(r"[^A-Za-z0-9]+", "_", entry["uri"]).strip("_")[-40:]
  return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
