"""WebDataset tars, read at random: their headers are scanned once, and where each member lies is kept beside them.

Members that share a name up to the first dot are a sample: "0001.jpg 0001.txt", "0001.jpg 0001.json" (its strings are texts),
"0001.input.jpg 0001.output.jpg 0001.txt" (an edit), with "input_0", "input_1" ... for several references.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from deepgen_jax.data.files import find_files
from deepgen_jax.data.formats.fields import as_fields, build_sample, first_task
from deepgen_jax.data.formats.index import cached_index
from deepgen_jax.data.images import decode_image
from deepgen_jax.data.sources import IMAGE_SUFFIXES, Sample
from deepgen_jax.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".caption")


class Tars:
  """The samples of uncompressed tars, in order of tar and of first member."""

  def __init__(self, path, *, task="", text="", target="", references=(), cache=""):
    """path: "shards/{000..099}.tar", a glob, a folder, one tar; local or gs://. text, target, references: names of members
    without their suffix ("input" for 0001.input.jpg) or of strings in a sample's .json. cache: a folder for the indices where
    the tars' own can't be written. Raises UserError for a tar that is compressed or damaged.
    """
    self.name = f"wds:{path}"
    self._files = find_files(path, r"\.tar$")
    self._fields = as_fields(text, target, references)
    with ThreadPoolExecutor(16) as pool:
      indices = list(pool.map(lambda file: cached_index(file, cache, _scan), self._files))
    # 20 bytes a member and 8 a sample, whatever their names are.
    self._kinds = sorted({str(kind) for index in indices for kind in index["kinds"]})
    places = {kind: i for i, kind in enumerate(self._kinds)}
    renumber = [np.array([places[str(k)] for k in index["kinds"]], np.uint32) for index in indices]
    self._kind = np.concatenate([table[index["kind"]] for table, index in zip(renumber, indices)])
    self._offset = np.concatenate([index["offset"] for index in indices])
    self._size = np.concatenate([index["size"] for index in indices])
    members = np.concatenate([index["members"] for index in indices])  # of each sample
    self._starts = np.cumsum([0, *members])
    self._first = np.cumsum([0, *(len(index["members"]) for index in indices)])  # sample of each tar
    self._wanted, self.task = task, task or first_task(self._fields, self._heads(100), path)

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: int) -> Sample:
    file = self._files[self._tar(index)]
    try:
      images, texts = self._record(index)
      decode = lambda place: decode_image(_read(file, place), f"at byte {place[0]}")
      return build_sample(self._wanted, self._fields, images, texts, decode)
    except ValueError as error:
      raise UserError(f"{file}, sample {index - self._first[self._tar(index)]}: {error}") from error

  def _record(self, index: int) -> tuple[dict, dict]:
    """(images, texts) of a sample; images are (offset, size) in its tar."""
    file = self._files[self._tar(index)]
    images, texts, described = {}, {}, {}
    for row in range(self._starts[index], self._starts[index + 1]):
      kind, place = self._kinds[self._kind[row]], (int(self._offset[row]), int(self._size[row]))
      if kind == "json":
        described = _strings(_read(file, place))
      elif f".{kind}".endswith(IMAGE_SUFFIXES):
        images[kind.rpartition(".")[0] or "image"] = place
      elif f".{kind}".endswith(TEXT_SUFFIXES):
        texts[kind.rpartition(".")[0] or "txt"] = _read(file, place).decode()
    return images, described | texts

  def _tar(self, index: int) -> int:
    return int(np.searchsorted(self._first, index, side="right")) - 1

  def _heads(self, count: int) -> Iterator[tuple[dict, dict]]:
    for index in range(min(len(self), count)):
      try:
        yield self._record(index)
      except ValueError:  # broken samples are for training to count
        continue


def _read(file: epath.Path, place: tuple[int, int]) -> bytes:
  offset, size = place
  with file.open("rb") as tar:
    tar.seek(offset)
    return tar.read(size)


def _strings(data: bytes) -> dict:
  """What can be texts in a sample's .json."""
  values = json.loads(data)
  if not isinstance(values, dict):
    raise UserError("its .json is not an object")
  return {name: value for name, value in values.items() if isinstance(value, str | list)}


def _scan(file: epath.Path) -> dict[str, np.ndarray]:
  """Reads a tar's headers: kinds (suffixes), kind, offset and size of each member, grouped by sample, members of each."""
  samples: dict[str, list[tuple[str, int, int]]] = {}
  with file.open("rb") as stream:
    if stream.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
      raise UserError(f"{file} is compressed, so its samples can't be read at random: decompress it first")
    stream.seek(0)
    try:
      with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
          folder, _, name = member.name.rpartition("/")
          key, _, kind = name.partition(".")
          if member.isfile() and key and kind and member.size:  # "._x" is no sample
            samples.setdefault(f"{folder}/{key}", []).append((kind.lower(), member.offset_data, member.size))
        stream.seek(tar.offset)
        if stream.read(512).strip(b"\0"):  # tarfile ends without a word where a later header is damaged
          raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
      raise UserError(f"{file} is damaged or no tar ({error}): fetch or pack it again, or leave it out") from error
  rows = [row for members in samples.values() for row in members]
  kinds = sorted({kind for kind, _, _ in rows})
  return {
    "kinds": np.array(kinds, np.str_),
    "kind": np.array([kinds.index(kind) for kind, _, _ in rows], np.uint32),
    "offset": np.array([offset for _, offset, _ in rows], np.int64),
    "size": np.array([size for _, _, size in rows], np.int64),
    "members": np.array([len(members) for members in samples.values()], np.int64),
  }
