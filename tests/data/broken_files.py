"""A list of many samples of which one in a hundred is broken in one of ten ways, and a run that trains on it:

    python -m tests.data.broken_files --entries 100000

builds it in a temporary folder, trains a small model on all of it once, and says what became of the broken ones.
"""

import argparse
import json
import math
import re
import struct
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
from etils import epath

from deepgen_jax import train
from deepgen_jax.config import load_config
from deepgen_jax.data.loader import DataSpec, MicroBatches
from deepgen_jax.data.mixture import open_sources
from deepgen_jax.data.tokens import build_tiny_tokenizer
from deepgen_jax.models.config import SIZES
from deepgen_jax.stages import supervised
from tests.data.formats.pictures import jpeg
from tests.small import CONFIG, draw_params, save_model

BATCH = 200
KINDS = {  # what the report must say
  "truncated JPEG": "truncated",
  "zero bytes": "the file is empty",
  "wrong extension": "its format is unknown",
  "bomb-sized PNG": "12000x12000 pixels .* are more than",
  "broken JSON line": "not JSON",
  "missing file": "does not exist",
  "non-UTF-8 caption": "not UTF-8",
  "empty caption": "the text is empty",
  "huge caption": "limit 8000",
  "path that leaves the folder": "leaves the folder",
}
SECRET = 255  # grey of the picture outside the folder; others are darker


def build(root: Path, entries: int, share: float = 0.01) -> dict[int, str]:
  """Writes root/data/list.jsonl and what it names, and a good picture outside; -> kind of each broken entry."""
  folder = root / "data"
  folder.mkdir()
  grey = lambda value: np.full((64, 64, 3), value, np.uint8)
  for n in range(10):
    (folder / f"{n}.jpg").write_bytes(jpeg(grey(20 * n)))
  (root / "secret.jpg").write_bytes(jpeg(grey(SECRET)))
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  (folder / "truncated.jpg").write_bytes(jpeg(noise)[:-500])
  (folder / "zero.jpg").write_bytes(b"")
  (folder / "extension.png").write_text("<html>not found</html>")
  (folder / "bomb.png").write_bytes(bomb(12000, 12000))
  rng = np.random.default_rng(1)
  broken = rng.permutation(entries)[: round(share * entries)]
  kinds = {int(index): list(KINDS)[n % len(KINDS)] for n, index in enumerate(broken)}
  outside = ("../secret.jpg", str(root / "secret.jpg"), "x/../../secret.jpg")
  images = {
    "truncated JPEG": "truncated.jpg",
    "zero bytes": "zero.jpg",
    "wrong extension": "extension.png",
    "bomb-sized PNG": "bomb.png",
    "missing file": "gone.jpg",
  }
  with (folder / "list.jsonl").open("wb") as file:
    for index in range(entries):
      kind = kinds.get(index)
      image, text = images.get(kind, f"{index % 10}.jpg"), f"sample {index}"
      if kind == "path that leaves the folder":
        image = outside[index % 3]
      if kind in ("empty caption", "huge caption"):
        text = "" if kind == "empty caption" else text * 10_000
      line = json.dumps({"image_path": image, "txt": text}).encode()
      if kind == "non-UTF-8 caption":
        line = line.replace(b"sample", b"caf\xe9")
      file.write((line[:-3] if kind == "broken JSON line" else line) + b"\n")
  return kinds


def bomb(height: int, width: int) -> bytes:
  """A PNG of some bytes that says it has this many pixels."""
  chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


class Seen:
  """What was in the micro-batches of one epoch: how often each entry, and which greys."""

  def __init__(self):
    self.entries, self.greys = Counter(), set()

  def note(self, batch: dict) -> None:
    self.entries.update(int(text.split()[1]) for text in batch["texts"])
    self.greys.update(int(image[0, 0, 0]) for image in batch["target"])


def read(root: Path, entries: int) -> tuple[Seen, list[dict]]:
  """One epoch through the loader alone, as a config sets it up -> (what was seen, bad samples)."""
  config = load_config("configs/align.py:tiny").data
  sources = open_sources([f"json:{root}/data/list.jsonl"], root)
  spec = DataSpec(("generate",), BATCH, 64, 8, (64,), caption_dropout=0.0, max_bad_share=config.max_bad_share)
  batches = MicroBatches(spec, sources, build_tiny_tokenizer())
  seen, stream = Seen(), batches.iterate()
  for _ in range(entries // BATCH):
    seen.note(next(stream))
  stream.close()
  return seen, [bad._asdict() for bad in batches.bad_samples()]


def train_on(root: Path, entries: int) -> tuple[Seen, list[dict]]:
  """Trains on one epoch, in root/run -> (what the train step was given, bad samples)."""
  seen, encode = Seen(), supervised.encode_batch

  def noted(model, params, encoder, host, *args):
    seen.note(host)
    return encode(model, params, encoder, host, *args)

  settings = {
    "init": save_model(root / "base", draw_params(), ("vlm", "dit", "vae")),
    "steps": entries // BATCH,
    "data.sources": f"json:{root}/data/list.jsonl",
    "data.pattern": "generate",
    "data.batch_size": BATCH,
    "data.text_buckets": "(64,)",
    "data.caption_dropout": 0.0,
    "unroll": "false",
    "eval.every": 0,
    "log.samples": "true",
  }
  config = load_config("configs/align.py:tiny", [f"{key}={value}" for key, value in settings.items()])
  with mock.patch.dict(SIZES, tiny=CONFIG), mock.patch.object(supervised, "encode_batch", noted):
    train.train(config, epath.Path(root / "run"))
  ids, metrics, bad = (rows(root / "run" / f"{name}.jsonl") for name in ("samples", "metrics", "bad_samples"))
  assert [i for row in ids for i in row["ids"]] == list(range(entries))
  assert metrics[-1]["step"] == entries // BATCH and all(math.isfinite(row["loss"]) for row in metrics)
  return seen, bad


def rows(file: Path) -> list[dict]:
  return [json.loads(line) for line in file.read_text().splitlines()]


def check(kinds: dict[int, str], entries: int, seen: Seen, bad: list[dict]) -> Counter:
  """AssertionError unless all is as it must be; -> how many of each kind the report names."""
  reasons = {sample["index"]: sample for sample in bad}
  assert reasons.keys() == kinds.keys()
  wrong = {i: reasons[i]["reason"] for i, kind in kinds.items() if not re.search(KINDS[kind], reasons[i]["reason"])}
  assert not wrong, list(wrong.items())[:5]
  assert {i for i in reasons if reasons[i]["filter"]} == {i for i, kind in kinds.items() if kind == "huge caption"}
  assert seen.entries.keys() == set(range(entries)) - kinds.keys()  # all good ones, and no other
  assert seen.entries.total() == entries and max(seen.greys) < SECRET - 20
  return Counter(kinds[i] for i in reasons)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--entries", type=int, default=100_000, help=f"a multiple of {BATCH}")
  entries = parser.parse_args().entries
  with tempfile.TemporaryDirectory() as root:
    kinds = build(Path(root), entries)
    start = time.monotonic()
    found = train_on(Path(root), entries)
    seconds = time.monotonic() - start
    for kind, count in sorted(check(kinds, entries, *found).items()):
      print(f"{count:6} {kind}")
    (counts,) = json.loads((Path(root) / "run" / "data_counts.json").read_text()).values()
    print(
      f"trained on {entries} entries in {entries // BATCH} updates, {seconds:.0f} s; drawn, reading ahead included: {counts}"
    )


if __name__ == "__main__":
  main()
