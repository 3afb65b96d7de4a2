"""The config's list of data sources -> opened sources with weights, by task.

    data.sources = ("emoji", "wds:gs://bucket/{000..099}.tar", {"uri": "json:edits.json", "weight": 2.0, "images": "pictures"})

An entry is a URI, or a dict of `uri`, `weight` (1 if not given; counts among the sources of a task), and the format's options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data.formats.json_lists import JsonList
from deepgen_jax.data.formats.parquet import Parquet
from deepgen_jax.data.formats.records import ArrayRecords, Tfds
from deepgen_jax.data.formats.tars import Tars
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration, ImageFolder, RenderedWords, Source
from deepgen_jax.errors import UserError, nearest

FORMATS = {
  "folder": ImageFolder,
  "json": JsonList,
  "wds": Tars,
  "array_record": ArrayRecords,
  "tfds": Tfds,
  "parquet": Parquet,
}
EMBEDDED = ("emoji", "words", "emoji-edits")  # these need no path


def open_sources(
  entries: Sequence[str | Mapping], data_dir: str, wrap: Callable[[Source, dict], Source] = lambda source, entry: source
) -> dict[str, list[tuple[Source, float]]]:
  """Task -> [(source, weight)]. data_dir: where the emoji set is built, and what indexes data that can't be written to.
  wrap(source, entry): what takes a source's place; entry is a dict of its uri and options, without the weight.

  Raises UserError for an unknown kind or option, with the nearest known, and for data that isn't there.
  """
  emoji = functools.cache(lambda: emoji_data.prepare(data_dir))
  sources: dict[str, list[tuple[Source, float]]] = {}
  names: set[str] = set()
  for entry in entries:
    uri, weight, options = _entry(entry)
    source = _open(uri, options, emoji, data_dir)
    if source.name in names:
      source.name = f"{source.name} (source {len(names) + 1})"  # counts and bad samples are listed by name
    names.add(source.name)
    sources.setdefault(source.task, []).append((wrap(source, {"uri": uri} | options), weight))
  return sources


def is_embedded(entries: Sequence[str | Mapping]) -> bool:
  """Whether all sources are parts of the embedded set, on whose held-out part training can then be judged."""
  return all(_entry(entry)[0] in EMBEDDED for entry in entries)


def _entry(entry: str | Mapping) -> tuple[str, float, dict]:
  """-> (uri, weight, options)."""
  if isinstance(entry, str):
    return entry.strip(), 1.0, {}
  if not isinstance(entry, Mapping) or not isinstance(entry.get("uri"), str):
    raise UserError(f"config.data.sources: {entry!r} is neither KIND:PATH nor a dict with 'uri'")
  options = dict(entry)
  uri, weight = options.pop("uri").strip(), options.pop("weight", 1.0)
  if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
    raise UserError(f"config.data.sources: the weight of {uri!r} is {weight!r}, not a number from 0 on")
  return uri, float(weight), options


def _open(uri: str, options: dict, emoji, data_dir: str) -> Source:
  kind, _, path = uri.partition(":")
  where = f"config.data.sources: {uri!r}"
  if kind in EMBEDDED and not path:
    if options:
      raise UserError(f"{where} takes no options but weight, not {', '.join(options)}")
    return RenderedWords() if kind == "words" else EmojiGeneration(emoji()) if kind == "emoji" else EmojiEdits(emoji())
  if kind not in FORMATS:
    known = [*FORMATS, *EMBEDDED]
    hint = nearest(kind, known) or f" Is it folder:{uri}?"
    raise UserError(f"{where} is of no known kind; write KIND:PATH with {', '.join(FORMATS)}.{hint}")
  if not path:
    raise UserError(f"{where} lacks its path: write {kind}:PATH")
  known = ["weight", *(name for name in inspect.signature(FORMATS[kind]).parameters if name != "path")]
  for name in options:
    if name not in known:
      raise UserError(f"{where}: unknown option {name!r}; known: {', '.join(known)}.{nearest(name, known)}")
  task = options.get("task", "")
  if task not in ("", "generate", "edit"):
    raise UserError(f"{where}: task {task!r} is neither 'generate' nor 'edit'")
  if "cache" in known:
    options = {"cache": data_dir} | options
  return FORMATS[kind](path, **options)
