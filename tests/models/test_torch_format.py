"""The name tables without torch: what doesn't fit is listed in one error, and nothing of ours is forgotten."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from deepgen_jax.errors import UserError
from deepgen_jax.models.config import TINY, TextConfig
from deepgen_jax.models.text import TextDecoder
from deepgen_jax.weights.names import text_table
from deepgen_jax.weights.torch_format import CONV, LINEAR, SAME, Constant, Layout, Row, Table, from_torch, to_torch

TABLE = Table(
  rows=(
    Row("proj/kernel", "proj.weight", LINEAR),
    Row("layers/q/kernel", "h.{layer}.qk.weight", LINEAR, layers=range(1, 3), part=(0, 2)),
    Row("layers/k/kernel", "h.{layer}.qk.weight", LINEAR, layers=range(1, 3), part=(1, 2)),
    Row("norm/scale", "norm.weight"),
  ),
  computed={"table": Constant((2,), lambda: np.array([0.25, 1.0], np.float32))},
  ignored=(r"cache\..*",),
)
SHAPES = {
  "proj": {"kernel": (2, 3)},
  "layers": {"q": {"kernel": (2, 3, 4)}, "k": {"kernel": (2, 3, 4)}},
  "norm": {"scale": (3,)},
}
ABSTRACT = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def state():
  rng = np.random.default_rng(0)
  shapes = {"proj.weight": (3, 2), "h.1.qk.weight": (8, 3), "h.2.qk.weight": (8, 3), "norm.weight": (3,)}
  return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def test_reading_and_writing():
  theirs = state()
  params = from_torch(TABLE, {**theirs, "cache.x": np.zeros(1), "table": np.array([0.25, 1.0])}, ABSTRACT)
  assert np.array_equal(params["proj"]["kernel"], theirs["proj.weight"].T)
  assert np.array_equal(params["layers"]["q"]["kernel"][1], theirs["h.2.qk.weight"][:4].T)
  assert np.array_equal(params["layers"]["k"]["kernel"][0], theirs["h.1.qk.weight"][4:].T)
  back = to_torch(TABLE, params)
  assert np.array_equal(back.pop("table"), [0.25, 1.0])
  assert back.keys() == theirs.keys()
  assert all(np.array_equal(back[k], theirs[k]) for k in theirs)


def test_dtype_is_ours():
  theirs = {k: v.astype(ml_dtypes.bfloat16) for k, v in state().items()}
  params = from_torch(TABLE, theirs, ABSTRACT)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_all_problems_in_one_error():
  theirs = state()
  del theirs["h.2.qk.weight"]
  theirs |= {"norm.weights": theirs.pop("norm.weight"), "proj.weight": np.zeros((2, 3)), "table": np.array([0.25, 0.9])}
  abstract = {**ABSTRACT, "extra": {"bias": jax.ShapeDtypeStruct((1,), np.float32)}}
  with pytest.raises(UserError) as error:
    from_torch(TABLE, theirs, abstract)
  message = str(error.value)
  for part in (
    "7 problem(s)",
    "h.2.qk.weight: missing, needed for layers/q/kernel",
    "h.2.qk.weight: missing, needed for layers/k/kernel",
    "norm.weight: missing, needed for norm/scale",
    "norm.weights: unknown key. Did you mean 'norm.weight'?",
    "proj.weight: shape (2, 3), expected (3, 2) for proj/kernel",
    "table: differs by up to 0.1",
    "extra/bias: no row of the name table fills it",
  ):
    assert part in message


def test_a_constant_may_differ_by_its_rounding():
  table = Table((), computed={"t": Constant((2,), lambda: np.array([0.123456, 0.9], np.float32))})
  rounded = np.array([0.123456, 0.9], ml_dtypes.bfloat16)
  assert from_torch(table, {"t": rounded}, {}) == {}
  with pytest.raises(UserError, match="t: differs"):
    from_torch(table, {"t": rounded.astype(np.float32)}, {})


def test_leaves_left_out_are_skipped_and_export_wants_them():
  abstract = {k: v for k, v in ABSTRACT.items() if k != "layers"}
  params = from_torch(TABLE, state(), abstract)
  with pytest.raises(UserError, match="layers/k/kernel: missing"):
    to_torch(TABLE, params)
  with pytest.raises(UserError, match="more/bias: not in the name table"):
    to_torch(TABLE, {**from_torch(TABLE, state(), ABSTRACT), "more": {"bias": np.zeros(1)}})


@pytest.mark.parametrize("layout", [SAME, LINEAR, CONV, Layout((2, 3, 1, 0), (5, 4, 3)), Layout((1, 2, 3, 0), (3, 5, 4))])
def test_layouts_invert(layout):
  shape = (2, 3) if layout is LINEAR else (2, 3, 5, 4)
  x = np.arange(np.prod(shape)).reshape(shape)
  ours = layout.to_ours(x)
  assert np.array_equal(layout.to_torch(ours), x)
  assert layout.torch_shape(ours.shape) == shape


@pytest.mark.parametrize("tied", [True, False])
def test_text_table_covers_every_leaf(tied):
  config = TextConfig(**{**vars(TINY.text), "tie_word_embeddings": tied})
  decoder = TextDecoder(config, (6, 4, 1))

  def logits(decoder, ids):
    return decoder.logits(decoder.embed(ids), jnp.zeros((1, 3, 4), int), jnp.ones((1, 4), int))

  ids = jnp.zeros((1, 4), int)
  abstract = jax.eval_shape(lambda key: decoder.init(key, ids, method=logits), jax.random.key(0))["params"]
  table = text_table(config, (6, 4, 1))
  assert {row.path for row in table.rows} == set(flatten_dict(abstract, sep="/"))
  assert ("lm_head.weight" in [row.key for row in table.rows]) != tied
