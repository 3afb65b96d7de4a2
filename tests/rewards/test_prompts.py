"""Prompt sets: their files, the reference's YAML, and draws that follow from seed and place."""

import json
from collections import Counter

import pytest

from deepgen_jax.data import words
from deepgen_jax.errors import UserError
from deepgen_jax.rewards import prompts

YAML = """\
sampling_mode: sample_proportional
datasets:
  - name: text
    path: text.txt
    sample_weight: 3.0
    rewards:
      - jpeg_compressibility: 0.3
      - ocr: 0.7
  - name: general
    path: general.jsonl
    sample_weight: 1.0
    rewards:
      - clip_sim: 1.0
      - ocr: 0
"""


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "text.txt").write_text('a sign "STOP"\n\n  a sign "GO"  \r\n', encoding="utf-8-sig")
  rows = [{"prompt": f"thing {i}", "key": str(i)} for i in range(5)]
  rows.append({"caption": "make it red", "images": ["a.png", "sub/b.png"], "kind": "edit"})
  (tmp_path / "general.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
  (tmp_path / "table.csv").write_text('index,prompt,sub_dims\n0,"a, ""quoted""\nline","{""x"": 1}"\n1,b,\n')
  (tmp_path / "train.yaml").write_text(YAML)
  return tmp_path


def test_text_files(folder):
  loaded = prompts.load(folder / "text.txt", {"ocr": 0.5, "clip_sim": 0})
  (dataset,) = loaded.datasets
  assert dataset.name == "text" and len(loaded) == 2
  assert [p.text for p in dataset.prompts] == ['a sign "STOP"', 'a sign "GO"']
  assert dataset.prompts[0] == prompts.Prompt('a sign "STOP"', {"ocr": 0.5}, "text")


def test_json_lines(folder):
  loaded = prompts.load(folder / "general.jsonl", {"clip_sim": 1}).datasets[0].prompts
  assert [p.text for p in loaded[:2]] == ["thing 0", "thing 1"]
  assert loaded[1].metadata == {"key": "1"} and loaded[1].references == ()
  assert loaded[5].text == "make it red" and loaded[5].metadata == {"caption": "make it red", "kind": "edit"}
  assert loaded[5].references == (str(folder / "a.png"), str(folder / "sub/b.png"))


def test_tables(folder):
  loaded = prompts.load(folder / "table.csv", {"clip_sim": 1}).datasets[0].prompts
  assert [p.text for p in loaded] == ['a, "quoted"\nline', "b"]
  assert loaded[0].metadata == {"index": "0", "sub_dims": '{"x": 1}'}


def test_yaml(folder):
  loaded = prompts.load(folder / "train.yaml")
  text, general = loaded.datasets
  assert (text.name, len(text.prompts), text.share) == ("text", 2, 3.0 * 2)
  assert (general.name, len(general.prompts), general.share) == ("general", 6, 6.0)
  assert text.prompts[0].weights == {"jpeg_compressibility": 0.3, "ocr": 0.7} and text.prompts[0].dataset == "text"
  assert general.prompts[0].weights == {"clip_sim": 1.0}
  assert loaded.reward_names() == ("clip_sim", "jpeg_compressibility", "ocr")


@pytest.mark.parametrize("mode, share", [("sample_proportional", 0.5), ("weight_only", 0.75)])
def test_the_two_ways_of_sampling(folder, mode, share):
  (folder / "train.yaml").write_text(YAML.replace("sample_proportional", mode))
  stream = prompts.load(folder / "train.yaml").stream(seed=0)
  count = Counter(stream[i].dataset for i in range(120))
  assert count["text"] == 120 * share
  texts = Counter(stream[i].text for i in range(120) if stream[i].dataset == "general")
  assert max(texts.values()) - min(texts.values()) <= 1  # every prompt comes once before one comes again


def test_draws_follow_from_seed_and_place(folder):
  draw = lambda seed, places: [prompts.load(folder / "train.yaml").stream(seed)[i].text for i in places]
  run = draw(0, range(40))
  assert draw(0, range(25, 40)) == run[25:]
  assert draw(1, range(40)) != run


def test_a_data_set_may_be_written_shorter(folder):
  (folder / "short.yaml").write_text("datasets: [{path: text.txt, rewards: {ocr: 1}}]")
  (dataset,) = prompts.load(folder / "short.yaml").datasets
  assert (dataset.name, dataset.share, dataset.prompts[0].weights) == ("text", 2.0, {"ocr": 1.0})


@pytest.mark.parametrize(
  "old, new, message",
  [
    ("sampling_mode: s", "sampling_mod: s", "unknown key 'sampling_mod'.*Did you mean 'sampling_mode'"),
    ("sample_proportional", "weights_only", "sampling_mode 'weights_only'.*Did you mean 'weight_only'"),
    ("sample_weight: 3.0", "sample_weight: 0", "train.yaml:3: sample_weight of data set 'text' is 0"),
    ("sample_weight: 1.0", "weight: 1.0", "train.yaml:9: unknown key 'weight'"),
    ("    path: text.txt\n", "", "train.yaml:3: a data set is a mapping with at least a path"),
    ("clip_sim: 1.0", "clipsim: 1.0", "train.yaml:9: unknown reward 'clipsim'. Did you mean 'clip_sim'?"),
    ("clip_sim: 1.0", "clip_sim: -1", "train.yaml:9: the weight of reward 'clip_sim' is -1"),
    ("clip_sim: 1.0", "clip_sim: 0", "train.yaml:9: data set 'general' weighs no reward"),
    ("general.jsonl", "other.jsonl", "train.yaml:9: prompt file .*other.jsonl does not exist"),
    ("general.jsonl", "other.parquet", "unknown kind '.parquet'; use .txt, .jsonl, .csv"),
    ("name: general", "name: text", "two data sets are called 'text'"),
    ("name: text\n", "name: [text\n", "train.yaml:4: no YAML"),
    ("datasets:", "data:", "it needs a list `datasets`"),
  ],
)
def test_what_is_wrong_in_a_yaml(folder, old, new, message):
  assert old in YAML
  (folder / "train.yaml").write_text(YAML.replace(old, new))
  with pytest.raises(UserError, match=message):
    prompts.load(folder / "train.yaml")


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": }\n', "a.jsonl:2: no JSON"),
    ("a.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', "a.jsonl:3: no text under `prompt` or `caption`; the line has text"),
    ("a.jsonl", b'["a"]\n', "a.jsonl:1: a line must be an object"),
    ("a.jsonl", b'{"prompt": "a", "images": "b.png"}\n', "a.jsonl:1: `images` must be a list"),
    ("a.csv", b"index,text\n0,a\n", "a.csv:1: no column `prompt`; the columns are index, text"),
    ("a.csv", b'index,prompt\n0,"a\nb"\n1\n', "a.csv:4: the row has not as many fields"),
    ("a.csv", b"index,prompt\n0,a\n1, \n", "a.csv:3: the prompt is empty"),
    ("a.csv", b'index,prompt\n0,"a"b\n', "a.csv:2: no CSV"),
    ("a.txt", b"a\nb\xff\n", "a.txt:2: not UTF-8"),
    ("a.txt", b"\n \n", "a.txt has no prompts"),
  ],
)
def test_what_is_wrong_in_a_file(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    prompts.load(tmp_path / name, {"ocr": 1.0})


def test_rewards_belong_to_a_file_or_to_its_yaml(folder):
  with pytest.raises(UserError, match=r"at least one reward"):
    prompts.load(folder / "text.txt", {"ocr": 0})
  with pytest.raises(UserError, match=r"gives each data set its rewards"):
    prompts.load(folder / "train.yaml", {"ocr": 1})


def test_embedded_prompts(emoji):
  training = prompts.embedded(emoji)
  captions, drawn = training.datasets
  assert [p.text for p in captions.prompts] == [c for c, out in zip(emoji.captions, emoji.held_out) if not out]
  assert captions.prompts[0].weights == {"emoji_similarity": 1.0} and drawn.prompts[0].weights == {"ocr": 1.0}
  count = Counter(training.stream(0)[i].dataset for i in range(20))
  assert count == {"emoji": 15, "words": 5}
  (held_out,) = prompts.embedded(emoji, held_out=True, rewards={"words": {"ocr": 0.5}}).datasets
  assert {p.text.split('"')[1] for p in held_out.prompts} == {word for word in words.WORDS if words.is_held_out(word)}
  assert not {p.text for p in held_out.prompts} & {p.text for p in drawn.prompts}
  with pytest.raises(UserError, match=r"no embedded data set 'emojis'.*Did you mean 'emoji'"):
    prompts.embedded(emoji, rewards={"emojis": {"ocr": 1.0}})
