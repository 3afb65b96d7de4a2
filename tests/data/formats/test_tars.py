import io
import json
import pickle
import tarfile

import pytest

from deepgen_jax.data.formats import tars
from deepgen_jax.data.formats.tars import Tars
from deepgen_jax.errors import UserError
from tests.data.formats.pictures import numbers, picture


def write(file, members, mode="w"):
  """A tar of (name, bytes or str)."""
  with tarfile.open(file, mode) as tar:
    for name, data in members:
      data = data.encode() if isinstance(data, str) else data
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return file


def pair(n, folder=""):
  return [(f"{folder}{n:04}.png", picture(n)), (f"{folder}{n:04}.txt", f"text {n}\n")]


def test_shards_in_order(tmp_path):
  write(tmp_path / "00.tar", [*pair(0, "a/"), ("a/._0000.png", b"x"), *pair(1, "a/"), *pair(0, "b/")])
  write(tmp_path / "01.tar", [*pair(3), ("0003.cls", "7")])
  source = Tars(tmp_path / "{00..01}.tar")
  assert source.task == "generate" and len(source) == 4
  assert [numbers(source[i]) for i in range(4)] == [[0], [1], [0], [3]]
  assert source[3].texts == ("text 3",)
  assert numbers(pickle.loads(pickle.dumps(source))[3]) == [3]


def test_texts_in_json(tmp_path):
  write(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.json", json.dumps({"prompt": "in json", "width": 3}))])
  assert Tars(tmp_path)[0].texts == ("in json",)
  write(tmp_path / "a.tar", [*pair(1), ("0001.json", json.dumps({"caption": "other", "long": ["wording", "another"]}))])
  assert Tars(tmp_path, text="long")[0].texts == ("wording", "another")


def test_edits_with_several_references(tmp_path):
  several = [("7.input_1.png", picture(1)), ("7.input_0.png", picture(0)), ("7.output.png", picture(9)), ("7.txt", "join")]
  one = [("8.input_0.PNG", picture(5)), ("8.output.png", picture(6)), ("8.txt", "change")]
  source = Tars(write(tmp_path / "edits.tar", several + one))
  assert source.task == "edit" and source[0].texts == ("join",)
  assert [numbers(sample) for sample in (source[0], source[1])] == [[9, 0, 1], [6, 5]]
  named = Tars(tmp_path / "edits.tar", target="input_0", references="output", text="txt")
  assert numbers(named[1]) == [5, 6]


def test_broken_members(tmp_path):
  broken = [("2.png", b"no image"), ("2.txt", "x"), ("3.txt", "no picture"), ("4.png", picture(4)), ("4.txt", b"\xff\xfe")]
  source = Tars(write(tmp_path / "a.tar", pair(1) + broken + [("5.png", picture(5)), ("5.json", "[1]")]))
  assert len(source) == 5
  for index, message in [
    (1, r"cannot read image at byte \d+: its format is unknown"),
    (2, "no target image"),
    (3, "codec"),
    (4, "not an object"),
  ]:
    with pytest.raises(UserError, match=rf"a\.tar, sample {index}: .*{message}"):
      source[index]


def test_the_index_is_read_again_until_the_tar_changes(tmp_path, monkeypatch):
  file = write(tmp_path / "a.tar", pair(1))
  scans = []
  scan = tars._scan
  monkeypatch.setattr(tars, "_scan", lambda file: scans.append(file) or scan(file))
  assert [len(Tars(file)), len(Tars(file)), len(scans)] == [1, 1, 1]
  (tmp_path / "a.tar.index.npz").write_bytes(b"PK\3\4 cut short")
  assert [len(Tars(file)), len(scans)] == [1, 2]
  write(file, pair(1) + pair(2))  # of the same length: tars are padded
  assert [len(Tars(file)), len(Tars(file)), len(scans)] == [2, 2, 3]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.index.npz"]


def test_the_index_goes_to_the_cache_where_the_tars_cannot_be_written(tmp_path):
  data = tmp_path / "data"
  data.mkdir()
  file = write(data / "a.tar", pair(1))
  (data / "a.tar.index.npz").mkdir()  # in its place, nothing can be written, whoever runs this
  assert len(Tars(file, cache=tmp_path / "cache")) == 1
  assert len(list((tmp_path / "cache" / "index").glob("*.npz"))) == 1
  assert sorted(path.name for path in data.iterdir()) == ["a.tar", "a.tar.index.npz"]
  assert numbers(Tars(file, cache=tmp_path / "cache")[0]) == [1]
  assert numbers(Tars(file)[0]) == [1]  # and without any place for it


def test_tars_that_cannot_be_used(tmp_path):
  with pytest.raises(UserError, match=r"a\.tar is compressed.*decompress it"):
    Tars(write(tmp_path / "a.tar", pair(1), "w:gz"))
  whole = write(tmp_path / "b.tar", pair(1) + pair(2) + pair(3)).read_bytes()
  for place, change in [
    ("cut.tar", whole[:1700]),
    ("bad.tar", whole[:2048] + b"x" * 512 + whole[2560:]),
    ("no.tar", b"x" * 2000),
  ]:
    (tmp_path / place).write_bytes(change)
    with pytest.raises(UserError, match=rf"{place} is damaged or no tar"):
      Tars(tmp_path / place)
  with pytest.raises(UserError, match="it holds no records"):
    Tars(write(tmp_path / "c.tar", []))
