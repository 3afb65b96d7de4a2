"""Pre-trains the parts of the tiny base, one after the other, from nothing but training emoji and rendered words.

bash launch/pretrain_tiny.sh                                                              all three; the cost stands there
python -m deepgen_jax.train --config configs/pretrain_tiny.py:vae --workdir runs/pretrain/vae
python -m deepgen_jax.train --config configs/pretrain_tiny.py:vlm --workdir runs/pretrain/vlm
python -m deepgen_jax.train --config configs/pretrain_tiny.py:dit --workdir runs/pretrain/dit     reads the VAE from `output`
"""

from configs import common


def get_config(part: str):
  c = common.get_config("tiny")
  c.stage = f"pretrain_{part}"
  c.output = "runs/pretrain/model"  # the model directory that the three parts fill
  c.checkpoint.every, c.eval.every, c.log.every = 500, 500, 50
  c.optim.weight_decay = 0.01
  if part == "vae":
    c.kl_weight = 5e-4
    c.steps, c.data.batch_size = 3000, 8
    c.optim.lr, c.optim.ema = 1.5e-3, 0.995
  elif part == "vlm":
    c.steps, c.data.batch_size = 1200, 16
    c.data.pattern = ("edit", "generate")
    c.optim.lr = 2e-3
  elif part == "dit":
    c.steps, c.data.batch_size = 7000, 32
    c.edit_share = 0.35  # of micro-batches
    c.words_share = 0.1  # of generation
    c.drop = 0.1  # texts left out, for guidance
    c.condition_noise = 0.2  # on normalised conditioning
    c.optim.lr, c.optim.ema = 1.5e-3, 0.999
  else:
    raise ValueError(f"part {part!r} must be vae, vlm or dit")
  return c
