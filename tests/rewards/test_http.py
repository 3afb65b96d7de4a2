"""The client: whatever a server does, a request ends in time with an answer or a reason."""

import base64
import io
import itertools
import math
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from deepgen_jax.errors import UserError
from deepgen_jax.rewards import http
from deepgen_jax.rewards.http import Client, Failure
from tests.rewards import servers


def ask(url, jobs=(1,), **options):
  """What a client gets for {"job": job} of each job, and the seconds it took."""
  start = time.monotonic()
  results = Client(url, **{**servers.QUICK, **options}).map(lambda post, job: post("/ask", {"job": job}), list(jobs))
  return results, time.monotonic() - start


def echo(handler, body):
  servers.send(handler, {"answer": body["job"]})


@pytest.mark.parametrize("name", servers.MISBEHAVIOUR)
def test_every_misbehaviour_is_a_failure_with_its_reason_and_in_time(name):
  answer, reason = servers.MISBEHAVIOUR[name]
  with servers.serving(answer) as server:
    (failure,), seconds = ask(server.url, **{**servers.once(reason), "attempts": 2})
  assert isinstance(failure, Failure) and failure.reason == reason
  assert seconds < 5
  assert len(server.seen) == (2 if failure.retry else 1)


def test_answers_come_in_order_and_in_parallel_within_the_bound():
  now, most, lock = 0, 0, threading.Lock()

  def answer(handler, body):
    nonlocal now, most
    with lock:
      now += 1
      most = max(most, now)
    time.sleep(0.02 * (body["job"] % 3))
    with lock:
      now -= 1
    echo(handler, body)

  with servers.serving(answer) as server:
    results, _ = ask(server.url, range(20), concurrency=4)
  assert results == [{"answer": job} for job in range(20)]
  assert 1 < most <= 4
  assert Client(server.url).map(ask, []) == []


@pytest.mark.parametrize("status, requests", [(500, 3), (503, 3), (408, 3), (429, 3), (400, 1), (401, 1), (413, 1), (301, 1)])
def test_only_what_may_pass_is_tried_again(status, requests):
  bad = servers.always({}, status)
  with servers.serving(servers.in_turn(bad, bad, echo)) as server:
    (result,), _ = ask(server.url)
  assert len(server.seen) == requests
  assert result == {"answer": 1} if requests == 3 else result.reason == f"HTTP {status}"


def test_a_bug_in_asking_is_raised():
  with servers.serving(echo) as server, pytest.raises(ZeroDivisionError):
    Client(server.url, **servers.QUICK).map(lambda post, job: 1 / job, [1, 0])


def test_a_process_that_is_interrupted_does_not_wait_for_a_hanging_server():
  code = """
import signal, sys
from deepgen_jax.rewards.http import Client
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have switched off for what it runs behind
Client(sys.argv[1]).map(lambda post, job: post("/ask", {}), [1])
"""
  with servers.serving(servers.hang) as server:
    process = subprocess.Popen([sys.executable, "-c", code, server.url], stderr=subprocess.PIPE, text=True)
    try:
      while not server.seen and process.poll() is None:
        time.sleep(0.05)
      process.send_signal(signal.SIGINT)
      _, errors = process.communicate(timeout=15)
    finally:
      process.kill()
  assert "KeyboardInterrupt" in errors and len(server.seen) == 1


def test_attempts_end_and_pauses_double_with_jitter(monkeypatch):
  pauses = []
  monkeypatch.setattr(http.time, "sleep", pauses.append)
  with servers.serving(servers.always({}, 500)) as server:
    (failure,), _ = ask(server.url, attempts=8, pause=1.0, limit=1000)
  assert failure.reason == "HTTP 500" and len(server.seen) == 8
  wanted = np.array([1, 2, 4, 8, 16, 30, 30])
  assert len(pauses) == 7 and all(wanted / 2 <= pauses) and all(pauses <= wanted)
  assert len({round(pause / most, 6) for pause, most in zip(pauses, wanted)}) > 1


def test_the_limit_holds_for_all_jobs_together():
  with servers.serving(servers.hang) as server:
    results, seconds = ask(server.url, range(12), concurrency=2, timeout=10, limit=0.5)
  assert Counter(failure.reason for failure in results) == {"timeout": 2, "out of time": 10}
  assert seconds < 5 and len(server.seen) == 2


def test_a_pause_does_not_pass_the_limit():
  with servers.serving(servers.always({}, 500)) as server:
    (failure,), seconds = ask(server.url, attempts=99, pause=20, limit=1)
  assert failure.reason == "HTTP 500" and seconds < 5


def test_a_server_that_dies_and_returns_costs_time_only():
  with servers.serving(echo) as server:
    port = server.server_address[1]
    assert ask(server.url)[0] == [{"answer": 1}]
  results = []
  thread = threading.Thread(target=lambda: results.extend(ask(server.url, range(5), attempts=50, pause=0.1, limit=10)[0]))
  thread.start()
  time.sleep(0.3)
  assert not results
  with servers.serving(echo, port):
    thread.join()
  assert results == [{"answer": job} for job in range(5)]


def test_nobody_listening():
  with servers.serving(echo) as server:
    pass
  (failure,), _ = ask(server.url)
  assert failure.reason == "no connection" and server.url in failure.detail


def test_too_large_an_answer(monkeypatch):
  monkeypatch.setattr(http, "MAX_ANSWER", 1000)
  with servers.serving(servers.always({"answer": "x" * 2000})) as server:
    (failure,), _ = ask(server.url)
  assert failure.reason == "too large an answer" and len(server.seen) == 1


def test_a_large_body_that_is_refused_unread():
  def refuse(handler, _):
    servers.send(handler, {"error": "too large"}, 413)

  with servers.serving(refuse) as server:
    results = Client(server.url, **servers.QUICK).map(lambda post, job: post("", {"text": "x" * (8 << 20)}), [1])
  assert server.seen == [None] and results[0].reason == "HTTP 413"


@pytest.mark.parametrize("body", [{"a": math.nan}, {"a": object()}, {("a", 1): 1}])
def test_what_is_not_json_is_not_sent(body):
  with servers.serving(echo) as server:
    results = Client(server.url, **servers.QUICK).map(lambda post, job: post("", body), [1])
  assert results[0].reason == "not sendable as JSON" and server.seen == []


def test_numpy_values_are_sent_as_numbers():
  with servers.serving(echo) as server:
    assert ask(server.url, [np.float32(0.5)])[0] == [{"answer": 0.5}]
    assert ask(server.url, [np.arange(2)])[0] == [{"answer": [0, 1]}]


def test_the_token_is_sent_and_the_path_kept(tmp_path):
  file = tmp_path / "token"
  file.write_text(" secret\n")
  with servers.serving(lambda handler, _: servers.send(handler, {"path": handler.path})) as server:
    assert ask(server.url + "/base/", token_file=str(file))[0] == [{"path": "/base/ask"}]
  assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("text", ["", " \n", "two\nlines", "schlüssel"])
def test_a_bad_token_file(tmp_path, text):
  file = tmp_path / "token"
  file.write_text(text)
  with pytest.raises(UserError, match="token"):
    Client("http://localhost:1", token_file=str(file))
  with pytest.raises(UserError, match="can't read the token file"):
    Client("http://localhost:1", token_file=str(tmp_path / "none"))


@pytest.mark.parametrize(
  "url",
  ["", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://host:99999", "http://host:0", "http://h?a=1"],
)
def test_a_bad_url(url):
  with pytest.raises(UserError, match="not a server's URL"):
    Client(url)


@pytest.mark.parametrize(
  "name, value", [*itertools.product(["concurrency", "timeout", "limit", "attempts", "pause"], [0, -1, math.nan, math.inf])]
)
def test_a_bad_number(name, value):
  with pytest.raises(UserError, match=f"{name} is"):
    Client("http://localhost:1", **{name: value})


@pytest.mark.parametrize(
  "value, number",
  [
    (1, 1.0),
    (-0.5, -0.5),
    (True, None),
    (None, None),
    ("3", None),
    ([1], None),
    (math.nan, None),
    (-math.inf, None),
    (10**400, None),
  ],
)
def test_finite(value, number):
  assert http.finite(value) == number


def test_images_arrive_unchanged():
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  with Image.open(io.BytesIO(base64.b64decode(http.encode_image(image)))) as back:
    assert back.format == "PNG" and np.array_equal(np.asarray(back), image)


def test_scores_count_failures_and_warn_of_each_reason_once():
  failures = Counter()
  with pytest.warns(UserWarning, match="reward x: timeout: slow") as caught:
    values = http.scores("x", failures, [0.5, Failure("timeout", "slow"), Failure("timeout", "slower")])
  assert len(caught) == 1
  np.testing.assert_array_equal(values, [0.5, np.nan, np.nan])
  assert values.dtype == np.float64 and failures == {"timeout": 2}
