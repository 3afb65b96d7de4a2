"""Helpers of the parity tests: random weights of ordinary size in a PyTorch module, the same weights for us, and comparisons.

Tolerances are the project's: 1e-4 relative for a module, 1e-3 per leaf for gradients, and for bfloat16 the larger of 3e-2 and
1.5 times PyTorch's own bfloat16 error on the same input.
"""

import copy

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from deepgen_jax.weights.torch_format import from_torch

torch.set_num_threads(1)  # inputs are tiny

FORWARD, GRADIENT, BFLOAT16 = 1e-4, 1e-3, 3e-2


def randomise(module, seed=0):
  """Draws every parameter anew, those that start at 0 or 1 too, so that each of them matters."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in module.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if p.ndim > 1:
        p.copy_(noise / p[0].numel() ** 0.5)
      else:
        p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))  # a vector called weight is the scale of a norm
  return module.eval()


def numpy_state(module):
  return {key: value.detach().numpy() for key, value in module.state_dict().items()}


def abstract_init(module, *args, **kwargs):
  """Shapes of a Flax module's parameters."""
  return jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))["params"]


def torch_gradients(module, table, abstract):
  """The gradients that `backward` left in the module, as our tree; zeros for parameters that got none."""
  grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in module.named_parameters(remove_duplicate=False)}
  return from_torch(table, {k: g.numpy() for k, g in grads.items()}, abstract)


def to_numpy(x):
  return x.detach().float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32)


def relative_error(ours, reference):
  ours, reference = to_numpy(ours), to_numpy(reference)
  assert ours.shape == reference.shape
  assert np.isfinite(ours).all()
  return float(np.abs(ours - reference).max() / np.abs(reference).max())


def assert_close(ours, reference, tolerance=FORWARD):
  error = relative_error(ours, reference)
  assert error <= tolerance, f"relative error {error:.2g} > {tolerance:.2g}"


def assert_gradients_close(ours, reference, tolerance=GRADIENT):
  """Per leaf. Leaves whose gradient is zero but for rounding (a key bias) are held to the largest leaf's scale."""
  ours, reference = flatten_dict(ours, sep="/"), flatten_dict(reference, sep="/")
  assert ours.keys() == reference.keys()
  floor = 1e-4 * max(np.abs(g).max() for g in reference.values())
  errors = {k: float(np.abs(np.asarray(ours[k]) - g).max() / max(np.abs(g).max(), floor)) for k, g in reference.items()}
  wrong = {k: e for k, e in errors.items() if not e <= tolerance}
  assert not wrong, f"gradients beyond {tolerance}: {wrong}"


def assert_bfloat16_close(ours, run_torch, module, reference):
  """ours: our bfloat16 result; run_torch(module) is run on a bfloat16 copy of the module; reference: the float32 result."""
  with torch.no_grad():
    theirs = run_torch(copy.deepcopy(module).to(torch.bfloat16))
  assert ours.dtype == jax.numpy.bfloat16
  assert_close(ours, reference, max(BFLOAT16, 1.5 * relative_error(theirs, reference)))
