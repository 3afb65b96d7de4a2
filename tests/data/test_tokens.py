import pytest

from deepgen_jax.data import tokens
from deepgen_jax.errors import UserError


def test_bytes_come_in_gpt2_order_and_specials_after_them(tokenizer):
  assert len(tokenizer) == 270
  assert tokenizer("!~¡")["input_ids"] == [0, 93, 126, 94]  # '!' is byte 33; '¡' is the bytes c2 a1
  assert tokens.special_ids(tokenizer) == (256, 257, 258, 265, 266, 268)
  assert tokenizer(" ")["input_ids"] == [220]  # as in Qwen and GPT-2


def test_round_trip_of_any_text_and_of_the_folder(tokenizer, tmp_path):
  tokenizer.save_pretrained(tmp_path)
  loaded = tokens.load_tokenizer(tmp_path)
  text = "<|im_start|>user\nGenerate an image: a café ☕\t红色  <|im_end|>"
  assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
  assert loaded.decode(loaded(text)["input_ids"]) == text
  assert len(loaded) == 270
  assert loaded.padding_side == "right"


def test_a_missing_or_foreign_folder_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match=r"no tokenizer in .*nowhere"):
    tokens.load_tokenizer(tmp_path / "nowhere")
  for name in ("tokenizer.json", "vocab.json"):  # the second with merges, of an older format
    (tmp_path / name).mkdir()
    for file in (name, "merges.txt"):
      (tmp_path / name / file).write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
      tokens.load_tokenizer(tmp_path / name)


def test_a_tokenizer_without_the_vision_tokens_is_refused():
  from transformers import Qwen2Tokenizer

  with pytest.raises(UserError, match=r"no <\|im_start\|>"):
    tokens.special_ids(Qwen2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]))
