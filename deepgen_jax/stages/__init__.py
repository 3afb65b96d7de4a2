"""The stages of training: `build(config, mesh, workdir)` gives the loop what it needs."""

from __future__ import annotations

import functools

from deepgen_jax.errors import UserError, nearest
from deepgen_jax.stages.stage import Report, Stage

__all__ = ["Report", "Stage", "build"]


def build(config, mesh, workdir) -> Stage:
  """The stage that `config.stage` names; `workdir` is where it may keep what a resumed run needs beside the checkpoints."""
  from deepgen_jax.stages import grpo, pretrain_dit, pretrain_vae, pretrain_vlm, supervised

  builders = {
    "supervised": supervised.build,
    "grpo": functools.partial(grpo.build, workdir=workdir),
    "pretrain_vae": pretrain_vae.build,
    "pretrain_vlm": pretrain_vlm.build,
    "pretrain_dit": pretrain_dit.build,
  }
  if config.stage not in builders:
    raise UserError(f"config.stage {config.stage!r} is unknown.{nearest(config.stage, builders)}")
  return builders[config.stage](config, mesh)
