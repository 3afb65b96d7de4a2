"""SCB against a PyTorch oracle written here (the libraries have none), run without padding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deepgen_jax.models.config import TINY, SCBConfig  # noqa: E402
from deepgen_jax.models.scb import SCB  # noqa: E402
from deepgen_jax.weights.names import scb_table  # noqa: E402
from deepgen_jax.weights.torch_format import from_torch, to_torch  # noqa: E402
from tests.models import oracle  # noqa: E402

CONFIG = dataclasses.replace(
  TINY,
  text=dataclasses.replace(TINY.text, hidden_size=12),
  scb=SCBConfig(num_think_tokens=3, hidden_size=32, intermediate_size=46, num_layers=3, num_heads=4, read_layers=(3, 2, 1)),
  dit=dataclasses.replace(TINY.dit, pooled_size=10, context_size=14),
)
MODEL = SCB(CONFIG)
INPUT = 3 * 12
MASK = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]], bool)  # prompt, padding, think
TABLE = scb_table(CONFIG.scb)


class _Layer(torch.nn.Module):
  def __init__(self, size, inner, heads):
    super().__init__()
    self.heads = heads
    self.layer_norm1, self.layer_norm2 = torch.nn.LayerNorm(size, eps=1e-6), torch.nn.LayerNorm(size, eps=1e-6)
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    self.self_attn = torch.nn.ModuleDict({name: torch.nn.Linear(size, size) for name in names})
    self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(size, inner), "fc2": torch.nn.Linear(inner, size)})

  def forward(self, x):
    h = self.layer_norm1(x)
    q, k, v = (self.self_attn[n](h).unflatten(-1, (self.heads, -1)).transpose(0, 1) for n in ("q_proj", "k_proj", "v_proj"))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    x = x + self.self_attn["out_proj"]((weights @ v).transpose(0, 1).flatten(1))
    return x + self.mlp["fc2"](torch.nn.functional.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class Oracle(torch.nn.Module):
  """The reference's names; takes one sample [T, reads*C] without padding -> pooled [P], context [T, D]."""

  def __init__(self, config):
    super().__init__()
    c = config.scb
    layers = [_Layer(c.hidden_size, c.intermediate_size, c.num_heads) for _ in range(c.num_layers)]
    self.connector = torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers)})
    self.projector_1 = torch.nn.Linear(INPUT, c.hidden_size)
    self.projector_2 = torch.nn.Linear(c.hidden_size, config.dit.pooled_size)
    self.projector_3 = torch.nn.Linear(c.hidden_size, config.dit.context_size)
    self.meta_queries = torch.nn.Parameter(torch.zeros(c.num_think_tokens, config.text.hidden_size))

  def forward(self, states):
    h = self.connector["layers"](self.projector_1(states))
    return self.projector_2(h.mean(0)), self.projector_3(h)


@pytest.fixture(scope="module")
def reference():
  return oracle.randomise(Oracle(CONFIG))


@pytest.fixture(scope="module")
def params(reference):
  abstract = oracle.abstract_init(MODEL, jnp.zeros((1, 4, INPUT)), jnp.ones((1, 4), bool))
  return from_torch(TABLE, oracle.numpy_state(reference), abstract)


@pytest.fixture(scope="module")
def states():
  return np.random.default_rng(0).normal(size=(*MASK.shape, INPUT)).astype(np.float32)


apply = jax.jit(lambda params, states, mask: MODEL.apply({"params": params}, states, mask))


def test_forward(reference, params, states):
  pooled, context = apply(params, states, MASK)
  for i, mask in enumerate(MASK):
    with torch.no_grad():
      expected_pooled, expected_context = reference(torch.tensor(states[i, mask]))
    oracle.assert_close(pooled[i], expected_pooled)
    oracle.assert_close(context[i, mask], expected_context)
  assert np.isfinite(context).all()


def test_padding_is_invisible(params, states):
  garbage = np.where(MASK[..., None], states, 50.0 * states + 3)
  (pooled, context), (other_pooled, other) = apply(params, states, MASK), apply(params, garbage, MASK)
  assert np.array_equal(pooled, other_pooled)
  assert np.array_equal(context[MASK], other[MASK])


def test_gradients(reference, params, states):
  def loss(params, states):
    pooled, context = MODEL.apply({"params": params}, states, MASK)
    return jnp.sin(pooled).sum() + jnp.where(MASK[..., None], jnp.sin(context), 0).sum()

  reference.zero_grad()
  x = torch.tensor(states, requires_grad=True)
  for i, mask in enumerate(MASK):
    pooled, context = reference(x[i][torch.tensor(mask)])
    (pooled.sin().sum() + context.sin().sum()).backward()
  by_params, by_states = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, states)
  oracle.assert_gradients_close(by_params, oracle.torch_gradients(reference, TABLE, params))
  oracle.assert_close(by_states, x.grad, oracle.GRADIENT)


def test_bfloat16(reference, params, states):
  with torch.no_grad():
    expected = reference(torch.tensor(states[0]))
  ours = apply(params, jnp.asarray(states, jnp.bfloat16), MASK)
  for i in range(2):
    run = lambda m, i=i: m(torch.tensor(states[0], dtype=torch.bfloat16))[i]
    oracle.assert_bfloat16_close(ours[i][0], run, reference, expected[i])


def test_names_go_both_ways(reference, params):
  theirs, ours = oracle.numpy_state(reference), to_torch(TABLE, params)
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


def test_initialisation():
  """The reference's rules: torch's uniform projector, xavier layers with 1e-6 biases in the MLP, heads at zero."""
  params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 4, INPUT)), jnp.ones((1, 4), bool))["params"]
  layers = params["layers"]
  for head in ("pooled_head", "context_head"):
    assert not np.any(params[head]["kernel"]) and not np.any(params[head]["bias"])
  near = lambda x, bound: 0.9 * bound < np.abs(x).max() <= bound
  for leaf in params["projector"].values():
    assert np.abs(leaf).max() <= 1 / math.sqrt(INPUT)
  assert near(params["projector"]["kernel"], 1 / math.sqrt(INPUT))
  for name, fan in (("q", 64), ("out", 64), ("fc1", 78), ("fc2", 78)):
    for layer in layers[name]["kernel"]:  # the stack's axis is no fan
      assert near(layer, math.sqrt(6 / fan))
  assert not np.any(layers["v"]["bias"])
  assert 0 < np.abs(layers["fc1"]["bias"]).max() < 1e-5
  assert 0.5 < np.std(params["think_tokens"]) * math.sqrt(12) < 1.5
