"""The reward against transformers from the folder to the cosine: tokens, images and networks."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import CLIPConfig, CLIPModel, CLIPTokenizer  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from deepgen_jax.errors import UserError  # noqa: E402
from deepgen_jax.rewards import clip_sim  # noqa: E402
from deepgen_jax.rewards.registry import build  # noqa: E402
from deepgen_jax.rewards.reward import Item  # noqa: E402
from tests.models import oracle  # noqa: E402

PROMPTS = ["a cat", "two dogs in the rain", "", "word " * 30]  # the last is longer than the model's 16 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  letters = "abcdefghijklmnopqrstuvwxyz"
  pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
  tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16)
  tokenizer.save_pretrained(folder)
  sizes = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
  text = {"vocab_size": len(pieces), "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
  config = CLIPConfig(text_config=sizes | text, vision_config=sizes | {"image_size": 28, "patch_size": 7}, projection_dim=24)
  oracle.randomise(CLIPModel(config)).save_pretrained(folder)
  return folder


def images():
  rng = np.random.default_rng(4)
  return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 64), (40, 90), (28, 28), (64, 64))]


def test_cosines(folder):
  model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
  processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
  with torch.no_grad():
    out = model(
      **tokenizer(PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt"),
      pixel_values=torch.tensor(processor(images(), return_tensors="np")["pixel_values"]),
    )
  reference = (out.text_embeds * out.image_embeds).sum(1)
  reward = build("clip_sim", path=folder)
  items = [Item(prompt, image) for prompt, image in zip(PROMPTS, images())]
  scores = reward(items)
  assert scores.dtype == np.float64
  assert np.allclose(scores, reference, atol=1e-5)
  assert np.ptp(scores) > 0.05


def test_scores_do_not_depend_on_the_call(folder, monkeypatch):
  monkeypatch.setattr(clip_sim, "BATCH", 3)  # so that more than one batch is run
  reward = build("clip_sim", path=folder)
  items = [Item(prompt, image) for prompt in PROMPTS[:2] for image in images()]
  together = reward(items)
  alone = np.concatenate([reward([item]) for item in reversed(items)])[::-1]
  assert np.allclose(together, alone, atol=1e-6)


def test_a_folder_without_a_tokenizer(folder, tmp_path):
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  with pytest.raises(UserError, match="no tokenizer in"):
    build("clip_sim", path=tmp_path)
