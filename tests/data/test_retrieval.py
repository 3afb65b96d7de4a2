import numpy as np

from deepgen_jax.data.retrieval import Retrieval, error_outside_change, features

RNG = np.random.default_rng(0)


def test_features_average_two_by_two():
  image = np.zeros((1, 4, 2, 3), np.uint8)
  image[0, :2, :, 1] = [[0, 100], [200, 100]]
  np.testing.assert_array_equal(features(image), [[0, 100, 0, 0, 0, 0]])


def test_ranks_match_brute_force():
  gallery = RNG.integers(0, 256, (20, 8, 8, 3), np.uint8)
  outputs = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8)
  true = RNG.integers(0, 20, 6)
  distance = ((features(outputs)[:, None] - features(gallery)[None]) ** 2).sum(-1)
  expected = [(distance[i] < distance[i, true[i]]).sum() for i in range(6)]
  scorer = Retrieval(gallery)
  np.testing.assert_array_equal(scorer.ranks(outputs, true), expected)
  assert scorer.recall(outputs, true)["r5"] == np.mean(np.array(expected) < 5)
  assert scorer.recall(gallery, range(20)) == {"r1": 1.0, "r5": 1.0}


def test_identical_pixels_are_one_answer():
  gallery = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8)
  gallery[4] = gallery[1]
  scorer = Retrieval(gallery)
  np.testing.assert_array_equal(scorer.ranks(gallery[[1, 1, 4]], [1, 4, 1]), [0, 0, 0])
  assert scorer.ranks(gallery[[1]], [2])[0] >= 1  # the pair counts once
  assert Retrieval(gallery[[1, 4, 2]]).ranks(gallery[[1]], [2])[0] == 1


def test_error_outside_the_change():
  source = np.full((2, 4, 4, 3), 10, np.uint8)
  target = source.copy()
  target[:, :2] = 200
  output = target.copy()
  output[0, :2] = 0  # inside the change: doesn't count
  output[1, 2:] += 6
  np.testing.assert_array_equal(error_outside_change(output, source, target), [0, 6])
  assert np.isnan(error_outside_change(output, source, source + 1)).all()


def test_emoji_gallery(emoji):
  images = emoji.images()
  scorer = Retrieval(images)
  held = np.flatnonzero(emoji.held_out)
  assert scorer.recall(images[held], held)["r1"] == 1.0
  blank = np.full((len(held), 64, 64, 3), 255, np.uint8)
  assert scorer.recall(blank, held)["r5"] < 0.05
