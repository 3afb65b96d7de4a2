"""The likelihood of a text against the sum over all alignments, and against PyTorch."""

import itertools

import numpy as np
import pytest

from deepgen_jax.rewards import ctc


def random_log_probs(frames, symbols, seed=0):
  x = np.random.default_rng(seed).normal(size=(frames, symbols)) * 2
  return x - np.log(np.exp(x).sum(1, keepdims=True))


def collapse(path):
  return [symbol for symbol, _ in itertools.groupby(path) if symbol]


@pytest.mark.parametrize("labels", [[1], [1, 2], [2, 2], [1, 2, 1], []])
def test_sum_over_all_alignments(labels):
  log_probs = random_log_probs(5, 3)
  paths = [path for path in itertools.product(range(3), repeat=5) if collapse(path) == labels]
  expected = np.logaddexp.reduce([sum(log_probs[t, s] for t, s in enumerate(path)) for path in paths])
  assert ctc.log_prob(log_probs, labels) == pytest.approx(expected, rel=1e-12)


def test_too_few_frames():
  assert ctc.log_prob(random_log_probs(2, 3), [1, 1]) == -np.inf  # a blank must come between
  assert ctc.log_prob(random_log_probs(3, 3), [1, 1]) > -np.inf
  assert ctc.log_prob(random_log_probs(1, 3), [1, 2]) == -np.inf


def test_against_torch():
  torch = pytest.importorskip("torch")
  log_probs, labels = random_log_probs(60, 20, seed=1), [3, 3, 7, 19, 1, 1, 1, 5]
  loss = torch.nn.functional.ctc_loss(
    torch.tensor(log_probs)[:, None], torch.tensor([labels]), torch.tensor([60]), torch.tensor([8]), reduction="sum"
  )
  assert ctc.log_prob(log_probs, labels) == pytest.approx(-loss.item(), rel=1e-9)
