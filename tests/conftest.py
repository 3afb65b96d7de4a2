"""Before anything imports JAX: the CPU with eight devices. After the last test: a skip that isn't allowed is a failure."""

import fcntl
import gc
import os
import re
import sys
from pathlib import Path

import pytest

from tests import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag in xla.flags(8).split():
  if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
# Compiled programs are kept, small ones too: each training compiles hundreds anew, of which tests run many. A second run of
# all takes a third of the time, and commands that tests start share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
gc.set_threshold(100_000, 50, 100)  # tracing makes objects faster than it drops them: looking for garbage took a tenth
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

# The files that take longest, which go first: at the end no process waits for one of them (launch/test.sh).
LONGEST = (
  "test_distributed",
  "test_estimate",
  "test_parallel",
  "test_train",
  "test_heldout",
  "test_grpo",
  "test_benchmark",
  "test_torture",
  "test_precompute",
  "test_pipeline",
  "test_diffusers",
  "test_convert",
  "test_grpo_run",
  "test_rollout",
)

# Why a test may skip. PyTorch is installed for Python 3.11 alone (setup.py).
ALLOWED_SKIPS = [r"needs an accelerator"]
if sys.version_info >= (3, 12):
  ALLOWED_SKIPS.append(r"could not import '(torch|diffusers)'")
if sys.version_info >= (3, 13):  # rapidocr-onnxruntime isn't made for it
  ALLOWED_SKIPS.append(r"could not import 'rapidocr_onnxruntime'")


def pytest_collection_modifyitems(items):
  place = {name: number for number, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def skip_is_allowed(reason):
  return any(re.search(pattern, reason) for pattern in ALLOWED_SKIPS)


def forbidden_skips(reports):
  """Lines "FILE:LINE reason" of the skipped tests and modules among pytest reports that shouldn't have skipped."""
  places = [report.longrepr for report in reports if isinstance(report.longrepr, tuple)]
  return [f"{file}:{line} {reason}" for file, line, reason in places if not skip_is_allowed(reason)]


def pytest_sessionfinish(session):
  gc.freeze()  # what is left isn't looked through again, which pytest asks for five times
  reporter = session.config.pluginmanager.get_plugin("terminalreporter")
  if reporter and session.exitstatus == 0 and forbidden_skips(reporter.stats.get("skipped", [])):
    session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
  if lines := forbidden_skips(terminalreporter.stats.get("skipped", [])):
    terminalreporter.section("skipped, which counts as failed: install what they miss (launch/test.sh)", red=True)
    for line in lines:
      terminalreporter.line(line)


@pytest.fixture(scope="session")
def emoji_dir(tmp_path_factory):
  """Where the emoji set is built, once for all tests, whichever process runs them."""
  from deepgen_jax.data import emoji as emoji_data

  here = tmp_path_factory.getbasetemp()
  here = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here
  with (here / "emoji.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    emoji_data.prepare(here / "emoji")
  return here / "emoji"


@pytest.fixture(scope="session")
def emoji(emoji_dir):
  from deepgen_jax.data import emoji as emoji_data

  return emoji_data.prepare(emoji_dir)


@pytest.fixture(scope="session")
def tokenizer():
  from deepgen_jax.data.tokens import build_tiny_tokenizer

  return build_tiny_tokenizer()
