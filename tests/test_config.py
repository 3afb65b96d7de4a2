"""Configs load, and every mistake is one clear message."""

import pytest

from deepgen_jax.config import flatten, load_config, to_json
from deepgen_jax.errors import UserError


@pytest.mark.parametrize(
  "spec",
  [
    "align.py:tiny",
    "align.py:full",
    "sft.py:tiny",
    "sft.py:full",
    "sft.py:full_lora",
    "pretrain_tiny.py:dit",
    "grpo.py:tiny",
    "grpo.py:full_lora",
  ],
)
def test_shipped_configs_load(spec):
  config = load_config(f"configs/{spec}")
  assert config.steps > 0 and to_json(config).startswith("{")
  assert len(dict(flatten(config))) <= 88  # keys of a stage, as a reader can hold them


def test_overrides_keep_types():
  config = load_config(
    "configs/align.py:tiny",
    ["steps=7", "optim.lr=1", "data.pattern=('edit',)", "init=some/dir", "unroll=false", "optim.betas=[0.5,0.6]"],
  )
  assert config.steps == 7 and config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
  assert config.data.pattern == ("edit",) and config.init == "some/dir" and config.unroll is False
  assert config.optim.betas == (0.5, 0.6)


def test_lists_of_words_need_no_quotes():
  options = ["data.pattern=edit,generate", "data.sources=folder:/a b/c,wds:/d/{0..9}.tar"]
  config = load_config("configs/align.py:tiny", options)
  assert config.data.pattern == ("edit", "generate") and config.data.sources == ("folder:/a b/c", "wds:/d/{0..9}.tar")
  config = load_config("configs/align.py:tiny", ["data.sources=({'uri': 'json:x', 'weight': 2},)", "data.pattern=edit"])
  assert dict(config.data.sources[0]) == {"uri": "json:x", "weight": 2} and config.data.pattern == ("edit",)
  assert '"weight": 2' in to_json(config)
  with pytest.raises(UserError, match=r"'data.text_buckets' is a tuple"):
    load_config("configs/align.py:tiny", ["data.text_buckets=few"])


@pytest.mark.parametrize(
  "override, message",
  [
    ("stepz=3", r"unknown config key 'stepz'.*Did you mean 'steps'"),
    ("optim.rl=3", r"unknown config key 'optim.rl'.*Did you mean 'optim.lr'"),
    ("optim=3", r"is a group; set one of .*optim.lr"),
    ("steps=many", r"'steps' is a int"),
    ("steps=true", r"'steps' is a int"),
    ("steps", r"give a value"),
  ],
)
def test_wrong_overrides(override, message):
  with pytest.raises(UserError, match=message):
    load_config("configs/align.py:tiny", [override])


def test_wrong_files(tmp_path):
  with pytest.raises(UserError, match="not found"):
    load_config("configs/nothing.py:tiny")
  broken = tmp_path / "configs" / "broken.py"
  broken.parent.mkdir()
  broken.write_text("def get_config(:")
  with pytest.raises(UserError, match="doesn't load"):
    load_config(str(broken))
  broken.write_text("x = 1")
  with pytest.raises(UserError, match="no function get_config"):
    load_config(str(broken))
  with pytest.raises(UserError, match="size 'huge'"):
    load_config("configs/align.py:huge")
