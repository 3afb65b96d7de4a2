"""Stage 1, alignment pre-training: SCB and think tokens learn to speak for a frozen VLM to a frozen DiT.

python -m deepgen_jax.train --config configs/align.py:tiny --workdir runs/align     2 cores, 5 min
python -m deepgen_jax.train --config configs/align.py:full --workdir gs://... --config.init=PATH \\
    --config.mesh.data=2 --config.mesh.fsdp=4        v5p:2x2x2, modelled: 7.2 s an update (MFU 44 %), 49 GiB a chip

Measured, tiny: with --config.steps=900 (13 min on two cores of an AMD EPYC of 2.4 GHz) the held-out loss falls from 0.341 to
0.207, and in retrieval generation has R@1 20.4 %, R@5 53.3 %, edits have R@1 49.2 %, R@5 80.8 %. More in README.md. Short
runs, one of each (updates x samples: loss, R@1 of edits, R@5 of captions): 500 x 8: 0.293, 19.2 %, 2.7 %; 540 x 8: 0.292,
16.7 %, 4.0 %; 600 x 8: 0.277, 20.8 %, 5.3 %; 320 x 16: 0.284, 10.0 %, 5.8 %; 150 x 32: 0.304, 16.7 %, 1.3 %. Updates of 32
teach less for their samples; between 8 and 16 these single runs settle nothing.

`full` follows the paper's Table 9 and the reference's config; its 200,000 micro-iterations are 50,000 updates here.
`tiny` departs where few updates must do: higher rates, with less for the linears whose input isn't normalised, and times drawn
towards noise, where the text matters most.
"""

from configs import common

# Projector and heads read residual streams as they are, several times larger than what the normalised layers read.
LR_GROUPS = [("scb/projector/.*", 0.2), ("scb/.*_head/.*", 0.5), ("scb/.*", 1.0), ("(dit|vlm)/.*", 0.5)]


def get_config(size: str = "tiny"):
  c = common.get_config(size)
  c.trainable = [("scb/.*", True), (".*", False)]
  c.data.pattern = ("edit", "generate", "generate", "generate") * (1 if size == "tiny" else 4)  # E,G,G,G in every update
  c.optim.lr = 1e-4
  c.steps = 50_000
  c.checkpoint.every, c.checkpoint.keep = 10_000, 5
  if size == "tiny":
    c.optim.lr, c.optim.warmup, c.optim.lr_groups = 2e-3, 0.1, LR_GROUPS
    c.timesteps.weighting, c.timesteps.logit_mean = "logit_normal", 1.0
    c.steps = 240
    c.checkpoint.every, c.checkpoint.keep, c.eval.every = 80, 2, 80
  return c
