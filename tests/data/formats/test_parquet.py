import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepgen_jax.data.formats import parquet
from deepgen_jax.data.formats.parquet import Parquet
from deepgen_jax.errors import UserError
from tests.data.formats.pictures import numbers, picture

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as the library `datasets` stores an image


def write(file, columns, **options):
  file.parent.mkdir(exist_ok=True)
  pq.write_table(pa.table(columns), file, **options)
  return file


def images(ns, kind=IMAGE):
  return pa.array([{"bytes": picture(n), "path": None} for n in ns] if kind is IMAGE else [picture(n) for n in ns], kind)


def test_splits_in_a_hugging_face_folder(tmp_path):
  for split, ns in [("train-00000", range(5)), ("train-00001", range(5, 8)), ("test-00000", range(50, 52))]:
    columns = {"id": list(ns), "image": images(ns), "text": [f"text {n}" for n in ns]}
    write(tmp_path / "data" / f"{split}-of-00002.parquet", columns, row_group_size=2)
  source = Parquet(tmp_path)
  assert source.task == "generate" and [numbers(source[i]) for i in range(len(source))] == [[n] for n in range(8)]
  assert source[6].texts == ("text 6",) and pickle.loads(pickle.dumps(source))[6].texts == source[6].texts
  assert numbers(Parquet(tmp_path, split="test")[1]) == [51]
  with pytest.raises(UserError, match=r"has no split 'val': .* test, train"):
    Parquet(tmp_path, split="val")


def test_edits(tmp_path):
  lists = pa.array([[{"bytes": picture(n), "path": None} for n in row] for row in ([1, 2], [3], [])], pa.list_(IMAGE))
  texts = pa.array([["one", "two"], ["three"], ["four"]], pa.list_(pa.string()))
  file = write(tmp_path / "a.parquet", {"input_images": lists, "output_image": images([7, 8, 9]), "instruction": texts})
  source = Parquet(file)
  assert source.task == "edit" and [numbers(source[i]) for i in (0, 1)] == [[7, 1, 2], [8, 3]]
  assert source[0].texts == ("one", "two")
  with pytest.raises(UserError, match=r"row 2 of row group 0: .*'input_images' is missing"):
    source[2]
  assert Parquet(file, task="generate")[2].texts == ("four",)


def test_bytes_paths_and_names(tmp_path):
  (tmp_path / "3.png").write_bytes(picture(3))
  mixed = pa.array([{"bytes": None, "path": "3.png"}, {"bytes": None, "path": None}, {"bytes": b"x", "path": None}], IMAGE)
  write(tmp_path / "a.parquet", {"photo": images([1, 2, 3], pa.binary()), "image": mixed, "words": ["a", "b", None]})
  source = Parquet(tmp_path / "*.parquet", target="photo", text="words")
  assert numbers(source[1]) == [2] and source[1].texts == ("b",)
  with pytest.raises(UserError, match="text 'words' is missing"):
    source[2]
  write(tmp_path / "a.parquet", {"image": mixed, "caption": ["a", "b", "c"]})
  source = Parquet(tmp_path)
  assert numbers(source[0]) == [3]
  for index, message in [(1, "neither bytes nor a path"), (2, "cannot read image")]:
    with pytest.raises(UserError, match=message):
      source[index]


def test_what_cannot_be_used(tmp_path, monkeypatch):
  file = write(tmp_path / "a.parquet", {"image": images([1]), "text": ["x"]})
  with pytest.raises(UserError, match=r"no column 'texts' .*Did you mean 'text'"):
    Parquet(file, text="texts")
  monkeypatch.setattr(parquet, "LARGE_GROUP", 10)
  with pytest.warns(UserWarning, match="row groups of 0 MB"):
    Parquet(file)
  monkeypatch.undo()
  write(tmp_path / "b.parquet", {"image": images([1]), "words": ["x"]})
  with pytest.raises(UserError, match=r"b\.parquet has other columns"):
    Parquet(tmp_path)
  (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
  with pytest.raises(UserError, match=r"b\.parquet can't be read as Parquet"):
    Parquet(tmp_path / "b.parquet")


def test_paths_stay_in_their_folder(tmp_path):
  (tmp_path / "set").mkdir()
  (tmp_path / "secret.png").write_bytes(picture(9))
  column = pa.array([{"bytes": None, "path": "../secret.png"}], IMAGE)
  write(tmp_path / "set" / "a.parquet", {"image": column, "text": ["a"]})
  with pytest.raises(UserError, match=r"the path '\.\./secret\.png' leaves the folder"):
    Parquet(tmp_path / "set")[0]
