"""Both sides of every case, in one process: they agree, and what is compared depends on the weights."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from safetensors.numpy import save_file  # noqa: E402

from deepgen_jax.benchmark import TOLERANCE, max_relative_error  # noqa: E402
from deepgen_jax.benchmarking import cases, torch_worker  # noqa: E402
from deepgen_jax.benchmarking.cases import CASES  # noqa: E402
from tests import small  # noqa: E402

CONFIG = dataclasses.replace(
  small.VARIED,
  text=dataclasses.replace(small.VARIED.text, num_layers=2),
  scb=dataclasses.replace(small.VARIED.scb, read_layers=(2,)),
  dit=dataclasses.replace(small.VARIED.dit, num_layers=2, pos_embed_max_size=32),
)
SIZES = cases.Sizes(CONFIG, steps=2, pixels=32, prompt=20)
SETTINGS = {"optim": cases.OPTIM, "guidance": cases.GUIDANCE}


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("1024")])
def test_sides_agree(name, tmp_path):
  torch.set_num_threads(1)
  with jax.default_matmul_precision("highest"):
    job, params = cases.build(name, SIZES)
    ours = job.read(job.run())
  cases.export(tmp_path, CONFIG, params)
  save_file(job.inputs, tmp_path / "inputs.safetensors")
  theirs = {key: x.numpy().copy() for key, x in torch_worker.build(job.kind, tmp_path, SETTINGS, compile=False)().items()}
  assert max_relative_error(ours, theirs) <= TOLERANCE.get(name, 1e-4)
  assert max(np.std(x) for x in theirs.values()) > 0
  name = next(iter(theirs))
  assert max_relative_error(ours, theirs | {name: theirs[name] + 0.01 * np.abs(theirs[name]).max()}) > 1e-3


def test_the_large_case_has_its_tokens():
  job, _ = cases.build("dit_forward_1024", SIZES)
  side = job.inputs["latents"].shape[-1]
  assert (side // CONFIG.dit.patch_size) ** 2 == 1024 and job.inputs["context"].shape[1] == 256


@pytest.mark.parametrize("sizes", [cases.CPU, cases.ACCELERATOR], ids=["cpu", "accelerator"])
def test_shipped_sizes(sizes):
  """What the published ratios are about: a 12 x 64 DiT of six layers, three of them dual; the full VAE."""
  dit, full = sizes.config.dit, cases.DeepGenConfig()
  assert dit.num_layers == 6 and dit.dual_attention_layers == (0, 1, 2)
  assert (dit.num_heads, dit.head_dim) == ((12, 64) if sizes is cases.CPU else (full.dit.num_heads, full.dit.head_dim))
  assert sizes.config.vae == full.vae
