"""Judges a model on samples that it never trains on: flow-matching loss with fixed noise, and pictures with fixed seeds.

Training and the evaluation command use the same programs, in batches of `BATCH`: what one compiled, the other finds cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from deepgen_jax import sharding
from deepgen_jax.data.loader import DataSpec, host_batch
from deepgen_jax.data.sources import Source
from deepgen_jax.errors import UserError
from deepgen_jax.models import lora
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.stages.encode import ImageEncoder, encode_batch
from deepgen_jax.stages.objective import sample_loss

BATCH = 40
STEPS, GUIDANCE = 10, 3.0  # shipped sampler settings of the tiny model


class HeldOut:
  """The first `count` samples of each task's source, in batches of `BATCH` (a rest is left out)."""

  def __init__(self, model: DeepGen, tokenizer, sources: Mapping[str, Source], count: int, mesh):
    if count < BATCH:
      raise UserError(f"config.eval.samples is {count}; held-out samples are judged in batches of {BATCH}: give at least that")
    config = model.config
    self._model, self._encoder = model, ImageEncoder(model, cache=10 * count, mesh=mesh)
    spec = DataSpec(image_size=config.image_size, num_think_tokens=config.scb.num_think_tokens, text_buckets=(128, 1024))
    self._batches, self._samples = [], {}
    divided = BATCH % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    self._sharding = sharding.batch_sharding(mesh) if divided else sharding.replicated(mesh)
    for task, source in sources.items():
      for start in range(0, min(len(source), count) - BATCH + 1, BATCH):
        ids = range(start, start + BATCH)
        samples = [source[i] for i in ids]
        self._samples.setdefault(task, samples)
        self._batches.append((task, host_batch(samples, ids, spec, tokenizer)))

    def judge(params, batch):
      keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(batch["sample_id"])
      return sample_loss(model, params, batch, keys, joint=False, drop=False)

    self._judge = sharding.jit(judge, mesh, out_shardings=sharding.replicated(mesh))

  def losses(self, params) -> dict[str, float]:
    """-> mean loss of each task; the noise and the time of a sample follow from its place."""
    params = lora.merge_lora(params)
    sums: dict[str, list] = {}
    for task, host in self._batches:
      batch = encode_batch(self._model, params, self._encoder, host, 16, self._model.scale)
      batch = sharding.place(batch, jax.tree.map(lambda _: self._sharding, batch))
      sums.setdefault(task, []).append(self._judge(params, batch))
    return {task: float(np.mean(jax.device_get(values))) for task, values in sums.items()}

  def pictures(self, pipe: DeepGenPipeline, params) -> dict[str, np.ndarray]:
    """task -> a grid of the first samples, uint8 [H,W,3]: (source,) true image and what these weights make, side by side."""
    pipe.params, grids = lora.merge_lora(params), {}
    for task, samples in self._samples.items():
      images = [sample.references[0] for sample in samples] if samples[0].references else None
      made = generate(pipe, [sample.texts[0] for sample in samples], images)
      columns = [*([images] if images else []), [sample.target for sample in samples], made]
      rows = np.concatenate([np.stack(column) for column in columns], axis=2)
      rows = rows.reshape(8, -1, *rows.shape[1:])
      grids[task] = np.concatenate(np.concatenate(rows, axis=1), axis=1)
    return grids


def generate(
  pipe: DeepGenPipeline, prompts: Sequence[str], images=None, steps: int = STEPS, guidance: float = GUIDANCE
) -> np.ndarray:
  """One image a prompt of the model's size, with seed = index: uint8 [N,H,W,3]. images: None, or one reference a prompt."""
  made, side = [], pipe.config.image_size
  for start in range(0, len(prompts), BATCH):
    places = np.minimum(np.arange(start, start + BATCH), len(prompts) - 1)  # the last batch repeats the last prompt
    references = None if images is None else [[images[i]] for i in places]
    out = pipe(
      [prompts[i] for i in places],
      image=references,
      height=side,
      width=side,
      num_inference_steps=steps,
      guidance_scale=guidance,
      seed=start,
      output_type="np",
    )
    made.append(np.round(out.images * 255).astype(np.uint8))
  return np.concatenate(made)[: len(prompts)]
