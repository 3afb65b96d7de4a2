"""ArrayRecord files of tf.train.Example records, by themselves or as TensorFlow Datasets wrote them. TensorFlow isn't needed.

Features that hold PNG, JPEG, WebP, GIF or BMP files are images, features of UTF-8 are texts; a list of either is several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from deepgen_jax.data.files import find_files, missing
from deepgen_jax.data.formats.fields import as_fields, build_sample, first_task
from deepgen_jax.data.images import decode_image
from deepgen_jax.data.sources import Sample
from deepgen_jax.errors import UserError, nearest

_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM")


class _Records:
  """Serialised `tf.train.Example`s, read at random."""

  def __init__(self, name: str, records: Sequence[bytes], path, task: str, fields):
    self.name, self._records, self._fields = name, records, fields
    self._wanted, self.task = task, task or first_task(fields, _heads(records, name), path)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Sample:
    return _sample(self.name, self._records, index, self._wanted, self._fields)


class ArrayRecords(_Records):
  """The records of ArrayRecord files, in order of file."""

  def __init__(self, path, *, task="", text="", target="", references=()):
    """path: a file, a folder, a glob, as "data/train.array_record-{00000..00063}-of-00064". text, target, references: names of
    features. Raises UserError for what can't be read.
    """
    self.name = f"array_record:{path}"
    files = [os.fspath(file) for file in find_files(path, r"array_?record")]
    records = _try(lambda: ArrayRecordDataSource(files), self.name)
    super().__init__(self.name, records, path, task, as_fields(text, target, references))


class Tfds(_Records):
  """A split of a data set that TensorFlow Datasets has prepared as ArrayRecord."""

  def __init__(self, path, *, task="", split="train", folder="", text="", target="", references=()):
    """path: "name", "name/config", "name/config:1.0.0", or the folder of a version, which holds dataset_info.json.
    folder: where TFDS keeps data sets, by default its own default. split: also slices, as "train[:90%]". text, target,
    references: names of features. Nothing is downloaded. Raises UserError for what isn't there, with how to prepare it.
    """
    self.name = f"tfds:{path}"
    builder = _builder(os.fspath(path), folder)
    splits = list(builder.info.splits)
    if split.partition("[")[0] not in [*splits, "all"]:
      raise UserError(f"{self.name} has no split {split!r}, but {', '.join(splits)}.{nearest(split, splits)}")
    records = _try(lambda: _raw(builder, split), self.name)
    super().__init__(self.name, records, path, task, as_fields(text, target, references))


def _builder(path: str, folder: str):
  import tensorflow_datasets as tfds

  if "/" in path and (epath.Path(path) / "dataset_info.json").exists():
    return tfds.builder_from_directory(path)
  if path.startswith(("/", ".")) or "://" in path:
    place = epath.Path(path)
    raise (
      UserError(f"{path} holds no dataset_info.json: name the folder of a version, as .../1.0.0")
      if (place.exists())
      else missing(place)
    )
  if folder and not epath.Path(folder).exists():
    raise missing(epath.Path(folder))
  try:
    return tfds.core.read_only_builder.builder_from_files(path, data_dir=folder or None)
  except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
    raise UserError(
      f"tfds:{path} isn't prepared in {folder or 'the default folder of TFDS'}; prepare it where there is a network: "
      f"tfds build {path.partition('/')[0].partition(':')[0]} --file_format=array_record --data_dir={folder or 'DIR'}, and set "
      "the option folder to DIR"
    ) from error


def _raw(builder, split: str) -> Sequence[bytes]:
  import tensorflow_datasets as tfds

  kind = builder.info.file_format
  if kind != tfds.core.FileFormat.ARRAY_RECORD:
    raise UserError(
      f"{builder.data_dir} is prepared as {kind.value}, which can't be read at random: "
      "prepare it with --file_format=array_record"
    )
  return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)


def _try(read: Callable, name: str):
  """`read()`; the libraries have no common error for a damaged file."""
  try:
    return read()
  except UserError:
    raise
  except Exception as error:
    raise UserError(f"{name} can't be read: {error}") from error


def _record(data: bytes) -> tuple[dict, dict]:
  """(images, texts) of a serialized tf.train.Example, lists of bytes and of str by name."""
  from tensorflow_datasets.proto import tf_example_pb2

  images, texts = {}, {}
  for name, feature in tf_example_pb2.Example.FromString(data).features.feature.items():
    values = list(feature.bytes_list.value)
    if values and all(v.startswith(_IMAGE_STARTS) or (v[:4], v[8:12]) == (b"RIFF", b"WEBP") for v in values):
      images[name] = values
    elif values:
      try:
        texts[name] = [v.decode() for v in values]
      except UnicodeDecodeError:  # bytes of another kind
        continue
  return images, texts


def _heads(records: Sequence[bytes], name: str) -> Iterator[tuple[dict, dict]]:
  for index in range(min(len(records), 100)):
    try:
      yield _try(lambda: _record(records[index]), name)  # noqa: B023  called at once
    except UserError:  # broken records are for training to count
      continue


def _sample(name: str, records: Sequence[bytes], index: int, task: str, fields) -> Sample:
  images, texts = _try(lambda: _record(records[index]), f"record {index} of {name}")
  try:
    return build_sample(task, fields, images, texts, lambda data: decode_image(data, "of this record"))
  except ValueError as error:
    raise UserError(f"record {index} of {name}: {error}") from error
