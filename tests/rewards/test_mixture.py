"""Each reward sees what weighs it and nothing else; failures become missing; too many of them stop the run."""

import threading

import numpy as np
import pytest

from deepgen_jax.errors import UserError
from deepgen_jax.rewards.mixture import Mixture
from deepgen_jax.rewards.reward import Item
from deepgen_jax.rl import advantages

IMAGE = np.zeros((8, 8, 3), np.uint8)


class Recorded:
  """A reward of a given function of the prompt, which remembers what it was asked."""

  def __init__(self, name, score):
    self.name, self.score, self.calls = name, score, []

  def __call__(self, items):
    self.calls.append([item.prompt for item in items])
    return np.array([self.score(item.prompt) for item in items], np.float64)


def items(prompts):
  return [Item(prompt, IMAGE) for prompt in prompts]


def test_only_what_weighs_a_reward_is_judged():
  a, b = Recorded("a", float), Recorded("b", lambda p: -float(p))
  scores = Mixture({"b": b, "a": a})(items("1234"), [{"a": 1}, {"b": 0.5, "a": 0}, {}, {"a": 2, "b": 3}])
  assert scores.names == ("a", "b")
  assert a.calls == [["1", "4"]] and b.calls == [["2", "4"]]
  nan = np.nan
  assert np.array_equal(scores.rewards, [[1, nan], [nan, -2], [nan, nan], [4, -4]], equal_nan=True)
  assert np.array_equal(scores.weights, [[1, 0], [0, 0.5], [0, 0], [2, 3]])
  assert scores.rewards.dtype == scores.weights.dtype == np.float64
  assert scores.asked == {"a": 2, "b": 2} and scores.missing == {"a": 0, "b": 0}


def test_a_reward_that_nothing_weighs_is_not_called():
  a, b = Recorded("a", float), Recorded("b", float)
  Mixture({"a": a, "b": b})(items("12"), [{"a": 1}] * 2)
  assert b.calls == []


def test_scores_fit_the_advantages():
  reward = Recorded("a", lambda p: np.nan if p == "3" else float(p))
  scores = Mixture({"a": reward})(items("1234"), [{"a": 1}] * 4)
  values = np.asarray(advantages("grpo", scores.rewards, scores.weights, 2))
  assert np.allclose(values, [-0.70700, 0.70700, 0, 0], atol=1e-4)


def test_the_caller_goes_on_meanwhile():
  go = threading.Event()

  class Slow(Recorded):
    def __call__(self, items):
      assert go.wait(10)
      return super().__call__(items)

  mixture = Mixture({"slow": Slow("slow", float), "fast": Recorded("fast", float)})
  pending = mixture.submit(items("12"), [{"slow": 1, "fast": 1}] * 2)
  later = mixture.submit(items("34"), [{"slow": 1}] * 2)
  assert not pending.done()
  go.set()
  assert pending.result().rewards.tolist() == [[1, 1], [2, 2]]
  assert later.result().rewards[:, 1].tolist() == [3, 4]
  assert pending.done() and pending.result() is pending.result()
  assert mixture.asked == {"fast": 2, "slow": 4}
  mixture.close()


def test_a_reward_that_breaks_is_missing_for_what_it_was_asked():
  def fail(prompt):
    raise OSError("gone")

  class Short(Recorded):
    def __call__(self, items):
      return super().__call__(items)[:-1]

  mixture = Mixture({"bad": Recorded("bad", fail), "good": Recorded("good", float), "short": Short("short", float)})
  scores = mixture(items("12"), [{"bad": 1, "good": 1}, {"good": 1, "short": 1}])
  assert np.array_equal(scores.rewards, [[np.nan, 1, np.nan], [np.nan, 2, np.nan]], equal_nan=True)
  assert scores.missing == {"bad": 1, "good": 0, "short": 1}
  assert mixture.missing == scores.missing
  assert mixture.failures["bad"] == {"OSError: gone": 1} and "shape (0,)" in next(iter(mixture.failures["short"]))


def test_infinite_is_missing():
  scores = Mixture({"a": Recorded("a", lambda p: np.inf)})(items("1"), [{"a": 1}])
  assert np.isnan(scores.rewards).all() and scores.missing == {"a": 1}


def test_too_many_missing_stop_the_run():
  values = {"good": 1.0, "none": np.nan}
  mixture = Mixture({"a": Recorded("a", values.get), "b": Recorded("b", values.get)}, max_missing=0.5, window=4)
  run = lambda prompts, name="a": mixture(items(prompts), [{name: 1}] * len(prompts))
  run(["none"] * 3)  # three of three, but the window isn't full
  run(["good"] * 4)
  run(["none"] * 2)  # two of the last four
  run(["none"] * 3, "b")  # counted by itself
  with pytest.raises(RuntimeError, match=r"reward 'a': 3 of the last 4 scores are missing, more than the share of 0.5"):
    run(["none"])


def test_what_the_user_set_up_wrongly():
  def fail(prompt):
    raise UserError("no such model")

  mixture = Mixture({"ocr": Recorded("ocr", fail)})
  pending = mixture.submit(items("1"), [{"ocr": 1}])
  with pytest.raises(UserError, match=r"no such model"):
    pending.result()
  with pytest.raises(UserError, match=r"'orc', which isn't built. Did you mean 'ocr'?"):
    mixture.submit(items("1"), [{"orc": 1}])
  with pytest.raises(UserError, match=r"weight of the reward 'ocr' is -1"):
    mixture.submit(items("1"), [{"ocr": -1}])
  with pytest.raises(UserError, match=r"2 items with the weights of 1"):
    mixture.submit(items("12"), [{"ocr": 1}])
  with pytest.raises(UserError, match=r"no rewards"):
    Mixture({})
  with pytest.raises(UserError, match=r"max_missing 2"):
    Mixture({"ocr": Recorded("ocr", fail)}, max_missing=2)
