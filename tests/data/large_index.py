"""Starting in the middle of a very large list: seconds and memory, from the first index and from the kept one.

    python -m tests.data.large_index --entries 50000000 --start 40000000

writes a .jsonl of so many lines (44 bytes each) to a temporary folder, and opens it in processes of their own, in a mixture
with a small folder.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from deepgen_jax.data.loader import DataSpec, MicroBatches
from deepgen_jax.data.mixture import open_sources
from deepgen_jax.data.tokens import build_tiny_tokenizer
from tests.data.formats.pictures import picture

BATCH = 40  # 30 of the list, 10 of the folder
DIGITS = 10


def build(root: Path, entries: int) -> None:
  """Writes root/list/list.jsonl with a number in each text, and root/folder."""
  for name in ("list", "folder"):
    (root / name).mkdir()
    (root / name / "0.png").write_bytes(picture(0, 64, 64))
  (root / "folder" / "0.txt").write_text("of the folder")
  line = np.frombuffer(json.dumps({"image_path": "0.png", "txt": "0" * DIGITS}).encode() + b"\n", np.uint8)
  place = bytes(line).index(b"0" * DIGITS)
  powers = 10 ** np.arange(DIGITS - 1, -1, -1)
  with (root / "list" / "list.jsonl").open("wb") as file:
    for start in range(0, entries, 1_000_000):
      numbers = np.arange(start, min(start + 1_000_000, entries))
      lines = np.tile(line, (len(numbers), 1))
      lines[:, place : place + DIGITS] = ord("0") + numbers[:, None] // powers % 10
      file.write(lines.tobytes())


def start(root: Path, first: int) -> dict:
  """Opens the mixture and reads the batch that has sample `first` -> seconds, texts and the process's peak memory in MB."""
  tokenizer = build_tiny_tokenizer()
  before, began = peak(), time.monotonic()
  sources = open_sources([{"uri": f"json:{root}/list", "weight": 3}, f"folder:{root}/folder"], root)
  opened = time.monotonic()
  spec = DataSpec(("generate",), BATCH, 64, 8, (64,), caption_dropout=0.0)
  stream = MicroBatches(spec, sources, tokenizer).iterate(first // BATCH)
  batch = next(stream)
  read = time.monotonic()
  stream.close()
  seconds = {"open_s": round(opened - began, 2), "first_batch_s": round(read - opened, 2)}
  return seconds | {"peak_mb": peak(), "before_mb": before, "ids": batch["sample_id"].tolist(), "texts": batch["texts"]}


def peak() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--entries", type=int, default=50_000_000)
  parser.add_argument("--start", type=int, default=40_000_000)
  parser.add_argument("--root", help="an earlier run's folder (used by the processes that are measured)")
  arguments = parser.parse_args()
  if arguments.root:
    print(json.dumps(start(Path(arguments.root), arguments.start)))
    return
  with tempfile.TemporaryDirectory() as root:
    build(Path(root), arguments.entries)
    size = (Path(root) / "list" / "list.jsonl").stat().st_size
    print(f"{arguments.entries} entries, {size / 1e9:.1f} GB", flush=True)
    command = [sys.executable, "-m", "tests.data.large_index", "--start", str(arguments.start), "--root", root]
    for name in ("no index yet", "index kept"):
      found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
      texts = found.pop("texts")
      print(f"{name}: {found | {'ids': found['ids'][:2], 'texts': texts[:3]}}", flush=True)


if __name__ == "__main__":
  main()
