"""Checkpoints of torch.save: what is read equals PyTorch's, and nothing of a file is ever run."""

import collections
import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from deepgen_jax.errors import UserError
from deepgen_jax.weights import torch_file

torch = pytest.importorskip("torch")


def save(path, values):
  torch.save(values, path)
  return path


def repacked(path, change):
  """The archive with `change(name, bytes) -> bytes or None` applied to each record."""
  with zipfile.ZipFile(path) as old:
    records = {name: old.read(name) for name in old.namelist()}
  with zipfile.ZipFile(path, "w") as new:
    for name, content in records.items():
      if (content := change(name, content)) is not None:
        new.writestr(name, content)
  return path


def with_pickle(path, payload):
  """A valid archive whose description is `payload`."""
  save(path, {"a": torch.zeros(2)})
  return repacked(path, lambda name, content: payload if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_values_equal_pytorchs(tmp_path, dtype):
  """Views, transposes, scalars, shared storage, parameters and nesting included."""
  base = (torch.randn(4, 6) * 3).to(dtype)
  values = {
    "state_dict": collections.OrderedDict(whole=base, view=base[1:3, ::2], turned=base.t(), scalar=base[2, 3], empty=base[:0]),
    "meta": {"epoch": 3, "names": ["a", ("b", None, True)], "rate": 1e-4},
  }
  if dtype.is_floating_point:
    values["parameter"] = torch.nn.Parameter(base.clone())
  loaded = torch_file.load(save(tmp_path / "x.pth", values))
  assert loaded["meta"] == values["meta"]
  tensors = {**values["state_dict"], **({"parameter": values["parameter"].detach()} if "parameter" in values else {})}
  for name, expected in tensors.items():
    ours = loaded.get(name) or loaded["state_dict"][name]
    assert ours.shape == tuple(expected.shape)
    assert ours.dtype == (ml_dtypes.bfloat16 if dtype == torch.bfloat16 else expected.numpy().dtype)
    np.testing.assert_array_equal(ours.read().astype(np.float64), expected.double().numpy())


def test_values_are_read_when_asked_for(tmp_path):
  path = save(tmp_path / "x.pth", {"a": torch.ones(100_000)})
  loaded = torch_file.load(path)
  os.truncate(path, 1000)
  with pytest.raises(UserError, match=r"x\.pth is damaged"):
    loaded["a"].read()


class Evil:
  """Leaves a file behind when it is unpickled."""

  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


@pytest.mark.parametrize("inside", [lambda x: x, lambda x: {"state_dict": {"w": torch.zeros(1), "x": x}}, lambda x: [x]])
def test_a_file_that_runs_code_is_refused_and_nothing_runs(tmp_path, inside):
  mark = tmp_path / "ran"
  path = save(tmp_path / "evil.pth", inside(Evil(f"touch {mark}")))
  with pytest.raises(UserError, match=r"evil\.pth asks for posix\.system, .*not run"):
    torch_file.load(path)
  assert not mark.exists()
  torch.load(path, weights_only=False)
  assert mark.exists()  # the file does what it says


def global_call(module, name, args=b"("):
  return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + args + b"tR."


def test_ways_around_the_names_are_closed(tmp_path):
  """Dotted names, builtins, extension codes, attributes of what is known, and numpy's or torch's own loaders."""
  attempts = {
    "dotted": (b"\x80\x04\x8c\x05torch\x8c\x0eSize.__class__\x93.", "torch.Size.__class__"),
    "eval": (global_call("builtins", "eval", b"(V1+1\n"), "builtins.eval"),
    "getattr": (global_call("builtins", "getattr"), "builtins.getattr"),
    "torch.load": (global_call("torch.serialization", "load"), "torch.serialization.load"),
    "numpy": (global_call("numpy.core.multiarray", "_reconstruct"), "numpy.core.multiarray._reconstruct"),
    "mmengine": (global_call("mmengine.logging", "HistoryBuffer"), "mmengine.logging.HistoryBuffer"),
  }
  for name, (payload, asked) in attempts.items():
    with pytest.raises(UserError, match=f"asks for {asked}"):
      torch_file.load(with_pickle(tmp_path / "x.pth", payload))
      pytest.fail(name)
  # Setting an attribute of the rebuilding function: BUILD with a slot state.
  payload = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x05\x00\x00\x00_callNu\x86b."
  for attempt in (payload, b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00_callNs\x86b."):
    with pytest.raises(UserError, match="damaged"):
      torch_file.load(with_pickle(tmp_path / "x.pth", attempt))


def test_a_tensor_can_not_reach_past_its_record(tmp_path):
  """The description is trusted with nothing: sizes and strides are checked against the record."""
  path = save(tmp_path / "x.pth", {"a": torch.arange(8.0)})
  short = lambda name, content: content[:16] if "/data/" in name else content
  with pytest.raises(UserError, match="reaches past the end"):
    torch_file.load(repacked(path, short))
  path = save(tmp_path / "x.pth", {"a": torch.arange(8.0)})
  with pytest.raises(UserError, match="missing"):
    torch_file.load(repacked(path, lambda name, content: None if "/data/" in name else content))


def test_damaged_files(tmp_path):
  path = save(tmp_path / "x.pth", {"a": torch.arange(100_000.0)})
  whole = path.read_bytes()
  for content in (whole[: len(whole) // 2], b"", b"no archive", pickle.dumps({"a": 1})):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth is damaged"):
      torch_file.load(path)
  old = io.BytesIO()
  torch.save({"a": torch.zeros(1)}, old, _use_new_zipfile_serialization=False)
  path.write_bytes(old.getvalue())
  with pytest.raises(UserError, match=r"1\.6 or newer"):
    torch_file.load(path)
  with pytest.raises(UserError, match=r"none\.pth is missing"):
    torch_file.load(tmp_path / "none.pth")


def test_a_flipped_byte_is_noticed(tmp_path):
  path = save(tmp_path / "x.pth", {"a": torch.arange(100_000.0)})
  tensor = torch_file.load(path)["a"]
  content = bytearray(path.read_bytes())
  at = content.index(np.arange(100_000, dtype=np.float32)[50_000:50_010].tobytes())
  content[at] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match="damaged"):
    tensor.read()
