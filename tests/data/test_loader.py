import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from deepgen_jax.data import loader as loader_module
from deepgen_jax.data.loader import DataSpec, MicroBatches, host_batch
from deepgen_jax.data.sources import Sample
from deepgen_jax.errors import Stalled, UserError

SPEC = DataSpec(batch_size=4, image_size=64, num_think_tokens=8, text_buckets=(64, 128), seed=3)


class Numbers:
  """Samples that say which they are: texts "n wording", image of colour n."""

  def __init__(self, task="generate", size=50, name="numbers", broken=(), shape=(64, 64)):
    self.task, self.size, self.name, self.broken, self.shape = task, size, name, broken, shape

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    if index in self.broken:
      raise OSError("broken on purpose")
    image = np.full((*self.shape, 3), index, np.uint8)
    texts = (f"{self.name} {index} a", f"{self.name} {index} b")
    return Sample(self.task, texts, image, (image,) if self.task == "edit" else ())


def make(tokenizer, spec=SPEC, generate=None, edit=None, **kwargs):
  given = {"generate": generate or [(Numbers(), 1.0)], "edit": edit or [(Numbers("edit"), 1.0)]}
  return MicroBatches(spec, given, tokenizer, **kwargs)


def change(spec=SPEC, **values):
  return DataSpec(**{**spec.__dict__, **values})


def equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    if isinstance(a[key], (str, np.ndarray)):
      np.testing.assert_array_equal(a[key], b[key])
    else:
      for x, y in zip(a[key], b[key], strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_contract(tokenizer):
  batch = make(tokenizer, edit=[(Numbers("edit", shape=(64, 96)), 1.0)]).batch(0)
  assert batch["task"] == "edit"
  assert batch["ids"].shape == batch["text_mask"].shape == batch["image_index"].shape == (4, 64)
  assert batch["position_ids"].shape == (4, 3, 72)
  assert batch["sample_id"].dtype == np.uint32
  assert [t.shape for t in batch["target"]] == [(64, 96, 3)] * 4
  assert [[r.shape for r in refs] for refs in batch["references"]] == [[(64, 96, 3)]] * 4
  assert (batch["image_index"].max(1) == 5).all()  # 2 x 3 vision tokens


@pytest.mark.parametrize("pattern", [("edit", "generate", "generate", "generate"), ("edit", "generate", "generate")])
def test_every_update_holds_the_exact_ratio_and_ids_are_unique(tokenizer, pattern):
  loader = make(tokenizer, change(pattern=pattern))
  batches = [loader.batch(m) for m in range(4 * len(pattern))]
  for start in range(0, len(batches), len(pattern)):
    assert [b["task"] for b in batches[start : start + len(pattern)]] == list(pattern)
  for task, first in (("generate", 0), ("edit", 2**31)):
    ids = np.concatenate([b["sample_id"] for b in batches if b["task"] == task])
    np.testing.assert_array_equal(ids, first + np.arange(len(ids)))


def test_draws_do_not_depend_on_batch_or_hosts(tokenizer):
  spec = change(pattern=("generate",), batch_size=8, text_buckets=tuple(range(1, 128)), seed=4)
  few = [(Numbers(size=11), 1.0)]  # of which one has a longer text
  whole = make(tokenizer, spec, few).batch(1)
  small = make(tokenizer, change(spec, batch_size=2), few)
  assert whole["texts"] == [t for m in range(4, 8) for t in small.batch(m)["texts"]]
  rows, said = (range(4), range(4, 8)), []

  def agree(m, own):
    said.append(own)
    return {key: max(one[key] for one in said) for key in own}

  hosts = [make(tokenizer, spec, few, rows=r, agree=agree).batch(1) for r in (*rows, *rows)][
    2:
  ]  # each has then heard the other
  assert said[0] != said[1]
  assert [host["extents"] for host in hosts] == [whole["extents"]] * 2
  for key in ("ids", "sample_id", "position_ids", "target"):
    np.testing.assert_array_equal(np.concatenate([h[key] for h in hosts]), whole[key])


def test_an_epoch_sees_each_sample_once_and_the_next_in_another_order(tokenizer):
  loader = make(tokenizer, change(pattern=("generate",), batch_size=50, caption_dropout=0.0))
  first, second = ([int(t[0, 0, 0]) for t in loader.batch(m)["target"]] for m in range(2))
  assert sorted(first) == sorted(second) == list(range(50))
  assert first != second
  other = make(tokenizer, change(pattern=("generate",), batch_size=50, seed=4)).batch(0)
  assert [int(t[0, 0, 0]) for t in other["target"]] != first


def test_dropout_of_captions_only_and_wordings(tokenizer):
  loader = make(tokenizer, change(batch_size=200))
  edit, generate = loader.batch(0), [loader.batch(m) for m in (1, 2, 3)]
  assert all(edit["texts"])
  assert 0.05 < np.mean([t == "" for b in generate for t in b["texts"]]) < 0.15
  assert 0.3 < np.mean([t.endswith("a") for t in edit["texts"]]) < 0.7


def test_mixture_by_weight(tokenizer):
  mixture = [(Numbers(name="one"), 3.0), (Numbers(name="two", size=7), 1.0), (Numbers(name="never"), 0.0)]
  loader = make(tokenizer, change(pattern=("generate",), batch_size=400, caption_dropout=0.0), generate=mixture)
  assert Counter(t.split()[0] for t in loader.batch(0)["texts"]) == {"one": 300, "two": 100}


def test_iterate_resumes_exactly(tokenizer):
  loader = make(tokenizer)
  whole = loader.iterate()
  batches = [next(whole) for _ in range(7)]
  whole.close()
  part = loader.iterate()
  for _ in range(3):
    next(part)
  assert part.consumed == 3  # not what was read ahead
  again = make(tokenizer).iterate(part.consumed)
  for m in range(3, 7):
    batch = next(again)
    equal(batch, batches[m])
    equal(batch, loader.batch(m))
  assert again.consumed == 7
  part.close()
  again.close()


def test_broken_samples_through_the_loader(tokenizer):
  loader = make(tokenizer, generate=[(Numbers(broken=(7,)), 1.0)])
  batches = [loader.batch(m) for m in range(20)]
  assert [(b.source, b.index) for b in loader.bad_samples()] == [("numbers", 7)]
  shown = Counter(int(t[0, 0, 0]) for b in batches if b["task"] == "generate" for t in b["target"])
  assert shown[7] == 0 and shown[8] >= 2  # the next one in its place
  reader = make(tokenizer, generate=[(Numbers(broken=range(25)), 1.0)]).iterate()
  with pytest.raises(UserError, match="were broken"):
    for _ in range(100):
      next(reader)
  reader.close()


def test_long_texts_are_cut_to_the_bucket_with_one_warning(tokenizer):
  loader = make(tokenizer, change(pattern=("generate",)), generate=[(Numbers(name="x" * 200), 1.0)])
  with pytest.warns(UserWarning, match="cut at the end") as seen:
    assert loader.batch(0)["ids"].shape[1] == 128
    loader.batch(1)
  assert len(seen) == 1


def test_what_cannot_work_is_a_user_error(tokenizer):
  with pytest.raises(UserError, match="unknown task 'paint'"):
    make(tokenizer, change(pattern=("paint",)))
  with pytest.raises(UserError, match="no data source"):
    MicroBatches(SPEC, {"generate": [(Numbers(), 1.0)]}, tokenizer)
  with pytest.raises(UserError, match="not 'generate'"):
    make(tokenizer, generate=[(Numbers("edit"), 1.0)])
  with pytest.raises(UserError, match="is empty"):
    make(tokenizer, generate=[(Numbers(size=0), 1.0)])
  with pytest.raises(UserError, match="text bucket"):
    make(tokenizer, change(text_buckets=(16,))).batch(0)


def test_host_batch_draws_nothing(tokenizer):
  samples = [Numbers()[i] for i in range(30)]
  batch = host_batch(samples, range(30), SPEC, tokenizer)
  assert batch["texts"] == [f"numbers {i} a" for i in range(30)]
  np.testing.assert_array_equal(batch["sample_id"], np.arange(30))


def test_reading_and_tokenizing_happen_in_the_workers(tokenizer, monkeypatch):
  threads = set()
  tokenize = loader_module.prompts.tokenize
  monkeypatch.setattr(
    loader_module.prompts, "tokenize", lambda *args, **kw: threads.add(threading.get_ident()) or tokenize(*args, **kw)
  )
  batches = make(tokenizer).iterate()
  for _ in range(5):
    next(batches)
  batches.close()
  assert threads and threading.get_ident() not in threads


def test_a_sample_of_another_task_is_broken(tokenizer):
  class Mixed(Numbers):
    def __getitem__(self, index):
      return Numbers("edit")[index] if index % 10 == 0 else super().__getitem__(index)

  loader = make(tokenizer, change(max_bad_share=0.5), generate=[(Mixed(), 1.0)])
  for m in range(20):
    loader.batch(m)
  assert {b.index for b in loader.bad_samples()} == {0, 10, 20, 30, 40}


class Hanging(Numbers):
  """Sample 9 waits for the event, or for ever."""

  def __init__(self, event):
    super().__init__(size=20)
    self.event = event

  def __getitem__(self, index):
    if index == 9:
      self.event.wait()
    return super().__getitem__(index)


def test_storage_that_hangs_is_named_while_training_waits(tokenizer):
  event = threading.Event()
  batches = make(tokenizer, change(pattern=("generate",), slow=0.2), generate=[(Hanging(event), 1.0)])
  stream = batches.iterate()
  with pytest.warns(UserWarning, match=r"waited \d+ s for micro-batch \d; being read: sample 9 of numbers \(\d+ s\)") as seen:
    threading.Timer(1.0, event.set).start()
    found = [next(stream) for _ in range(5)]
  assert 2 <= len(seen) <= 5 and stream.waited > 0.4
  assert sorted(int(t[0, 0, 0]) for batch in found for t in batch["target"]) == list(range(20))  # nothing is lost
  assert batches.reading() == []
  stream.close()


def test_past_a_second_limit_it_stops(tokenizer):
  event = threading.Event()
  stream = make(tokenizer, change(pattern=("generate",), slow=0.1, stalled=0.3), generate=[(Hanging(event), 1.0)]).iterate()
  with (
    pytest.warns(UserWarning, match="sample 9"),
    pytest.raises(Stalled, match=r"being read: sample 9 of numbers.*seems to hang"),
  ):
    for _ in range(5):
      next(stream)
  stream.close()
  event.set()


def test_a_command_whose_data_hangs_ends():
  """Though a thread of it never does."""
  code = """if True:
    import threading
    from concurrent.futures import ThreadPoolExecutor
    from deepgen_jax.errors import Stalled, run_command
    def main():
      ThreadPoolExecutor(1).submit(threading.Event().wait)
      raise Stalled("sample 9 of numbers hangs")
    run_command(main)"""
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert run.returncode == 1 and "error: sample 9 of numbers hangs" in run.stderr and "Traceback" not in run.stderr
