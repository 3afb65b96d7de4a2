"""What blocks keep for the backward pass changes memory and work, not gradients; what they draw stays what it was."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepgen_jax.estimating.flops import count_flops
from deepgen_jax.models import plain
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.layers import Linear, attention, split_heads, stack
from tests.small import CONFIG


class Block(nn.Module):
  """A linear, attention of its result with itself."""

  @nn.compact
  def __call__(self, x, scale):
    h = split_heads(Linear(8)(x), 2)
    return x + scale * attention(h, h, h).reshape(x.shape), None


@pytest.mark.parametrize("unroll", [False, True])
def test_remat_repeats_work_and_gives_the_same_gradients(monkeypatch, unroll):
  monkeypatch.setattr(plain, "MANY", 0)  # few scores are always kept where nothing says otherwise
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
  params = stack(Block, 3, unroll)().init(jax.random.key(0), x, 1.0)

  def gradient(remat):
    loss = lambda params: jnp.square(stack(Block, 3, unroll, remat=remat)().apply(params, x, 1.0)[0]).sum()
    return jax.jit(jax.grad(loss))(params), count_flops(jax.grad(loss), params)

  (expected, none), (dots, least), (attention_kept, some), (full, most) = map(gradient, ("none", "dots", "attention", "full"))
  assert none == least < some < most  # the linear's products again; and the attention's
  for got in (dots, attention_kept, full):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_a_seed_draws_what_it_always_drew():
  """Published scores depend on it: those of a fresh SCB, and of whatever was trained from one."""
  params = jax.jit(lambda key: DeepGen(CONFIG).init(key, ("scb",)))(jax.random.key(0))
  assert sum(float(np.abs(x, dtype=np.float64).sum()) for x in jax.tree.leaves(params)) == pytest.approx(1210.16739, abs=1e-4)
