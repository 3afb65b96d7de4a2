"""A whole model of random weights, small enough to compile in seconds, for tests of the pipeline and of commands."""

import dataclasses

import jax
import numpy as np

from deepgen_jax.data.tokens import build_tiny_tokenizer
from deepgen_jax.models.config import DeepGenConfig, DiTConfig, SCBConfig, TextConfig, VAEConfig, VisionConfig
from deepgen_jax.models.deepgen import PARTS, param_shapes
from deepgen_jax.models.lora import path_name
from deepgen_jax.weights import model_dir

# A layer of each part, two where SCB reads one of them.
CONFIG = DeepGenConfig(
  text=TextConfig(
    vocab_size=272,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    mrope_section=(1, 1, 2),
  ),
  vision=VisionConfig(
    num_layers=1, hidden_size=32, num_heads=2, intermediate_size=40, out_size=32, window_size=56, full_attention_layers=(0,)
  ),
  scb=SCBConfig(num_think_tokens=3, hidden_size=32, intermediate_size=46, num_layers=1, num_heads=4, read_layers=(1,)),
  dit=DiTConfig(
    num_layers=1,
    num_heads=2,
    head_dim=8,
    context_size=24,
    pooled_size=12,
    dual_attention_layers=(),
    pos_embed_max_size=12,
    sample_size=8,
  ),
  vae=VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
  image_size=64,
)
# Layers of every kind.
VARIED = dataclasses.replace(
  CONFIG,
  text=dataclasses.replace(CONFIG.text, num_layers=3),
  vision=dataclasses.replace(CONFIG.vision, num_layers=2, full_attention_layers=(1,)),
  scb=dataclasses.replace(CONFIG.scb, num_layers=2, read_layers=(2, 1)),
  dit=dataclasses.replace(CONFIG.dit, num_layers=3, dual_attention_layers=(0,)),
)


def draw_params(config=CONFIG):
  """Random weights of ordinary size, heads that would start at zero too; drawn from the shapes, so that nothing compiles."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise, name = rng.normal(size=leaf.shape), path_name(path).rpartition("/")[2]
    if name in ("scale", "bias"):
      return np.float32(0.1 * noise + (name == "scale"))
    return np.float32(noise / np.sqrt(np.prod(leaf.shape[-4:-1] if leaf.ndim == 4 else leaf.shape[-2])))

  return jax.tree_util.tree_map_with_path(draw, param_shapes(config))


def save_model(folder, params, parts=PARTS, config=CONFIG):
  """Writes a model directory."""
  model_dir.save(folder, config, {part: params[part] for part in parts}, build_tiny_tokenizer())
  return folder


def random_image(height, width, seed=0):
  """uint8 [H,W,3] with structure at two scales."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(0, 200, (-(-height // 16), -(-width // 16), 3)).repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
  return (coarse + rng.uniform(0, 55, coarse.shape)).astype(np.uint8)
