"""The retrieval score: is the true emoji the nearest of all to what the model made? Shares nothing with a reward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def features(images: np.ndarray) -> np.ndarray:
  """uint8 [N,H,W,3] (sides even), on white -> float64 [N, H/2*W/2*3]: average over 2x2 pixels, values 0..255."""
  n, height, width, channels = images.shape
  blocks = images.reshape(n, height // 2, 2, width // 2, 2, channels).astype(np.float64)
  return blocks.mean((2, 4)).reshape(n, -1)


class Retrieval:
  """Nearest neighbours by L2 among a gallery of images; images with the same pixels count as the same answer."""

  def __init__(self, gallery: np.ndarray):
    """gallery: uint8 [N,H,W,3]."""
    same = {}
    self._identity = np.array([same.setdefault(image.tobytes(), i) for i, image in enumerate(gallery)])
    self._places = np.unique(self._identity)  # one of each kind of pixels
    self._features = features(gallery[self._places])
    self._squares = (self._features**2).sum(1)

  def ranks(self, outputs: np.ndarray, true: Sequence[int]) -> np.ndarray:
    """outputs: uint8 [B,H,W,3]; true: gallery index of each -> int [B], 0 where the true image is the nearest.

    The rank is the number of other images that are nearer; a tie counts against the output.
    """
    found = features(outputs)
    distance = self._squares[None] - 2 * found @ self._features.T  # + |output|^2, the same along a row
    column = np.searchsorted(self._places, self._identity[np.asarray(true)])
    own = np.take_along_axis(distance, column[:, None], 1)
    return (distance <= own).sum(1) - 1

  def recall(self, outputs: np.ndarray, true: Sequence[int], k: Sequence[int] = (1, 5)) -> dict[str, float]:
    """{'r1': share of outputs whose true image is the nearest, 'r5': ... among the nearest five}."""
    ranks = self.ranks(outputs, true)
    return {f"r{n}": float((ranks < n).mean()) for n in k}


def error_outside_change(outputs: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """Mean absolute pixel error, 0..255, where source and true target agree: what the edit should have left alone.

  All uint8 [B,H,W,3] -> float32 [B]; NaN where source and target agree nowhere.
  """
  kept = (sources == targets).all(-1)
  error = np.abs(outputs.astype(np.float32) - targets).mean(-1)
  with np.errstate(invalid="ignore"):
    return (error * kept).sum((1, 2)) / kept.sum((1, 2), dtype=np.float32)
