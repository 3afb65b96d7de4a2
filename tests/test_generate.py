"""The generate command: the files that it writes, and its mistakes."""

import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepgen_jax import generate
from deepgen_jax.errors import run_command
from tests import small

SMALL = {"--height": 32, "--width": 64, "--steps": 2, "--guidance": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return small.save_model(tmp_path_factory.mktemp("model"), small.draw_params())


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
  """A pipeline and its programs are shared by the calls that open the same model."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(generate.DeepGenPipeline, "from_pretrained", functools.cache(generate.DeepGenPipeline.from_pretrained))
    yield


@pytest.fixture
def references(tmp_path):
  """Two PNG files."""
  files = [tmp_path / "one.png", tmp_path / "two.png"]
  for file, size in zip(files, ((32, 64), (64, 32))):
    Image.fromarray(small.random_image(*size)).save(file)
  return files


@pytest.fixture
def run(monkeypatch, capsys):
  """run(options, *more) -> (exit code, standard output, standard error) of the command, in process."""

  def run(options, *more):
    words = [word for pair in options.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, [*words, *more])])
    with pytest.raises(SystemExit) as end:
      run_command(generate.main)
    return end.value.code, *capsys.readouterr()

  return run


def read(file):
  with Image.open(file) as image:
    return np.asarray(image, int)


def options(model, output, **more):
  return {"--model": model, "--prompt": "a red apple", "--output": output} | SMALL | {f"--{k}": v for k, v in more.items()}


def test_one_image(run, model, tmp_path):
  file = tmp_path / "new" / "out.png"
  code, out, _ = run(options(model, file))
  assert code == 0 and out.strip() == str(file)
  assert read(file).shape == (32, 64, 3)
  assert os.listdir(file.parent) == ["out.png"]


def test_several_images_have_consecutive_seeds(run, model, tmp_path):
  code, out, _ = run(options(model, tmp_path / "out.png", num_images=2, seed=7))
  files = [tmp_path / "out_0.png", tmp_path / "out_1.png"]
  assert code == 0 and out.split() == [str(file) for file in files]
  for seed, file in zip((7, 8), files):
    assert run(options(model, tmp_path / "alone.png", seed=seed))[0] == 0
    assert np.abs(read(file) - read(tmp_path / "alone.png")).max() <= 1
  assert np.abs(read(files[0]) - read(files[1])).max() > 8
  assert sorted(os.listdir(tmp_path)) == ["alone.png", "out_0.png", "out_1.png"]


def test_an_edit_with_two_references(run, model, references, tmp_path):
  file = tmp_path / "out.png"
  assert run(options(model, file), "--image", *references)[0] == 0
  both = read(file)
  assert both.shape == (32, 64, 3)
  assert run(options(model, file), "--image", references[0])[0] == 0
  assert np.abs(read(file) - both).max() > 1


def test_file_formats(run, model, tmp_path):
  for suffix, kind in ((".jpg", "JPEG"), (".webp", "WEBP"), (".PNG", "PNG")):
    file = tmp_path / f"out{suffix}"
    assert run(options(model, file))[0] == 0
    with Image.open(file) as image:
      assert image.format == kind


@pytest.mark.parametrize(
  "changed, message",
  [
    ({"--prompt": " "}, "--prompt is empty"),
    ({"--image": "broken.png"}, "cannot read image"),
    ({"--image": "absent.png"}, "absent.png does not exist"),
    ({"--height": "40"}, "--height 40: must be a positive multiple of 16"),
    ({"--width": None}, "both --height and --width"),
    ({"--width": "208"}, "from 16 to 192"),
    ({"--num_image": "2"}, "unknown option '--num_image'. Did you mean '--num_images'?"),
    ({"--steps": "0"}, "--steps 0: must be at least 1"),
    ({"--model": "absent"}, "no such folder"),
    ({"--model": "empty"}, "neither a model directory"),
    ({"--model": "workdir"}, "has no complete checkpoint yet"),
    ({"--output": "out.gif"}, "name a .png, .jpg or .webp file"),
    ({"--output": "empty"}, "name a .png, .jpg or .webp file"),
    ({"--output": "broken.png/out.png"}, "is a file, not a folder"),
    ({"--weights": "best"}, "--weights"),
    ({"--steps": "many"}, "--steps"),
  ],
  ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_mistakes_end_with_code_2_and_one_message(run, model, changed, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Path("broken.png").write_text("no image")
  Path("empty").mkdir()
  Path("workdir/checkpoints").mkdir(parents=True)
  Path("workdir/config.json").write_text('{"init": "absent", "lora": {"targets": []}}')
  before = sorted(tmp_path.rglob("*"))
  given = options(model, "new/out.png") | changed
  code, out, error = run({name: value for name, value in given.items() if value is not None})
  assert code == 2 and message in error and out == ""
  assert error.count("error:") == 1 and "Traceback" not in error
  assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_option_is_named(run):
  code, _, error = run({"--prompt": "a red apple"})
  assert code == 2 and "--model" in error and "--output" in error
