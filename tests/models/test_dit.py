"""The MMDiT against diffusers' SD3Transformer2DModel; with references, against an oracle composed of its blocks.

The oracle takes one sample without padding: each latent is embedded with its own centre crop of the position table, references
follow the target in the sequence, and the target's tokens are what comes out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from deepgen_jax.errors import UserError  # noqa: E402
from deepgen_jax.models.config import DiTConfig  # noqa: E402
from deepgen_jax.models.dit import DiT, crop_positions, patchify, unpatchify  # noqa: E402
from deepgen_jax.weights.names import dit_table  # noqa: E402
from deepgen_jax.weights.torch_format import from_torch, to_torch  # noqa: E402
from tests.models import oracle  # noqa: E402

CONFIG = DiTConfig(
  in_channels=4,
  num_layers=4,
  num_heads=2,
  head_dim=8,
  context_size=24,
  pooled_size=12,
  dual_attention_layers=(0, 1),
  pos_embed_max_size=12,
  sample_size=8,
)
MODEL, TABLE = DiT(CONFIG), dit_table(CONFIG)
TARGETS = [(6, 10), (8, 8), (4, 14)]  # latents; 3x5, 4x4 and 2x7 patches
REFERENCES = [[(6, 10)], [(10, 2), (4, 6)], []]
CONTEXTS = [7, 3, 5]
BUDGET, REFERENCE_BUDGET = 18, 16  # tokens


@pytest.fixture(scope="module")
def model():
  size = CONFIG.hidden_size
  return oracle.randomise(
    diffusers.SD3Transformer2DModel(
      sample_size=CONFIG.sample_size,
      patch_size=CONFIG.patch_size,
      in_channels=CONFIG.in_channels,
      out_channels=CONFIG.in_channels,
      num_layers=CONFIG.num_layers,
      attention_head_dim=CONFIG.head_dim,
      num_attention_heads=CONFIG.num_heads,
      joint_attention_dim=CONFIG.context_size,
      caption_projection_dim=size,
      pooled_projection_dim=CONFIG.pooled_size,
      pos_embed_max_size=CONFIG.pos_embed_max_size,
      dual_attention_layers=CONFIG.dual_attention_layers,
      qk_norm="rms_norm",
    )
  )


@pytest.fixture(scope="module")
def params(model):
  tokens, position = jnp.zeros((1, 4, CONFIG.patch_dim)), jnp.zeros((1, 4, 2), int)
  context, pooled, mask = jnp.zeros((1, 3, CONFIG.context_size)), jnp.zeros((1, CONFIG.pooled_size)), jnp.ones((1, 4), bool)
  abstract = oracle.abstract_init(MODEL, tokens, jnp.zeros(1), context, mask[:, :3], pooled, position, mask)
  return from_torch(TABLE, oracle.numpy_state(model), abstract)


@pytest.fixture(scope="module")
def samples():
  """Per sample, without padding: target and reference latents [h,w,c], context [L,D], pooled [P], timestep."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return [
    dict(
      target=draw(*target, 4),
      references=[draw(*size, 4) for size in references],
      context=draw(length, CONFIG.context_size),
      pooled=draw(CONFIG.pooled_size),
      timestep=np.float32(timestep),
    )
    for target, references, length, timestep in zip(TARGETS, REFERENCES, CONTEXTS, (1000, 371.25, 8.9))
  ]


def pad(rows, length, garbage):
  """[n, ...] -> [length, ...] and its mask."""
  out = np.full((length, *rows.shape[1:]), garbage, rows.dtype)
  out[: len(rows)] = rows
  return out, np.arange(length) < len(rows)


def positions_of(latents):
  return crop_positions(latents.shape[0] // 2, latents.shape[1] // 2, CONFIG)


def collate(samples, garbage=3.0):
  """Padded to the budgets, with garbage in every pad; the inputs of `DiT.__call__`, the last three for references."""
  rows = []
  for s in samples:
    tokens, mask = pad(patchify(s["target"]), BUDGET, garbage)
    positions, _ = pad(positions_of(s["target"]), BUDGET, 0)
    references = [np.zeros((0, CONFIG.patch_dim), np.float32), *map(patchify, s["references"])]
    reference_positions = [np.zeros((0, 2), np.int32), *map(positions_of, s["references"])]
    reference_tokens, reference_mask = pad(np.concatenate(references), REFERENCE_BUDGET, garbage)
    reference_positions, _ = pad(np.concatenate(reference_positions), REFERENCE_BUDGET, 0)
    context, context_mask = pad(s["context"], max(CONTEXTS) + 1, garbage)
    conditioning = (context, context_mask, s["pooled"], positions, mask)
    rows.append((tokens, s["timestep"], *conditioning, reference_tokens, reference_positions, reference_mask))
  return tuple(np.stack(column) for column in zip(*rows))


@jax.jit
def apply(params, *inputs):
  return MODEL.apply({"params": params}, *inputs)


@jax.jit
def apply_with_gradients(params, *inputs):
  """Velocity, and the gradients of a loss on its valid tokens by the parameters, tokens, context, pooled and references."""
  varied = (0, 2, 4, 7)

  def loss(params, *values):
    given = dict(zip(varied, values))
    out = MODEL.apply({"params": params}, *(given.get(i, x) for i, x in enumerate(inputs)))
    return jnp.where(inputs[6][..., None], jnp.sin(out), 0).sum(), out

  grads, out = jax.grad(loss, argnums=range(5), has_aux=True)(params, *(inputs[i] for i in varied))
  return out, grads


def run_torch(model, target, references, context, pooled, timestep):
  """One sample -> velocity tokens [N, patch_dim]; latents [h,w,c]."""
  latents = [x.permute(2, 0, 1)[None] for x in (target, *references)]
  x = torch.cat([model.pos_embed(z) for z in latents], dim=1)
  temb = model.time_text_embed(timestep[None], pooled[None])
  c = model.context_embedder(context[None])
  for block in model.transformer_blocks:
    c, x = block(hidden_states=x, encoder_hidden_states=c, temb=temb)
  tokens = target.shape[0] * target.shape[1] // CONFIG.patch_size**2
  return model.proj_out(model.norm_out(x[:, :tokens], temb))[0]


def as_torch(sample, dtype=torch.float32):
  cast = lambda x: torch.tensor(x, dtype=dtype)
  return dict(
    target=cast(sample["target"]),
    references=[cast(x) for x in sample["references"]],
    context=cast(sample["context"]),
    pooled=cast(sample["pooled"]),
    timestep=torch.tensor(sample["timestep"]),
  )


def tokens_of(sample):
  return sample["target"].shape[0] * sample["target"].shape[1] // CONFIG.patch_size**2


def test_generation(model, params, samples):
  """Without references: the library's own forward on each sample."""
  ours = apply(params, *collate(samples)[:7])
  for out, sample in zip(ours, map(as_torch, samples)):
    with torch.no_grad():
      reference = model(
        hidden_states=sample["target"].permute(2, 0, 1)[None],
        encoder_hidden_states=sample["context"][None],
        pooled_projections=sample["pooled"][None],
        timestep=sample["timestep"][None],
      ).sample[0]
    height, width = sample["target"].shape[:2]
    latents = unpatchify(out[: height * width // 4], height, width)
    oracle.assert_close(latents, reference.permute(1, 2, 0))


def test_ragged_references(model, params, samples):
  ours, _ = apply_with_gradients(params, *collate(samples))
  assert np.isfinite(ours).all()
  for out, sample in zip(ours, samples):
    with torch.no_grad():
      reference = run_torch(model, **as_torch(sample))
    oracle.assert_close(out[: tokens_of(sample)], reference)


def test_references_matter(model, samples):
  """Guards the test above: the oracle does read its references."""
  sample = as_torch(samples[1])
  with torch.no_grad():
    with_them, without = run_torch(model, **sample), run_torch(model, **{**sample, "references": []})
  assert oracle.relative_error(without, with_them) > 0.05


def test_padding_is_invisible(params, samples):
  (ours, grads), (other, other_grads) = (apply_with_gradients(params, *collate(samples, garbage)) for garbage in (3.0, -40.0))
  for sample, x, y in zip(samples, ours, other):
    assert np.array_equal(x[: tokens_of(sample)], y[: tokens_of(sample)])
  assert jax.tree.all(jax.tree.map(np.array_equal, grads, other_grads))


def test_layers_apart(params, samples):
  """A sampler's way: the same blocks, with parameters that were taken out of their stacks beforehand."""

  @jax.jit
  def apart(params, tokens, timestep, *conditioning):
    prepared = MODEL.apply({"params": params}, *conditioning, apart=True, method="prepare")
    return MODEL.apply({"params": params}, tokens, timestep, prepared, method="velocity"), prepared.layers

  inputs = collate(samples)
  ours, layers = apart(params, *inputs)
  assert [len(run) for run in layers] == [2, 1, 1]
  np.testing.assert_allclose(ours, apply_with_gradients(params, *inputs)[0], atol=1e-5)


def test_gradients(model, params, samples):
  model.zero_grad()
  theirs = [as_torch(s) for s in samples]
  for s in theirs:
    for x in (s["target"], s["context"], s["pooled"], *s["references"]):
      x.requires_grad_()
    run_torch(model, **s).sin().sum().backward()
  _, grads = apply_with_gradients(params, *collate(samples))
  oracle.assert_gradients_close(grads[0], oracle.torch_gradients(model, TABLE, params))
  for i, s in enumerate(theirs):
    flat = lambda x: patchify(x.grad.numpy())
    oracle.assert_close(grads[1][i, : tokens_of(samples[i])], flat(s["target"]), oracle.GRADIENT)
    oracle.assert_close(grads[2][i, : CONTEXTS[i]], s["context"].grad, oracle.GRADIENT)
    oracle.assert_close(grads[3][i], s["pooled"].grad, oracle.GRADIENT)
    if s["references"]:
      expected = np.concatenate([flat(x) for x in s["references"]])
      oracle.assert_close(grads[4][i, : len(expected)], expected, oracle.GRADIENT)
      assert not np.any(grads[4][i, len(expected) :])  # nothing leaks from the pads


def test_bfloat16(model, params, samples):
  batch = [jnp.asarray(x, jnp.bfloat16) if x.ndim > 1 and x.dtype == np.float32 else x for x in collate(samples)]
  ours = apply(params, *batch)
  sample = samples[1]
  run = lambda m: run_torch(m, **as_torch(sample, m.dtype))
  with torch.no_grad():
    reference = run(model)
  oracle.assert_bfloat16_close(ours[1, : tokens_of(sample)], run, model, reference)


def test_names_go_both_ways(model, params):
  """The position table too, which is no parameter of ours."""
  theirs, ours = oracle.numpy_state(model), to_torch(TABLE, params)
  assert ours.keys() == theirs.keys()
  oracle.assert_close(ours.pop("pos_embed.pos_embed"), theirs["pos_embed.pos_embed"], 1e-6)
  assert all(np.array_equal(ours[k], theirs[k]) for k in ours)


def test_a_different_position_table_is_refused(model, params):
  state = oracle.numpy_state(model)
  state["pos_embed.pos_embed"] = state["pos_embed.pos_embed"][:, ::-1]
  with pytest.raises(UserError, match=r"pos_embed\.pos_embed: differs"):
    from_torch(TABLE, state, params)


def test_image_beyond_the_position_table():
  with pytest.raises(ValueError, match="larger than the position table"):
    crop_positions(13, 4, CONFIG)
