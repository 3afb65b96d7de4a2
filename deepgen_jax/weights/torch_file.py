"""Reads what `torch.save` wrote, without PyTorch and without running anything: tensors and plain containers, nothing else.

A .pth file is a zip archive: a pickle that describes the objects, and one record of raw bytes a storage. The pickle goes
through an unpickler that knows a handful of names; whatever else the file asks for is refused by that name. Values are read
from the archive on demand.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from deepgen_jax.errors import UserError
from deepgen_jax.weights.tensors import Tensor

STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
_DATA_TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def load(path) -> Any:
  """The objects of a file: containers as they are, tensors as `Tensor`. Raises UserError if it is damaged, in the format of
  before PyTorch 1.6, or asks for anything but tensors and plain containers (nothing of it has run then).
  """
  path = epath.Path(path)
  try:
    archive = _Archive(path)
    return _Unpickler(archive).load()
  except UserError:
    raise
  except FileNotFoundError:
    raise UserError(f"{path} is missing") from None
  except Exception as error:  # a damaged pickle can fail in any way
    raise UserError(f"{path} is damaged, or no file that torch.save (1.6 or newer) wrote: {error}") from error


class _Archive:
  """The records of the zip archive. It stays open: its index is as long as the model has tensors."""

  def __init__(self, path: epath.Path):
    self.path = path
    self._archive = zipfile.ZipFile(path.open("rb") if "://" in str(path) else str(path))
    names = [name for name in self._archive.namelist() if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(names) != 1:
      raise ValueError(f"it has {len(names)} descriptions (data.pkl)")
    self._prefix = names[0].removesuffix("data.pkl")
    self.pickle = self._archive.read(names[0])
    self._sizes = {info.filename: info.file_size for info in self._archive.infolist()}
    if f"{self._prefix}byteorder" in self._sizes and self._archive.read(f"{self._prefix}byteorder") != b"little":
      raise ValueError("it was written on a big-endian machine")

  def tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple) -> Tensor:
    """A view of a storage; it must lie within it."""
    name = f"{self._prefix}data/{storage.key}"
    if name not in self._sizes:
      raise ValueError(f"the record {name} is missing")
    if min((offset, *shape, *strides), default=0) < 0 or len(shape) != len(strides):
      raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset}")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides)) if 0 not in shape else offset - 1
    if (last + 1) * storage.dtype.itemsize > self._sizes[name]:
      raise ValueError(f"a tensor reaches past the end of the record {name}")

    def read() -> np.ndarray:
      try:
        flat = np.frombuffer(self._archive.read(name), storage.dtype)
      except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{self.path} is damaged: record {name}: {error}") from error
      steps = tuple(s * storage.dtype.itemsize for s in strides)
      return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)

    return Tensor(tuple(shape), storage.dtype, read)


class _Storage:
  __slots__ = ("dtype", "key")

  def __init__(self, dtype, key):
    self.dtype, self.key = np.dtype(dtype), str(key)


class _Known:
  """Something that a pickle may call; it has no attributes that a pickle could set."""

  __slots__ = ("_call",)

  def __init__(self, call):
    object.__setattr__(self, "_call", call)

  def __call__(self, *args):
    return self._call(*args)

  def __setattr__(self, name, value):
    raise AttributeError(name)


class _Unpickler(pickle.Unpickler):
  """Knows tensors, their storages and plain containers."""

  def __init__(self, archive: _Archive):
    super().__init__(io.BytesIO(archive.pickle))
    self._archive = archive
    self._known: Mapping[tuple[str, str], Any] = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): _Known(lambda s, at, shape, strides, *_: archive.tensor(s, at, shape, strides)),
      ("torch._utils", "_rebuild_parameter"): _Known(lambda tensor, *_: tensor),
      ("torch", "Size"): tuple,
      **{("torch", name): name for name in (*STORAGES, *_DATA_TYPES)},
    }

  def find_class(self, module, name):
    if (module, name) not in self._known:
      raise UserError(
        f"{self._archive.path} asks for {module}.{name}, which is neither a tensor nor a plain container. It was not run, and "
        "the file is refused: save a plain state dict with torch.save(model.state_dict(), ...)"
      )
    return self._known[module, name]

  def persistent_load(self, pid):
    kind, storage, key, *_ = pid
    if kind != "storage" or storage not in STORAGES:
      raise ValueError(f"an unknown record {pid[:3]!r}")
    return _Storage(STORAGES[storage], key)
