"""The reward server: the same scores as in process, refusals that say why, and the command."""

import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepgen_jax.errors import UserError
from deepgen_jax.rewards import serve
from deepgen_jax.rewards.remote import remote, to_wire
from tests.rewards import servers
from tests.rewards.servers import Brightness, make_items

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:reward ")


@pytest.fixture
def start():
  """start(reward, **options) -> a running Server with it under the name "brightness"."""
  running = []

  def start(reward=None, **options):
    server = serve.Server({"brightness": reward or Brightness()}, "127.0.0.1", 0, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    running.append((server, thread))
    return server

  yield start
  for server, thread in running:
    server.shutdown()
    server.server_close()
    thread.join()


def client(server, **options):
  return remote("brightness", server.url, **{**servers.QUICK, **options})


def request(server, method, path, body=b"", headers=None):
  """(status, JSON object) of one request."""
  connection = http.client.HTTPConnection(*server.server_address[:2], timeout=5)
  connection.request(method, path, body, headers or {})
  response = connection.getresponse()
  answer = response.status, json.loads(response.read())
  connection.close()
  return answer


def post(server, body, **headers):
  data = body if isinstance(body, bytes) else json.dumps(body).encode()
  return request(server, "POST", "/score", data, {"Content-Type": "application/json", **headers})


def test_remote_scores_are_the_local_ones_and_missing_stays_missing(start):
  items = make_items(10, 0, group=1) + make_items(200, 255, group=2)
  reward = client(start())
  np.testing.assert_array_equal(reward(items), Brightness()(items))
  assert np.isnan(reward(items)[1]) and reward.failures == {"missing at the scorer": 2}


def test_items_arrive_whole(start):
  rng = np.random.default_rng(0)
  references = tuple(rng.integers(0, 256, size, np.uint8) for size in ((4, 6, 3), (8, 2, 3)))
  (item,) = make_items(7, group=3, references=references, metadata={"objects": [{"class": "apple", "count": 2}]})
  seen = []

  class Recorder:
    name = "recorder"

    def __call__(self, items):
      seen.extend(items)
      return np.zeros(len(items))

  assert client(start(Recorder()))([item]).tolist() == [0.0]
  (arrived,) = seen
  assert (arrived.prompt, arrived.group, arrived.metadata) == (item.prompt, 3, item.metadata)
  for a, b in zip((item.image, *references), (arrived.image, *arrived.references), strict=True):
    np.testing.assert_array_equal(a, b)


def test_health(start):
  server = start()
  assert request(server, "GET", "/health") == (200, {"rewards": ["brightness"]})
  assert request(server, "GET", "/")[0] == 404


def png(size=(4, 4), format="PNG"):
  file = io.BytesIO()
  Image.new("RGB", size).save(file, format)
  return base64.b64encode(file.getvalue()).decode()


def body(**more):
  return {"reward": "brightness", "items": [{"prompt": "p", "image": png(), **more}]}


@pytest.mark.parametrize(
  "sent, status, says",
  [
    (b"\x80\x04K\x01.", 400, "not JSON"),  # a pickle
    (b"[" * 100_000, 400, "not JSON"),
    ([], 400, "the body must be"),
    ({"reward": "brightness"}, 400, "the body must be"),
    ({"reward": "colour", "items": []}, 404, "there are ['brightness']"),
    ({"reward": ["brightness"], "items": []}, 404, "not served"),
    ({"reward": "brightness", "items": [1]}, 400, "items[0]"),
    (body(prompt=None), 400, "items[0] needs a text"),
    (body(image=None), 400, "items[0].image"),
    (body(image="@@@"), 400, "items[0].image"),
    (body(image=png(format="BMP")), 400, "items[0].image"),
    (body(image=png()[:-40]), 400, "items[0].image"),
    (body(references=[png(), "?"]), 400, "items[0].references[1]"),
    (body(references="none"), 400, "references must be a list"),
    (body(group="1"), 400, "group a whole number"),
    (body(metadata=[]), 400, "metadata an object"),
  ],
)
def test_a_bad_body_is_refused_with_what_is_wrong(start, capfd, sent, status, says):
  server = start()
  got, answer = post(server, sent)
  assert got == status and says in answer["error"]
  assert post(server, body(image=to_wire(*make_items(255))["image"])) == (200, {"scores": [1.0]})
  assert "Traceback" not in capfd.readouterr().err


def test_large_images_are_refused_before_they_are_decoded(start, monkeypatch):
  monkeypatch.setattr(serve, "MAX_PIXELS", 20)
  status, answer = post(start(), body(image=png((7, 3))))
  assert status == 400 and "7 x 3 pixels" in answer["error"]


def test_large_bodies_are_refused_and_the_client_learns_it(start):
  server = start(max_bytes=10_000)
  status, answer = post(server, body(prompt="x" * 15_000))
  assert status == 413 and "limit is 10000" in answer["error"]
  reward = client(server)
  assert np.isnan(reward(make_items(1, metadata={"long": "x" * 4_000_000}))).all() and reward.failures == {"HTTP 413": 1}


def test_a_refused_body_is_read_so_that_the_client_gets_the_answer(start):
  """Without that the server's closing breaks the client's sending."""
  status, answer = request(start(), "POST", "/scores", b"x" * (8 << 20))
  assert status == 404 and "/scores does not exist" in answer["error"]


@pytest.mark.parametrize(
  "headers, status", [({"Content-Type": "text/plain"}, 415), ({"Content-Type": ""}, 415), ({"Content-Length": "x"}, 400)]
)
def test_headers_must_fit(start, headers, status):
  assert post(start(), body(), **headers)[0] == status


def test_a_body_without_a_length_is_refused(start):
  server = start()
  connection = http.client.HTTPConnection(*server.server_address[:2], timeout=5)
  connection.putrequest("POST", "/score")
  for name, value in (("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")):
    connection.putheader(name, value)
  connection.endheaders()  # it answers without waiting for the body, whose sending would meet a closed connection
  assert connection.getresponse().status == 411
  connection.close()


def test_the_token_is_demanded(start, tmp_path):
  server = start(token="right")
  file = tmp_path / "token"
  items = make_items(51)
  for token, wanted in ((None, "HTTP 401"), ("wrong", "HTTP 401"), ("right", None)):
    file.write_text(token or "")
    reward = client(server, **({"token_file": str(file)} if token else {}))
    values = reward(items)
    assert list(reward.failures) == ([wanted] if wanted else [])
    assert np.isnan(values).all() if wanted else values == 0.2
  assert request(server, "GET", "/health")[0] == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_address_needs_a_token(host):
  with pytest.raises(UserError, match="token_file"):
    serve.Server({}, host, 0)


def test_an_open_address_with_a_token():
  serve.Server({}, "0.0.0.0", 0, token="t").server_close()


def test_an_address_that_cannot_be_had(start):
  taken = start().server_address[1]
  for host, port, says in (
    ("127.0.0.1", taken, "in use"),
    ("192.0.2.1", 0, "can't listen"),
    ("127.0.0.1", 65536, "--port 65536"),
  ):
    with pytest.raises(UserError, match=says):
      serve.Server({}, host, port, token="t")


@pytest.mark.parametrize(
  "give, says",
  [(lambda n: 1 / 0, "ZeroDivisionError"), (lambda n: np.zeros(n + 1), "shape"), (lambda n: ["a"] * n, "ValueError")],
)
def test_a_reward_that_fails_costs_its_request_only(start, give, says):
  class Broken(Brightness):
    def __call__(self, items):
      return give(len(items)) if items[0].prompt == "grey 1" else super().__call__(items)

  server = start(Broken())
  with pytest.warns(UserWarning, match=says):
    reward = client(server)
    values = reward(make_items(1, group=0) + make_items(255, group=1))
  np.testing.assert_array_equal(values, [np.nan, 1])
  assert reward.failures == {"HTTP 500": 1}


def test_one_request_is_scored_at_a_time_and_none_for_a_client_that_left(start):
  class Slow(Brightness):
    calls, now, most = 0, 0, 0

    def __call__(self, items):
      self.calls, self.now = self.calls + 1, self.now + 1
      self.most = max(self.most, self.now)
      time.sleep(0.5)
      self.now -= 1
      return super().__call__(items)

  slow = Slow()
  server = start(slow)
  patient = threading.Thread(target=client(server, timeout=5, limit=5), args=(make_items(255),))
  patient.start()
  while not slow.now:
    time.sleep(0.01)
  impatient = client(server, timeout=0.1, attempts=2)
  assert np.isnan(impatient(make_items(255))).all() and impatient.failures == {"timeout": 1}
  patient.join()
  assert client(server, timeout=5)(make_items(255)) == 1
  assert slow.calls == 2 and slow.most == 1


def test_options_of_the_command():
  settings = ["a.path=dir/x=y", "a.size=3", "b.on=true"]
  assert serve.read_options(settings, ["a", "b"]) == {"a": {"path": "dir/x=y", "size": 3}, "b": {"on": True}}
  for bad in ("a", "a.x", "a=1", "c.x=1", ".x=1", "a.=1"):
    with pytest.raises(UserError, match=re.escape(bad)):
      serve.read_options([bad], ["a", "b"])


def command(*arguments, code=None):
  """The command as a process; `code` registers what only tests have."""
  start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "deepgen_jax.rewards.serve"]
  return subprocess.Popen(
    [*start, *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": ""},
  )


def test_the_command_serves_a_reward():
  code = """
from deepgen_jax.errors import run_command
from deepgen_jax.rewards import registry, serve
registry.REGISTRY["brightness"] = "tests.rewards.servers:Brightness"
run_command(serve.main)
"""
  process = command("brightness", "--port", "0", code=code)
  try:
    line = process.stdout.readline()
    url = re.fullmatch(r"serving brightness on (http://127\.0\.0\.1:\d+)\n", line)[1]
    np.testing.assert_array_equal(remote("brightness", url, timeout=10)(make_items(51, 0)), [0.2, np.nan])
  finally:
    process.terminate()
    process.communicate()


@pytest.mark.parametrize(
  "arguments, says",
  [
    (["remot"], "Did you mean 'remote'?"),
    (["remote"], "reward"),
    (["remote", "--prot", "1"], "Did you mean '--port'?"),
    (["remote", "--host", "0.0.0.0", "--port", "0"], "give --token_file"),
    (["remote", "--token-file", "/none"], "can't read the token file"),
    (["remote", "--max_mib", "0"], "--max_mib 0"),
  ],
)
def test_mistakes_end_with_exit_code_2(monkeypatch, capsys, arguments, says):
  monkeypatch.setattr(sys, "argv", ["serve", *arguments])
  with pytest.raises(SystemExit) as end:
    serve.run_command(serve.main)
  assert end.value.code == 2 and says in capsys.readouterr().err


def test_help_has_an_example():
  process = command("--help")
  out, _ = process.communicate()
  assert process.returncode == 0 and "example: python -m deepgen_jax.rewards.serve" in out
