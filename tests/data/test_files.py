import os

import pytest
from etils import epath

from deepgen_jax.data.files import find_files, inside
from deepgen_jax.errors import UserError


@pytest.fixture
def shards(tmp_path):
  for name in ("one/a-08.tar", "one/a-09.tar", "one/a-10.tar", "one/notes.txt", "two/b.tar"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
  return tmp_path


@pytest.mark.parametrize(
  "pattern, names",
  [
    ("one", "a-08 a-09 a-10"),
    ("one/a-09.tar", "a-09"),
    ("one/a-{08..10}.tar", "a-08 a-09 a-10"),
    ("{two,one}/*.tar", "b a-08 a-09 a-10"),
    ("*/a-?[89].tar", "a-08 a-09"),
    ("**/*.tar", "a-08 a-09 a-10 b"),
  ],
)
def test_folders_globs_and_braces(shards, pattern, names):
  assert [file.stem for file in find_files(f"{shards}/{pattern}", r"\.tar$")] == names.split()


@pytest.mark.parametrize(
  "pattern, message",
  [
    ("one/a-{08..11}.tar", r"no such file or folder: .*a-11\.tar.* Did you mean 'a-10\.tar'"),
    ("ones/sub/x.tar", r"no such file or folder: .*/ones\. Did you mean 'one'"),
    ("one/*.zip", "no data files in .*zip"),
    ("one/{9..8}.tar", "is empty"),
  ],
)
def test_what_is_not_there(shards, pattern, message):
  with pytest.raises(UserError, match=message):
    find_files(f"{shards}/{pattern}", r"\.tar$")


def test_a_folder_without_such_files(shards):
  with pytest.raises(UserError, match=r"no data files in .*two: expected names like \*\.json$"):
    find_files(shards / "two", r"\.json$")


@pytest.mark.parametrize(
  "folder, path, place",
  [
    ("/data/a", "b/c.png", "/data/a/b/c.png"),
    ("/data/a/", "./b//../c.png", "/data/a/c.png"),
    ("/data/a", "/data/a/c.png", "/data/a/c.png"),
    ("/data/a", "gs://bucket/c.png", "/data/a/gs:/bucket/c.png"),
    ("/", "/etc/c.png", "/etc/c.png"),
    (".", "c.png", "CWD/c.png"),
    ("gs://bucket/a", "c.png", "gs://bucket/a/c.png"),
    ("gs://bucket/a", "gs://bucket/a/../a/c.png", "gs://bucket/a/c.png"),
    ("/data/a", "../c.png", None),
    ("/data/a", "../ab/c.png", None),
    ("/data/a", "/etc/c.png", None),
    ("/data/a", "b/../../c.png", None),
    ("/data/a", "", None),
    (".", "..", None),
    ("gs://bucket/a", "/etc/c.png", None),
    ("gs://bucket/a", "gs://other/a/c.png", None),
    ("gs://bucket/a", "../../../etc/c.png", None),
  ],
)
def test_paths_of_data_stay_in_their_folder(folder, path, place):
  if place:
    assert os.fspath(inside(epath.Path(folder), path)) == place.replace("CWD", os.getcwd())
    return
  with pytest.raises(UserError, match="leaves the folder"):
    inside(epath.Path(folder), path)
