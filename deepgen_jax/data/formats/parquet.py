"""Parquet as Hugging Face data sets hold it: images as bytes in a column, or in structs {bytes, path}, or lists of these."""

from __future__ import annotations

import re
import warnings

import numpy as np
from etils import epath, epy

from deepgen_jax.data.files import find_files, inside
from deepgen_jax.data.formats.fields import as_fields, build_sample, first_task
from deepgen_jax.data.images import decode_image, load_image
from deepgen_jax.data.sources import Sample
from deepgen_jax.errors import UserError, nearest

with epy.lazy_imports():  # it starts a thread, which `cli.start_command` has to come before
  import pyarrow as pa
  import pyarrow.parquet as pq

LARGE_GROUP = 128 * 2**20  # bytes that one random sample should not cost


class Parquet:
  """The rows of Parquet files, in order of file."""

  def __init__(self, path, *, task="", split="", text="", target="", references=()):
    """path: a file, a glob, or a folder (its own files, or those of its subfolder `data`); local or gs://. split: where file
    names tell splits ("train-00000-of-00005.parquet"), which to take; by default "train" or the only one. text, target,
    references: column names. A row is read with its whole row group: groups above 128 MB bring a warning.
    """
    self.name = f"parquet:{path}"
    self._files = _of_split(_find(path), split, self.name)
    self._fields = as_fields(text, target, references)
    groups, rows, self._schema = [], [], None
    for number, file in enumerate(self._files):
      with _open(file) as parquet:
        schema = parquet.schema_arrow
        self._schema = self._schema or schema
        if schema.names != self._schema.names:
          raise UserError(f"{file} has other columns than {self._files[0]}: {', '.join(schema.names)}")
        for group in range(parquet.num_row_groups):
          groups.append((number, group))
          rows.append(parquet.metadata.row_group(group).num_rows)
        largest = max((parquet.metadata.row_group(g).total_byte_size for g in range(parquet.num_row_groups)), default=0)
      if number == 0 and largest > LARGE_GROUP:
        warnings.warn(
          f"{file} has row groups of {largest >> 20} MB, and each random sample reads a whole one: write it again with "
          "row_group_size=100 or so, or as tars",
          stacklevel=2,
        )
    self._groups = np.array(groups, np.int32).reshape(-1, 2)
    self._starts = np.cumsum([0, *rows])
    self._images = [field.name for field in self._schema if _holds(field.type, _is_image)]
    self._texts = [field.name for field in self._schema if _holds(field.type, _is_text)]
    for name in (*self._fields.text, self._fields.target, *self._fields.references):
      if name and name not in (*self._images, *self._texts):
        raise UserError(f"{self.name} has no column {name!r} of images or texts.{nearest(name, self._schema.names)}")
    found = first_task(self._fields, [(self._images, self._texts)], path)
    self._fields = self._fields.complete(self._images, self._texts)
    self.task = task or found

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: int) -> Sample:
    place = int(np.searchsorted(self._starts, index, side="right")) - 1
    number, group = (int(i) for i in self._groups[place])
    file, row = self._files[number], index - int(self._starts[place])
    columns = [*self._fields.text, self._fields.target, *(self._fields.references if self.task == "edit" else ())]
    with _open(file) as parquet:
      try:
        record = parquet.read_row_group(group, columns=columns).slice(row, 1).to_pylist()[0]
      except pa.ArrowException as error:
        raise UserError(f"{file}, row group {group} can't be read: {error}") from error
    images = {name: record[name] for name in columns if name in self._images}
    try:
      return build_sample(self.task, self._fields, images, record, lambda value: _decode(value, file.parent))
    except ValueError as error:
      raise UserError(f"{file}, row {row} of row group {group}: {error}") from error


def _find(path) -> list[epath.Path]:
  folder = epath.Path(path)
  if folder.is_dir() and not any(folder.glob("*.parquet")) and (folder / "data").is_dir():
    path = folder / "data"  # where Hugging Face puts them
  return find_files(path, r"\.parquet$")


def _of_split(files: list[epath.Path], split: str, name: str) -> list[epath.Path]:
  found = [re.match(r"(.+?)-\d+-of-\d+", file.name) for file in files]
  splits = sorted({match[1] for match in found if match})
  if not splits and not split:
    return files
  wanted = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
  chosen = [file for file, match in zip(files, found) if match and match[1] == wanted]
  if not chosen:
    raise UserError(f"{name} has no split {wanted!r}: set the option split to one of {', '.join(splits) or '(none)'}")
  return chosen


def _open(file: epath.Path) -> pq.ParquetFile:
  """Opened anew for every read: a ParquetFile isn't for several threads."""
  try:
    if "://" in str(file):
      return pq.ParquetFile(file.open("rb"))
    return pq.ParquetFile(str(file), memory_map=True)
  except (pa.ArrowException, OSError) as error:
    raise UserError(f"{file} can't be read as Parquet: {error}") from error


def _holds(kind: pa.DataType, test) -> bool:
  """Whether a column's type passes `test`, or is a list of what does."""
  return test(kind) or ((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and test(kind.value_type))


def _is_image(kind: pa.DataType) -> bool:
  if pa.types.is_struct(kind):
    return any(field.name == "bytes" and _is_image(field.type) for field in kind)
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _decode(value, folder: epath.Path) -> np.ndarray:
  """Bytes, or a struct {bytes, path} of which one may be null, -> uint8 [H,W,3]."""
  if isinstance(value, dict):
    if value.get("bytes") is None and not value.get("path"):
      raise UserError("an image has neither bytes nor a path")
    if value["bytes"] is None:
      return load_image(inside(folder, value["path"]))
    value = value["bytes"]
  return decode_image(value, "of this record")
