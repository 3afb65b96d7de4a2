"""The text decoder, alone and with images in its prompts, against transformers' Qwen2.5-VL."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from deepgen_jax import sharding  # noqa: E402
from deepgen_jax.data.prompts import Prompt, collate  # noqa: E402
from deepgen_jax.models.config import TextConfig, VisionConfig  # noqa: E402
from deepgen_jax.models.text import TextDecoder  # noqa: E402
from deepgen_jax.models.vision import VisionTower  # noqa: E402
from deepgen_jax.weights.names import text_table, vision_table  # noqa: E402
from deepgen_jax.weights.torch_format import Table, from_torch, to_torch  # noqa: E402
from tests.models import oracle  # noqa: E402

CONFIG = TextConfig(
  vocab_size=40,
  hidden_size=32,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  intermediate_size=48,
  mrope_section=(1, 1, 2),
)
VISION = VisionConfig(
  num_layers=2, hidden_size=32, num_heads=2, intermediate_size=40, out_size=32, window_size=56, full_attention_layers=(1,)
)
READ_LAYERS = (3, 1)
IMAGE_PAD, VISION_START = 39, 38
DECODER, TOWER = TextDecoder(CONFIG, READ_LAYERS), VisionTower(VISION)
TABLE = Table.join({"text": text_table(CONFIG, READ_LAYERS), "vision": vision_table(VISION)})
LENGTHS, SLOTS, THINK = (9, 4, 1), 20, 3
VISION_TOKENS = 12
NO_FEATURES = np.full((len(LENGTHS), VISION_TOKENS, CONFIG.hidden_size), 7.0, np.float32)  # garbage that no slot asks for
NO_INDEX = np.full((len(LENGTHS), SLOTS), -1, np.int32)


@pytest.fixture(scope="module")
def model():
  text = dict(
    vocab_size=CONFIG.vocab_size,
    hidden_size=CONFIG.hidden_size,
    num_hidden_layers=CONFIG.num_layers,
    num_attention_heads=CONFIG.num_heads,
    num_key_value_heads=CONFIG.num_kv_heads,
    intermediate_size=CONFIG.intermediate_size,
    rms_norm_eps=CONFIG.rms_eps,
    rope_parameters=dict(rope_type="default", rope_theta=CONFIG.rope_theta, mrope_section=list(CONFIG.mrope_section)),
    bos_token_id=0,
    eos_token_id=0,
  )
  vision = dict(
    depth=VISION.num_layers,
    hidden_size=VISION.hidden_size,
    num_heads=VISION.num_heads,
    intermediate_size=VISION.intermediate_size,
    out_hidden_size=VISION.out_size,
    window_size=VISION.window_size,
    fullatt_block_indexes=list(VISION.full_attention_layers),
  )
  config = transformers.Qwen2_5_VLConfig(
    text_config=text,
    vision_config=vision,
    tie_word_embeddings=True,
    image_token_id=IMAGE_PAD,
    video_token_id=37,
    vision_start_token_id=VISION_START,
    attn_implementation="eager",
  )
  return oracle.randomise(transformers.Qwen2_5_VLForConditionalGeneration(config))


@pytest.fixture(scope="module")
def params(model):
  def init_text(decoder, ids):
    return decoder.logits(decoder.embed(ids), jnp.zeros((1, 3, 4), int), jnp.ones((1, 4), int))

  abstract = {
    "text": oracle.abstract_init(DECODER, jnp.zeros((1, 4), int), method=init_text),
    "vision": oracle.abstract_init(TOWER, jnp.zeros((1, 4, 1176)), (2, 2)),
  }
  return from_torch(TABLE, oracle.numpy_state(model), abstract)


@pytest.fixture(scope="module")
def batch():
  """Prompts of unequal length, padded with garbage, and think tokens."""
  rng = np.random.default_rng(0)
  mask = np.arange(SLOTS) < np.array(LENGTHS)[:, None]
  positions = np.zeros((len(LENGTHS), 3, SLOTS + THINK), np.int32)
  for i, n in enumerate(LENGTHS):
    positions[i, :, :n] = np.arange(n)
    positions[i, :, SLOTS:] = n + np.arange(THINK)
  ids = rng.integers(0, 37, (len(LENGTHS), SLOTS)).astype(np.int32)
  think = rng.normal(size=(THINK, CONFIG.hidden_size)).astype(np.float32)
  return ids, mask, jnp.asarray(positions), think


def states(text_params, ids, mask, positions, think, features=NO_FEATURES, index=NO_INDEX, dtype=jnp.float32, decoder=DECODER):
  """Hidden states, the prompt and the think tokens as two streams: [reads][B, slots + think, C]."""

  def run(decoder):
    x = decoder.embed(ids, features, index, dtype=dtype)
    t = jnp.broadcast_to(think.astype(dtype), (len(ids), *think.shape))
    segments = (mask.astype(int), jnp.ones(t.shape[:2], int))
    return decoder.hidden_states((x, t), (positions[..., :SLOTS], positions[..., SLOTS:]), segments)

  return decoder.apply({"params": text_params}, method=run)


jit_states = jax.jit(states, static_argnames="dtype")


def torch_states(model, ids, think):
  """One unpadded sample -> [reads][n + think, C]."""
  decoder = model.model.language_model
  x = torch.cat([decoder.embed_tokens(torch.as_tensor(ids, dtype=torch.long)), think.to(decoder.norm.weight.dtype)])[None]
  hidden = decoder(inputs_embeds=x, output_hidden_states=True, use_cache=False).hidden_states
  return [hidden[layer][0] for layer in READ_LAYERS]


def unpadded(x, i):
  """The slots of sample i that aren't padding."""
  return jnp.concatenate([x[i, : LENGTHS[i]], x[i, SLOTS:]])


def test_hidden_states(model, params, batch):
  ids, _, _, think = batch
  ours = jit_states(params["text"], *batch)
  for i, n in enumerate(LENGTHS):
    with torch.no_grad():
      reference = torch_states(model, ids[i, :n], torch.tensor(think))
    for x, y in zip(ours, reference):
      oracle.assert_close(unpadded(x, i), y)
  assert all(np.isfinite(x).all() for x in ours)


def test_padding_is_invisible(params, batch):
  ids, mask, positions, think = batch
  other = np.where(mask, ids, (ids + 5) % 37)
  ours, changed = jit_states(params["text"], *batch), jit_states(params["text"], other, mask, positions, think)
  for x, y in zip(ours, changed):
    for i in range(len(LENGTHS)):
      assert np.array_equal(unpadded(x, i), unpadded(y, i))


def test_one_stream_is_two_streams(params, batch):
  ids, mask, positions, think = batch

  def run(decoder):
    t = jnp.broadcast_to(think, (len(ids), *think.shape))
    x = jnp.concatenate([decoder.embed(ids), t], axis=1)
    segments = jnp.concatenate([mask, np.ones(t.shape[:2], bool)], axis=1).astype(int)
    return decoder.hidden_states((x,), (positions,), (segments,))

  joined = jax.jit(lambda p: DECODER.apply({"params": p}, method=run))(params["text"])
  for x, y in zip(joined, jit_states(params["text"], *batch)):
    for i in range(len(LENGTHS)):
      oracle.assert_close(unpadded(x, i), unpadded(y, i), 1e-5)


def test_gradients(model, params, batch):
  ids, mask, positions, think = batch
  valid = np.concatenate([mask, np.ones((len(ids), THINK), bool)], axis=1)[..., None]

  def loss(text_params, think):
    return sum(jnp.where(valid, jnp.sin(x), 0).sum() for x in states(text_params, ids, mask, positions, think))

  model.zero_grad()
  theirs = torch.tensor(think, requires_grad=True)
  total = 0
  for i, n in enumerate(LENGTHS):
    total = total + sum(x.sin().sum() for x in torch_states(model, ids[i, :n], theirs))
  total.backward()
  by_params, by_think = jax.jit(jax.grad(loss, argnums=(0, 1)))(params["text"], think)
  oracle.assert_gradients_close(by_params, oracle.torch_gradients(model, TABLE, params)["text"])
  oracle.assert_close(by_think, theirs.grad, oracle.GRADIENT)


def test_one_loop_where_parameters_are_split(params, batch):
  """Hidden states and gradients are those of a loop for each segment."""
  decoder = dataclasses.replace(DECODER, remat="full")
  alone = lambda *args: states(*args, decoder=decoder)
  split = sharding.on_mesh(sharding.make_mesh({"data": 1, "fsdp": 2}, jax.devices()[:2]), alone)
  loss = lambda run: lambda params, think: sum(jnp.sin(x).sum() for x in run(params, *batch[:3], think))
  loops = lambda run: str(jax.make_jaxpr(run)(params["text"], *batch)).count(" scan[")
  assert (loops(alone), loops(split)) == (2, 1)
  theirs, ours = (jax.jit(jax.value_and_grad(loss(run), argnums=(0, 1)))(params["text"], batch[3]) for run in (alone, split))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max()), ours, theirs)


def test_logits(model, params, batch):
  ids, mask, positions, _ = batch
  run = lambda decoder: decoder.logits(decoder.embed(ids), positions[..., :SLOTS], mask.astype(int))
  ours = jax.jit(lambda p: DECODER.apply({"params": p}, method=run))(params["text"])
  for i, n in enumerate(LENGTHS):
    with torch.no_grad():
      reference = model(input_ids=torch.tensor(ids[i : i + 1, :n], dtype=torch.long)).logits[0]
    oracle.assert_close(ours[i, :n], reference)


def test_images_in_prompts(model, params):
  """Two images of different size in one prompt, one in the next, none in the last; the library finds positions itself."""
  sizes = [((64, 96), (96, 32)), ((64, 96),), ()]
  rng = np.random.default_rng(1)
  prompts, patches = [], []
  for images in sizes:
    ids = list(rng.integers(0, 37, 3))
    for height, width in images:
      ids += [VISION_START] + [IMAGE_PAD] * (height * width // 32**2) + list(rng.integers(0, 37, 2))
    ids = np.array(ids, np.int32)
    prompts.append(Prompt(ids, images, ids == IMAGE_PAD))
    patches.append([rng.normal(size=(1, h * w // 16**2, 1176)).astype(np.float32) for h, w in images])
  batch = collate(prompts, THINK, buckets=(SLOTS,))
  think_ids = np.arange(THINK)
  think = np.asarray(params["text"]["embedding"])[think_ids]

  tower = jax.jit(lambda x, grid: TOWER.apply({"params": params["vision"]}, x, grid), static_argnums=1)
  features = NO_FEATURES.copy()
  for i, images in enumerate(sizes):
    start = 0
    for (height, width), x in zip(images, patches[i]):
      tokens = tower(x, (height // 16, width // 16))[0]
      features[i, start : start + len(tokens)] = tokens
      start += len(tokens)
  ours = jit_states(
    params["text"],
    batch["ids"],
    batch["text_mask"],
    batch["position_ids"],
    think,
    features,
    batch["image_index"],
  )
  for i, prompt in enumerate(prompts):
    n = len(prompt.ids)
    ids = torch.tensor(np.concatenate([prompt.ids, think_ids])[None], dtype=torch.long)
    inputs = {}
    if sizes[i]:
      inputs = dict(
        pixel_values=torch.tensor(np.concatenate(patches[i], axis=1)[0]),
        image_grid_thw=torch.tensor([[1, h // 16, w // 16] for h, w in sizes[i]]),
        mm_token_type_ids=(ids == IMAGE_PAD).int(),
      )
    model.model.rope_deltas = None
    with torch.no_grad():
      hidden = model.model(input_ids=ids, output_hidden_states=True, use_cache=False, **inputs).hidden_states
    for x, layer in zip(ours, READ_LAYERS):
      oracle.assert_close(jnp.concatenate([x[i, :n], x[i, SLOTS:]]), hidden[layer][0])


def test_bfloat16(model, params, batch):
  ids, _, _, think = batch
  ours = jit_states(params["text"], *batch, dtype=jnp.bfloat16)
  run = lambda m: torch_states(m, ids[0, : LENGTHS[0]], torch.tensor(think))[0]
  with torch.no_grad():
    reference = run(model)
  oracle.assert_bfloat16_close(unpadded(ours[0], 0), run, model, reference)


def test_names_go_both_ways(model, params):
  theirs, ours = oracle.numpy_state(model), to_torch(TABLE, params)
  theirs.pop("lm_head.weight")  # tied
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("layers", [(), (5,), (0, 2), (2, 2)])
def test_read_layers_are_checked(layers):
  with pytest.raises(ValueError, match="read_layers"):
    TextDecoder(CONFIG, layers).init(jax.random.key(0), jnp.zeros((1, 2), int), method="embed")
