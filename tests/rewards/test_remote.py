"""Remote scorers against servers that answer wrongly: no wrong number, no crash, a reason for each missing score."""

import math

import numpy as np
import pytest

from deepgen_jax.rewards.registry import REGISTRY, build
from deepgen_jax.rewards.remote import read_scores, remote, to_wire
from tests.rewards import servers
from tests.rewards.servers import make_items

pytestmark = pytest.mark.filterwarnings("ignore:reward ")


def level_scores(handler, body):
  """A scorer that has the prompts' grey levels for scores."""
  servers.send(handler, {"scores": [int(item["prompt"].split()[1]) for item in body["items"]]})


def score(answer, items, **options):
  with servers.serving(answer) as server:
    reward = remote("pickscore", server.url, **{**servers.QUICK, **options})
    values = reward(items)
  assert values.dtype == np.float64 and values.shape == (len(items),)
  return values, reward.failures, server.seen


def test_each_group_is_one_request_and_scores_come_back_in_place():
  items = make_items(1, 2, group=7) + make_items(3, group=8) + make_items(4, group=7)
  values, failures, seen = score(level_scores, items)
  np.testing.assert_array_equal(values, [1, 2, 3, 4])
  assert sorted([item["prompt"] for item in body["items"]] for body in seen) == [["grey 1", "grey 2", "grey 4"], ["grey 3"]]
  assert not failures and {body["reward"] for body in seen} == {"pickscore"}


@pytest.mark.parametrize("name", servers.MISBEHAVIOUR)
def test_a_scorer_that_misbehaves_makes_its_group_missing_and_no_other(name):
  answer, reason = servers.MISBEHAVIOUR[name]

  def group_one_fails(handler, body):
    (answer if body["items"][0]["group"] == 1 else level_scores)(handler, body)

  items = make_items(1, 2, group=0) + make_items(3, 4, group=1)
  values, failures, _ = score(group_one_fails, items, **servers.once(reason))
  np.testing.assert_array_equal(values, [1, 2, np.nan, np.nan])
  assert failures == {reason: 2}


@pytest.mark.parametrize(
  "body", [{}, {"scores": [1.0]}, {"scores": [1.0, 2.0, 3.0]}, {"scores": 1.0}, {"scores": {"0": 1, "1": 2}}]
)
def test_scores_that_cannot_be_told_apart_are_all_missing(body):
  values, failures, seen = score(servers.always(body), make_items(1, 2))
  assert np.isnan(values).all() and failures == {"wrong answer": 2} and len(seen) == 1


@pytest.mark.parametrize(
  "text, reason",
  [(b"null", "missing at the scorer")]
  + [(text, "not a finite number") for text in (b"NaN", b"Infinity", b"1e999", b"true", b'"0.7"', b"[0.7]", b"1" * 400)],
)
def test_a_score_that_is_no_number_is_missing_alone(text, reason):
  values, failures, _ = score(servers.always(b'{"scores": [0.25, ' + text + b"]}"), make_items(1, 2))
  np.testing.assert_array_equal(values, [0.25, np.nan])
  assert failures == {reason: 1}


def test_500s_then_fine_is_fine():
  bad = servers.always({"error": "busy"}, 500)
  values, failures, seen = score(servers.in_turn(bad, servers.hang_up, level_scores), make_items(5))
  assert values.tolist() == [5] and not failures and len(seen) == 3


def test_failures_add_up_over_calls():
  with servers.serving(servers.always({}, 404)) as server:
    reward = remote("hps", server.url, **servers.QUICK)
    reward(make_items(1, 2))
    reward(make_items(3))
  assert reward.failures == {"HTTP 404": 3}


def test_what_is_on_the_wire():
  (item,) = make_items(9, references=(np.zeros((2, 2, 3), np.uint8),), metadata={"tag": "colour"})
  wire = to_wire(item)
  assert sorted(wire) == ["group", "image", "metadata", "prompt", "references"]
  assert wire["prompt"] == "grey 9" and len(wire["references"]) == 1 and wire["metadata"] == {"tag": "colour"}


def test_metadata_that_cannot_be_sent_is_missing():
  values, failures, seen = score(level_scores, make_items(1, metadata={"when": math}))
  assert np.isnan(values).all() and failures == {"not sendable as JSON": 1} and seen == []


def test_no_items():
  values, failures, seen = score(level_scores, [])
  assert values.shape == (0,) and not failures and seen == []


def test_read_scores_keeps_numbers():
  assert read_scores({"scores": [1, -2.5]}, 2) == [1.0, -2.5]


@pytest.mark.parametrize("name", ["pickscore", "hps", "image_reward", "aesthetic", "deqa", "geneval"])
def test_the_usual_scorers_ask_under_their_names(name):
  reward = build(name, url="http://localhost:1")
  assert name in REGISTRY and reward.name == name
