"""CLIP against transformers, by way of a folder that its own save_pretrained wrote; and the preparation of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

from transformers import CLIPConfig as TheirConfig  # noqa: E402
from transformers import CLIPModel  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from deepgen_jax.errors import UserError  # noqa: E402
from deepgen_jax.models.clip import ImageTower, TextTower, preprocess  # noqa: E402
from deepgen_jax.weights.clip import load  # noqa: E402
from tests.models import oracle  # noqa: E402

END, PAD = 49, 0
LENGTHS = (4, 11, 7)


def make(activation="quick_gelu"):
  sizes = {"num_attention_heads": 2, "hidden_act": activation}
  text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 12}
  vision = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7}
  tokens = {"bos_token_id": 48, "eos_token_id": END, "pad_token_id": PAD}
  config = TheirConfig(text_config=text | sizes | tokens, vision_config=vision | sizes, projection_dim=24)
  return oracle.randomise(CLIPModel(config))


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def saved(request, tmp_path_factory):
  """A model and the folder that it was saved in."""
  folder, model = tmp_path_factory.mktemp("clip"), make(request.param)
  model.save_pretrained(folder)
  return folder, model


def random_ids():
  ids = np.random.default_rng(1).integers(1, 48, (len(LENGTHS), 12))
  for row, length in enumerate(LENGTHS):
    ids[row, length - 1], ids[row, length:] = END, PAD
  return ids


def features(output):
  """Newer releases wrap the projected features."""
  return getattr(output, "pooler_output", output)


def test_texts_of_unequal_length(saved):
  folder, model = saved
  config, params = load(folder)
  ids = random_ids()
  with torch.no_grad():
    mask = torch.tensor(np.arange(12) < np.array(LENGTHS)[:, None]).long()
    reference = features(model.get_text_features(input_ids=torch.tensor(ids), attention_mask=mask))
  ends = np.array(LENGTHS) - 1
  run = jax.jit(lambda params, ids: TextTower(config).apply({"params": params}, ids, ends))
  oracle.assert_close(run(params["text"], ids), reference)
  garbage = np.where(ids == PAD, 17, ids)
  assert np.array_equal(run(params["text"], garbage), run(params["text"], ids))


def test_images(saved):
  folder, model = saved
  config, params = load(folder)
  pixels = np.random.default_rng(2).normal(size=(3, 28, 28, 3)).astype(np.float32)
  with torch.no_grad():
    reference = features(model.get_image_features(pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)))
  run = jax.jit(lambda params, pixels: ImageTower(config).apply({"params": params}, pixels))
  oracle.assert_close(run(params["image"], pixels), reference)


@pytest.mark.parametrize("size", [(28, 28), (90, 61), (20, 75), (64, 64)])
def test_preparing_an_image(size):
  image = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
  processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
  reference = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
  ours = preprocess(image, 28)
  assert ours.dtype == np.float32
  assert np.allclose(ours, reference, atol=1e-5)


def test_what_is_wrong_with_a_folder(saved, tmp_path):
  folder, _ = saved
  with pytest.raises(UserError, match=r"config.json is missing"):
    load(tmp_path)
  config = (folder / "config.json").read_text()
  (tmp_path / "config.json").write_text(config)
  with pytest.raises(UserError, match=r"model.safetensors is missing"):
    load(tmp_path)
  tensors = load_file(folder / "model.safetensors")
  del tensors["visual_projection.weight"]
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(UserError, match=r"model.safetensors: weights don't fit.*\n.*visual_projection.weight: missing"):
    load(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')
  with pytest.raises(UserError, match=r"config.json is no config of a CLIP model"):
    load(tmp_path)


def test_an_unknown_activation(saved, tmp_path):
  folder, _ = saved
  config = (folder / "config.json").read_text().replace('"quick_gelu"', '"gelu"').replace('"gelu"', '"relu"')
  (tmp_path / "config.json").write_text(config)
  with pytest.raises(UserError, match=r"hidden_act 'relu'; known are quick_gelu, gelu"):
    load(tmp_path)


def test_shapes_follow_the_model(saved):
  config, params = load(saved[0])
  assert params["image"]["positions"].shape == (17, 40)
  assert params["text"]["layers"]["q"]["kernel"].shape == (3, 32, 32)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  assert config.max_length == 12 and config.projection_size == 24
