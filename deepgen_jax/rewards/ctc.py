"""How likely a text is under the frame-wise predictions of a recogniser (connectionist temporal classification)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def log_prob(log_probs: np.ndarray, labels: Sequence[int]) -> float:
  """log P(labels) summed over all alignments. log_probs [T,C], symbol 0 being the blank -> float; -inf if T is too short.

  The forward recursion of Graves et al., 2006.
  """
  symbols = np.zeros(2 * len(labels) + 1, int)
  symbols[1::2] = labels
  may_skip = np.zeros(len(symbols), bool)  # from the symbol before the blank, unless it is the same
  may_skip[2:] = (symbols[2:] != 0) & (symbols[2:] != symbols[:-2])
  emitted = np.asarray(log_probs, np.float64)[:, symbols]
  alpha = np.full(len(symbols), -np.inf)
  alpha[:2] = 0  # before the first frame: a path may start with a blank or with the first symbol
  for t, frame in enumerate(emitted):
    if t:
      one, two = np.full_like(alpha, -np.inf), np.full_like(alpha, -np.inf)
      one[1:], two[2:] = alpha[:-1], alpha[:-2]
      alpha = np.logaddexp(np.logaddexp(alpha, one), np.where(may_skip, two, -np.inf))
    alpha = alpha + frame
  return float(np.logaddexp.reduce(alpha[-2:]))
