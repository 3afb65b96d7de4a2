"""The rollout on a small random model: it is the pipeline's sampler where it is an ODE, and replays what it drew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.data.tokens import build_tiny_tokenizer
from deepgen_jax.flow.schedule import inference_sigmas
from deepgen_jax.models.dit import patchify, unpatchify
from deepgen_jax.pipeline import DeepGenPipeline
from deepgen_jax.rewards.reward import Item
from deepgen_jax.rl.rollout import make_velocity, replay, rollout, sample_keys
from deepgen_jax.stages.rollouts import Answers, encode, items_of, reward_scalars, window_start
from tests.small import CONFIG, draw_params, random_image

STEPS, GROUP = 5, 2
SIGMAS = inference_sigmas(CONFIG.scheduler, STEPS)
SIZE = (8, 8)


class Prompt:
  def __init__(self, text, references=(), weights=None, dataset=""):
    self.text, self.references, self.weights, self.dataset, self.metadata = text, references, weights or {}, dataset, {}


PROMPTS = [Prompt("a red cat"), Prompt("make it blue", (random_image(64, 64), random_image(48, 96, seed=1)))]


@pytest.fixture(scope="module")
def pipe():
  return DeepGenPipeline(CONFIG, draw_params(), build_tiny_tokenizer())


@pytest.fixture(scope="module")
def inputs(pipe):
  """Of a generation and an edit with two references, two rows each."""
  return jax.tree.map(lambda x: np.repeat(np.asarray(x), GROUP, axis=0), encode(pipe, PROMPTS, (64, 64), guided=True))


@pytest.fixture(scope="module")
def run(pipe, inputs):
  """run(kind, rows, number=0, shared=True, guided=True, window, start) -> Rollout; compiled once per kind and shape."""
  programs = {}

  def run(kind, rows=slice(None), number=0, shared=True, guided=True, window=STEPS - 1, start=0):
    window = 0 if kind == "ode" else window
    settings = dict(size=SIZE, kind=kind, eta=0.7, window=window, guidance=3.0)
    key = (kind, window)
    if key not in programs:
      programs[key] = jax.jit(functools.partial(rollout, pipe.model, **settings))
    keys = sample_keys(jax.random.key(5), number, 2 * GROUP, GROUP, shared)
    pick = lambda tree: jax.tree.map(lambda x: x[rows], tree)
    chosen = pick({name: value for name, value in inputs.items() if guided or name != "negative"})
    return programs[key](pipe.params, chosen, *pick(keys), SIGMAS, np.int32(start))

  return run


@pytest.fixture(scope="module")
def cps(run):
  return run("cps")


def test_an_ode_rollout_is_the_pipelines_sampler(run, pipe):
  """A generation and an edit with two references, with guidance, from the same noise."""
  out = run("ode", number=1)
  noise_keys, _ = sample_keys(jax.random.key(5), 1, 2 * GROUP, GROUP, True)
  noise = jnp.stack([jax.random.normal(key, (*SIZE, 16)) for key in noise_keys])
  for place, prompt in enumerate(PROMPTS):
    call = functools.partial(pipe, prompt.text, image=list(prompt.references) or None, height=64, width=64)
    settings = dict(num_inference_steps=STEPS, guidance_scale=3.0, latents=noise[place * GROUP][None])
    expected = call(output_type="latent", **settings).images
    found = np.asarray(unpatchify(out.latents[place * GROUP], *SIZE))
    assert np.abs(found - expected[0]).max() < 1e-4 * np.abs(expected).max()
    image = np.round(call(output_type="np", **settings).images[0] * 255)
    assert np.abs(image - out.images[place * GROUP]).max() <= 1


def test_samples_have_keys_of_their_own_and_groups_may_share_the_first_noise():
  rows = lambda keys: [tuple(row) for row in np.asarray(jax.random.key_data(keys))]
  shared, steps = map(rows, sample_keys(jax.random.key(0), 3, 6, 3, True))
  own, same_steps = map(rows, sample_keys(jax.random.key(0), 3, 6, 3, False))
  assert shared[:3] == [shared[0]] * 3 and shared[3:] == [shared[3]] * 3 and shared[0] != shared[3]
  assert len({*own, *steps}) == 12 and steps == same_steps and own[0] == shared[0]
  later = rows(sample_keys(jax.random.key(0), 4, 6, 3, False)[1])
  assert not {*later} & {*steps}
  more = rows(sample_keys(jax.random.key(0), 3, 12, 3, False)[1])
  assert more[:6] == steps


def test_samples_of_a_group_differ_by_their_steps_alone(cps):
  np.testing.assert_array_equal(cps.path[0, 0], cps.path[1, 0])
  assert not np.array_equal(cps.path[0, 0], cps.path[2, 0])
  assert np.abs(cps.path[0, 1] - cps.path[1, 1]).max() > 0.1
  assert not np.array_equal(cps.images[0], cps.images[1])


@pytest.mark.parametrize("kind", ["cps", "flow_sde", "dance"])
def test_a_replay_gives_the_rollouts_log_probabilities(kind, run, pipe, inputs, cps):
  out = cps if kind == "cps" else run(kind)

  @jax.jit
  def again(latents, after, sigma, sigma_next):
    full = lambda value: jnp.full(len(latents), value)
    velocity = make_velocity(pipe.model, pipe.params, inputs, 3.0)(latents, full(sigma))
    batch = {"latents": latents, "next": after, "sigma": full(sigma), "sigma_next": full(sigma_next)}
    return replay(kind, 0.7, velocity, batch | {"sigma_max": full(SIGMAS[1])}).log_prob

  for step in range(STEPS - 1):
    found = again(out.path[:, step], out.path[:, step + 1], SIGMAS[step], SIGMAS[step + 1])
    np.testing.assert_allclose(found, out.log_prob[:, step], rtol=1e-5, atol=1e-5)
  assert np.abs(out.log_prob).min() > 0


def test_a_trajectory_is_kept_once(cps):
  """Latents before each stochastic step and after the last: nothing of their size beside it but the final ones."""
  assert cps.path.shape == (2 * GROUP, STEPS, 16, 64) and cps.path.dtype == jnp.float32
  large = [leaf for leaf in jax.tree.leaves(cps) if leaf.size >= cps.path.size // 2]
  assert len([leaf for leaf in large if leaf.dtype == jnp.float32]) == 1


def test_a_window_is_stochastic_and_the_rest_is_not(run, pipe, inputs):
  """Two steps in the middle: what is kept there replays; the steps around are Euler steps."""
  out = run("flow_sde", window=2, start=1)
  assert out.path.shape[1] == 3 and out.log_prob.shape[1] == 2
  velocity = jax.jit(lambda x, sigma: make_velocity(pipe.model, pipe.params, inputs, 3.0)(x, jnp.full(len(x), sigma)))
  noise_keys, _ = sample_keys(jax.random.key(5), 0, 2 * GROUP, GROUP, True)
  noise = patchify(np.stack([jax.random.normal(key, (*SIZE, 16)) for key in noise_keys]))
  euler = lambda x, step: x + (SIGMAS[step + 1] - SIGMAS[step]) * velocity(x, SIGMAS[step])
  np.testing.assert_allclose(out.path[:, 0], euler(noise, 0), atol=1e-4)
  assert np.abs(out.path[:, 1] - euler(out.path[:, 0], 1)).max() > 0.1
  np.testing.assert_allclose(out.latents, euler(euler(out.path[:, 2], 3), 4), atol=1e-4)
  np.testing.assert_array_equal(out.path[0, 0], out.path[1, 0])
  moved = run("flow_sde", window=2, start=2)
  np.testing.assert_allclose(moved.path[:, 0], euler(out.path[:, 0], 1), atol=1e-4)


def test_a_trajectory_depends_on_nothing_else_in_the_batch(run, cps):
  """The third of four, first of two: its draws are the same, what is computed agrees within rounding."""
  out = run("cps", rows=np.array([2, 0]))
  np.testing.assert_array_equal(out.path[0, 0], cps.path[2, 0])
  assert np.abs(out.path[0] - cps.path[2]).max() < 1e-4 * np.abs(cps.path[2]).max()
  np.testing.assert_allclose(out.log_prob[0], cps.log_prob[2], rtol=1e-3)


def test_without_guidance_there_is_one_branch(run, cps):
  assert np.abs(run("cps", guided=False).latents - cps.latents).max() > 1e-2


def test_windows_are_drawn_or_slide_and_leave_the_last_step_out():
  drawn = [window_start(n, 10, 4, 0, np.random.default_rng((7, n))) for n in range(200)]
  assert {*drawn} == set(range(6)) and drawn[:5] == [window_start(n, 10, 4, 0, np.random.default_rng((7, n))) for n in range(5)]
  assert [window_start(n, 5, 2, 2, np.random.default_rng(0)) for n in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]
  assert window_start(3, 10, 9, 0, np.random.default_rng(0)) == window_start(3, 10, 0, 1, np.random.default_rng(0)) == 0


def test_answers_are_kept_as_they_were_and_a_torn_file_is_no_answer(tmp_path):
  answers, nan = Answers(tmp_path / "rewards"), np.nan
  rewards, weights = np.array([[1 / 3, nan], [nan, 2e-17]]), np.array([[1.0, 0.0], [0.5, 1.0]])
  assert answers.read(4) is None
  answers.write(4, rewards, weights, ("a", "b"))
  found = answers.read(4)
  np.testing.assert_array_equal(found[0], rewards)
  np.testing.assert_array_equal(found[1], weights)
  assert found[2] == ["a", "b"] and answers.read(3) is None
  file = tmp_path / "rewards" / "0000004.json"
  file.write_text(file.read_text()[:-9])
  assert answers.read(4) is None


def test_items_know_their_prompt_group_and_source():
  images = np.zeros((4, 8, 8, 3), np.uint8)
  items, weights = items_of([Prompt("a", weights={"x": 1.0}), PROMPTS[1]], images, 2, first_group=3)
  assert [item.prompt for item in items] == ["a", "a", "make it blue", "make it blue"]
  assert [item.group for item in items] == [3, 3, 4, 4] and weights == [{"x": 1.0}] * 2 + [{}] * 2
  assert items[0].references == () and isinstance(items[0], Item)
  np.testing.assert_array_equal(items[3].references[1], PROMPTS[1].references[1])


def test_reward_scalars_count_what_is_asked_and_what_is_missing():
  nan = np.nan
  rewards = np.array([[1, nan], [3, nan], [2, 5], [2, 5], [2, nan], [nan, 7]])
  weights = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [1, 0]], float)
  found = reward_scalars(rewards, weights, ["a", "b"], ["s", "s", "t", "t", "s", "s"], 2)
  assert found["missing/a"] == 1 and found["missing/b"] == 0
  assert found["reward/a/s"] == 2 and found["reward_std/a/s"] == pytest.approx(np.std([1, 3, 2]))
  assert found["reward/b/t"] == 5 and "reward/b/s" not in found and "reward/a/t" not in found
  assert found["reward"] == pytest.approx(3.5)  # the group with a missing reward doesn't count
  assert found["zero_std_groups"] == 0.5
