"""Kernels are cast while they are sharded; masters, moments and gradient sums stay float32."""

import jax
import jax.numpy as jnp
import numpy as np

from deepgen_jax import sharding
from deepgen_jax.models import lora
from deepgen_jax.stages.step import in_compute_dtype, init_state, make_optimizer, make_train_step
from tests.stages.test_step import OPTIM, linear_loss, make_batch, make_params


def test_what_linear_and_embed_would_cast_is_cast_alone():
  kernel = lora.LoraKernel(*(np.ones((2, 2), np.float32) for _ in range(3)))
  tree = {"fc1": {"kernel": kernel, "bias": np.ones(2, np.float32)}, "norm": {"scale": jnp.ones(2)}, "gone": None}
  dtypes = jax.tree.map(lambda x: x.dtype.name, in_compute_dtype(tree, jnp.bfloat16))
  assert dtypes["fc1"]["bias"] == dtypes["norm"]["scale"] == "float32" and dtypes["gone"] is None
  assert {dtypes["fc1"]["kernel"].kernel, dtypes["fc1"]["kernel"].a, dtypes["fc1"]["kernel"].b} == {"bfloat16"}


def test_a_bfloat16_step_sees_bfloat16_kernels_and_keeps_float32():
  seen = []

  def loss(params, batch, keys):
    seen.append(params["fc1"]["kernel"].dtype)
    return linear_loss(params, batch, keys)

  trainable, frozen = sharding.partition(make_params(), [("fc1/.*", True), (".*", False)])
  optimizer, schedule = make_optimizer(OPTIM, 10)
  options = dict(accumulate=2, clip=1.0, ema_decay=0.0)
  states = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    step = jax.jit(make_train_step(loss, optimizer, schedule, **options, dtype=dtype))
    states[dtype], _ = step(init_state(trainable, optimizer, ema=False), frozen, make_batch(0), jax.random.key(0))
  assert seen == [jnp.float32, jnp.bfloat16]
  masters = jax.tree.leaves((states[jnp.bfloat16].params, states[jnp.bfloat16].grads, states[jnp.bfloat16].opt_state))
  assert {x.dtype.name for x in masters if x.ndim} == {"float32"}
  exact, rounded = (states[dtype].grads["fc1"]["kernel"] for dtype in (jnp.float32, jnp.bfloat16))
  np.testing.assert_allclose(rounded, exact, rtol=0.05, atol=0.05)  # bfloat16 has eight bits
  assert not np.array_equal(rounded, exact)
