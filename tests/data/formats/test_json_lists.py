"""The reference's three layouts, written by hand as its configs expect them."""

import json
import pickle

import pytest

from deepgen_jax.data.formats.json_lists import JsonList
from deepgen_jax.data.sources import Guarded
from deepgen_jax.errors import UserError
from tests.data.formats.pictures import numbers, picture


@pytest.fixture
def root(tmp_path):
  (tmp_path / "raw" / "sub").mkdir(parents=True)
  for n in range(8):
    (tmp_path / "raw" / "sub" / f"{n}.png").write_bytes(picture(n))
  return tmp_path


def write(file, entries):
  file.write_text(json.dumps(entries))
  return file


def test_fine_tuning_lists(root):
  entries = [
    {"type": "T2I_SFT", "image": "", "image_path": f"sub/{n}.png", "txt": f"text {n} é", "source": "x"} for n in range(3)
  ]
  source = JsonList(write(root / "list.json", entries), images=root / "raw")
  assert source.task == "generate" and len(source) == 3
  assert source[2].texts == ("text 2 é",) and numbers(source[2]) == [2]
  again = pickle.loads(pickle.dumps(source))
  assert again[1].texts == source[1].texts


def test_caption_folders(root):
  (root / "captions").mkdir()
  for n in range(2):
    write(root / "captions" / f"{n}.json", {"caption": f"long {n}", "caption_internlm2_short": f"short {n}"})
  data = write(root / "data.json", [{"image": f"sub/{n}.png", "annotation": f"{n}.json"} for n in range(3)])
  folders = {"images": root / "raw", "captions": root / "captions"}
  assert JsonList(data, **folders)[1].texts == ("long 1",)
  source = JsonList(data, **folders, text="caption_internlm2_short")
  assert source.task == "generate" and source[1].texts == ("short 1",) and numbers(source[1]) == [1]
  with pytest.raises(UserError, match=r"entry 2: the annotation .*2\.json does not exist"):
    source[2]
  with pytest.raises(UserError, match=r"0\.json has no 'captoin'.*Did you mean 'caption'"):
    JsonList(data, **folders, text="captoin")[0]


def test_edits_with_all_their_references(root):
  entries = [
    {"input_image": ["raw/sub/1.png", "raw/sub/2.png"], "output_image": "raw/sub/3.png", "instruction": "mix"},
    {"input_image": ["raw/sub/4.png"], "output_image": "raw/sub/5.png", "instruction": "change"},
    {"input_image": [], "output_image": "raw/sub/5.png", "instruction": "nothing to edit"},
  ]
  source = JsonList(write(root / "edits.json", entries))  # paths start beside the list
  assert source.task == "edit" and numbers(source[0]) == [3, 1, 2] and numbers(source[1]) == [5, 4]
  assert source[0].texts == ("mix",) and source[2].references == ()  # which Guarded replaces


def test_folders_of_lists_and_lines(root):
  write(root / "b.json", [{"image_path": "raw/sub/2.png", "txt": "two"}])
  lines = ['{"image_path": "raw/sub/0.png", "txt": "zero"}', "", "{broken", '"no object"', '{"image_path": "raw/sub/1.png"}']
  (root / "a.jsonl").write_text("\n".join(lines))
  source = JsonList(root)
  assert len(source) == 5 and [source[i].texts for i in (0, 4)] == [("zero",), ("two",)]
  for index, message in [(1, "entry 1: "), (2, "'no object' is not an object"), (3, "entry 3: no text among the fields")]:
    with pytest.raises(UserError, match=message):
      source[index]


def test_a_missing_image_is_a_broken_sample(root):
  source = JsonList(write(root / "list.json", [{"image_path": "none.png", "txt": "x"}]))
  with pytest.raises(UserError, match=r"entry 0: image .*none\.png does not exist"):
    source[0]


def test_a_list_that_mixes_tasks_has_samples_of_another_task_than_its_own(root):
  edit = {"input_image": ["raw/sub/1.png"], "output_image": "raw/sub/2.png", "instruction": "change"}
  source = JsonList(write(root / "list.json", [{"image_path": "raw/sub/0.png", "txt": "zero"}, edit]))
  guarded = Guarded(source)
  assert source.task == "generate" and guarded[1].texts == ("zero",)
  assert "'edit' in a source of task 'generate'" in guarded.bad_samples()[0].reason


def test_the_task_can_be_set(root):
  entry = {"input_image": ["raw/sub/1.png"], "output_image": "raw/sub/2.png", "instruction": "a two"}
  source = JsonList(write(root / "list.json", [entry]), task="generate")
  assert source.task == "generate" and numbers(source[0]) == [2]


@pytest.mark.parametrize(
  "text, message",
  [
    ('{"image": 1}', "must hold a list of objects, not dict"),
    ("[1,", "is not JSON"),
    ("[]", "it holds no records"),
    ('[{"photo": "a.png", "url": "b"}]', "no text and no target image among the fields photo, url"),
  ],
)
def test_lists_that_cannot_be_used(root, text, message):
  (root / "list.json").write_text(text)
  with pytest.raises(UserError, match=message):
    JsonList(root / "list.json")


def test_a_missing_folder(root):
  with pytest.raises(UserError, match=r"no such file or folder: .*/rwa\. Did you mean 'raw'"):
    JsonList(write(root / "list.json", []), images=root / "rwa")


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "ROOT/secret.png", ".."])
def test_paths_stay_in_their_folder(root, path):
  """Also those of captions; a path may well be absolute, or take a turn inside."""
  (root / "secret.png").write_bytes(picture(99))
  (root / "secret.json").write_text('{"caption": "secret"}')
  path = path.replace("ROOT", str(root))
  good = {"image_path": f"{root}/raw/sub/1.png", "txt": "one"}
  turn = {"image_path": "sub/../sub/2.png", "txt": "two"}
  captioned = {"image": "sub/1.png", "annotation": path.replace(".png", ".json")}
  source = JsonList(write(root / "list.json", [good, turn, {"image_path": path, "txt": "x"}, captioned]), images=root / "raw")
  assert numbers(source[0]) == [1] and numbers(source[1]) == [2]
  message = "no target image" if path == ".." else "leaves the folder"
  with pytest.raises(UserError, match=f"entry 2: .*{message}"):
    source[2]
  with pytest.raises(UserError, match=r"entry 3: the path .* leaves the folder"):
    source[3]
  everywhere = JsonList(write(root / "list.json", [{"image_path": f"{root}/secret.png", "txt": "x"}]), images="/")
  assert numbers(everywhere[0]) == [99]


def test_lines_that_cannot_be_read(root):
  lines = [b'{"image_path": "raw/sub/0.png", "txt": "caf\xe9"}', b"[" * 100_000, b'{"image_path": "a\\u0000.png", "txt": "x"}']
  (root / "a.jsonl").write_bytes(b"\n".join([b'{"image_path": "raw/sub/0.png", "txt": "x"}', *lines]))
  source = JsonList(root / "a.jsonl")
  for index, message in [(1, "the line is not UTF-8"), (2, "the line is not JSON"), (3, "entry 3: ")]:
    with pytest.raises(UserError, match=message):
      source[index]
