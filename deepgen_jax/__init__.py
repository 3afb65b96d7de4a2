"""DeepGen 1.0 in JAX and Flax: one model that generates and edits images.

The public names load when they are first used, so that `import deepgen_jax` costs nothing.
"""

import importlib

_PUBLIC = {
  "DeepGenPipeline": "deepgen_jax.pipeline",
  "Conditioning": "deepgen_jax.models.deepgen",
}

__all__ = ["Conditioning", "DeepGenPipeline", "rl"]


def __getattr__(name: str):
  if name == "rl":
    return importlib.import_module("deepgen_jax.rl")
  if name not in _PUBLIC:
    raise AttributeError(f"module 'deepgen_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)
