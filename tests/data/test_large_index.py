"""A list's length costs neither time nor memory beyond 8 bytes an entry. Full size: python -m tests.data.large_index"""

import itertools
import tracemalloc

import numpy as np
import pytest

from deepgen_jax.data.formats import json_lists
from deepgen_jax.data.loader import DataSpec, MicroBatches
from deepgen_jax.data.sources import Sample
from tests.data import large_index


class Endless:
  """Fifty million samples, none of them anywhere."""

  task = "generate"

  def __init__(self, name):
    self.name = name

  def __len__(self):
    return 50_000_000

  def __getitem__(self, index):
    return Sample(self.task, (f"{self.name} {index}",), np.zeros((64, 64, 3), np.uint8))


def traced(call):
  """-> (result, peak of what was allocated meanwhile, bytes)."""
  tracemalloc.start()
  try:
    return call(), tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_shuffle_and_mixture_are_not_written_out(tokenizer):
  spec = DataSpec(("generate",), 10, 64, 8, (64,), caption_dropout=0.0)
  make = lambda: MicroBatches(spec, {"generate": [(Endless("a"), 3.0), (Endless("b"), 1.0)]}, tokenizer)
  make().batch(0)  # imports
  batch, peak = traced(lambda: make().batch(4_000_000))
  assert peak < 4e6
  assert batch["sample_id"].tolist() == list(range(40_000_000, 40_000_010))
  places = [int(text.split()[1]) for text in batch["texts"]]
  assert len(set(places)) == 10 and np.ptp(places) > 1e6
  assert make().batch(4_000_000)["texts"] == batch["texts"]


@pytest.mark.parametrize("kept", [False, True])
def test_a_list_takes_eight_bytes_a_line(tmp_path, monkeypatch, kept):
  monkeypatch.setattr(json_lists, "LARGE", 0 if kept else 2**60)
  monkeypatch.setattr(json_lists, "CHUNK", 2**20)
  entries = 200_000  # 9 MB
  large_index.build(tmp_path, entries)
  open_list = lambda: json_lists.JsonList(tmp_path / "list", images=tmp_path / "list")
  open_list()
  source, peak = traced(open_list)
  assert peak < 3 * 8 * entries + 8 * 2**20  # the parts and the whole, and what looking at a part takes
  assert len(source) == entries and [source[i].texts for i in (0, 123_456)] == [("0000000000",), ("0000123456",)]
  assert (tmp_path / "list" / "list.jsonl.index.npz").exists() == kept
  if kept:
    monkeypatch.setattr(json_lists, "_scan", None)
    assert len(open_list()) == entries


def test_the_command_s_measure(tmp_path):
  large_index.build(tmp_path, 2000)
  found = large_index.start(tmp_path, 1000)
  assert found["ids"] == list(range(1000, 1040)) and found["texts"].count("of the folder") == 10
  assert len({text for text in found["texts"]}) == 31 and found["peak_mb"] > 10


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_where_lines_start(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(json_lists, "CHUNK", chunk)
  file = tmp_path / "a.jsonl"
  lines = [b"\n", b'{"a": 1}\r\n', b" \t\r\n", b"\n", b"x", b"yz\n", b"  {}\n", b"\n", b"last"]
  for end in range(len(lines) + 1):
    file.write_bytes(b"".join(lines[:end]))
    starts = json_lists._scan(file)["starts"]
    found = [file.read_bytes()[a:b].strip() for a, b in itertools.pairwise(starts)]
    assert found == [line.strip() for line in b"".join(lines[:end]).split(b"\n") if line.strip()]
    assert starts[-1] == file.stat().st_size
