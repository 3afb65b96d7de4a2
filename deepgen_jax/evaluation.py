"""Scores a tiny model on what it has never seen: `python -m deepgen_jax.evaluation --model runs/sft --stage sft --output DIR`.

Retrieval (design section 5): every held-out caption and up to --edits held-out edit triplets make one image each, seed = index;
is the true emoji the nearest of all 3,953, or among the nearest five? Beside it the flow-matching loss on the same samples
with fixed noise, the pixel error outside the true change of an edit, and the reward that stage 3 learns from (emoji_similarity)
on the same images of captions. Writes scores.json and samples.npz, which `deepgen_jax.report` draws.
"""

from __future__ import annotations

import argparse
import json
import sys

import jax
import numpy as np
from etils import epath

from deepgen_jax import atomic
from deepgen_jax.cli import parse, start_command
from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data.retrieval import Retrieval, error_outside_change
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration
from deepgen_jax.errors import run_command
from deepgen_jax.heldout import GUIDANCE, STEPS, HeldOut, generate
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.rewards.emoji_similarity import emoji_similarity
from deepgen_jax.rewards.reward import Item
from deepgen_jax.sharding import make_mesh
from deepgen_jax.weights.load import load_model


def load_pipeline(path: str, base: str | None = None) -> DeepGenPipeline:
  """The pipeline of a model, or of a base without an SCB: that gets the fresh one that stage 1 starts from (seed 0)."""
  config, params, tokenizer = load_model(path, base=base)
  if "scb" not in params:
    params = params | jax.jit(lambda key: DeepGen(config).init(key, ("scb",)))(jax.random.key(0))
  return DeepGenPipeline(config, params, tokenizer, mesh=make_mesh())


def evaluate(pipe: DeepGenPipeline, data_dir: str, *, edits: int, steps: int, guidance: float) -> tuple[dict, dict]:
  """-> (scores, samples): what scores.json and samples.npz hold."""
  emoji = emoji_data.prepare(data_dir)
  gallery = emoji.images()
  captions, triplets = EmojiGeneration(emoji, held_out=True), EmojiEdits(emoji, held_out=True, limit=edits)
  names = [emoji.captions[i] for i in captions.indices]
  generated = generate(pipe, names, None, steps, guidance)
  instructions = [edit.instructions[0] for edit in triplets.edits]
  source, true = (gallery[[getattr(edit, which) for edit in triplets.edits]] for which in ("source", "target"))
  edited = generate(pipe, instructions, source, steps, guidance)
  held_out = HeldOut(pipe.model, pipe.tokenizer, {"generate": captions, "edit": triplets}, 225, pipe.mesh)
  retrieval = Retrieval(gallery)
  reward = emoji_similarity(data_dir)([Item(name, image) for name, image in zip(names, generated)])
  by_caption = retrieval.recall(generated, captions.indices)
  by_edit = retrieval.recall(edited, [edit.target for edit in triplets.edits])
  scores = {
    "generation_r1": by_caption["r1"],
    "generation_r5": by_caption["r5"],
    "edit_r1": by_edit["r1"],
    "edit_r5": by_edit["r5"],
    "heldout_loss": float(np.mean([*held_out.losses(pipe.params).values()])),
    "edit_error_outside": float(np.nanmean(error_outside_change(edited, source, true))),
    "reward": float(np.nanmean(reward)),
    "captions": len(names),
    "edits": len(instructions),
    "sampler_steps": steps,
    "guidance": guidance,
  }
  samples = {"captions": np.array(names), "generated": generated, "true": gallery[captions.indices]}
  samples |= {"instructions": np.array(instructions), "source": source, "edited": edited, "edit_true": true}
  return scores, samples


def main() -> None:
  start_command()
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.evaluation",
    description=__doc__.partition("\n")[0],
    epilog="example: python -m deepgen_jax.evaluation --model runs/sft --stage sft --output runs/eval/sft",
    allow_abbrev=False,
  )
  parser.add_argument("--model", required=True, help="what generate takes, or a base without an SCB")
  parser.add_argument("--base", default=None, help="frozen parts of a workdir, if not where its run recorded")
  parser.add_argument("--stage", required=True, help="name of the row in scores.json")
  parser.add_argument("--output", required=True, help="folder for scores.json and samples.npz")
  parser.add_argument("--data_dir", default="runs/data", help="where the emoji set is built")
  parser.add_argument("--edits", type=int, default=500, help="held-out triplets, at most 500")
  parser.add_argument("--steps", type=int, default=STEPS)
  parser.add_argument("--guidance", type=float, default=GUIDANCE)
  arguments = parse(parser, sys.argv[1:])
  pipe = load_pipeline(arguments.model, arguments.base)
  scores, samples = evaluate(
    pipe, arguments.data_dir, edits=arguments.edits, steps=arguments.steps, guidance=arguments.guidance
  )
  folder = epath.Path(arguments.output)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "samples.npz").open("wb") as file:
    np.savez_compressed(file, **samples)
  atomic.write_text(folder / "scores.json", json.dumps({"stage": arguments.stage} | scores, indent=2) + "\n")
  print(json.dumps({"stage": arguments.stage} | scores))


if __name__ == "__main__":
  run_command(main)
