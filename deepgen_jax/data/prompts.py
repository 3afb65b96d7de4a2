"""Prompts as token ids and positions: the reference's templates, truncation, M-RoPE positions, right-padded buckets.

A batch's text slots are `[prompt | padding | think tokens]`; positions skip the padding, so that they don't depend on it.
"""

from __future__ import annotations

import bisect
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deepgen_jax.data.tokens import special_ids

GENERATION = "Generate an image: {}"
PIXELS_PER_TOKEN = 32  # a vision token stands for 32x32 pixels of a reference: the VLM sees references at 28/32 of their size
TEXT_BUCKETS = (64, 128, 256, 384, 512, 1024)
MAX_TOKENS = 1024
_TOKENIZER_LOCK = threading.Lock()  # Rust tokenizers refuse a second borrower while an option changes


@dataclass(frozen=True)
class Prompt:
  """One tokenized prompt. ids int32 [n]; image_sizes: (H, W) in pixels of its references, in order."""

  ids: np.ndarray
  image_sizes: tuple[tuple[int, int], ...]
  is_image: np.ndarray  # bool [n]: slots of vision tokens
  dropped: int = 0  # tokens of the user's text that were cut off


def image_tokens(height: int, width: int) -> int:
  """Vision tokens of a reference of this size in pixels (multiples of 32)."""
  if height % PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN:
    raise ValueError(f"reference of {height}x{width} pixels: sides must be multiples of {PIXELS_PER_TOKEN}")
  return (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)


def tokenize(
  tokenizer,
  task: str,
  text: str,
  image_sizes: Sequence[tuple[int, int]] = (),
  max_tokens: int = MAX_TOKENS,
  warn: bool = True,
) -> Prompt:
  """One prompt in the reference's template, as a user turn without a system prompt.

  task "generate": "Generate an image: " + text; "edit": the references (`<|vision_start|>` `<|image_pad|>` x n
  `<|vision_end|>` each), a newline, text. Special tokens inside `text` are plain characters. Where the tokens other than
  image tokens exceed `max_tokens`, the text loses its end, with a warning; the template is never cut.
  """
  if task not in ("generate", "edit"):
    raise ValueError(f"task is {task!r}; it must be 'generate' or 'edit'")
  if (task == "edit") != bool(image_sizes):
    raise ValueError(f"task {task!r} with {len(image_sizes)} reference images: 'generate' takes none, 'edit' at least one")
  special = special_ids(tokenizer)

  def plain(piece: str) -> list[int]:
    with _TOKENIZER_LOCK:
      return tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]

  head, images = [special.im_start], []
  if task == "generate":
    frame = "user\n" + GENERATION
  else:
    head, frame = [*head, *plain("user\n")], "\n{}"
    for height, width in image_sizes:
      images += [special.vision_start, *[special.image_pad] * image_tokens(height, width), special.vision_end]
  tail = [special.im_end, *plain("\n"), special.im_start, *plain("assistant\n")]
  body = plain(frame.replace("{}", text))
  pads = sum(image_tokens(*size) for size in image_sizes)
  room = max_tokens - (len(head) + len(images) - pads + len(tail))
  kept = max(room, len(plain(frame.replace("{}", "")))) if len(body) > room else len(body)
  dropped, body = len(body) - kept, body[:kept]
  if dropped and warn:
    message = f"the prompt {text[:40]!r}... is {dropped} tokens too long (limit {max_tokens}): its end is cut off"
    warnings.warn(message, stacklevel=2)
  ids = np.array([*head, *images, *body, *tail], np.int32)
  is_image = np.zeros(len(ids), bool)
  is_image[len(head) : len(head) + len(images)] = np.array(images, np.int32) == special.image_pad
  return Prompt(ids, tuple((int(h), int(w)) for h, w in image_sizes), is_image, dropped)


def with_answer(tokenizer, prompt: Prompt, answer: str, max_tokens: int) -> Prompt:
  """The prompt and, where both fit into `max_tokens`, the assistant's whole reply with its end token after it."""
  with _TOKENIZER_LOCK:
    reply = tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
  reply = np.array([*reply, special_ids(tokenizer).im_end], np.int32)
  if len(prompt.ids) + len(reply) > max_tokens:
    return prompt
  ids, is_image = np.concatenate([prompt.ids, reply]), np.concatenate([prompt.is_image, np.zeros(len(reply), bool)])
  return replace(prompt, ids=ids, is_image=is_image)


def positions(prompt: Prompt, num_think_tokens: int) -> np.ndarray:
  """M-RoPE positions (time, row, column) of a prompt and the think tokens after it: int32 [3, n + K].

  Text counts up on all three axes. An image keeps the time of its first slot, rows and columns count from there, and the next
  text starts one past the largest position used (transformers' get_rope_index for Qwen2.5-VL).
  """
  out = np.empty((3, len(prompt.ids) + num_think_tokens), np.int32)
  sizes = iter(prompt.image_sizes)
  slot, start = 0, 0
  while slot < out.shape[1]:
    if slot < len(prompt.ids) and prompt.is_image[slot]:
      rows, columns = (side // PIXELS_PER_TOKEN for side in next(sizes))
      grid = np.stack([np.zeros((rows, columns), np.int32), *np.indices((rows, columns), np.int32)])
      out[:, slot : slot + rows * columns] = start + grid.reshape(3, -1)
      slot, start = slot + rows * columns, start + max(rows, columns)
    else:
      out[:, slot] = start
      slot, start = slot + 1, start + 1
  return out


def pick_bucket(length: int, buckets: Sequence[int] = TEXT_BUCKETS) -> int:
  """The smallest bucket that holds `length` tokens; past the largest, the next multiple of the largest."""
  buckets = sorted(buckets)
  place = bisect.bisect_left(buckets, length)
  return buckets[place] if place < len(buckets) else -(-length // buckets[-1]) * buckets[-1]


def collate(prompts: Sequence[Prompt], num_think_tokens: int, buckets: Sequence[int] = TEXT_BUCKETS) -> dict:
  """Prompts -> ids int32 [B,T], text_mask bool [B,T], position_ids int32 [B,3,T+K], image_index int32 [B,T].

  T is the bucket of the longest prompt, padded on the right. position_ids: think tokens sit in the last K slots and continue
  their own prompt; padding has 0. image_index: k where the slot takes the k-th vision token of its sample (over all its
  references, in order), else -1.
  """
  batch, length = len(prompts), pick_bucket(max(len(p.ids) for p in prompts), buckets)
  out = {
    "ids": np.zeros((batch, length), np.int32),
    "text_mask": np.zeros((batch, length), bool),
    "position_ids": np.zeros((batch, 3, length + num_think_tokens), np.int32),
    "image_index": np.full((batch, length), -1, np.int32),
  }
  for row, prompt in enumerate(prompts):
    n, place = len(prompt.ids), positions(prompt, num_think_tokens)
    out["ids"][row, :n] = prompt.ids
    out["text_mask"][row, :n] = True
    out["position_ids"][row, :, :n] = place[:, :n]
    out["position_ids"][row, :, length:] = place[:, n:]
    out["image_index"][row, :n][prompt.is_image] = np.arange(prompt.is_image.sum(), dtype=np.int32)
  return out
