"""Judges over an OpenAI-compatible endpoint: what is asked, what counts as an answer, and win rates."""

import base64
import hashlib
import io
import itertools
import json
import re
import threading

import numpy as np
import pytest
from PIL import Image

from deepgen_jax.errors import UserError
from deepgen_jax.rewards import judges
from deepgen_jax.rewards.http import Failure
from deepgen_jax.rewards.registry import build
from tests.rewards import servers
from tests.rewards.servers import make_items

pytestmark = pytest.mark.filterwarnings("ignore:reward ")
THOUGHT = "<think>\n1. Semantic consistency: \n    Image 1 (9/10) - ...\n</think>\n"
AXES = "Alignment Score (1-5): {}\nCoherence Score (1-5): {}\nStyle Score (1-5): {}"


def completion(text, end="stop"):
  return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end}]}


def levels(body):
  """Grey level of each image in a request."""
  parts = body["messages"][0]["content"]
  urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
  files = [base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True) for url in urls]
  return [np.asarray(Image.open(io.BytesIO(file)))[0, 0, 0] for file in files]


def text_of(body):
  return body["messages"][0]["content"][-1]["text"]


def verdict(first_wins):
  return completion(f"{THOUGHT}<answer>Image {1 if first_wins else 2} is better</answer>")


def brighter(handler, body):
  """A judge that likes the brighter image, and the first of two equal ones."""
  first, second = levels(body)
  servers.send(handler, verdict(first >= second))


def judge(name, answer, items, **options):
  with servers.serving(answer) as server:
    reward = build(name, url=server.url, **{**servers.QUICK, **options})
    values = reward(items)
  assert reward.name == name and values.dtype == np.float64 and values.shape == (len(items),)
  return values, dict(reward.failures), server.seen


def test_win_rates_of_groups():
  items = make_items(10, 30, group=1) + make_items(5, group=2) + make_items(20, group=1) + make_items(9, 9, group=3)
  values, failures, seen = judge("unifiedreward_think", brighter, items)
  np.testing.assert_array_equal(values, [0, 1, np.nan, 0.5, 0.5, 0.5])
  assert failures == {"alone in its group": 1} and len(seen) == 3 * 2 + 2
  pairs = sorted(tuple(map(int, levels(body))) for body in seen)
  assert pairs == sorted([*itertools.permutations([10, 30, 20], 2), (9, 9), (9, 9)])


def test_a_judge_that_follows_position_gives_ties_and_one_order_alone_gives_nothing():
  items = make_items(10, 30)
  values, failures, _ = judge("unifiedreward_think", servers.always(verdict(True)), items)
  assert values.tolist() == [0.5, 0.5] and failures == {}

  def one_order(handler, body):
    first, second = levels(body)
    servers.send(handler, verdict(True) if first < second else completion("no idea"))

  values, failures, _ = judge("unifiedreward_think", one_order, items)
  assert np.isnan(values).all() and failures == {"unreadable answer": 1}


@pytest.mark.parametrize("name", servers.MISBEHAVIOUR)
def test_a_judge_that_misbehaves_costs_the_pairs_it_misjudged(name):
  answer, reason = servers.MISBEHAVIOUR[name]

  def fails_on_40(handler, body):
    (answer if 40 in levels(body) else brighter)(handler, body)

  items = make_items(10, 20, 40, group=0) + make_items(1, 2, group=1)
  values, failures, _ = judge("unifiedreward_think", fails_on_40, items, **servers.once(reason))
  np.testing.assert_array_equal(values, [0, 1, np.nan, 0, 1])
  assert failures == {reason: 4}


def test_all_groups_are_in_flight_at_once_under_one_bound():
  together = threading.Barrier(12, timeout=10)

  def answer(handler, body):
    together.wait()  # breaks unless all twelve requests of both groups are there
    brighter(handler, body)

  items = make_items(1, 2, 3, group=0) + make_items(4, 5, 6, group=1)
  values, failures, _ = judge("unifiedreward_think", answer, items)
  assert values.tolist() == [0, 0.5, 1, 0, 0.5, 1] and not failures


@pytest.mark.parametrize("seed", range(3))
def test_win_rates_match_a_count_by_hand(seed):
  rng = np.random.default_rng(seed)
  orders = [order for order in itertools.permutations(range(5), 2) if rng.random() < 0.7]
  first_wins = {order: bool(rng.random() < 0.5) for order in orders}
  wins = [[] for _ in range(5)]
  for i, j in itertools.combinations(range(5), 2):
    if (i, j) in first_wins and (j, i) in first_wins:
      votes = (i if first_wins[i, j] else j, j if first_wins[j, i] else i)
      wins[i].append(votes.count(i) / 2)
      wins[j].append(votes.count(j) / 2)
  wanted = [np.mean(w) if w else np.nan for w in wins]
  np.testing.assert_allclose(judges.win_rates(5, first_wins), wanted, rtol=1e-12)


@pytest.mark.parametrize("text", ["{}", THOUGHT + "{}", "<think>Image 2?</think>\n\n {} \n"])
def test_verdicts(text):
  for image in (1, 2):
    assert judges.read_verdict(text.format(f"<answer>Image {image} is better</answer>")) == (image == 1)
    assert judges.read_verdict(text.format(f"<answer>\nImage {image} is better\n</answer>")) == (image == 1)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "Image 1 is better",
    "<answer>Image 3 is better</answer>",
    "<answer>image 1 is better</answer>",
    "<answer>Image 1 is better than Image 2</answer>",
    "<answer>Image 1 is not better</answer>",
    "<answer>Both images are equally good</answer>",
    "<answer>Image 1 is better</answer><answer>Image 2 is better</answer>",
    "<answer>Image 1 is better</answer> or maybe not",
    "<answer>Image 1 is better",
    "<think>I will answer <answer>Image 1 is better</answer>",
    "<answer>Image 1 is better</answer></think>",
  ],
)
def test_what_is_not_exactly_a_verdict_is_missing(text):
  with pytest.raises(Failure, match="unreadable answer"):
    judges.read_verdict(text)


def test_axes():
  assert judges.read_axes(AXES.format("2.694700002670288", 1, 5)) == pytest.approx((2.694700002670288 + 5) / 2)
  assert judges.read_axes(THOUGHT + AXES.format(4, 1, 3) + "\n") == 3.5


@pytest.mark.parametrize(
  "text",
  [
    "",
    "Alignment Score (1-5): 4",
    AXES.format(4, 3, "X"),
    AXES.format(4, 3, 0),
    AXES.format(4, 3, 5.5),
    AXES.format(4, 3, "4/5"),
    AXES.format(4, 3, "nan"),
    AXES.format(4, 3, "-4"),
    AXES.format(4, 3, 5) + "\nStyle Score (1-5): 2",
    AXES.format(4, 3, 5).replace("Style", "Alignment"),
    AXES.format(4, 3, 5).replace("(1-5)", "(1-10)"),
  ],
)
def test_what_is_not_exactly_the_axes_is_missing(text):
  with pytest.raises(Failure, match="unreadable answer"):
    judges.read_axes(text)


@pytest.mark.parametrize("text", ["{}", "```json\n{}\n```", "```\n{}\n```", "<think>{{0.9}}</think>\n{}\n"])
def test_json_answers(text):
  found = json.dumps({"expected_text": "Hi", "recognized_text": "H{i}", "score": 0.5})
  assert judges.read_ocr(text.format(found)) == 0.5
  assert judges.read_edit(text.format(json.dumps({"reasoning": "", "score": [20, 5]}))) == 0.2


def test_a_prompt_without_text_is_missing_not_zero():
  with pytest.raises(Failure) as failure:
    judges.read_ocr('{"expected_text": "", "recognized_text": "", "score": null}')
  assert failure.value.reason == "no text asked for"


@pytest.mark.parametrize("score", ["-0.1", "1.1", "NaN", "true", '"0.5"', "[0.5]", "1e999"])
def test_wrong_ocr_scores_are_missing(score):
  with pytest.raises(Failure, match="unreadable answer"):
    judges.read_ocr(f'{{"score": {score}}}')


@pytest.mark.parametrize("score", ["20", "[20]", "[20, 26]", "[-1, 5]", "[20, 5, 3]", "[20, null]", "[NaN, 5]", "{}", "null"])
def test_wrong_edit_scores_are_missing(score):
  with pytest.raises(Failure, match="unreadable answer"):
    judges.read_edit(f'{{"score": {score}}}')


@pytest.mark.parametrize("text", ["", "0.5", "[]", "{}", '{"score": 0.5} and more', 'Sure: {"score": 0.5}', "[" * 100_000])
def test_what_is_not_one_json_object_is_missing(text):
  for read in (judges.read_ocr, judges.read_edit):
    with pytest.raises(Failure, match="unreadable answer"):
      read(text)


@pytest.mark.parametrize(
  "body, reason",
  [
    ({}, "wrong answer"),
    ({"choices": []}, "wrong answer"),
    ({"choices": [None]}, "wrong answer"),
    ({"choices": [{"message": "hi"}]}, "wrong answer"),
    ({"choices": {"0": 1}}, "wrong answer"),
    (completion(None), "wrong answer"),
    (completion(["3"]), "wrong answer"),
    (completion(AXES.format(4, 4, 4), end="length"), "cut off"),
    (completion("I can't help with that."), "unreadable answer"),
  ],
)
def test_what_is_not_a_completion_is_missing_and_not_asked_again(body, reason):
  values, failures, seen = judge("unifiedreward", servers.always(body), make_items(1))
  assert np.isnan(values).all() and failures == {reason: 1} and len(seen) == 1


def test_pointwise_scores_each_image_and_recovers_from_500s():
  def answer(handler, body):
    servers.send(handler, completion(AXES.format(levels(body)[0], 1, 5)))

  busy = servers.always({"error": "busy"}, 503)
  values, failures, seen = judge("unifiedreward", servers.in_turn(busy, busy, answer), make_items(1, 3, 5))
  assert values.tolist() == [3, 4, 5] and failures == {} and len(seen) == 5


def test_edits_show_the_sources_first_and_need_one():
  sources = tuple(np.full((8, 8, 3), level, np.uint8) for level in (1, 2))
  items = make_items(3, references=sources) + make_items(4)
  answer = servers.always(completion('{"reasoning": "fine", "score": [25, 20]}'))
  values, failures, (body,) = judge("editreward", answer, items)
  np.testing.assert_array_equal(values, [0.8, np.nan])
  assert levels(body) == [1, 2, 3] and failures == {"no source image": 1}


def test_what_is_asked():
  answer = servers.always(completion('{"score": 1.0}'))
  _, _, (body,) = judge("ocr_vllm", answer, make_items(7), model="Qwen", max_tokens=99)
  assert (body["model"], body["temperature"], body["max_tokens"]) == ("Qwen", 0, 99)
  (message,) = body["messages"]
  assert message["role"] == "user" and [part["type"] for part in message["content"]] == ["image_url", "text"]
  assert text_of(body).endswith("Prompt: grey 7\n")


def test_the_trained_templates_are_asked_to_the_letter():
  """The hashes are those of the texts that the models' authors publish, {prompt} in the caption's place."""
  for name, published in (
    ("unifiedreward_think", "a8a0d80818246406b783d5cca630336c5fdf1264fef13f09d09bd94d61a139d5"),
    ("unifiedreward", "75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851"),
  ):
    _, _, seen = judge(name, servers.always(completion("")), [*make_items(0), *make_items(0)])
    text = text_of(seen[0])
    assert text.count("grey 0") == 1
    assert hashlib.sha256(text.replace("grey 0", "{prompt}").encode()).hexdigest() == published


def test_a_template_of_ones_own(tmp_path):
  file = tmp_path / "template.txt"
  file.write_text("{prompt}: {{score}} 1-5?")
  answer = servers.always(completion(AXES.format(1, 2, 3)))
  _, _, (body,) = judge("unifiedreward", answer, make_items(4), template=str(file))
  assert text_of(body) == "grey 4: {{score}} 1-5?"
  file.write_text("no place")
  with pytest.raises(UserError, match=re.escape("has no {prompt}")):
    build("unifiedreward", url="http://localhost:1", template=str(file))
  with pytest.raises(UserError, match="can't read the judge's template"):
    build("unifiedreward", url="http://localhost:1", template=str(tmp_path / "none"))


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_in_v1(end):
  with servers.serving(lambda handler, _: servers.send(handler, completion(handler.path))) as server:
    reward = build("unifiedreward", url=server.url + end, **servers.QUICK)
    with pytest.warns(UserWarning, match="unreadable answer: /v1/chat/completions"):
      reward(make_items(1))


def test_an_unknown_option_or_reward_is_the_users_error():
  with pytest.raises(UserError, match="unifiedreward"):
    build("unifiedreward", url="http://localhost:1", temperature=1)
  with pytest.raises(UserError, match="Did you mean 'editreward'"):
    build("editrewards")
