"""Our model directory: what is written comes back, and nothing is loaded loosely."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deepgen_jax.errors import UserError
from deepgen_jax.weights import model_dir
from tests.small import CONFIG, draw_params


@pytest.fixture(scope="module")
def params():
  return {"scb": draw_params()["scb"]}


def test_what_is_saved_comes_back(params, tmp_path):
  model_dir.save(tmp_path, CONFIG, jax.tree.map(np.zeros_like, params))
  model_dir.save(tmp_path, CONFIG, params)  # in place of the older ones
  loaded = model_dir.load(tmp_path)
  assert loaded.keys() == {"scb"} and model_dir.load_config(tmp_path) == CONFIG
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_every_tensor_that_does_not_fit_is_named(params, tmp_path):
  model_dir.save(tmp_path, CONFIG, params)
  file = tmp_path / "scb.safetensors"
  tensors = load_file(file)
  tensors["think_tokens"] = tensors["think_tokens"][:1]
  tensors["extra"] = tensors.pop("projector/bias")
  save_file(tensors, file)
  with pytest.raises(UserError) as error:
    model_dir.load(tmp_path)
  for part in ("3 problem(s)", "think_tokens is (1, 32), expected (3, 32)", "extra is unknown", "projector/bias is missing"):
    assert part in str(error.value)


def test_a_damaged_or_newer_directory_is_refused(params, tmp_path):
  model_dir.save(tmp_path, CONFIG, params)
  (tmp_path / "scb.safetensors").write_bytes(b"not tensors")
  with pytest.raises(UserError, match=r"scb\.safetensors is damaged"):
    model_dir.load(tmp_path)
  values = json.loads((tmp_path / "model.json").read_text())
  (tmp_path / "model.json").write_text(json.dumps(values | {"format": 99}))
  with pytest.raises(UserError, match="format 99"):
    model_dir.load(tmp_path)
