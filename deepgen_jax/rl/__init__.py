"""Reinforcement learning of stage 3: the stochastic sampler step and the advantages of MR-GRPO.

Pure functions; rollout, objectives and rewards build on them.
"""

from deepgen_jax.rl.advantages import advantages
from deepgen_jax.rl.sde import SDEStep, sde_step

__all__ = ["SDEStep", "advantages", "sde_step"]
