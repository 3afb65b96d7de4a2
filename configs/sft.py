"""Stage 2, joint supervised fine-tuning: SCB, think tokens, the whole DiT, and LoRA on the VLM.

python -m deepgen_jax.train --config configs/sft.py:tiny --workdir runs/sft --config.init=runs/align     2 cores, 4 min
python -m deepgen_jax.train --config configs/sft.py:full --workdir gs://... --config.init=gs://.../align \\
    --config.mesh.data=2 --config.mesh.fsdp=4        v5p:2x2x2, modelled: 8.5 s an update (MFU 40 %), 86 GiB a chip; README.md

Measured, tiny: after align with 900 updates, --config.steps=240 (8 min) takes the held-out loss from 0.207 to 0.204, and in
retrieval generation has R@1 22.7 %, R@5 54.7 %, edits have R@1 50.8 %, R@5 83.6 %. More in README.md. In short runs a
higher rate undoes what align has learned: after 280 updates of it, 60 of 12 samples at 1.2e-3 took R@5 of captions from 12 % to
3 %; 50 of 24 at 3e-4 kept it at 12 %. After 600 of 8, 100 of 12 at 3e-4 took the loss from 0.277 to 0.269.

python -m deepgen_jax.train --config configs/sft.py:full_lora --workdir runs/lora --config.init=PATH       compiled: 13.3 GiB

`full_lora` is meant for one GPU of 24 GB: LoRA on the DiT's attention, everything else frozen in bfloat16, two samples at a
time: 13.3 GiB as compiled for such a GPU, 14.4 for a chip of v6e. `--config.data.sources` says on what.

`full` follows the reference's config; its 400,000 micro-iterations are 133,333 updates here. Departure: LoRA sits where a
gradient arrives (the decoder layers that SCB reads and the embedding), not on the vision tower, the last layer and the head.
"""

from configs import common
from configs.align import LR_GROUPS
from configs.grpo import LORA_TARGETS as DIT_LORA_TARGETS

LORA_TARGETS = [
  r"vlm/text/segments_[0-5]/(q|k|v|out|gate|up|down)/kernel",  # the layers up to the last one that SCB reads
  r"vlm/text/embedding",
]


def get_config(size: str = "tiny"):
  size, _, lora = size.partition("_")
  if lora not in ("", "lora"):
    raise ValueError(f"size {size}_{lora} must be tiny, full, tiny_lora or full_lora")
  c = common.get_config(size)
  c.trainable = [(r"vlm/.*/(a|b)", True), ("(vlm|vae)/.*", False), ("(scb|dit)/.*", True)]
  c.lora.targets = LORA_TARGETS
  c.data.pattern = ("edit", "generate", "generate") * (1 if size == "tiny" else 4)  # E,G,G in every update
  c.optim.lr = 5e-5
  c.steps = 133_333
  c.checkpoint.every, c.checkpoint.keep = 13_333, 5
  if size == "tiny":
    c.init = "runs/align"
    c.lora.rank, c.lora.alpha, c.lora.dropout = 8, 16.0, 0.0  # dropout costs a tenth of the step here
    c.optim.lr, c.optim.warmup, c.optim.lr_groups = 6e-4, 0.05, LR_GROUPS
    c.optim.ema = 0.98
    c.timesteps.weighting, c.timesteps.logit_mean = "logit_normal", 1.0
    c.steps = 150
    c.checkpoint.every, c.checkpoint.keep, c.eval.every = 75, 2, 75
  if lora:
    c.trainable = [(r"dit/.*/(a|b)", True), (".*", False)]
    c.lora.targets, c.lora.rank, c.lora.alpha, c.lora.dropout = DIT_LORA_TARGETS, 32, 64.0, 0.0
    c.remat = "full"
    c.data.batch_size, c.data.pattern = 2, ("edit", "generate", "generate")
    c.optim.lr, c.optim.lr_groups, c.steps = 1e-4, [], 2000
    c.checkpoint.every, c.checkpoint.keep = 500, 2
  return c
