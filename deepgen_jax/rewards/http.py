"""JSON over HTTP to servers that may hang, die or talk nonsense: a request ends in time, as an answer or a counted Failure.

The standard library is used because only there the socket is at hand: a timeout of the usual clients bounds one read, and a
server that sends a byte now and then would hold a request for ever.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import json
import math
import random
import socket
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from etils import epath
from PIL import Image

from deepgen_jax.errors import UserError

MAX_ANSWER = 16 << 20  # bytes; longer answers are failures
MAX_PAUSE = 30.0  # seconds between two attempts

Job = TypeVar("Job")
Answer = TypeVar("Answer")
Post = Callable[[str, Any], dict]


class Failure(Exception):
  """Why there is no answer. `reason` is one of few fixed phrases, to be counted; `detail` is for people."""

  def __init__(self, reason: str, detail: str = "", retry: bool = False):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.detail, self.retry = reason, detail, retry


class Client:
  """Posts JSON to one server, many requests at a time.

  url: http(s)://HOST[:PORT][/PATH]. token_file: a file that holds the server's token; a token itself would be recorded with
  the run's config. concurrency: requests in flight. timeout: seconds for one attempt, answer included. limit: seconds for one
  `map`, waiting and retries included. attempts, pause: how often a request is tried, and the seconds before the second try;
  pauses double, up to 30, with random cuts of up to a half so that requests that failed together don't return together. The
  defaults outlast a server that needs about a minute to restart. Proxies from the environment are not used, redirects not
  followed. Raises UserError for a bad url, number or token file.
  """

  def __init__(
    self,
    url: str,
    *,
    token_file: str | None = None,
    concurrency: int = 64,
    timeout: float = 180.0,
    limit: float = 600.0,
    attempts: int = 8,
    pause: float = 1.0,
  ):
    self._parts = check_url(url)
    for name, value in dict(concurrency=concurrency, timeout=timeout, limit=limit, attempts=attempts, pause=pause).items():
      if not 0 < value < math.inf:
        raise UserError(f"{name} is {value!r} for {url}; give a positive number")
    self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if token_file is not None:
      self._headers["Authorization"] = f"Bearer {read_token(token_file)}"
    self.url, self.concurrency, self.timeout, self.limit = url, concurrency, timeout, limit
    self.attempts, self.pause = attempts, pause

  def map(self, ask: Callable[[Post, Job], Answer], jobs: Sequence[Job]) -> list[Answer | Failure]:
    """ask(post, job) of each job, or the Failure that it raised; in order, and within `limit` seconds in all.

    post(path, body) -> the JSON object that the server answers; it raises Failure.
    """
    post = functools.partial(self._post, time.monotonic() + self.limit)
    results: list[Any] = [None] * len(jobs)
    waiting = deque(enumerate(jobs))

    def work() -> None:
      while True:
        try:
          index, job = waiting.popleft()
        except IndexError:
          return
        try:
          results[index] = ask(post, job)
        except Exception as error:
          results[index] = error

    # Daemons, not a pool: a pool's threads are waited for when the process ends, and a hanging server would hold it up.
    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(self.concurrency, len(jobs)))]
    for worker in workers:
      worker.start()
    for worker in workers:
      worker.join()
    for result in results:
      if isinstance(result, Exception) and not isinstance(result, Failure):
        raise result
    return results

  def _post(self, deadline: float, path: str, body: Any) -> dict:
    try:
      data = json.dumps(body, allow_nan=False, default=_plain).encode()
    except (TypeError, ValueError) as error:
      raise Failure("not sendable as JSON", str(error)) from error
    for attempt in range(self.attempts):
      try:
        return self._once(deadline, path, data)
      except Failure as failure:
        pause = min(self.pause * 2**attempt, MAX_PAUSE) * random.uniform(0.5, 1)
        if not failure.retry or attempt + 1 == self.attempts or time.monotonic() + pause >= deadline:
          raise
      time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")

  def _once(self, deadline: float, path: str, data: bytes) -> dict:
    seconds = min(self.timeout, deadline - time.monotonic())
    if seconds <= 0:
      raise Failure("out of time", f"not asked within {self.limit} s")
    kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(self._parts.hostname, self._parts.port, timeout=seconds)
    late = threading.Event()
    timer = None
    try:
      connection.connect()
      timer = threading.Timer(seconds, _cut, (connection.sock, late))
      timer.daemon = True
      timer.start()
      status, text = self._exchange(connection, path, data)
    except (OSError, http.client.HTTPException, ValueError) as error:
      reason = "timeout" if late.is_set() or isinstance(error, TimeoutError) else "no connection"
      raise Failure(reason, f"{self.url}: {error!r}", retry=True) from error
    finally:
      if timer:
        timer.cancel()
      connection.close()
    if late.is_set():  # an answer without a length looks complete when it is cut
      raise Failure("timeout", f"{self.url}: no whole answer in {seconds:.3g} s", retry=True)
    if status != 200:
      detail = f"{self.url}{path}: {text[:300].decode(errors='replace')}"
      raise Failure(f"HTTP {status}", detail, retry=status in (408, 429) or status >= 500)
    return _object(text)

  def _exchange(self, connection: http.client.HTTPConnection, path: str, data: bytes) -> tuple[int, bytes]:
    # A server that refuses a large body answers and closes before it has read it all; without an answer getresponse raises.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
      connection.request("POST", self._parts.path.rstrip("/") + path, data, self._headers)
    response = connection.getresponse()
    return response.status, response.read(MAX_ANSWER + 1)


def _cut(sock: socket.socket, late: threading.Event) -> None:
  """Wakes the thread that waits on `sock`. Not by SSLSocket's own shutdown, which takes its state away under a reader."""
  late.set()
  with contextlib.suppress(OSError):  # it has ended meanwhile
    socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _object(text: bytes) -> dict:
  if len(text) > MAX_ANSWER:
    raise Failure("too large an answer", f"more than {MAX_ANSWER} bytes")
  try:
    answer = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise Failure("not JSON", f"{error} in {text[:300]!r}", retry=True) from error
  if not isinstance(answer, dict):
    raise Failure("not JSON", f"expected an object, got {text[:300]!r}", retry=True)
  return answer


def _plain(value: Any) -> Any:
  if isinstance(value, (np.ndarray, np.generic)):
    return value.tolist()
  if isinstance(value, Mapping):
    return dict(value)
  raise TypeError(f"{type(value).__name__} is not JSON")


def check_url(url: str):
  """The parts of an http(s) URL (urllib's SplitResult). Raises UserError if it isn't one."""
  try:
    parts = urlsplit(url)
    valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query + parts.fragment
  except ValueError:
    valid = False
  if not valid:
    raise UserError(f"{url!r} is not a server's URL; give http://HOST:PORT")
  return parts


def read_token(file: str) -> str:
  """The token in a file, white space around it removed. Raises UserError if there is none."""
  try:
    token = epath.Path(file).read_text().strip()
  except (OSError, ValueError) as error:
    raise UserError(f"can't read the token file {file}: {error}") from error
  if not token or not token.isascii() or not token.isprintable():
    raise UserError(f"the token file {file} must hold one line of printable ASCII: the token")
  return token


def finite(value: Any) -> float | None:
  """A JSON number as a float; None for what is not a finite number (true, NaN, "3", an integer past float's range)."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return None
  try:
    number = float(value)
  except OverflowError:
    return None
  return number if math.isfinite(number) else None


def encode_image(image: np.ndarray) -> str:
  """uint8 [H,W,3] -> base64 of a PNG file: lossless, so that a remote score is the score of this image."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, format="PNG", compress_level=1)
  return base64.b64encode(file.getvalue()).decode("ascii")


def tally(reward: str, failures: Counter, results: Sequence[Any]) -> None:
  """Adds the Failures among `results` to `failures`, by reason; warns of each reason's first, with its detail."""
  for failure in results:
    if isinstance(failure, Failure):
      if failure.reason not in failures:
        warnings.warn(f"reward {reward}: {failure}. Scores that fail are missing; further ones are counted only.", stacklevel=2)
      failures[failure.reason] += 1


def scores(reward: str, failures: Counter, results: Sequence[float | Failure]) -> np.ndarray:
  """float64 [len(results)]: numbers as they are, NaN for Failures, which are added to `failures`."""
  tally(reward, failures, results)
  return np.array([math.nan if isinstance(result, Failure) else result for result in results], np.float64)
