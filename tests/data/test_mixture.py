from collections import Counter

import pytest

from deepgen_jax.config import load_config
from deepgen_jax.data.loader import DataSpec, MicroBatches
from deepgen_jax.data.mixture import is_embedded, open_sources
from deepgen_jax.errors import UserError
from tests.data.formats.pictures import picture


@pytest.fixture
def root(tmp_path):
  for name, start in (("cats", 0), ("dogs", 100)):
    (tmp_path / name).mkdir()
    for n in range(20):
      (tmp_path / name / f"{n:02}.png").write_bytes(picture(start + n, 64, 64))
      (tmp_path / name / f"{n:02}.txt").write_text(f"{name} {n}")
  return tmp_path


def test_weights_of_a_user_s_sources(root, tokenizer):
  entries = (f"folder:{root}/cats", {"uri": f"folder:{root}/dogs", "weight": 3})
  sources = open_sources(entries, root)
  assert [(source.name, weight) for source, weight in sources["generate"]] == [
    (f"folder:{root}/cats", 1.0),
    (f"folder:{root}/dogs", 3.0),
  ]
  spec = DataSpec(pattern=("generate",), batch_size=40, image_size=64, text_buckets=(64,), caption_dropout=0.0)
  loader = MicroBatches(spec, sources, tokenizer)
  batch = loader.batch(0)
  assert Counter(text.split()[0] for text in batch["texts"]) == {"cats": 10, "dogs": 30}
  again = MicroBatches(spec, open_sources(entries, root), tokenizer).batch(0)
  assert again["texts"] == batch["texts"] and again["texts"] != loader.batch(1)["texts"]
  assert loader.counts()[f"folder:{root}/dogs"] == {"drawn": 60, "broken": 0, "filtered": {}}


def test_the_same_source_twice_has_two_names(root):
  sources = open_sources([f"folder:{root}/cats"] * 2, root)["generate"]
  assert len({source.name for source, _ in sources}) == 2


def test_the_default_is_the_embedded_set(emoji_dir, root):
  config = load_config("configs/align.py:tiny")
  assert is_embedded(config.data.sources) and not is_embedded([*config.data.sources, f"folder:{root}/cats"])
  sources = open_sources(config.data.sources, emoji_dir)
  assert {task: [(s.name, w) for s, w in some] for task, some in sources.items()} == {
    "generate": [("emoji", 0.9), ("words", 0.1)],
    "edit": [("emoji edits", 1.0)],
  }


@pytest.mark.parametrize(
  "entry, message",
  [
    ("/data/cats", r"'/data/cats' is of no known kind; write KIND:PATH with folder, json, wds"),
    ("floder:cats", "no known kind.* Did you mean 'folder'"),
    ("wds:", "lacks its path"),
    ("words:big", "is of no known kind"),
    ("folder:ROOT/cast", "no such file or folder: .*cast. Did you mean 'cats'"),
    ({"uri": "folder:ROOT/cats", "wieght": 2}, "unknown option 'wieght'; known: weight. Did you mean 'weight'"),
    ({"uri": "wds:ROOT", "img": 2}, "unknown option 'img'; known: weight, task, text, target, references, cache"),
    ({"uri": "folder:ROOT/cats", "weight": -1}, "the weight of .* is -1, not a number"),
    ({"uri": "folder:ROOT/cats", "weight": "2"}, "the weight of .* is '2', not a number"),
    ({"uri": "json:ROOT/x.json", "task": "paint"}, "task 'paint' is neither"),
    ({"uri": "emoji", "task": "edit"}, "takes no options but weight"),
    ({"weight": 2}, "is neither KIND:PATH nor a dict with 'uri'"),
    (3, "is neither KIND:PATH nor a dict with 'uri'"),
  ],
)
def test_mistakes(root, entry, message):
  if isinstance(entry, str):
    entry = entry.replace("ROOT", str(root))
  elif isinstance(entry, dict) and "uri" in entry:
    entry = entry | {"uri": entry["uri"].replace("ROOT", str(root))}
  with pytest.raises(UserError, match=message):
    open_sources([entry], root)
