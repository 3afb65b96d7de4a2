"""Prompt sets for reinforcement learning: texts with the weights of their rewards, drawn as a pure function of seed and place.

Files hold one prompt a line (.txt), one object a line (.jsonl: `prompt` or `caption`, optional `images`), or a table (.csv:
`prompt`). Several files are mixed by a YAML in the reference's format:

    sampling_mode: sample_proportional    # a data set's share of the draws goes with sample_weight x its size; or
                                          # weight_only: with sample_weight alone
    datasets:
      - {name: ocr, path: ocr.txt, sample_weight: 3.0, rewards: [{ocr: 0.7}, {clip_sim: 0.3}]}
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import yaml
from etils import epath

from deepgen_jax.data import words
from deepgen_jax.data.composition import text_hash
from deepgen_jax.data.emoji import EmojiSet
from deepgen_jax.errors import UserError, nearest
from deepgen_jax.rewards.registry import check_name

MODES = ("sample_proportional", "weight_only")
SUFFIXES = (".txt", ".jsonl", ".csv")
EMBEDDED_REWARDS = {"emoji": {"emoji_similarity": 1.0}, "words": {"ocr": 1.0}}
EMBEDDED_SHARES = {"emoji": 3.0, "words": 1.0}
_KEYS = ("name", "path", "sample_weight", "rewards")
_LINE = "\n"  # where a mapping of the YAML file keeps its line; no key of a user can be this


@dataclass(frozen=True)
class Prompt:
  """One prompt. weights: reward -> weight, those above 0; references: images (arrays or paths) of an edit."""

  text: str
  weights: Mapping[str, float]
  dataset: str = ""
  references: tuple = ()
  metadata: Mapping[str, Any] = field(default_factory=dict)  # what else its file says


@dataclass(frozen=True)
class Dataset:
  """Prompts that share rewards. share: of all draws, relative to the other data sets'."""

  name: str
  prompts: tuple[Prompt, ...]
  share: float


class PromptSet:
  """Data sets, mixed. `len` counts prompts."""

  def __init__(self, datasets: Sequence[Dataset]):
    self.datasets = tuple(datasets)
    if not self.datasets:
      raise UserError("the prompt set has no data set")
    for dataset in self.datasets:
      if not dataset.prompts:
        raise UserError(f"the data set {dataset.name!r} has no prompts")

  def __len__(self) -> int:
    return sum(len(dataset.prompts) for dataset in self.datasets)

  def reward_names(self) -> tuple[str, ...]:
    """The rewards that some prompt weighs, sorted."""
    return tuple(sorted({name for dataset in self.datasets for prompt in dataset.prompts for name in prompt.weights}))

  def stream(self, seed: int) -> grain.MapDataset:
    """`stream[i]` is the i-th Prompt drawn, without end: a pure function of seed and i.

    Each data set is shuffled, anew each time round, and takes its share of every stretch of draws exactly (to one draw).
    """
    streams = [
      grain.MapDataset.source(dataset.prompts).shuffle(seed=int(text_hash(f"{seed} prompts {place}") * 2**32)).repeat()
      for place, dataset in enumerate(self.datasets)
    ]
    return grain.MapDataset.mix(streams, [dataset.share for dataset in self.datasets]) if len(streams) > 1 else streams[0]


def embedded(emoji: EmojiSet, held_out: bool = False, rewards: Mapping[str, Mapping[str, float]] | None = None) -> PromptSet:
  """The embedded prompts: emoji captions and rendered words, of training or held out, three to one.

  rewards: data set ("emoji", "words") -> weights; one that is left out gives no prompts.
  """
  rewards = EMBEDDED_REWARDS if rewards is None else rewards
  texts = {
    "emoji": [caption for caption, out in zip(emoji.captions, emoji.held_out) if out == held_out],
    "words": [words.caption(*word) for word in words.combinations(held_out)],
  }
  if unknown := set(rewards) - set(texts):
    raise UserError(f"no embedded data set {min(unknown)!r}; use {', '.join(texts)}.{nearest(min(unknown), texts)}")
  weights = {name: _weights(own, f"embedded data set {name!r}: ") for name, own in rewards.items()}
  return PromptSet(
    [
      Dataset(name, tuple(Prompt(text, own, name) for text in texts[name]), EMBEDDED_SHARES[name])
      for name, own in weights.items()
      if own
    ]
  )


def load(path, rewards: Mapping[str, float] | None = None) -> PromptSet:
  """Reads a prompt file, all of whose prompts have the weights `rewards`, or a YAML of several with weights of their own.

  `path` may be local or gs://; paths in a YAML are relative to its folder. Raises UserError with file and line.
  """
  file = epath.Path(path)
  if file.suffix in (".yaml", ".yml"):
    if rewards:
      raise UserError(f"{file} gives each data set its rewards; leave out the others ({', '.join(rewards)})")
    return _load_yaml(file)
  weights = _weights(rewards or {}, f"{file}: ")
  if not weights:
    raise UserError(f"{file}: give at least one reward a weight above 0")
  return PromptSet([Dataset(file.stem, _with_weights(_read_prompts(file), weights, file.stem), 1.0)])


def _load_yaml(file: epath.Path) -> PromptSet:
  try:
    tree = yaml.load(_text(file), _Lines)
  except yaml.YAMLError as error:
    mark = getattr(error, "problem_mark", None)
    where = f"{file}:{mark.line + 1}" if mark else str(file)
    raise UserError(f"{where}: no YAML: {getattr(error, 'problem', None) or error}") from error
  if not isinstance(tree, dict) or not isinstance(tree.get("datasets"), list):
    raise UserError(f"{file}: it needs a list `datasets`, of name, path, sample_weight and rewards each")
  _check_keys(tree, ("sampling_mode", "datasets"), f"{file}: ")
  mode = tree.get("sampling_mode", MODES[0])
  if mode not in MODES:
    raise UserError(f"{file}: sampling_mode {mode!r}; use {' or '.join(MODES)}.{nearest(str(mode), MODES)}")
  datasets = [_dataset(entry, file, mode) for entry in tree["datasets"]]
  names = [dataset.name for dataset in datasets]
  if twice := {name for name in names if names.count(name) > 1}:
    raise UserError(f"{file}: two data sets are called {min(twice)!r}")
  return PromptSet(datasets)


class _Lines(yaml.SafeLoader):
  """Notes the line of each mapping under the key `_LINE`."""

  def construct_mapping(self, node, deep=False):
    return {**super().construct_mapping(node, deep), _LINE: node.start_mark.line + 1}


def _dataset(entry, file: epath.Path, mode: str) -> Dataset:
  if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
    line = f":{entry[_LINE]}" if isinstance(entry, dict) else ""
    raise UserError(f"{file}{line}: a data set is a mapping with at least a path, not {_plain(entry)!r}")
  where = f"{file}:{entry[_LINE]}: "
  _check_keys(entry, _KEYS, where)
  name = str(entry.get("name", epath.Path(entry["path"]).stem))
  weight = entry.get("sample_weight", 1.0)
  if not _is_number(weight) or weight <= 0:
    raise UserError(f"{where}sample_weight of data set {name!r} is {weight!r}; it must be a number above 0")
  rewards = entry.get("rewards") or []
  pairs = rewards if isinstance(rewards, list) else [rewards]
  if not all(isinstance(pair, dict) for pair in pairs):
    raise UserError(f"{where}rewards of data set {name!r} must be a list of `name: weight`, not {_plain(rewards)!r}")
  weights = _weights({key: value for pair in pairs for key, value in pair.items() if key != _LINE}, where)
  if not weights:
    raise UserError(f"{where}data set {name!r} weighs no reward; give it rewards, or leave it out")
  try:
    prompts = _with_weights(_read_prompts(file.parent / entry["path"]), weights, name)
  except UserError as error:
    raise UserError(f"{where}{error}") from error
  return Dataset(name, prompts, float(weight) * (len(prompts) if mode == MODES[0] else 1))


def _check_keys(found: Mapping, known: Sequence[str], where: str) -> None:
  for key in found:
    if key not in known and key != _LINE:
      raise UserError(f"{where}unknown key {key!r}; known are {', '.join(known)}.{nearest(str(key), known)}")


def _plain(tree):
  """A piece of the YAML tree without its lines, for messages."""
  if isinstance(tree, dict):
    return {key: _plain(value) for key, value in tree.items() if key != _LINE}
  return [_plain(value) for value in tree] if isinstance(tree, list) else tree


def _weights(rewards: Mapping, where: str) -> dict[str, float]:
  """Those above 0, checked."""
  for name, weight in rewards.items():
    check_name(name, where)
    if not _is_number(weight) or weight < 0:
      raise UserError(f"{where}the weight of reward {name!r} is {weight!r}; it must be a number from 0 on")
  return {name: float(weight) for name, weight in rewards.items() if weight > 0}


def _is_number(value) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _with_weights(rows: Sequence[tuple[str, tuple, dict]], weights: Mapping[str, float], name: str) -> tuple[Prompt, ...]:
  return tuple(Prompt(text, weights, name, references, metadata) for text, references, metadata in rows)


def _read_prompts(file: epath.Path) -> list[tuple[str, tuple, dict]]:
  """(text, references, metadata) of each prompt of a file, in its order."""
  readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
  if file.suffix not in readers:
    raise UserError(f"prompt file {file}: unknown kind {file.suffix!r}; use {', '.join(SUFFIXES)}")
  rows = list(readers[file.suffix](_text(file), file))
  if not rows:
    raise UserError(f"prompt file {file} has no prompts")
  return rows


def _text(file: epath.Path) -> str:
  try:
    return file.read_bytes().decode("utf-8-sig")
  except FileNotFoundError as error:
    raise UserError(f"prompt file {file} does not exist") from error
  except OSError as error:
    raise UserError(f"cannot read prompt file {file}: {error}") from error
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b"\n") + 1
    raise UserError(f"{file}:{line}: not UTF-8 text ({error.reason})") from error


def _read_txt(text: str, file: epath.Path):
  for line in text.split("\n"):
    if line.strip():
      yield line.strip(), (), {}


def _read_jsonl(text: str, file: epath.Path):
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    where = f"{file}:{number}: "
    try:
      row = json.loads(line)
    except ValueError as error:
      raise UserError(f"{where}no JSON: {error}") from error
    if not isinstance(row, dict):
      raise UserError(f"{where}a line must be an object with `prompt`, not {row!r}")
    prompt = row.get("prompt") or row.get("caption")
    if not isinstance(prompt, str) or not prompt.strip():
      raise UserError(f"{where}no text under `prompt` or `caption`; the line has {', '.join(row) or 'nothing'}")
    images = row.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
      raise UserError(f"{where}`images` must be a list of paths, relative to the file's folder")
    references = tuple(str(file.parent / image) for image in images)
    yield prompt, references, {key: value for key, value in row.items() if key not in ("prompt", "images")}


def _read_csv(text: str, file: epath.Path):
  rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
  try:
    if "prompt" not in (rows.fieldnames or ()):
      raise UserError(f"{file}:1: no column `prompt`; the columns are {', '.join(rows.fieldnames or ()) or 'none'}")
    for row in rows:
      if None in row or None in row.values():
        raise UserError(f"{file}:{rows.line_num}: the row has not as many fields as there are columns ({len(rows.fieldnames)})")
      if not row["prompt"].strip():
        raise UserError(f"{file}:{rows.line_num}: the prompt is empty")
      yield row.pop("prompt"), (), row
  except csv.Error as error:
    raise UserError(f"{file}:{rows.reader.line_num}: no CSV: {error}") from error
