"""Serves rewards over HTTP: `python -m deepgen_jax.rewards.serve ocr --port 8000`; `rewards.remote` has the wire format.

GET /health lists the rewards, POST /score scores. Whoever can reach the port can use it, so anything but this machine's own
addresses needs a token. Bodies are JSON of bounded size and images PNG of bounded size; nothing is unpickled.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import io
import ipaddress
import json
import math
import select
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from deepgen_jax.cli import parse
from deepgen_jax.data.images import load_image
from deepgen_jax.errors import UserError, run_command
from deepgen_jax.rewards.http import read_token
from deepgen_jax.rewards.registry import build
from deepgen_jax.rewards.reward import Item, Reward

MAX_PIXELS = 1 << 25  # of one image: 32 million
IDLE = 60  # seconds that a client may keep a connection without sending


class Refused(Exception):
  """A request that gets an error status and a message instead of scores."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Server(ThreadingHTTPServer):
  """Listens at once; serve_forever() answers. One request is scored at a time: rewards share a device and need no locks.

  rewards: by name. token: what `Authorization: Bearer` must carry, or None. max_bytes: of a request's body. Raises UserError
  if the address can't be had, or reaches beyond this machine without a token.
  """

  daemon_threads = True
  request_queue_size = 128  # the standard library's 5 makes a burst of clients wait for seconds

  def __init__(self, rewards: Mapping[str, Reward], host: str, port: int, token: str | None = None, max_bytes: int = 1 << 28):
    self.rewards, self.token, self.max_bytes = rewards, token, max_bytes
    self.lock = threading.Lock()
    if not 0 <= port < 1 << 16:
      raise UserError(f"--port {port}: must be from 0 to 65535")
    try:
      family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
      if token is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise UserError(f"--host {host} can be reached from other machines; give --token_file FILE, or --host 127.0.0.1")
      self.address_family = family
      super().__init__(address[:2], Handler)
    except OSError as error:
      raise UserError(f"can't listen on --host {host} --port {port}: {error}") from error

  @property
  def url(self) -> str:
    """http://HOST:PORT, with the port that was chosen if 0 was asked for."""
    host, port = self.server_address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

  def score(self, name: str, items: Sequence[Item]) -> list[float | None]:
    """What goes on the wire for the items: finite numbers, None where missing. Raises Refused if the reward is at fault."""
    try:
      values = np.asarray(self.rewards[name](items), np.float64)
    except Exception as error:  # the server outlives a reward's bug, and the client is told: it counts the scores as missing
      raise Refused(500, f"reward {name}: {type(error).__name__}: {error}") from error
    if values.shape != (len(items),):
      raise Refused(500, f"reward {name} gave scores of shape {list(values.shape)} for {len(items)} items")
    return [float(value) if math.isfinite(value) else None for value in values]

  def handle_error(self, request, client_address) -> None:
    """A client that went away ends its own thread: one line, no traceback."""
    print(f"{client_address[0]}: {sys.exception()!r}", file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
  """One connection of a Server."""

  server: Server
  timeout = IDLE

  def do_GET(self) -> None:
    self._answer(self._health)

  def do_POST(self) -> None:
    self._answer(self._score)

  def log_message(self, format, *arguments) -> None:
    """Refusals are logged, by log_error; every request would drown them."""

  def log_error(self, format, *arguments) -> None:
    """To standard error."""
    print(f"{self.client_address[0]} {self.requestline!r}: {format % arguments}", file=sys.stderr, flush=True)

  def _answer(self, respond) -> None:
    try:
      self._authorize()
      status, body = 200, respond()
    except Refused as refusal:
      status, body = refusal.status, {"error": str(refusal)}
      self.log_error("%d %s", status, refusal)
      self._drain()
    data = json.dumps(body, allow_nan=False).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def _authorize(self) -> None:
    self.unread = 0
    if self.server.token is None:
      return
    given = self.headers.get("Authorization", "").encode("utf-8", "replace")
    if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
      self.unread = self._length()
      raise Refused(401, "send the server's token: Authorization: Bearer TOKEN")

  def _health(self) -> dict:
    if self.path != "/health":
      raise Refused(404, f"{self.path} does not exist; there are GET /health and POST /score")
    return {"rewards": sorted(self.server.rewards)}

  def _score(self) -> dict:
    self.unread = self._length()
    if self.path != "/score":
      raise Refused(404, f"{self.path} does not exist; there are GET /health and POST /score")
    if self.headers.get_content_type() != "application/json":
      raise Refused(415, "the body must be application/json")
    if "Content-Length" not in self.headers:
      raise Refused(411, "send a Content-Length")
    if self.unread > self.server.max_bytes:
      raise Refused(413, f"the body has {self.unread} bytes, the limit is {self.server.max_bytes}; send fewer items at once")
    data, self.unread = self.rfile.read(self.unread), 0
    try:
      body = json.loads(data)
    except (ValueError, RecursionError) as error:
      raise Refused(400, f"the body is not JSON: {error}") from error
    name, items = read_body(body, self.server.rewards)
    with self.server.lock:
      if self._gone():
        raise Refused(408, "the client left while it waited for its turn; its items are not scored")
      return {"scores": self.server.score(name, items)}

  def _gone(self) -> bool:
    """Whether the client has closed the connection. It will ask again, and scoring for nobody would make all others late."""
    readable, _, _ = select.select([self.connection], [], [], 0)
    return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

  def _length(self) -> int:
    text = self.headers.get("Content-Length", "0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
      raise Refused(400, "Content-Length is not a number of bytes")
    return int(text)

  def _drain(self) -> None:
    """Reads on after a refusal, up to the limit: a client that is still sending would see a broken connection instead."""
    left = min(self.unread, self.server.max_bytes)
    while left > 0 and (chunk := self.rfile.read(min(left, 1 << 16))):
      left -= len(chunk)


def read_body(body: Any, rewards: Mapping[str, Reward]) -> tuple[str, list[Item]]:
  """(reward's name, items) of a request. Raises Refused, naming the item, for whatever isn't as the wire format says."""
  if not isinstance(body, dict) or not isinstance(body.get("items"), list):
    raise Refused(400, 'the body must be {"reward": NAME, "items": [...]}')
  name = body.get("reward")
  if not isinstance(name, str) or name not in rewards:
    raise Refused(404, f"reward {name!r} is not served here; there are {sorted(rewards)}")
  return name, [_item(f"items[{index}]", item) for index, item in enumerate(body["items"])]


def _item(where: str, item: Any) -> Item:
  if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
    raise Refused(400, f"{where} needs a text in prompt")
  references, group, metadata = item.get("references", []), item.get("group", 0), item.get("metadata", {})
  if not isinstance(references, list) or type(group) is not int or not isinstance(metadata, dict):
    raise Refused(400, f"{where}: references must be a list, group a whole number, metadata an object")
  images = [_image(f"{where}.references[{index}]", text) for index, text in enumerate(references)]
  return Item(item["prompt"], _image(f"{where}.image", item.get("image")), tuple(images), group, metadata)


def _image(where: str, text: Any) -> np.ndarray:
  try:
    data = base64.b64decode(text, validate=True)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
      if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
      return load_image(image)
  except (TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise Refused(400, f"{where} is not the base64 of a PNG file: {error}") from error


def read_options(settings: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """{reward: {option: value}} of NAME.KEY=VALUE texts; a value is JSON, else the text itself. Raises UserError."""
  options: dict[str, dict[str, Any]] = {name: {} for name in names}
  for setting in settings:
    target, equals, text = setting.partition("=")
    name, dot, key = target.partition(".")
    if not equals or not dot or not key or name not in options:
      raise UserError(f"--option {setting}: write NAME.KEY=VALUE, with NAME one of {', '.join(names)}")
    try:
      options[name][key] = json.loads(text)
    except ValueError:
      options[name][key] = text
  return options


def build_parser() -> argparse.ArgumentParser:
  """The command's options."""
  parser = argparse.ArgumentParser(
    prog="python -m deepgen_jax.rewards.serve",
    description="Serves rewards over HTTP and JSON, for a run on another machine or in another environment.",
    epilog="example: python -m deepgen_jax.rewards.serve clip_sim --option clip_sim.path=clip-vit-large-patch14 --port 8000",
    allow_abbrev=False,
  )
  parser.add_argument("names", nargs="+", metavar="NAME", help="rewards, as in a config")
  parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need --token_file")
  parser.add_argument("--port", type=int, default=8000, help="0: any free one, printed")
  parser.add_argument("--token_file", "--token-file", metavar="FILE", help="holds the token that clients must send")
  parser.add_argument("--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="of a reward; repeatable")
  parser.add_argument("--max_mib", type=int, default=256, metavar="N", help="largest request body")
  return parser


def main() -> None:
  arguments = parse(build_parser(), sys.argv[1:])
  if arguments.max_mib < 1:
    raise UserError(f"--max_mib {arguments.max_mib}: must be at least 1")
  options = read_options(arguments.option, arguments.names)
  token = read_token(arguments.token_file) if arguments.token_file else None
  rewards: dict[str, Reward] = {}
  # Listening comes first: a wrong address shows before minutes of loading, and clients wait in the queue meanwhile.
  with Server(rewards, arguments.host, arguments.port, token, arguments.max_mib << 20) as server:
    for name in options:
      rewards[name] = build(name, **options[name])
    print(f"serving {', '.join(rewards)} on {server.url}", flush=True)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      print("stopped")


if __name__ == "__main__":
  run_command(main)
