"""Stage 1, alignment pre-training: SCB and think tokens learn to speak for a frozen VLM to a frozen DiT.

python -m deepgen_jax.train --config configs/align.py:tiny --workdir runs/align     2 cores
python -m deepgen_jax.train --config configs/align.py:full --workdir gs://...       not measured yet

`full` follows the paper's Table 9 and the reference's config; its 200,000 micro-iterations are 50,000 updates here.
"""

from configs import common


def get_config(size: str = "tiny"):
  c = common.get_config(size)
  c.trainable = [("scb/.*", True), (".*", False)]
  c.data.pattern = ("edit", "generate", "generate", "generate")  # E,G,G,G in every update
  c.optim.lr = 1e-4
  c.steps = 50_000
  c.checkpoint.every, c.checkpoint.keep = 10_000, 5
  if size == "tiny":
    c.optim.lr = 2e-3  # a small model, few updates
    c.steps = 400
    c.checkpoint.every, c.checkpoint.keep, c.eval.every = 200, 2, 100
  return c
