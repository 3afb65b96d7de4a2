"""Tensors that are read when they are needed, and safetensors files that are read and written one tensor at a time.

A model larger than the host's memory passes through here: every format is a mapping name -> `Tensor`, whose shape and dtype are
known from the file's header and whose values are read on demand. The safetensors layout is that of its specification: eight
bytes with the length of a JSON header, the header, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from etils import epath

from deepgen_jax.errors import UserError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_BYTES = 5 * 10**9  # of one file; larger models come in several with an index
MAX_HEADER = 100 * 10**6


@dataclass(frozen=True)
class Tensor:
  """A named tensor's shape and dtype, and how to get at its values (numpy; may be read-only)."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the values."""
    return self.size * self.dtype.itemsize


def in_memory(array) -> Tensor:
  """An array (or a Tensor, as it is) as a Tensor."""
  if isinstance(array, Tensor):
    return array
  array = np.asarray(array)
  return Tensor(array.shape, array.dtype, lambda: array)


def read_finite(name: str, tensor: Tensor) -> np.ndarray:
  """The values; UserError if one of them is NaN or infinite."""
  values = tensor.read()
  if values.dtype.kind not in "iub" and not np.isfinite(values).all():
    raise UserError(f"{name} holds NaN or infinite values: the file is from a run that diverged, or damaged")
  return values


def open_file(path) -> dict[str, Tensor]:
  """The tensors of one safetensors file (local or gs://). Raises UserError for a damaged or truncated one."""
  path = epath.Path(path)
  try:
    header, start, end = _header(path)
  except FileNotFoundError:
    raise UserError(f"{path} is missing") from None
  except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
    raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
  header.pop("__metadata__", None)
  tensors = {}
  for name, entry in header.items():
    try:
      dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(f"{path}: {name} is stored in a way that isn't known ({error!r}: {entry})") from error
    if not 0 <= first <= last or last - first != math.prod(shape) * dtype.itemsize:
      raise UserError(f"{path} is damaged: {name} has {last - first} bytes, not those of {dtype} {list(shape)}")
    if start + last > end:
      raise UserError(f"{path} is damaged: it ends after {end} bytes, {name} needs {start + last}; copy it again")
    tensors[name] = Tensor(shape, dtype, lambda at=start + first, s=shape, d=dtype: _read(path, at, s, d))
  return tensors


def _header(path: epath.Path) -> tuple[dict, int, int]:
  """-> (header, where the data starts, length of the file)."""
  length = path.stat().length
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= min(MAX_HEADER, length - 8):
      raise ValueError("its header has no sensible length")
    header = json.loads(file.read(size))
  if not isinstance(header, dict):
    raise ValueError("its header is no table")
  return header, 8 + size, length


def _read(path: epath.Path, at: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  count = math.prod(shape)
  with path.open("rb") as file:
    file.seek(at)
    values = np.frombuffer(file.read(count * dtype.itemsize), dtype)
  if len(values) != count:
    raise UserError(f"{path} became shorter while it was read")
  return values.reshape(shape)


def find_files(file) -> list[epath.Path]:
  """The file itself or, where there is an index beside it instead, every file that the index names; UserError if missing."""
  file = epath.Path(file)
  index = file.with_name(file.name + ".index.json")
  if file.exists():
    return [file]
  if not index.exists():
    raise UserError(f"{file} is missing, and so is {index.name}")
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f"{index} is damaged: {error!r}") from error
  if missing := [name for name in names if not (file.parent / name).exists()]:
    raise UserError(f"{index} names files that are missing: {', '.join(missing)}")
  return [file.parent / name for name in names]


def open_files(file) -> dict[str, Tensor]:
  """The tensors of a safetensors file, or of all that its index names."""
  return {name: tensor for part in find_files(file) for name, tensor in open_file(part).items()}


def has_files(file) -> bool:
  """Whether the file or its index is there."""
  file = epath.Path(file)
  return file.exists() or file.with_name(file.name + ".index.json").exists()


def write_file(path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
  """Writes tensors one after the other, so that one at a time is in memory. The file appears when it is complete, in place of
  an older one.

  Raises UserError for values that are NaN or infinite.
  """
  path = epath.Path(path)
  header, at = {"__metadata__": dict(metadata or {"format": "pt"})}, 0
  for name, tensor in tensors.items():
    header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
    at += tensor.nbytes
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)  # so that the data is aligned
  partial = path.with_name(path.name + ".partial")
  with partial.open("wb") as file:
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name, tensor in tensors.items():
      values = np.asarray(read_finite(name, tensor), order="C")
      if values.shape != tensor.shape or values.dtype != tensor.dtype:
        raise ValueError(f"{name}: {values.dtype} {values.shape}, announced as {tensor.dtype} {tensor.shape}")
      file.write(memoryview(values.reshape(-1).view(np.uint8)))
  partial.replace(path)


def write_files(file, tensors: Mapping[str, Tensor], max_bytes: int = MAX_BYTES) -> list[epath.Path]:
  """As `write_file`; above `max_bytes` into numbered files with an index, named as the Hugging Face libraries do."""
  file = epath.Path(file)
  groups: list[dict[str, Tensor]] = [{}]
  for name, tensor in tensors.items():
    if groups[-1] and sum(t.nbytes for t in groups[-1].values()) + tensor.nbytes > max_bytes:
      groups.append({})
    groups[-1][name] = tensor
  if len(groups) == 1:
    write_file(file, groups[0])
    return [file]
  stem, count = file.name.removesuffix(".safetensors"), len(groups)
  paths = [file.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors") for i in range(count)]
  for path, group in zip(paths, groups):
    write_file(path, group)
  where = {name: path.name for path, group in zip(paths, groups) for name in group}
  total = sum(tensor.nbytes for tensor in tensors.values())
  index = file.with_name(file.name + ".index.json")
  index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
  return paths


def describe(tensors: Sequence) -> str:
  """'12 tensors, 3,456 parameters, 6.8 KiB, bfloat16' of whatever has shapes and dtypes."""
  kinds = sorted({str(np.dtype(tensor.dtype)) for tensor in tensors})
  size = sum(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in tensors)
  unit = next((u for u in ((2**30, "GiB"), (2**20, "MiB")) if size >= u[0]), (2**10, "KiB"))
  count = sum(math.prod(tensor.shape) for tensor in tensors)
  return f"{len(tensors)} tensors, {count:,} parameters, {size / unit[0]:.1f} {unit[1]}, {' and '.join(kinds)}"
