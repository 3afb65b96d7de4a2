"""The emoji set, built once for all data tests, and the tiny tokenizer."""

import pytest

from deepgen_jax.data import emoji as emoji_data
from deepgen_jax.data.tokens import build_tiny_tokenizer


@pytest.fixture(scope="session")
def emoji_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("emoji")


@pytest.fixture(scope="session")
def emoji(emoji_dir):
  return emoji_data.prepare(emoji_dir)


@pytest.fixture(scope="session")
def tokenizer():
  return build_tiny_tokenizer()
