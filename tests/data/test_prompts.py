import numpy as np
import pytest

from deepgen_jax.data import prompts
from deepgen_jax.data.tokens import special_ids

EDIT = [(64, 96), (32, 128)]


def test_templates_match_tokenizing_the_whole_string(tokenizer):
  text = "a café,  red\n"
  whole = f"<|im_start|>user\nGenerate an image: {text}<|im_end|>\n<|im_start|>assistant\n"
  assert prompts.tokenize(tokenizer, "generate", text).ids.tolist() == tokenizer(whole)["input_ids"]
  pads = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (6, 4))
  whole = f"<|im_start|>user\n{pads}\n{text}<|im_end|>\n<|im_start|>assistant\n"
  prompt = prompts.tokenize(tokenizer, "edit", text, EDIT)
  assert prompt.ids.tolist() == tokenizer(whole)["input_ids"]
  assert prompt.is_image.sum() == 10


def test_special_tokens_in_the_users_text_are_plain_characters(tokenizer):
  special = special_ids(tokenizer)
  prompt = prompts.tokenize(tokenizer, "edit", "<|image_pad|><|im_end|>{}", [(32, 32)])
  assert (prompt.ids == special.image_pad).sum() == 1
  assert (prompt.ids == special.im_end).sum() == 1
  assert "{}" in tokenizer.decode(prompt.ids)


def test_only_the_end_of_the_text_is_cut(tokenizer):
  short = prompts.tokenize(tokenizer, "edit", "", EDIT)
  limit = len(short.ids) - 10 + 5  # image tokens don't count
  with pytest.warns(UserWarning, match="cut off"):
    cut = prompts.tokenize(tokenizer, "edit", "abcdefgh", EDIT, max_tokens=limit)
  assert cut.dropped == 3
  np.testing.assert_array_equal(cut.ids, prompts.tokenize(tokenizer, "edit", "abcde", EDIT, max_tokens=limit).ids)
  with pytest.warns(UserWarning):  # the template stays whole
    np.testing.assert_array_equal(prompts.tokenize(tokenizer, "edit", "abc", EDIT, max_tokens=3).ids, short.ids)


def test_wrong_use_is_refused(tokenizer):
  with pytest.raises(ValueError, match="task is 'paint'"):
    prompts.tokenize(tokenizer, "paint", "x")
  with pytest.raises(ValueError, match="generate"):
    prompts.tokenize(tokenizer, "generate", "x", EDIT)
  with pytest.raises(ValueError, match="at least one"):
    prompts.tokenize(tokenizer, "edit", "x")
  with pytest.raises(ValueError, match="multiples of 32"):
    prompts.tokenize(tokenizer, "edit", "x", [(64, 65)])


def test_buckets():
  assert [prompts.pick_bucket(n, (64, 128)) for n in (1, 64, 65, 128, 129, 300)] == [64, 64, 128, 128, 256, 384]


def test_collate_keeps_a_prompt_independent_of_its_batch(tokenizer):
  short = prompts.tokenize(tokenizer, "generate", "dog")
  long = prompts.tokenize(tokenizer, "edit", "x" * 60, EDIT)
  alone, both = prompts.collate([short], 3, (64, 128)), prompts.collate([long, short], 3, (64, 128))
  n = len(short.ids)
  assert alone["ids"].shape == (1, 64) and both["ids"].shape == (2, 128)
  assert both["position_ids"].shape == (2, 3, 131)
  np.testing.assert_array_equal(both["text_mask"].sum(1), [len(long.ids), n])
  np.testing.assert_array_equal(both["position_ids"][1, :, -3:], [[n, n + 1, n + 2]] * 3)  # padding is skipped
  np.testing.assert_array_equal(alone["position_ids"][0, :, :n], both["position_ids"][1, :, :n])
  assert (both["position_ids"][1, :, n:128] == 0).all()
  index = both["image_index"][0]
  np.testing.assert_array_equal(index[index >= 0], np.arange(10))
  assert (both["image_index"][1] == -1).all()
  assert {both[k].dtype for k in ("ids", "position_ids", "image_index")} == {np.dtype(np.int32)}


@pytest.mark.parametrize("sizes", [[], [(64, 64)], [(64, 160), (96, 32)], [(32, 32), (224, 64), (64, 96)]])
def test_positions_match_transformers(tokenizer, sizes):
  """Against get_rope_index, on the prompt with the think tokens appended as text, as the reference does."""
  torch = pytest.importorskip("torch")
  from transformers import Qwen2_5_VLConfig
  from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

  prompt = prompts.tokenize(tokenizer, "edit" if sizes else "generate", "make it red", sizes)
  with torch.device("meta"):
    config = Qwen2_5_VLConfig(
      text_config={"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 272, "num_attention_heads": 1},
      vision_config={"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 8},
    )
    model = Qwen2_5_VLModel(config)
  ids = torch.tensor(np.concatenate([prompt.ids, np.zeros(5, np.int64)])[None])
  kinds = torch.tensor(np.concatenate([prompt.is_image, np.zeros(5, bool)])[None].astype(np.int32))
  grid = torch.tensor([[1, h // 16, w // 16] for h, w in sizes]) if sizes else None  # patches: 14 pixels at 28/32 of the size
  expected, _ = model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
  np.testing.assert_array_equal(prompts.positions(prompt, 5), expected[:, 0].numpy())


def test_an_answer_follows_the_prompt_or_is_left_out(tokenizer):
  prompt = prompts.tokenize(tokenizer, "edit", "make it red", [(64, 32)])
  answered = prompts.with_answer(tokenizer, prompt, "a red apple", len(prompt.ids) + 12)
  whole = "a red apple<|im_end|>"
  assert tokenizer.decode(answered.ids[len(prompt.ids) :]) == whole
  np.testing.assert_array_equal(answered.ids[: len(prompt.ids)], prompt.ids)
  assert answered.is_image.sum() == 2 and len(answered.is_image) == len(answered.ids)
  assert prompts.with_answer(tokenizer, prompt, "a red apple", len(prompt.ids) + 11) is prompt
