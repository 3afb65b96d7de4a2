import numpy as np
import pytest

from deepgen_jax.data.formats.fields import Fields, as_fields, build_sample
from deepgen_jax.errors import UserError


@pytest.mark.parametrize(
  "images, texts, expected",
  [
    ("image", "caption url", ("caption", "image", "")),
    ("jpg image", "txt", ("txt", "image", "")),
    ("original_image edited_image", "edit_prompt original_prompt", ("edit_prompt", "edited_image", "original_image")),
    ("source_img target_img mask_img", "instruction", ("instruction", "target_img", "source_img")),
    ("input_image output_image", "instruction txt", ("instruction", "output_image", "input_image")),
    ("input_10 input_2 output", "prompt", ("prompt", "output", "input_2 input_10")),
    ("image_path", "txt", ("txt", "image_path", "")),
    ("Source Target", "Caption", ("Caption", "Target", "Source")),
  ],
)
def test_names_that_data_sets_use(images, texts, expected):
  fields = Fields().complete(images.split(), texts.split())
  assert (" ".join(fields.text), fields.target, " ".join(fields.references)) == expected
  assert fields.task == ("edit" if expected[2] else "generate")


def test_the_config_overrules():
  fields = as_fields("long, short", "photo", ["a", "b"]).complete(["image", "input", "photo"], ["caption"])
  assert fields == Fields(("long", "short"), "photo", ("a", "b"))
  for options in ({"text": 3}, {"target": ["a"]}, {"references": [1]}):
    with pytest.raises(UserError, match="field"):
      as_fields(**options)


def test_what_is_missing_is_named():
  with pytest.raises(UserError, match="no text among the fields image, url"):
    Fields().complete(["image"], ["url"])
  with pytest.raises(UserError, match="no target image among the fields caption, photo"):
    Fields().complete(["photo"], ["caption"])


PIXELS = {n: np.full((1, 1, 3), n, np.uint8) for n in range(4)}
build = lambda task, fields, images, texts: build_sample(task, as_fields(*fields), images, texts, PIXELS.__getitem__)


def test_samples_have_all_references_and_wordings():
  texts = {"a": ["one ", "two"], "b": "three"}
  sample = build("edit", ("a,b", "target", "x,y"), {"target": 0, "x": [1, 2], "y": 3}, texts)
  assert sample.texts == ("one", "two", "three") and sample.target[0, 0, 0] == 0
  assert [r[0, 0, 0] for r in sample.references] == [1, 2, 3]
  assert build("generate", ("b", "target", "x"), {"target": 0, "x": "not read"}, texts).references == ()


@pytest.mark.parametrize(
  "images, texts, message",
  [
    ({"target": 0}, {"a": "x"}, "image 'source' is missing"),
    ({"target": 0, "source": None}, {"a": "x"}, "image 'source' is missing"),
    ({"target": 0, "source": []}, {"a": "x"}, "image 'source' is missing"),
    ({"target": [0, 1], "source": 2}, {"a": "x"}, "'target' has 2 images"),
    ({"target": 0, "source": 1}, {"a": None}, "text 'a' is missing"),
    ({"target": 0, "source": 1}, {"a": []}, "text 'a' is missing"),
  ],
)
def test_broken_records(images, texts, message):
  with pytest.raises(UserError, match=message):
    build("edit", ("a", "target", "source"), images, texts)
