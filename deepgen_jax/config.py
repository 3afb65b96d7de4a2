"""Reads a config: one Python file with `get_config(argument)`, overridden key by key on the command line.

    --config configs/align.py:tiny --config.steps=100 --config.optim.lr=3e-4

ml_collections holds the values; the parsing is ours because every mistake here must be one clear message with exit code 2.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from deepgen_jax.errors import UserError, nearest


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """`FILE.py[:ARGUMENT]` and overrides `key.sub=value` -> a locked ConfigDict. Raises UserError."""
  path, _, argument = spec.partition(":")
  file = Path(path)
  if not file.is_file():
    raise UserError(f"config file {path!r} not found; try --config configs/align.py:tiny from the root of the checkout")
  root = str(file.resolve().parent.parent)  # configs share code as `from configs import common`
  sys.path.insert(0, root)
  try:
    module_spec = importlib.util.spec_from_file_location(f"deepgen_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
  except (SyntaxError, ImportError, NameError) as error:
    raise UserError(f"config file {path!r} doesn't load: {error}") from error
  finally:
    sys.path.remove(root)
  if not hasattr(module, "get_config"):
    raise UserError(f"config file {path!r} has no function get_config")
  try:
    config = module.get_config(argument) if argument else module.get_config()
  except (TypeError, ValueError) as error:
    raise UserError(f"config {spec!r}: {error}; the argument follows the file name, as in configs/align.py:tiny") from error
  for override in overrides:
    _override(config, override, path)
  return config.lock()


def _override(config: ConfigDict, override: str, path: str) -> None:
  key, equals, text = override.partition("=")
  if not equals:
    raise UserError(f"--config.{key}: give a value, --config.{key}=VALUE")
  if key not in (known := dict(flatten(config))) and not _is_group(config, key):
    raise UserError(f"unknown config key {key!r} in {path}.{nearest(key, known)}")
  if _is_group(config, key):
    raise UserError(f"config key {key!r} is a group; set one of {', '.join(k for k in known if k.startswith(key + '.'))}")
  config.update_from_flattened_dict({key: _parse(key, text, known[key])})


def _is_group(config: ConfigDict, key: str) -> bool:
  node = config
  for part in key.split("."):
    if not isinstance(node, ConfigDict) or part not in node:
      return False
    node = node[part]
  return isinstance(node, ConfigDict)


def _parse(key: str, text: str, old):
  """`text` as the type of the value that it replaces."""
  if isinstance(old, str):
    return text
  if isinstance(old, bool) or old is None:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
      return words[text.lower()]
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(value, str) and isinstance(old, tuple) and old and all(isinstance(word, str | dict) for word in old):
    value = tuple(text.split(","))  # words, as in --config.data.pattern=edit,generate
  kinds = {bool: (bool,), int: (int,), float: (int, float), list: (list, tuple), tuple: (list, tuple)}.get(type(old))
  if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
    raise UserError(f"config key {key!r} is a {type(old).__name__} (now {old!r}); {text!r} is not")
  return float(value) if isinstance(old, float) else type(old)(value) if isinstance(old, list | tuple) else value


def flatten(config, prefix: str = "") -> Iterator[tuple[str, object]]:
  """(dotted key, value) of every leaf."""
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def to_json(config: ConfigDict) -> str:
  """What a workdir records."""
  return json.dumps(json.loads(config.to_json_best_effort()), indent=2, sort_keys=True)
