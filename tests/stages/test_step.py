"""The shared train step on a problem small enough to compute by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from deepgen_jax import sharding
from deepgen_jax.errors import UserError
from deepgen_jax.stages.step import init_state, make_optimizer, make_train_step, sample_keys, summarise

OPTIM = ConfigDict(
  {"lr": 0.1, "lr_groups": [], "warmup": 0.0, "schedule": "constant", "betas": (0.9, 0.95), "weight_decay": 0.05, "clip": 1.0}
)


def linear_loss(params, batch, keys):
  """Per-sample squared error of x w + bias; the frozen gain must take part."""
  y = (batch["x"] @ params["fc1"]["kernel"] + params["fc1"]["bias"]) * params["gain"]["scale"]
  return jnp.square(y - batch["y"]).mean(-1), {}


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "fc1": {"kernel": jnp.array(rng.normal(size=(3, 2)), jnp.float32), "bias": jnp.zeros(2)},
    "gain": {"scale": jnp.array([2.0, 0.5])},
  }


def make_batch(seed, size=4):
  rng = np.random.default_rng(seed)
  x, y = rng.normal(size=(size, 3)).astype(np.float32), rng.normal(size=(size, 2)).astype(np.float32)
  return {"x": x, "y": y, "sample_id": np.arange(size, dtype=np.uint32)}


@pytest.fixture(scope="module")
def setup():
  """(step of two micro-batches with EMA, fresh state, frozen)."""
  trainable, frozen = sharding.partition(make_params(), [("fc1/.*", True), (".*", False)])
  optimizer, schedule = make_optimizer(OPTIM, 100)
  step = jax.jit(make_train_step(linear_loss, optimizer, schedule, accumulate=2, clip=1.0, ema_decay=0.9))
  return step, lambda: init_state(trainable, optimizer, ema=True), frozen


def run(step, state, frozen, batches):
  for batch in batches:
    state, metrics = step(state, frozen, batch, jax.random.key(0))
  return state, metrics


def test_updates_equal_optax_on_the_mean_of_their_micro_batches(setup):
  step, fresh, frozen = setup
  params = make_params()["fc1"]
  _, schedule = make_optimizer(OPTIM, 100)
  reference = optax.adamw(schedule, 0.9, 0.95, weight_decay=0.05, mask={"kernel": True, "bias": False})
  opt_state, state = reference.init(params), fresh()
  for update in range(3):  # the first has the warm-up's tiny rate
    batches = [make_batch(2 * update), make_batch(2 * update + 1)]
    state, metrics = run(step, state, frozen, batches)
    mean_loss = lambda fc1: sum(linear_loss({"fc1": fc1, "gain": frozen["gain"]}, b, None)[0].mean() for b in batches) / 2
    value, grads = jax.value_and_grad(mean_loss)(params)
    norm = optax.tree.norm(grads)
    assert norm > 1  # so that clipping takes part
    updates, opt_state = reference.update(jax.tree.map(lambda g: g / norm, grads), opt_state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params["fc1"], params)
  assert int(state.step) == 3 and int(state.micro) == 0


def test_a_program_that_completes_no_update_does_the_same_to_the_first_micro_batch(setup):
  step, fresh, frozen = setup
  optimizer, schedule = make_optimizer(OPTIM, 100)
  early = make_train_step(linear_loss, optimizer, schedule, accumulate=2, clip=1.0, ema_decay=0.9)
  early = jax.jit(early, static_argnames="completes")
  never = lambda *arguments: early(*arguments, completes=False)
  both = (jax.tree.leaves(run(one, fresh(), frozen, [make_batch(0)])) for one in (step, never))
  for whole, without in zip(*both, strict=True):
    np.testing.assert_allclose(whole, without, rtol=1e-6)
  arguments = fresh(), frozen, make_batch(0), jax.random.key(0)
  assert "sqrt" in step.lower(*arguments).as_text()  # AdamW's
  assert "sqrt" not in early.lower(*arguments, completes=False).as_text()


def test_a_batch_may_weigh_its_samples_and_say_how_many_its_update_has(setup):
  """Three micro-batches where the step expects two: the gradient is that of the weighted mean, and each share has its norm."""
  step, fresh, frozen = setup
  factors, batches = [0.6, 1.5, 0.9], [make_batch(10 + i) for i in range(3)]
  told = [b | {"weight": np.full(4, f, np.float32), "micro_batches": np.full(4, 3)} for b, f in zip(batches, factors)]
  first, metrics = run(step, fresh(), frozen, told[:1])
  part = lambda fc1, i: factors[i] * linear_loss({"fc1": fc1, "gain": frozen["gain"]}, batches[i], None)[0].mean() / 3
  norm = lambda f: optax.tree.norm(jax.grad(f)(make_params()["fc1"]))
  np.testing.assert_allclose(metrics["grad_norm_share"], norm(lambda fc1: part(fc1, 0)), rtol=1e-5)
  state, metrics = run(step, first, frozen, told[1:2])
  assert int(state.step) == 0
  np.testing.assert_allclose(metrics["grad_norm_share"], norm(lambda fc1: part(fc1, 1)), rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm_so_far"], norm(lambda fc1: part(fc1, 0) + part(fc1, 1)), rtol=1e-5)
  state, metrics = run(step, state, frozen, told[2:])
  whole = lambda fc1: sum(part(fc1, i) for i in range(3))
  assert int(state.step) == 1
  np.testing.assert_allclose(metrics["loss"], whole(make_params()["fc1"]), rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], norm(whole), rtol=1e-5)


def test_an_update_of_one_micro_batch_needs_no_sum(setup):
  _, fresh, frozen = setup
  optimizer, schedule = make_optimizer(OPTIM, 100)
  step = jax.jit(make_train_step(linear_loss, optimizer, schedule, accumulate=1, clip=1.0, ema_decay=0.9))
  told = {"weight": np.ones(4, np.float32), "micro_batches": np.ones(4, np.int32)}  # what makes the step keep one
  batches = [make_batch(seed) for seed in range(3)]
  (state, metrics), (other, others) = (run(step, fresh(), frozen, [b | more for b in batches]) for more in ({}, told))
  assert int(state.step) == 3 and int(state.micro) == 0 and not any(g.any() for g in jax.tree.leaves(state.grads))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state, other)
  np.testing.assert_allclose([metrics[k] for k in ("loss", "grad_norm")], [others[k] for k in ("loss", "grad_norm")], rtol=1e-6)


def test_metrics_of_an_update_are_means_and_its_own():
  rows = [{"a": 1.0, "loss": 5.0, "lr": 0.1}, {"a": 3.0, "b": 7.0, "loss": 6.0, "lr": 0.2}]
  rows = [row | {"grad_norm": 0.0, "skipped": 0.0, "skipped_in_row": 0.0} for row in rows]
  assert summarise(rows) == {
    "a": 2.0,
    "b": 7.0,
    "loss": 6.0,
    "lr": 0.2,
    "grad_norm": 0.0,
    "skipped": 0.0,
    "skipped_in_row": 0.0,
  }


def test_nothing_changes_before_the_update_is_complete(setup):
  step, fresh, frozen = setup
  state, _ = run(step, fresh(), frozen, [make_batch(0)])
  jax.tree.map(np.testing.assert_array_equal, state.params, fresh().params)
  assert int(state.step) == 0 and int(state.micro) == 1


def test_ema_follows_the_weights(setup):
  step, fresh, frozen = setup
  first, _ = run(step, fresh(), frozen, [make_batch(0), make_batch(1)])
  second, _ = run(step, first, frozen, [make_batch(2), make_batch(3)])
  expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, first.ema, second.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), second.ema, expected)
  assert not np.array_equal(second.ema["fc1"]["kernel"], fresh().ema["fc1"]["kernel"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_changes_no_weight_and_is_counted(setup, bad):
  step, fresh, frozen = setup
  good, _ = run(step, fresh(), frozen, [make_batch(0), make_batch(1)])
  poisoned = make_batch(2)
  poisoned["y"][1, 0] = bad
  state, metrics = run(step, good, frozen, [poisoned, make_batch(3)])
  for name in ("params", "opt_state", "ema"):
    jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(good, name))
  assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == 1 and int(state.step) == 2
  state, metrics = run(step, state, frozen, [make_batch(4), make_batch(5)])
  assert int(metrics["skipped"]) == 1 and int(metrics["skipped_in_row"]) == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_keys_depend_on_update_and_sample_alone():
  rng = jax.random.key(3)
  data = lambda step, ids: jax.random.key_data(sample_keys(rng, step, np.array(ids, np.uint32)))
  np.testing.assert_array_equal(data(5, [7, 9, 11])[1], data(5, [9])[0])
  assert not np.array_equal(data(5, [9]), data(6, [9])) and not np.array_equal(data(5, [9]), data(5, [10]))


def test_partition_and_merge_are_inverse_and_every_path_needs_a_row():
  params = make_params()
  trainable, frozen = sharding.partition(params, [("fc1/kernel", True), (".*", False)])
  assert trainable["fc1"]["bias"] is None and frozen["fc1"]["kernel"] is None
  jax.tree.map(np.testing.assert_array_equal, sharding.merge(trainable, frozen), params)
  with pytest.raises(UserError, match="gain/scale"):
    sharding.partition(params, [("fc1/.*", True)])


def test_learning_rate_groups_multiply_the_rate(setup):
  """A tenth of the rate gives a tenth of the step, decay included; a path without a row is an error."""
  params, steps = setup[1]().params, {}
  grads = jax.tree.map(lambda p: 0.3 * jnp.ones_like(p), params)
  for factor in (1.0, 0.1):
    optimizer, _ = make_optimizer(ConfigDict({**OPTIM, "lr_groups": [["fc1/kernel", factor], [".*", 1.0]]}), 100)
    steps[factor] = optimizer.update(grads, optimizer.init(params), params)[0]["fc1"]
  np.testing.assert_allclose(steps[0.1]["kernel"], 0.1 * steps[1.0]["kernel"], rtol=1e-6)
  np.testing.assert_array_equal(steps[0.1]["bias"], steps[1.0]["bias"])
  assert (steps[1.0]["kernel"] != 0).all()
  optimizer, _ = make_optimizer(ConfigDict({**OPTIM, "lr_groups": [["fc1/kernel", 1.0]]}), 100)
  with pytest.raises(UserError, match=r"config.optim.lr_groups: no row matches .*fc1/bias"):
    optimizer.update(grads, optimizer.init(params), params)
