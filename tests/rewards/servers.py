"""Real HTTP servers on loopback for tests: one that does whatever a test says, and how servers go wrong."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from deepgen_jax.rewards.reward import Item

QUICK = dict(timeout=10.0, limit=20.0, pause=0.01, attempts=3)  # of a client in tests, where nothing hangs


def once(reason):
  """Options of a client that asks once, and waits only for what won't come: a busy machine may take a moment to answer."""
  return dict(attempts=1, timeout=2.0 if reason == "timeout" else 10.0)


@contextlib.contextmanager
def serving(answer, port=0):
  """A server whose POSTs are answered by answer(handler, body). Yields it; .url, .seen (bodies, in order), .over (an event)."""

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
      length = int(self.headers["Content-Length"])
      body = json.loads(self.rfile.read(length)) if length < 1 << 20 else None
      with server.lock:
        server.seen.append(body)
        server.headers.append(self.headers)
      with contextlib.suppress(OSError):  # the client may be gone
        answer(self, body)

    def log_message(self, *arguments):
      pass

  server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
  server.daemon_threads = True
  server.url = f"http://127.0.0.1:{server.server_address[1]}"
  server.seen, server.headers, server.lock, server.over = [], [], threading.Lock(), threading.Event()
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  try:
    yield server
  finally:
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def send(handler, body, status=200, length=True):
  """Answers with bytes, or with JSON of anything else."""
  data = body if isinstance(body, bytes) else json.dumps(body).encode()
  handler.send_response(status)
  if length:
    handler.send_header("Content-Length", str(len(data)))
  handler.end_headers()
  handler.wfile.write(data)


def always(body, status=200):
  return lambda handler, _: send(handler, body, status)


def in_turn(*answers):
  """The first request gets the first answer and so on; the last one stays."""
  left = list(answers)
  lock = threading.Lock()

  def answer(handler, body):
    with lock:
      now = left.pop(0) if len(left) > 1 else left[0]
    now(handler, body)

  return answer


def hang(handler, _):
  handler.server.over.wait(30)


def drip(handler, _):
  """A byte now and then: no single read takes long."""
  handler.send_response(200)
  handler.end_headers()
  while not handler.server.over.is_set():
    handler.wfile.write(b" ")
    time.sleep(0.05)


def drip_headers(handler, _):
  handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
  while not handler.server.over.is_set():
    handler.wfile.write(b"x")
    time.sleep(0.05)


def hang_up(handler, _):
  handler.connection.close()


def hang_up_midway(handler, _):
  handler.wfile.write(b'HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{"scores": [1')


def babble(handler, _):
  handler.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")


MISBEHAVIOUR = {  # how a server goes wrong -> how the failure is counted
  "hang": (hang, "timeout"),
  "drip": (drip, "timeout"),
  "drip headers": (drip_headers, "timeout"),
  "hang up": (hang_up, "no connection"),
  "hang up midway": (hang_up_midway, "not JSON"),
  "babble": (babble, "no connection"),
  "500": (always({"error": "out of memory"}, 500), "HTTP 500"),
  "404": (always({"error": "no such model"}, 404), "HTTP 404"),
  "redirect": (always({}, 301), "HTTP 301"),
  "a web page": (always(b"<html>busy</html>"), "not JSON"),
  "a list": (always([1.0, 2.0]), "not JSON"),
  "empty": (always(b""), "not JSON"),
  "not text": (always(b"\xff\xfe{}"), "not JSON"),
  "nested": (always(b"[" * 200_000), "not JSON"),
}


def make_items(*levels, group=0, **more):
  """Items whose images are of one grey level each; prompts tell it."""
  return [Item(f"grey {level}", np.full((8, 8, 3), level, np.uint8), group=group, **more) for level in levels]


class Brightness:
  """A reward: mean of the image, 0..1; missing for black ones."""

  name = "brightness"

  def __call__(self, items):
    return np.array([item.image.mean() / 255 or np.nan for item in items])
