"""safetensors files, written one tensor at a time: equal to the library's, and every kind of damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deepgen_jax.errors import UserError
from deepgen_jax.weights import tensors as files


def arrays():
  rng = np.random.default_rng(0)
  return {
    "b/half": rng.normal(size=(3, 5)).astype(np.float16),
    "a/full": rng.normal(size=(2, 3, 4)).astype(np.float32),
    "count": np.arange(5),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 4), np.float32),
    "brain": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
  }


def lazily(values):
  return {name: files.in_memory(value) for name, value in values.items()}


def test_reads_and_writes_what_the_library_does(tmp_path):
  values = arrays()
  files.write_file(tmp_path / "ours.safetensors", lazily(values))
  with safe_open(tmp_path / "ours.safetensors", framework="flax") as opened:
    assert set(opened.keys()) == set(values)
    for name, value in values.items():
      np.testing.assert_array_equal(np.asarray(opened.get_tensor(name)), value, err_msg=name)
  plain = {name: np.asarray(value) for name, value in values.items() if name != "brain"}
  save_file(plain, tmp_path / "theirs.safetensors")
  for file in ("ours", "theirs"):
    for name, tensor in files.open_file(tmp_path / f"{file}.safetensors").items():
      assert (tensor.shape, tensor.dtype) == (values[name].shape, values[name].dtype)
      np.testing.assert_array_equal(tensor.read(), values[name])
  assert load_file(tmp_path / "theirs.safetensors").keys() == plain.keys()


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
  alive = []

  def make(name, i):
    def read():
      alive.append(name)
      return np.full((4,), i, np.float32)

    return files.Tensor((4,), np.dtype(np.float32), read)

  tensors = {f"t{i}": make(f"t{i}", i) for i in range(5)}
  assert alive == []
  files.write_files(tmp_path / "x.safetensors", tensors, max_bytes=40)
  assert alive == list(tensors)  # each was read once, in order
  index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
  assert index["metadata"] == {"total_size": 80} and set(index["weight_map"]) == set(tensors)
  assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == [f"x-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  for i, (name, tensor) in enumerate(sorted(files.open_files(tmp_path / "x.safetensors").items())):
    assert name == f"t{i}" and (tensor.read() == i).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_leave_no_file(tmp_path, value):
  bad = lazily({"fine": np.zeros(2, np.float32), "bad": np.array([0, value], ml_dtypes.bfloat16)})
  with pytest.raises(UserError, match="bad holds NaN or infinite"):
    files.write_file(tmp_path / "x.safetensors", bad)
  assert not (tmp_path / "x.safetensors").exists()


def test_damage_is_named(tmp_path):
  path = tmp_path / "x.safetensors"
  save_file({"a": np.arange(100, dtype=np.float32), "b": np.zeros(3, np.float32)}, path)
  whole = path.read_bytes()
  header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])

  def rewritten(change):
    new = json.loads(json.dumps(header))
    change(new)
    encoded = json.dumps(new).encode()
    return len(encoded).to_bytes(8, "little") + encoded + whole[8 + int.from_bytes(whole[:8], "little") :]

  cases = {
    "ends after": whole[:-4],
    "no sensible length": b"\xff" * 8 + whole[8:],
    "damaged or no": whole[:8] + b"x" * (len(whole) - 8),
    "x.safetensors is damaged": b"",
    "isn't known": rewritten(lambda h: h["a"].update(dtype="F4")),
    "bytes, not those of": rewritten(lambda h: h["a"].update(shape=[101])),
  }
  for message, content in cases.items():
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
      files.open_file(path)
  with pytest.raises(UserError, match=r"y\.safetensors is missing"):
    files.open_file(tmp_path / "y.safetensors")
