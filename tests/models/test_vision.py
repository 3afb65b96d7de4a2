"""The vision tower against transformers' Qwen2.5-VL, and the patches against torch's resize."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel  # noqa: E402

from deepgen_jax.models.config import VisionConfig  # noqa: E402
from deepgen_jax.models.vision import CLIP_MEAN, CLIP_STD, VisionTower, patch_grid, patchify, window_segments  # noqa: E402
from deepgen_jax.weights.names import vision_table  # noqa: E402
from deepgen_jax.weights.torch_format import from_torch, to_torch  # noqa: E402
from tests.models import oracle  # noqa: E402

CONFIG = VisionConfig(
  num_layers=3, hidden_size=32, num_heads=2, intermediate_size=40, out_size=24, window_size=56, full_attention_layers=(1,)
)
TOWER = VisionTower(CONFIG)
TABLE = vision_table(CONFIG, prefix="")
GRIDS = [(6, 10), (2, 14), (8, 4)]  # 3x5, 1x7 and 4x2 merged cells; a window holds 2x2


@pytest.fixture(scope="module")
def tower():
  config = Qwen2_5_VLVisionConfig(
    depth=CONFIG.num_layers,
    hidden_size=CONFIG.hidden_size,
    num_heads=CONFIG.num_heads,
    intermediate_size=CONFIG.intermediate_size,
    out_hidden_size=CONFIG.out_size,
    window_size=CONFIG.window_size,
    fullatt_block_indexes=list(CONFIG.full_attention_layers),
    attn_implementation="eager",
  )
  return oracle.randomise(Qwen2_5_VisionTransformerPretrainedModel(config))


@pytest.fixture(scope="module")
def params(tower):
  abstract = oracle.abstract_init(TOWER, jnp.zeros((1, 4, 1176)), (2, 2))
  return from_torch(TABLE, oracle.numpy_state(tower), abstract)


@functools.partial(jax.jit, static_argnums=2)
def apply(params, patches, grid):
  return TOWER.apply({"params": params}, patches, grid)


def random_patches(grid, batch=2):
  return np.random.default_rng(3).normal(size=(batch, grid[0] * grid[1], 1176)).astype(np.float32)


def run_torch(tower, patches, grid):
  """All images of the batch in one packed call -> [B, N/4, out]."""
  patches = torch.as_tensor(patches)
  out = tower(patches.flatten(0, 1), grid_thw=torch.tensor([[1, *grid]] * len(patches))).pooler_output
  return out.unflatten(0, (len(patches), -1))


@pytest.mark.parametrize("grid", GRIDS)
def test_tower(tower, params, grid):
  patches = random_patches(grid)
  with torch.no_grad():
    reference = run_torch(tower, patches, grid)
  oracle.assert_close(apply(params, patches, grid), reference)


def test_full_size_windows():
  """112 px windows: 4x4 merged cells, each of 2x2 patches; a 5x6 image has four windows, three of them partial."""
  windows = window_segments((10, 12), VisionConfig())
  assert np.bincount(windows).tolist() == [0, 64, 32, 16, 8]


def test_gradients(tower, params):
  grid = GRIDS[0]
  patches = random_patches(grid)
  x = torch.tensor(patches, requires_grad=True)
  tower.zero_grad()
  run_torch(tower, x, grid).square().mean().backward()
  loss = lambda params, x: jnp.square(TOWER.apply({"params": params}, x, grid)).mean()
  by_params, by_patches = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, patches)
  oracle.assert_gradients_close(by_params, oracle.torch_gradients(tower, TABLE, params))
  oracle.assert_close(by_patches, x.grad, oracle.GRADIENT)


def test_unrolled_is_the_same_network(params):
  grid = GRIDS[2]
  patches = random_patches(grid)
  unrolled = jax.jit(lambda p, x: VisionTower(CONFIG, unroll=True).apply({"params": p}, x, grid))(params, patches)
  oracle.assert_close(unrolled, apply(params, patches, grid), 1e-5)


def test_bfloat16(tower, params):
  grid = GRIDS[0]
  patches = random_patches(grid)
  with torch.no_grad():
    reference = run_torch(tower, patches, grid)
  run = lambda m: run_torch(m, torch.tensor(patches, dtype=torch.bfloat16), grid)
  oracle.assert_bfloat16_close(apply(params, jnp.asarray(patches, jnp.bfloat16), grid), run, tower, reference)


def test_names_go_both_ways(tower, params):
  theirs, ours = oracle.numpy_state(tower), to_torch(TABLE, params)
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


def test_patches():
  images = np.random.default_rng(4).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
  config = VisionConfig()
  grid = patch_grid(64, 96, config)
  assert grid == (4, 6)
  ours = np.asarray(patchify(images, config))

  x = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
  x = torch.nn.functional.interpolate(x, scale_factor=28 / 32, mode="bilinear", align_corners=False)
  x = ((x + 1) / 2 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
  expected = []
  for cell_row in range(0, grid[0], 2):
    for cell_column in range(0, grid[1], 2):
      for row in (cell_row, cell_row + 1):
        for column in (cell_column, cell_column + 1):
          patch = x[:, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
          expected.append(torch.stack([patch, patch], dim=2).flatten(1))  # channel, frame, row, column
  oracle.assert_close(ours, torch.stack(expected, dim=1))
  floats = images.astype(np.float32) / 127.5 - 1
  oracle.assert_close(patchify(floats, config), ours, 1e-6)


@pytest.mark.parametrize("size", [(64, 48), (0, 32)])
def test_sides_must_be_multiples_of_32(size):
  with pytest.raises(ValueError, match="multiples of 32"):
    patchify(np.zeros((1, *size, 3), np.uint8), VisionConfig())
