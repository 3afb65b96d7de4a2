"""Layouts: the colours of a coarse grid over an image, and how the tiny DiT's pre-training shows them.

A user has no words for a layout. But captions are recombined later, and a layout is what recombining has to give; the VLM's
pre-training makes it draw them (`pretrain_vlm.sketch`), and an SCB is to pass them on.
"""

from __future__ import annotations

import numpy as np

SIDE = 4  # rows and columns
CELLS = SIDE**2


def layout(images: np.ndarray) -> np.ndarray:
  """uint8 [N,H,W,3], sides multiples of 4 -> mean colours of a 4x4 grid's cells in [-1,1], float32 [N,16,3]."""
  n, height, width, _ = images.shape
  cells = images.reshape(n, SIDE, height // SIDE, SIDE, width // SIDE, 3)
  return (cells.mean((2, 4), dtype=np.float32) / 127.5 - 1).reshape(n, -1, 3)


class Changes:
  """Changes of layouts [B,16,3]: to an image from the one that it is made from, or from the average image where there is none.

  So zero, which is what a new SCB sends, means an average image or the reference as it is. What is told of them are guesses:
  an SCB can't know better than its few samples taught it, and its small components it knows last. The DiT learns to take a
  guess for what it is, whose expected truth is itself, so that the right answer for an SCB is its mean over what is possible.
  """

  def __init__(self, seen: np.ndarray):
    """seen: all of one task, [N,16,3]."""
    flat = seen.reshape(len(seen), -1)
    self._variance, self._components = np.linalg.eigh(flat.T @ flat / len(flat))
    self._variance = np.maximum(self._variance, 1e-6 * self._variance[-1])

  def guess(self, changes: np.ndarray, blur: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes [B,16,3] -> the expectation of each when seen with noise whose variance is `blur` [B] times their mean variance
    (Wiener's filter; exact where changes are normally distributed).
    """
    noise = np.asarray(blur)[:, None] * self._variance.mean()
    parts = changes.reshape(len(changes), -1) @ self._components
    parts = parts + np.sqrt(noise) * rng.standard_normal(parts.shape)
    return (parts * self._variance / (self._variance + noise) @ self._components.T).reshape(changes.shape)

  def pooling(self, size: int) -> np.ndarray:
    """A linear map [48, size] to pooled vectors, size >= 48: onto random directions, and elements have a mean square of one.

    Standard deviations of the principal components are reduced to their square roots: the small ones shall count too.
    """
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((size, len(self._variance))))[0].T
    scale = np.sqrt(size / np.sqrt(self._variance).sum()) * self._variance**-0.25
    return self._components * scale @ directions
