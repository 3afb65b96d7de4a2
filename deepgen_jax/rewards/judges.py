"""Judges: vision-language models behind an OpenAI-compatible endpoint (vLLM, SGLang) that say how good an image is.

    unifiedreward_think   win rate within the group, every pair in both orders           0..1
    unifiedreward         mean of the Alignment and Style scores of one image            1..5
    ocr_vllm              share of the prompt's text that is drawn correctly             0..1
    editreward            smaller of edit success and preservation of the rest           0..1

For the first two: `vllm serve CodeGoat24/UnifiedReward-Think-qwen3vl-8b --served-model-name UnifiedReward --limit-mm-per-prompt
'{"image": 2}'`. The others are questions for any capable model. A request is one user message, images first, at temperature 0.

An answer counts only if it is exactly of the form that was asked for. Anything else is missing: neither a tie, nor a zero, nor
the batch's mean (the reference's choices), which would make training follow the judge's failures.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from deepgen_jax.errors import UserError
from deepgen_jax.rewards.http import Client, Failure, Post, encode_image, finite, scores, tally
from deepgen_jax.rewards.reward import Item

# unifiedreward_think.txt and unifiedreward.txt are, to the letter, what these models' authors ask them: the wording is part of
# the protocol that they are trained for. From github.com/CodeGoat24/UnifiedReward (MIT, see NOTICE) at 53e1343, the files
# UnifiedReward-Think/inference_qwen/UnifiedReward-Think-qwen3-inference/qwen3_infer_cot_image_generation.py and
# inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py. The other two texts are this project's.
TEMPLATES = Path(__file__).parent.parent / "assets" / "judges"

VERDICT = re.compile(r"\s*<answer>\s*Image ([12]) is better\s*</answer>\s*")
AXIS = re.compile(r"^[ \t]*(Alignment|Coherence|Style) Score \(1-5\):[ \t]*([0-9]+(?:\.[0-9]+)?)[ \t]*$", re.MULTILINE)
FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


class Judge:
  """How a judge is asked. failures: requests (for pairwise judges: one of an ordered pair) without a usable answer, by reason.

  url: of the server, with or without /v1. model: its served name. template: a text file with {prompt} in it, instead of the
  judge's own; the form of the answers stays. max_tokens: of an answer, thinking included. options: Client's.
  """

  def __init__(self, name: str, url: str, model: str, template: str | None = None, max_tokens: int = 4096, **options):
    self.name, self.model, self.max_tokens = name, model, max_tokens
    self.client = Client(url.rstrip("/").removesuffix("/v1"), **options)
    self.template = read_template(template or TEMPLATES / f"{name}.txt")
    self.failures: Counter = Counter()

  def ask(self, post: Post, images: Sequence[str], prompt: str) -> str:
    """The model's answer to the template about `images` (base64 PNG). Raises Failure."""
    pictures = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
    text = self.template.replace("{prompt}", prompt)
    message = {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}
    body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": self.max_tokens}
    return read_completion(post("/v1/chat/completions", body))


class Pointwise(Judge):
  """Scores each image by itself. read: an answer -> the score, or Failure. edits: whether the source images are shown first."""

  def __init__(self, name: str, read: Callable[[str], float], url: str, model: str, edits: bool = False, **options):
    super().__init__(name, url, model, **options)
    self.read, self.edits = read, edits

  def __call__(self, items: Sequence[Item]) -> np.ndarray:
    return scores(self.name, self.failures, self.client.map(self._score, items))

  def _score(self, post: Post, item: Item) -> float:
    if self.edits and not item.references:
      raise Failure("no source image", f"the prompt {item.prompt[:100]!r} is not an edit")
    sources = item.references if self.edits else ()
    return self.read(self.ask(post, [encode_image(image) for image in (*sources, item.image)], item.prompt))


class Pairwise(Judge):
  """Compares all images of a group with each other; a score is the win rate. All requests of all groups are in flight at once,
  as far as the client's concurrency allows: n (n - 1) for a group of n.
  """

  def __call__(self, items: Sequence[Item]) -> np.ndarray:
    groups: dict[int, list[int]] = {}
    for index, item in enumerate(items):
      groups.setdefault(item.group, []).append(index)
    orders = [order for members in groups.values() for order in itertools.permutations(members, 2)]
    picture = functools.cache(lambda index: encode_image(items[index].image))

    def first_wins(post: Post, order: tuple[int, int]) -> bool:
      return read_verdict(self.ask(post, [picture(index) for index in order], items[order[0]].prompt))

    verdicts = self.client.map(first_wins, orders)
    lonely = [Failure("alone in its group", "nothing to compare with") for members in groups.values() if len(members) == 1]
    tally(self.name, self.failures, [*verdicts, *lonely])
    return win_rates(len(items), {order: v for order, v in zip(orders, verdicts) if not isinstance(v, Failure)})


def win_rates(count: int, first_wins: Mapping[tuple[int, int], bool]) -> np.ndarray:
  """float64 [count]: wins / comparisons of each image, NaN for an image without any.

  first_wins[i, j]: whether image i, shown first, won against j, shown second. A pair counts only if both orders were answered:
  one order alone would carry the judge's liking for a position into the score. Who wins both orders wins the pair. If the same
  position won twice, the judge answered and told no difference but the position: half a win each, the mean of the two orders.
  """
  points, games = np.zeros(count), np.zeros(count)
  for (i, j), won in first_wins.items():
    if i < j and (j, i) in first_wins:
      share = (won + (not first_wins[j, i])) / 2
      points[i] += share
      points[j] += 1 - share
      games[[i, j]] += 1
  return np.divide(points, games, out=np.full(count, math.nan), where=games > 0)


def read_template(file: str | Path) -> str:
  """The text of a template. Raises UserError if it can't be read or has no place for the prompt."""
  try:
    text = epath.Path(file).read_bytes().decode()
  except (OSError, ValueError) as error:
    raise UserError(f"can't read the judge's template {file}: {error}") from error
  if "{prompt}" not in text:
    raise UserError(f"the judge's template {file} has no {{prompt}}: write it where the prompt belongs")
  return text


def read_completion(answer: dict) -> str:
  """The text of a chat completion. Raises Failure if there is none, or if it was cut off at max_tokens."""
  try:
    choice = answer["choices"][0]
    text, end = choice["message"]["content"], choice.get("finish_reason")
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise Failure("wrong answer", f"not a chat completion: {answer!r:.300}") from error
  if end == "length":
    raise Failure("cut off", "the answer is longer than max_tokens")
  if not isinstance(text, str):
    raise Failure("wrong answer", f"no text: {answer!r:.300}")
  return text


def read_verdict(text: str) -> bool:
  """Whether the first image won. Thinking may come before; nothing else but one <answer> may."""
  match = VERDICT.fullmatch(_conclusion(text))
  if not match:
    raise _unreadable(text)
  return match[1] == "1"


def read_axes(text: str) -> float:
  """Mean of Alignment and Style, 1..5, as the reference takes it; Coherence must be there but does not count."""
  found = AXIS.findall(_conclusion(text))
  values = {axis: float(value) for axis, value in found}
  if len(found) != 3 or len(values) != 3 or not all(1 <= value <= 5 for value in values.values()):
    raise _unreadable(text)
  return (values["Alignment"] + values["Style"]) / 2


def read_ocr(text: str) -> float:
  """The share of correct characters, 0..1. A null score says that the prompt asks for no text: missing."""
  answer = _json_object(text)
  if "score" in answer and answer["score"] is None:
    raise Failure("no text asked for")
  return _within(answer.get("score"), 1, text)


def read_edit(text: str) -> float:
  """min(success, preservation) / 25, 0..1: an unchanged image preserves all and an unrelated one may show the edit, so that a
  mean would pay for either (the minimum is VIEScore's rule, arXiv 2312.14867).
  """
  values = _json_object(text).get("score")
  if not isinstance(values, list) or len(values) != 2:
    raise _unreadable(text)
  return min(_within(value, 25, text) for value in values) / 25


def _conclusion(text: str) -> str:
  return text.rpartition("</think>")[2]


def _json_object(text: str) -> dict:
  text = _conclusion(text).strip()
  fenced = FENCED.fullmatch(text)
  try:
    answer = json.loads(fenced[1] if fenced else text)
  except (ValueError, RecursionError) as error:
    raise _unreadable(text) from error
  if not isinstance(answer, dict):
    raise _unreadable(text)
  return answer


def _within(value: Any, largest: float, text: str) -> float:
  number = finite(value)
  if number is None or not 0 <= number <= largest:
    raise _unreadable(text)
  return number


def _unreadable(text: str) -> Failure:
  return Failure("unreadable answer", f"...{text[-300:]}" if len(text) > 300 else text)


def unifiedreward_think(url: str, model: str = "UnifiedReward", **options) -> Pairwise:
  """UnifiedReward-Think (arXiv 2505.03318), pairwise."""
  return Pairwise("unifiedreward_think", url, model, **options)


def unifiedreward(url: str, model: str = "UnifiedReward", **options) -> Pointwise:
  """UnifiedReward (arXiv 2503.05236), point-wise."""
  return Pointwise("unifiedreward", read_axes, url, model, **options)


def ocr_vllm(url: str, model: str = "OCR-VLM", **options) -> Pointwise:
  """Text rendering, judged by a general model."""
  return Pointwise("ocr_vllm", read_ocr, url, model, **options)


def editreward(url: str, model: str = "UnifiedReward", **options) -> Pointwise:
  """Edits, judged from source, instruction and result. The regression model EditReward has no chat: use `remote` for it."""
  return Pointwise("editreward", read_edit, url, model, edits=True, **options)
