"""Judging on held-out samples, and the command that scores a model."""

import json
import sys

import jax
import numpy as np
import pytest

from deepgen_jax import evaluation
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.heldout import BATCH, HeldOut, generate
from deepgen_jax.models import lora
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.reporting.results import read_stage
from tests.small import CONFIG, draw_params, save_model


@pytest.fixture(scope="module")
def pipe(tokenizer):
  return DeepGenPipeline(CONFIG, draw_params(), tokenizer)


@pytest.fixture(scope="module")
def judge(pipe, emoji):
  sources = {"generate": EmojiGeneration(emoji, held_out=True), "edit": EmojiEdits(emoji, held_out=True)}
  return HeldOut(pipe.model, pipe.tokenizer, sources, BATCH + 3, pipe.mesh)


def test_losses_are_fixed_and_follow_the_weights(judge, pipe):
  losses = judge.losses(pipe.params)
  assert losses.keys() == {"generate", "edit"} and losses == judge.losses(pipe.params)
  other = jax.tree.map(lambda x: x, pipe.params)
  other["dit"]["out"]["bias"] = other["dit"]["out"]["bias"] + 1
  assert all(abs(judge.losses(other)[task] - loss) > 1e-3 for task, loss in losses.items())


def test_losses_see_lora(judge, pipe):
  params = lora.add_lora(pipe.params, ["dit/out/kernel"], 2, 4.0, jax.random.key(0))
  assert judge.losses(params) == judge.losses(pipe.params)  # b starts at zero
  kernel = params["dit"]["out"]["kernel"]
  params["dit"]["out"]["kernel"] = kernel.replace(b=kernel.b + 1)
  assert judge.losses(params) != judge.losses(pipe.params)


def test_pictures_show_what_the_weights_make(judge, pipe, emoji):
  grids = judge.pictures(pipe, pipe.params)
  columns = BATCH // 8 * 64
  assert grids["generate"].shape == (8 * 64, 2 * columns, 3) and grids["edit"].shape == (8 * 64, 3 * columns, 3)
  first = EmojiGeneration(emoji, held_out=True)[0]
  np.testing.assert_array_equal(grids["generate"][:64, :64], first.target)
  made = generate(pipe, [first.texts[0]])[0]
  difference = np.abs(grids["generate"][:64, 64:128].astype(int) - made)
  assert difference.max() <= 1  # another batch
  assert generate(pipe, [first.texts[0]] * 2, steps=1).shape == (2, 64, 64, 3)


def test_too_few_samples_are_refused(pipe, emoji):
  with pytest.raises(UserError, match=r"config.eval.samples is 8"):
    HeldOut(pipe.model, pipe.tokenizer, {"generate": EmojiGeneration(emoji, held_out=True)}, 8, pipe.mesh)


def test_the_command_writes_scores_and_samples(emoji, emoji_dir, tmp_path, monkeypatch, capsys):
  model = save_model(tmp_path / "model", draw_params(), ("vlm", "dit", "vae"))  # a base: it gets a fresh SCB
  options = ["--model", model, "--stage", "start", "--output", tmp_path / "out", "--data_dir", emoji_dir]
  options += ["--edits", 25, "--steps", 1, "--guidance", 1]
  monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, options)])
  with pytest.raises(SystemExit) as end:
    run_command(evaluation.main)
  assert end.value.code == 0, capsys.readouterr().err
  stage = read_stage("start", tmp_path / "out")
  printed = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert printed == stage.scores and printed["captions"] == emoji.held_out.sum() and printed["edits"] == 25
  assert 0 <= printed["generation_r1"] <= printed["generation_r5"] < 0.1  # random weights
  np.testing.assert_array_equal(stage.samples["true"], emoji.images()[np.flatnonzero(emoji.held_out)])


@pytest.mark.parametrize(
  "options, message",
  [(["--model", "no/such"], "no such folder"), (["--stages", "x"], "Did you mean '--stage'")],
)
def test_mistakes_end_with_code_2(options, message, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["evaluation", "--model", "m", "--stage", "s", "--output", str(tmp_path / "o"), *options])
  with pytest.raises(SystemExit) as end:
    run_command(evaluation.main)
  assert end.value.code == 2 and message in capsys.readouterr().err
  assert not (tmp_path / "o").exists()
