"""Judging on held-out samples, and the command that scores a model."""

import json
import sys

import jax
import numpy as np
import pytest

from deepgen_jax import evaluation, heldout
from deepgen_jax.data.sources import EmojiEdits, EmojiGeneration
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.heldout import HeldOut, generate
from deepgen_jax.models import lora
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.reporting.results import read_stage
from tests.small import CONFIG, draw_params, save_model

BATCH = 16


@pytest.fixture(scope="module", autouse=True)
def small_batches():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(heldout, "BATCH", BATCH)
    yield


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


def test_too_few_samples_are_refused(pipe, emoji):
  with pytest.raises(UserError, match=r"config.eval.samples is 8"):
    HeldOut(pipe.model, pipe.tokenizer, {"generate": EmojiGeneration(emoji, held_out=True)}, 8, pipe.mesh)


def run(monkeypatch, capsys, *options) -> tuple[int, str, str]:
  """The command -> (exit code, stdout, stderr)."""
  monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, options)])
  with pytest.raises(SystemExit) as end:
    run_command(evaluation.main)
  return end.value.code, *capsys.readouterr()


def test_the_command_writes_scores_and_samples(emoji, emoji_dir, tmp_path, monkeypatch, capsys):
  params, parts = draw_params(), ("vlm", "dit", "vae")
  start = save_model(tmp_path / "start", params, parts)  # a base: it gets a fresh SCB
  trained = save_model(tmp_path / "trained", params)
  few = ["--data_dir", emoji_dir, "--captions", 25, "--edits", 20, "--steps", 1, "--guidance", 1]
  models = {"trained": trained, "start": start, "again": trained}
  options = [word for name, model in models.items() for word in ("--stage", f"{name}={model}")]
  code, out, err = run(monkeypatch, capsys, *options, "--output", tmp_path / "out", *few)
  assert code == 0, err
  printed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
  stages = [read_stage(name, tmp_path / "out" / name) for name in models]
  assert printed == [stage.scores for stage in stages]
  for stage, scores in zip(stages, printed):
    assert scores["captions"] == 25 and scores["edits"] == 20
    assert 0 <= scores["generation_r1"] <= scores["generation_r5"] < 0.1  # random weights
    np.testing.assert_array_equal(stage.samples["true"], emoji.images()[np.flatnonzero(emoji.held_out)[::9]])  # 25 of 225
  assert printed[0]["heldout_loss"] != printed[1]["heldout_loss"]
  assert printed[2] == printed[0] | {"stage": "again"}  # whatever was scored in between
  np.testing.assert_array_equal(stages[2].samples["edited"], stages[0].samples["edited"])


@pytest.mark.parametrize(
  "options, message",
  [
    (["--stage", "s=no/such"], "no such folder"),
    (["--stage", "s=tiny", "--captions", "0"], "give at least 1"),
    (["--stage", "tiny"], "write --stage NAME=VALUE"),
    (["--stage", "s=tiny", "--stages", "x"], "Did you mean '--stage'"),
    (["--stage", "s=tiny", "--stage", "t=no/such"], "no such folder"),  # before the first is scored
  ],
)
def test_mistakes_end_with_code_2(options, message, tmp_path, monkeypatch, capsys):
  code, _, err = run(monkeypatch, capsys, "--output", tmp_path / "o", *options)
  assert code == 2 and message in err
  assert not (tmp_path / "o").exists()
