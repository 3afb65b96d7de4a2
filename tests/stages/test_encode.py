"""Images become latents and vision features outside the train step; what an image gives depends on nothing else."""

import jax
import numpy as np
import pytest

from deepgen_jax import sharding
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.stages.encode import ImageEncoder, images_per_device
from tests.small import VARIED as CONFIG
from tests.small import draw_params, random_image


@pytest.fixture(scope="module")
def setup():
  return DeepGen(CONFIG), draw_params(CONFIG)


def test_with_a_cache_history_does_not_matter(setup):
  """Bit for bit: resuming a run starts with an empty cache, so other images share a call."""
  model, params = setup
  images = [random_image(64, 64, seed) for seed in range(10)]
  first, second = ImageEncoder(model, cache=100), ImageEncoder(model, cache=100)
  first.moments(params, images[:3])
  for one, other in zip(first.moments(params, images[2:]), second.moments(params, images[:1:-1])[::-1]):
    jax.tree.map(np.testing.assert_array_equal, one, other)
  for one, other in zip(first.features(params, images[:2]), second.features(params, images[1::-1])[::-1]):
    np.testing.assert_array_equal(one, other)


def test_sizes_are_grouped_and_results_are_the_models(setup):
  model, params = setup
  images = [random_image(64, 32, 1), random_image(32, 64, 2), random_image(64, 32, 3)]
  for cache in (0, 10):
    found = ImageEncoder(model, cache=cache).moments(params, images)
    assert [mean.shape[:2] for mean, _ in found] == [(8, 4), (4, 8), (8, 4)]
    for image, (mean, logvar) in zip(images, found):
      expected = model.encode_moments(params, image[None])
      np.testing.assert_allclose(mean, expected[0][0], rtol=1e-4, atol=1e-4)
      np.testing.assert_allclose(logvar, expected[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size, rows", [(4, 8), (8, 8), (16, 16), (64, 64), (256, 64)])
def test_a_program_has_a_micro_batchs_rows(batch_size, rows):
  """Dealt over eight devices, and at most eight on each."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  assert ImageEncoder(DeepGen(CONFIG), images_per_device(batch_size, mesh), mesh=mesh).batch == rows
