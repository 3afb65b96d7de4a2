"""Parameter counts of the full size, by abstract initialisation. The published totals; no memory is needed."""

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax.models.config import FULL
from deepgen_jax.models.dit import DiT
from deepgen_jax.models.scb import SCB
from deepgen_jax.models.text import TextDecoder
from deepgen_jax.models.vae import VAE
from deepgen_jax.models.vision import VisionTower


def count(module, *inputs, **kwargs):
  """inputs: shapes of zeros, or values as they are."""
  inputs = [jnp.zeros(x) if isinstance(x, tuple) else x for x in inputs]
  tree = jax.eval_shape(lambda key: module.init(key, *inputs, **kwargs), jax.random.key(0))
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_vlm():
  def logits(decoder, ids):
    return decoder.logits(decoder.embed(ids), jnp.zeros((1, 3, 4), int), jnp.ones((1, 4), int))

  text = count(TextDecoder(FULL.text, FULL.scb.read_layers), jnp.zeros((1, 4), int), method=logits)
  vision = count(VisionTower(FULL.vision), (1, 4, 3 * 2 * 14 * 14), grid=(2, 2))
  assert vision == 668_684_288
  assert text + vision == 3_754_622_976


def test_scb():
  states = (1, 4, len(FULL.scb.read_layers) * FULL.text.hidden_size)
  assert count(SCB(FULL), states, jnp.ones((1, 4), bool)) == 432_449_532


def test_dit():
  c = FULL.dit
  mask = jnp.ones((1, 4), bool)
  positions = jnp.zeros((1, 4, 2), int)
  total = count(DiT(c), (1, 4, c.patch_dim), (1,), (1, 4, c.context_size), mask, (1, c.pooled_size), positions, mask)
  assert total == 2_243_171_520


def test_vae():
  assert count(VAE(FULL.vae), (1, 32, 32, 3)) == 83_819_683
