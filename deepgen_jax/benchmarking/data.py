"""The case `data`: what one core reads, decodes, resizes, tokenises and batches, and how many cores feed one chip.

It is measured on the loader's own functions, one after the other in one thread, with JPEGs of ordinary size made for it.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from PIL import Image

from deepgen_jax.data import prompts
from deepgen_jax.data.images import decode_image, fix_pixels
from deepgen_jax.data.loader import DataSpec, Example, assemble
from deepgen_jax.data.tokens import build_tiny_tokenizer

STAGES = ("read", "decode", "resize", "tokenise", "batch")
SAMPLES = 16  # of a micro-batch
SIDE = 1024  # pixels of a JPEG, quality 90
CAPTION = "a photograph of a lighthouse on a rocky shore at dusk, long exposure, waves blurred to mist, warm light " * 3


def measure(image_size: int, rounds: int, clock: str, images_per_s: float) -> dict:
  """-> the fields of the case's JSON object: milliseconds of a sample by stage (medians), samples/s of a core, and the cores
  that a chip needs which trains on `images_per_s`.

  image_size: that samples are brought to; clock: "wall" or "cpu".
  """
  now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
  times: dict[str, list[float]] = {stage: [] for stage in STAGES}
  with tempfile.TemporaryDirectory(prefix="deepgen_benchmark_") as folder:
    files = [epath.Path(folder) / f"{n}.jpg" for n in range(SAMPLES)]
    for n, file in enumerate(files):
      file.write_bytes(photograph(n))
    size = sum(file.stat().length for file in files) / len(files)
    spec = DataSpec(("generate",), SAMPLES, image_size, text_buckets=(512,))
    tokenizer = build_tiny_tokenizer()
    for turn in range(rounds + 1):  # the first one warms up
      for stage, seconds in one_round(files, spec, tokenizer, now).items():
        if turn:
          times[stage].append(1000 * seconds / SAMPLES)
  stages = {stage: statistics.median(values) for stage, values in times.items()}
  rate = 1000 / sum(stages.values())
  return {
    "stages_ms": {stage: round(value, 4) for stage, value in stages.items()},
    "samples_per_s_per_core": round(rate, 2),
    "image_size": image_size,
    "images_per_s": images_per_s,
    "cores_per_chip": round(images_per_s / rate, 3),
    "notes": [
      f"JPEGs of {SIDE}x{SIDE} pixels and {size / 1000:.0f} kB in the page cache: `read` is without the storage's own time",
      f"captions of {len(CAPTION)} characters; the shipped tokenizer, which has no merges, makes a token of every byte",
      "an edit with one reference has two images: about twice the time of a sample",
    ],
  }


def one_round(files: Sequence[epath.Path], spec: DataSpec, tokenizer, now: Callable[[], float]) -> dict[str, float]:
  """Takes the files through all stages -> seconds of each, of all files together."""
  times, started = {}, now()

  def done(stage: str, result):
    nonlocal started
    times[stage], started = now() - started, now()
    return result

  data = done("read", [file.read_bytes() for file in files])
  images = done("decode", [decode_image(raw, file.name) for raw, file in zip(data, files)])
  images = done("resize", [fix_pixels(image, spec.image_size) for image in images])
  tokens = done("tokenise", [prompts.tokenize(tokenizer, "generate", CAPTION) for _ in images])
  examples = [Example(n, CAPTION, prompt, image, ()) for n, (prompt, image) in enumerate(zip(tokens, images))]
  done("batch", _stacked(assemble("generate", examples, spec)))
  return times


def _stacked(batch: dict) -> np.ndarray:
  """As the encoder takes the images."""
  return np.stack(batch["target"])


def photograph(seed: int) -> bytes:
  """A JPEG with about as much detail as a photograph: noise at several scales."""
  rng, pixels = np.random.default_rng(seed), np.zeros((SIDE, SIDE, 3))
  for cells in (4, 16, 64, 256):
    noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels += np.asarray(noise, float)
  data = io.BytesIO()
  Image.fromarray((pixels / 4 + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
  return data.getvalue()
