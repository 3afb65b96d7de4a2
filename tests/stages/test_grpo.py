"""Stage 3 on a small random model: what an update is made of, that it learns, that devices and micro-batches don't matter."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from deepgen_jax import sharding
from deepgen_jax.checkpoint import Checkpointer
from deepgen_jax.config import load_config, to_json
from deepgen_jax.errors import UserError
from deepgen_jax.estimating.inputs import policy_batch, rollout_arguments
from deepgen_jax.models.config import SIZES
from deepgen_jax.models.deepgen import DeepGen, param_shapes
from deepgen_jax.models.lora import path_name
from deepgen_jax.rl.rollout import make_velocity, replay
from deepgen_jax.stages import grpo, rollouts
from deepgen_jax.stages.grpo import Judging
from deepgen_jax.stages.step import full_params, init_state, make_optimizer, make_train_step
from deepgen_jax.weights.load import load_model
from tests.small import CONFIG, draw_params, random_image, save_model

SMALL = {
  "grpo.objective": "flow_grpo",
  "grpo.sampler": "cps",
  "grpo.shared_noise": True,
  "unroll": "false",
  "data.text_buckets": "(128,)",
  "grpo.prompts": 4,
  "grpo.group_size": 4,
  "grpo.steps": 4,
  "grpo.window": 3,
  "grpo.train_steps": 2,
  "grpo.sft_weight": 0.0,
  "grpo.kl_weight": 0.0,
  "optim.lr": 5e-3,
  "eval.every": 0,
}


def prompt(text, references=(), dataset="colours", **weights):
  return SimpleNamespace(text=text, references=references, weights=weights, metadata={}, dataset=dataset)


class Prompts:
  """Texts that take turns."""

  def __init__(self, *prompts):
    self._prompts = prompts

  def __getitem__(self, i):
    return self._prompts[i % len(self._prompts)]


class Judge:
  """What a mixture of rewards offers, with one reward: how red an image is. Keeps the items that it saw."""

  names = ("redness",)

  def __init__(self, score=None):
    self.seen, self._score = [], score or (lambda item: (item.image[..., 0].mean() - item.image[..., 1:].mean()) / 255)

  def submit(self, items, weights):
    self.seen.append(items)
    rewards = np.array([[self._score(item)] for item in items])
    scores = SimpleNamespace(rewards=rewards, weights=np.array([[w.get("redness", 0.0)] for w in weights]), names=self.names)
    return SimpleNamespace(result=lambda: scores)

  def __call__(self, items, weights):
    return self.submit(items, weights).result()


TEXTS = Prompts(prompt("a cat", redness=1.0), prompt("a dog", redness=1.0))


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(SIZES, "tiny", CONFIG)
    yield save_model(tmp_path_factory.mktemp("base"), draw_params())


def configure(base, size="tiny", **overrides):
  values = SMALL | {"init": base} | {key.replace("__", "."): value for key, value in overrides.items()}
  return load_config(f"configs/grpo.py:{size}", [f"{key}={value}" for key, value in values.items()])


class Run:
  """A stage with its state, driven update by update as the loop does."""

  def __init__(self, config, workdir, devices=1, prompts=TEXTS, judge=None):
    self.mesh = sharding.make_mesh({"data": -1}, jax.devices()[:devices])
    self.judge = judge or Judge()
    self.stage = grpo.build(config, self.mesh, workdir, Judging(prompts, self.judge))
    trainable, frozen = sharding.partition(self.stage.init(), config.trainable)
    self.frozen = jax.device_put(frozen, sharding.param_shardings(frozen, self.mesh))
    optimizer, schedule = make_optimizer(config.optim, 100)
    decay = self.stage.old_decay
    fresh = lambda params: init_state(params, optimizer, config.optim.ema > 0, decay is not None)
    shardings = sharding.state_shardings(jax.eval_shape(fresh, trainable), self.mesh)
    self.state = jax.jit(fresh, out_shardings=shardings)(trainable)
    settings = dict(accumulate=1, clip=1.0, ema_decay=config.optim.ema, old_decay=decay or (0.0, 0.0))
    step = make_train_step(self.stage.loss, optimizer, schedule, **settings)
    self._step = jax.jit(step, out_shardings=(shardings, sharding.replicated(self.mesh)))
    self._updates = self.stage.batches.iterate(0)

  def batches(self):
    """Those of the next update; lazily, as in the loop."""
    return self.stage.prepare(full_params(self.state, self.frozen), next(self._updates))

  def update(self):
    """-> metrics of one update, and its batches."""
    rows, batches = [], []
    for batch in self.batches():
      batch = jax.device_put(batch, sharding.batch_sharding(self.mesh))
      batches.append(batch)
      self.state, found = self._step(self.state, self.frozen, batch, jax.random.key(0))
      rows.append({name: float(value) for name, value in found.items()})
    return self.stage.summarise(rows) | self.stage.scalars(), batches


def moved(one, two):
  return max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def close(one, two, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    assert np.abs(np.asarray(a) - b).max() <= tolerance * max(1.0, np.abs(np.asarray(b)).max())


@pytest.fixture(scope="module")
def first(base, tmp_path_factory):
  """A run on one device, everything in one micro-batch a timestep, and what its first update was and left."""
  run = Run(configure(base), tmp_path_factory.mktemp("first"))
  before = jax.device_get(run.state.params)
  metrics, batches = run.update()
  return SimpleNamespace(run=run, before=before, metrics=metrics, batches=batches, after=jax.device_get(run.state))


def test_an_update_trains_on_a_subset_of_the_window(first):
  assert len(first.batches) == 2
  sigmas = {float(batch["sigma"][0]) for batch in first.batches}
  assert len(sigmas) == 2 and all(float(batch["sigma_next"][0]) > 0 for batch in first.batches)
  assert int(first.after.step) == 1 and moved(first.after.params, first.before) > 0


def test_with_one_update_the_ratio_is_one_and_the_replay_is_the_rollout(first):
  m = first.metrics
  assert m["ratio"] == m["ratio_min"] == m["ratio_max"] == 1 and m["clip_fraction"] == 0
  assert 0 <= m["replay_difference"] <= 1e-5
  assert m["grad_norm"] > 0 and m["grad_norm_policy"] == pytest.approx(m["grad_norm"], rel=1e-5)


def test_the_estimate_compiles_for_the_batches_that_training_makes(first, base):
  config, model = configure(base), DeepGen(CONFIG)
  arguments = rollout_arguments(config, model, first.run.mesh, 16, 60)
  params = param_shapes(model.config)
  made = jax.eval_shape(rollouts.sampler(config.grpo, model), params, *arguments)
  chunk = arguments[0] | {name: getattr(made, name) for name in rollouts.kept(config.grpo)}
  shapes = lambda batch: jax.tree.map(lambda x: (x.shape, x.dtype.name), batch)
  assert shapes(policy_batch(config, model, first.run.mesh, chunk, 16)) == shapes(first.batches[0])


def test_metrics_say_what_the_rewards_were(first):
  rewards = np.array([first.run.judge._score(item) for item in first.run.judge.seen[0]])
  m = first.metrics
  assert m["reward/redness/colours"] == pytest.approx(rewards.mean()) and m["reward"] == pytest.approx(rewards.mean())
  assert m["reward_std/redness/colours"] == pytest.approx(rewards.std()) and m["missing/redness"] == 0
  assert m["zero_std_groups"] == 0 and {"seconds_rollout", "seconds_rewards"} <= m.keys()


def test_advantages_weigh_the_log_probabilities(first):
  """With a ratio of 1 the gradient is that of -A times the log-probability, written out."""
  run, batch = first.run, first.batches[0]
  full = sharding.merge(first.before, run.frozen)
  inputs = {name: batch[name] for name in ("cond", "target")}

  def expected(dit):
    velocity = make_velocity(DeepGen(CONFIG), full | {"dit": dit}, inputs, 1.0)(batch["latents"], batch["sigma"])
    return -(batch["advantage"] * replay("cps", 1.0, velocity, batch).log_prob).mean()

  ours = lambda dit: run.stage.loss(full | {"dit": dit}, batch, None)[0].mean()
  one, two = jax.jit(lambda dit: (jax.grad(expected)(dit), jax.grad(ours)(dit)))(full["dit"])
  close(two, one, 1e-6)
  assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(two)) > 1e-4


def test_eight_devices_and_micro_batches_give_the_same_update(first, base, tmp_path):
  """Rollout, gradients and weights of a run on eight devices, and of one that cuts everything into pieces."""
  run = Run(configure(base, grpo__rollout_batch=8, grpo__micro_batch=8), tmp_path, devices=8)
  metrics, batches = run.update()
  assert len(batches) == 4
  pieces = lambda name: np.concatenate([np.asarray(batch[name]) for batch in batches[:2]])
  close(pieces("latents"), first.batches[0]["latents"])
  np.testing.assert_array_equal(pieces("sample_id"), first.batches[0]["sample_id"])
  assert metrics["loss"] == pytest.approx(first.metrics["loss"], abs=1e-5)
  assert metrics["grad_norm"] == pytest.approx(first.metrics["grad_norm"], rel=1e-4)
  close(run.state.opt_state[0].mu, first.after.opt_state[0].mu)


def test_the_reward_rises(first):
  """Redness is something that any weights can learn."""
  rewards = [first.metrics["reward"], *(first.run.update()[0]["reward"] for _ in range(15))]
  assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 2 * first.metrics["reward_std/redness/colours"]


def test_processes_share_the_groups_and_what_they_found(monkeypatch):
  """Each image is judged once, by the process that has all of its group; a missing score stays missing."""
  images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
  prompts = [prompt("a", redness=1.0), prompt("b"), prompt("c", redness=0.5)]
  told, seen = [], []

  def judge(index, count, others):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(rollouts.distributed, "shared", lambda text: (told.append(text), others or [text])[1])
    judges = rollouts.Judges(Judge(lambda item: np.nan if (item.image == images[1]).all() else item.image.mean() / 3), 2)
    judges.submit(prompts[:1], images[:2])
    judges.submit(prompts[1:], images[2:], first_group=1)
    seen.append([item.group for items in judges._score.seen for item in items])
    return judges.result()

  whole = judge(0, 1, None)
  assert np.isnan(whole[0][1]) and np.isnan(whole[0]).sum() == 1 and whole[1][:, 0].tolist() == [1, 1, 0, 0, 0.5, 0.5]
  for index in range(2):
    judge(index, 2, None)
  assert seen[1:] == [[0, 0, 2, 2], [1, 1]]
  for index in range(2):
    rewards, weights, names = judge(index, 2, told[1:3])
    np.testing.assert_array_equal(rewards, whole[0])
    np.testing.assert_array_equal(weights, whole[1])
    assert names == whole[2]


EDITS = Prompts(prompt("a cat", redness=1.0), prompt("redder", (random_image(64, 64), random_image(64, 32, 1)), redness=2.0))


@pytest.fixture(scope="module")
def rich(base, tmp_path_factory, emoji_dir):
  """Everything else at once: two updates a rollout, GRPO-Guard, guidance, KL, LoRA, EMA, edits, a supervised batch each second
  update. Two rollouts: the warm-up's first update hardly moves.
  """
  overrides = {
    "data.dir": emoji_dir,
    "data.batch_size": 4,
    "data.caption_dropout": 0.0,
    "lora.rank": 2,
    "optim.ema": 0.5,
    "grpo.prompts": 2,
    "grpo.objective": "grpo_guard",
    "grpo.sampler": "flow_sde",
    "grpo.guidance": 2.0,
    "grpo.shared_noise": "false",
    "grpo.window": 2,
    "grpo.updates_per_rollout": 2,
    "grpo.train_steps": 2,
    "grpo.ratio_clip": "(0.001, 0.002)",
    "grpo.kl_weight": 0.5,
    "grpo.sft_weight": 0.25,
    "grpo.sft_every": 2,
  }
  config = configure(base, "tiny_lora", **overrides)
  run = Run(config, tmp_path_factory.mktemp("rich"), prompts=EDITS)
  before = jax.device_get(run.state.params)
  updates = [run.update() for _ in range(3)]
  middle = jax.device_get(run.state)
  updates.append(run.update())
  return SimpleNamespace(run=run, config=config, before=before, updates=updates, middle=middle)


def test_several_updates_share_a_rollout_and_compare_with_its_weights(rich):
  (one, first), (two, second) = rich.updates[2:]
  ids = lambda batches: [int(i) for i in batches[0]["sample_id"]]
  assert sorted(ids(first) + ids(second)) == list(range(8)) and len(ids(first)) == 4
  assert len(rich.run.judge.seen) == 2
  assert one["ratio_min"] == pytest.approx(1, abs=1e-4) and one["ratio_max"] == pytest.approx(1, abs=1e-4)
  assert one["replay_difference"] <= 1e-5 and two["replay_difference"] == 0  # by then the weights are others
  assert two["ratio_max"] > 1.0001 or two["ratio_min"] < 0.9999
  assert 0 <= two["clip_fraction"] <= 1


def test_the_supervised_batch_weighs_lambda_where_there_is_one(rich):
  (one, first), (two, second) = rich.updates[2:]
  assert len(first) == 3 and len(second) == 2  # two timesteps; the first update has a supervised batch beside
  weights = [float(batch["weight"].mean()) for batch in first]
  np.testing.assert_allclose(np.array(weights) / 3, [0.375, 0.375, 0.25], rtol=1e-6)
  assert [float(batch["weight"].mean()) for batch in second] == [1.0, 1.0]
  assert one["grad_norm_sft"] > 0 and one["grad_norm_policy"] > 0 and "grad_norm_sft" not in two
  terms = 0.75 * (one["policy_loss"] + 0.5 * one["kl"]) + 0.25 * one["sft_loss"]
  assert one["loss"] == pytest.approx(terms, rel=1e-5)
  assert two["loss"] == pytest.approx(two["policy_loss"] + 0.5 * two["kl"], rel=1e-4)


def test_with_lora_the_weights_below_are_the_reference(rich):
  """The KL is 0 before anything has moved and not after; nothing keeps a second copy; EMA follows."""
  run = rich.run
  assert rich.updates[0][0]["kl"] == 0 and rich.updates[3][0]["kl"] > 0
  assert "reference" not in run.frozen
  trained = [path for path, leaf in _paths(run.state.params) if leaf is not None]
  assert trained and all(path.endswith(("/a", "/b")) for path in trained)
  assert moved(rich.middle.params, rich.before) > 0
  expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, rich.middle.ema, jax.device_get(run.state.params))
  close(run.state.ema, expected)


def test_a_run_with_lora_can_be_loaded(rich, base, tmp_path):
  """Its LoRA lies upon the weights that it started from."""
  workdir, state = epath.Path(tmp_path), rich.run.state
  (workdir / "config.json").write_text(to_json(rich.config))
  saved = Checkpointer(workdir, 1, 1)
  saved.save(4, state, {"micro_batches": 4})
  saved.close()
  _, loaded, _ = load_model(workdir, weights="raw")
  kernel, trained = (tree["dit"]["blocks_0"]["attn"]["q"]["kernel"] for tree in (loaded, state.params))
  np.testing.assert_array_equal(kernel.a, trained.a)
  np.testing.assert_array_equal(kernel.b, trained.b)
  np.testing.assert_array_equal(kernel.kernel, load_model(base)[1]["dit"]["blocks_0"]["attn"]["q"]["kernel"])
  assert kernel.scale == rich.config.lora.alpha / 2 and np.abs(kernel.b).max() > 0


def _paths(tree):
  return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def test_groups_can_have_references_and_judges_see_them(rich):
  items = rich.run.judge.seen[0]
  assert [item.group for item in items] == [0] * 4 + [1] * 4
  assert items[0].references == () and [image.shape for image in items[4].references] == [(64, 64, 3), (64, 32, 3)]
  assert items[4].prompt == "redder" and items[4].image.shape == (64, 64, 3)
  batch = rich.updates[0][1][0]
  edits = np.asarray(batch["sample_id"]) >= 4
  np.testing.assert_array_equal(np.asarray(batch["references"]["mask"]).any(1), edits)
  assert not np.array_equal(batch["latents"][0], batch["latents"][1])  # noise of their own


def test_diffusion_nft_compares_with_a_slower_policy(base, tmp_path):
  """The old policy makes the rollout and follows; the initial one is kept for the KL and stays."""
  overrides = {
    "grpo.objective": "diffusion_nft",
    "grpo.sampler": "ode",
    "grpo.shared_noise": False,
    "grpo.kl_weight": 0.1,
    "grpo.nft_old_decay": "(0.5, 0.6)",
  }
  run = Run(configure(base, **overrides), tmp_path)
  before = jax.device_get(run.state.params)
  run.update()
  close(run.state.old, run.state.params, 0)  # at the first update it keeps nothing of itself
  kept = jax.device_get(run.state.old)
  metrics, batches = run.update()
  close(run.state.old, jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, kept, jax.device_get(run.state.params)))
  assert moved(run.state.old, run.state.params) > 0
  jax.tree.map(np.testing.assert_array_equal, run.frozen["reference"]["dit"], before["dit"])
  assert metrics["kl"] > 0 and metrics["old_policy_distance"] == 0  # both moved from the first update's weights on
  assert batches[0]["latents"].shape == (16, 16, 64) and "next" not in batches[0]
  levels = np.stack([batch["sigma"] for batch in batches])
  assert len(np.unique(levels[0])) > 1 and (levels[0] != levels[1]).all()  # each sample has timesteps of its own
  third, _ = run.update()
  assert third["old_policy_distance"] > 0


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"grpo.objective": "grpo"}, "config.grpo.objective 'grpo'; use flow_grpo"),
    ({"grpo.sampler": "csp"}, "Did you mean 'cps'"),
    ({"grpo.sampler": "ode"}, "diffusion_nft goes with sampler ode"),
    ({"grpo.sampler": "ode", "grpo.objective": "diffusion_nft"}, "a group's images are equal"),
    ({"grpo.group_size": 1}, "group_size must be at least 2"),
    ({"grpo.rollout_batch": 6}, "rollout_batch 6 must divide"),
    ({"grpo.rollout_batch": 2}, "whole groups of 4"),
    ({"grpo.micro_batch": 5}, "micro_batch 5 must divide"),
    ({"grpo.updates_per_rollout": 3}, "updates_per_rollout 3 must divide"),
    ({"grpo.window": 4}, "the last step isn't in it"),
    ({"grpo.train_steps": 4}, "train_steps 4 must be at most 3"),
    ({"grpo.sft_weight": 1.0}, "sft_weight"),
    ({"grpo.ratio_clip": "(-1, 2)"}, "ratio clip"),
    ({"grpo.size": "(64, 60)"}, "multiples of 32"),
  ],
)
def test_settings_that_do_not_go_together_are_named(base, tmp_path, overrides, message):
  with pytest.raises(UserError, match=message.replace("(", r"\(")):
    grpo.build(
      configure(base, **overrides), sharding.make_mesh({"data": -1}, jax.devices()[:1]), tmp_path, Judging(TEXTS, Judge())
    )


def test_a_replay_that_is_not_the_rollout_stops_the_run():
  row = {"replay_difference": 3e-5, "loss": 0.0, "grad_norm": 1.0, "lr": 0.1, "skipped": 0, "skipped_in_row": 0}
  row |= {"policy_loss": 0.0, "grad_norm_so_far": 1.0, "grad_norm_share": 1.0}
  assert grpo.summarise([row | {"replay_difference": 9e-6}], 1e-5)["replay_difference"] == 9e-6
  with pytest.raises(RuntimeError, match="differ from the rollout's by 3e-05, more than 1e-05"):
    grpo.summarise([row | {"replay_difference": 1e-6}, row], 1e-5)
