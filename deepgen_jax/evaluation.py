"""Scores tiny models on what they have never seen: `python -m deepgen_jax.evaluation --stage sft=runs/sft --output runs/eval`.

Retrieval (design section 5): up to --captions held-out captions and --edits edit triplets make one image each, seed = index; is
the true emoji the nearest of all 3,953, or among the nearest five? Beside it the flow-matching loss on held-out samples with
fixed noise, the pixel error outside the true change of an edit, and the reward that stage 3 learns from (emoji_similarity)
on the same images of captions. Writes scores.json and samples.npz of each model into its folder, OUTPUT/NAME, which
`deepgen_jax.report` draws. Models of one base share what is compiled and what is encoded: score them in one command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from deepgen_jax import atomic
from deepgen_jax.cli import named_values, parse, start_command
from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data.retrieval import Retrieval, error_outside_change
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.heldout import GUIDANCE, STEPS, HeldOut, generate
from deepgen_jax.models.config import DeepGenConfig
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.rewards.emoji_similarity import emoji_similarity
from deepgen_jax.rewards.reward import Item
from deepgen_jax.sharding import make_mesh
from deepgen_jax.weights.load import open_weights


class Evaluator:
  """Scores one model after another, each like the others."""

  def __init__(self, data_dir: str, *, captions: int = 225, edits: int = 500, steps: int = STEPS, guidance: float = GUIDANCE):
    """data_dir: where the emoji set is built; captions, edits: held-out ones, at most 225 and 500, fewer captions at even
    distances; steps, guidance: of the sampler.
    """
    emoji = emoji_data.prepare(data_dir)
    self._gallery = emoji.images()
    self._captions, self._triplets = EmojiGeneration(emoji, held_out=True), EmojiEdits(emoji, held_out=True, limit=edits)
    count = len(self._captions)
    self._true = self._captions.indices[np.arange(min(captions, count)) * count // min(captions, count)]
    self._names = [emoji.captions[i] for i in self._true]
    self._sampler = {"steps": steps, "guidance": guidance}
    self._retrieval, self._reward = Retrieval(self._gallery), emoji_similarity(data_dir)
    self._pipe = self._held_out = None

  def _take(self, config: DeepGenConfig, params: Mapping, tokenizer) -> None:
    """Makes these the weights to score. Programs and encoded images stay where they hold for this model too."""
    if "scb" not in params:
      params = params | jax.jit(lambda key: DeepGen(config).init(key, ("scb",)))(jax.random.key(0))
    pipe, self._pipe = self._pipe, DeepGenPipeline(config, params, tokenizer, mesh=make_mesh())
    if pipe and _same_base(pipe, self._pipe):
      pipe.params, self._pipe = self._pipe.params, pipe
      return
    sources = {"generate": self._captions, "edit": self._triplets}
    self._held_out = HeldOut(self._pipe.model, tokenizer, sources, 225, self._pipe.mesh)

  def score(self, config: DeepGenConfig, params: Mapping, tokenizer) -> tuple[dict, dict]:
    """A model, or a base without an SCB, which gets the fresh one that stage 1 starts from (seed 0).

    -> (scores, samples): what scores.json and samples.npz hold.
    """
    self._take(config, params, tokenizer)
    names, edits = self._names, self._triplets.edits
    generated = generate(self._pipe, names, None, **self._sampler)
    instructions = [edit.instructions[0] for edit in edits]
    source, true = (self._gallery[[getattr(edit, which) for edit in edits]] for which in ("source", "target"))
    edited = generate(self._pipe, instructions, source, **self._sampler)
    by_caption = self._retrieval.recall(generated, self._true)
    by_edit = self._retrieval.recall(edited, [edit.target for edit in edits])
    scores = {
      "generation_r1": by_caption["r1"],
      "generation_r5": by_caption["r5"],
      "edit_r1": by_edit["r1"],
      "edit_r5": by_edit["r5"],
      "heldout_loss": float(np.mean([*self._held_out.losses(self._pipe.params).values()])),
      "edit_error_outside": float(np.nanmean(error_outside_change(edited, source, true))),
      "reward": float(np.nanmean(self._reward([Item(name, image) for name, image in zip(names, generated)]))),
      "captions": len(names),
      "edits": len(instructions),
      "sampler_steps": self._sampler["steps"],
      "guidance": self._sampler["guidance"],
    }
    samples = {"captions": np.array(names), "generated": generated, "true": self._gallery[self._true]}
    samples |= {"instructions": np.array(instructions), "source": source, "edited": edited, "edit_true": true}
    return scores, samples


def _same_base(one: DeepGenPipeline, other: DeepGenPipeline) -> bool:
  """Whether they have the same sizes, tokenizer, VAE and vision tower."""
  if one.config != other.config or one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
    return False
  encoders = [{"vae": pipe.params["vae"], "vision": pipe.params["vlm"]["vision"]} for pipe in (one, other)]
  return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *encoders))


def main() -> None:
  start_command()
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.evaluation",
    description="Scores tiny models on what they have never seen.",
    epilog="example: python -m deepgen_jax.evaluation --stage start=tiny --stage sft=runs/sft --output runs/eval",
    allow_abbrev=False,
  )
  parser.add_argument(
    "--stage",
    action="append",
    required=True,
    metavar="NAME=MODEL",
    help="name of a row in scores.json, and what generate takes as --model, or a base without an SCB; repeat",
  )
  parser.add_argument("--base", default=None, help="frozen parts of workdirs, if not where their runs recorded")
  parser.add_argument("--output", required=True, metavar="DIR", help="a folder for each NAME is made in it")
  parser.add_argument("--data_dir", default="runs/data", help="where the emoji set is built")
  parser.add_argument("--captions", type=int, default=225, help="held-out captions, 1 to 225")
  parser.add_argument("--edits", type=int, default=500, help="held-out triplets, 1 to 500")
  parser.add_argument("--steps", type=int, default=STEPS)
  parser.add_argument("--guidance", type=float, default=GUIDANCE)
  arguments = parse(parser, sys.argv[1:])
  models = {name: open_weights(path, arguments.base) for name, path in named_values("--stage", arguments.stage)}
  if min(arguments.captions, arguments.edits) < 1:
    raise UserError(f"--captions {arguments.captions}, --edits {arguments.edits}: give at least 1 of each")
  asked = {name: getattr(arguments, name) for name in ("captions", "edits", "steps", "guidance")}
  evaluator = Evaluator(arguments.data_dir, **asked)
  for name, model in models.items():
    scores, samples = evaluator.score(model.config, model.params(), model.tokenizer())
    folder = epath.Path(arguments.output) / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "samples.npz").open("wb") as file:
      np.savez_compressed(file, **samples)
    atomic.write_text(folder / "scores.json", json.dumps({"stage": name} | scores, indent=2) + "\n")
    print(json.dumps({"stage": name} | scores), flush=True)


if __name__ == "__main__":
  run_command(main)
