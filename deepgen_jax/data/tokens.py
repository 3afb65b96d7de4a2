"""The byte-level tokenizer of the tiny model, and reading a tokenizer from a folder. No torch is needed.

The tiny tokenizer is the Qwen2 tokenizer without merges: ids 0-255 are the bytes in GPT-2's order, then the special tokens
in Qwen2.5's order. Code asks for special ids by name (`special_ids`), so the real Qwen2.5 tokenizer works unchanged.
"""

from __future__ import annotations

import os
import tempfile
from typing import NamedTuple

from etils import epath

from deepgen_jax.errors import UserError

SPECIAL_TOKENS = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|object_ref_start|>",
  "<|object_ref_end|>",
  "<|box_start|>",
  "<|box_end|>",
  "<|quad_start|>",
  "<|quad_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
)


_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.json",
  "chat_template.jinja",
)


class SpecialIds(NamedTuple):
  """Ids of the tokens that the prompt templates need."""

  endoftext: int
  im_start: int
  im_end: int
  vision_start: int
  vision_end: int
  image_pad: int


def byte_alphabet() -> list[str]:
  """The 256 printable characters that stand for bytes, in GPT-2's order: printable bytes first, the others after them.

  Printable bytes stand for themselves; the n-th other byte is chr(256 + n).
  """
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def build_tiny_tokenizer():
  """A transformers Qwen2 tokenizer with 270 entries (the tiny model's vocabulary has 272); padding on the right."""
  _without_advice()
  from transformers import AddedToken, Qwen2Tokenizer

  vocab = {token: i for i, token in enumerate([*byte_alphabet(), *SPECIAL_TOKENS])}
  tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], padding_side="right", clean_up_tokenization_spaces=False)
  tokenizer.add_special_tokens(
    {"additional_special_tokens": [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS[1:]]}
  )
  return tokenizer


def load_tokenizer(path: str | os.PathLike):
  """Reads the tokenizer of a model, as `read_tokenizer`. Raises UserError too if it lacks a token that the prompts need."""
  tokenizer = read_tokenizer(path, "Qwen2Tokenizer")  # the automatic choice would import PyTorch where it is installed
  special_ids(tokenizer)
  return tokenizer


def read_tokenizer(path: str | os.PathLike, kind: str = "AutoTokenizer"):
  """Reads the tokenizer that `save_pretrained` wrote to the folder `path` (local or gs://); never goes to the network.
  kind: its class in transformers.

  Raises UserError if the folder isn't there or can't be read.
  """
  _without_advice()
  import transformers

  folder = epath.Path(path)
  if not folder.is_dir() or not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
    raise UserError(f"no tokenizer in {path}: expected a folder with tokenizer.json. Give the tokenizer/ folder of a model.")
  try:
    return getattr(transformers, kind).from_pretrained(str(_local(folder)), local_files_only=True)
  except Exception as error:  # a damaged file can fail in any way: tokenizers raises nothing narrower
    raise UserError(f"cannot read the tokenizer in {path}: {error}") from error


def copy_tokenizer(source: str | os.PathLike, target: str | os.PathLike) -> None:
  """Copies a tokenizer's files as they are: releases of transformers don't read each other's rewritten ones."""
  target = epath.Path(target)
  target.mkdir(parents=True, exist_ok=True)
  for name in _FILES:
    if (file := epath.Path(source) / name).exists():
      file.copy(target / name, overwrite=True)


def special_ids(tokenizer) -> SpecialIds:
  """Looks up the template's special tokens by name. Raises UserError if the tokenizer lacks one."""
  names = [f"<|{name}|>" for name in SpecialIds._fields]
  ids = tokenizer.convert_tokens_to_ids(names)
  for name, found in zip(names, tokenizer.convert_ids_to_tokens([0 if i is None else i for i in ids])):
    if name != found:
      raise UserError(f"the tokenizer has no {name}: it is not a Qwen2.5-VL tokenizer. Use the model's own tokenizer/.")
  return SpecialIds(*ids)


def _without_advice() -> None:
  """transformers would advise to install PyTorch, which nothing here needs."""
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _local(folder: epath.Path) -> epath.Path:
  """transformers reads local folders only: a remote one is copied to a temporary folder first."""
  if "://" not in str(folder):
    return folder
  target = epath.Path(tempfile.mkdtemp(prefix="tokenizer-"))
  for file in folder.iterdir():
    if file.suffix in (".json", ".txt", ".jinja"):
      file.copy(target / file.name)
  return target
