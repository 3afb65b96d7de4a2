"""Pre-trains the parts of the tiny base, one after the other, from nothing but training emoji and rendered words.

bash launch/pretrain_tiny.sh                                                              all three
python -m deepgen_jax.train --config configs/pretrain_tiny.py:vae --workdir runs/pretrain/vae
python -m deepgen_jax.train --config configs/pretrain_tiny.py:vlm --workdir runs/pretrain/vlm
python -m deepgen_jax.train --config configs/pretrain_tiny.py:dit --workdir runs/pretrain/dit     reads the VAE from `output`

The weights that ship came in two goes: first by this file as it stood in commit 68f3c1e, without sketches and layouts, then by
this one with `--config.init=tiny` (the first go's VLM and DiT). From nothing in one go, as the script does, is not measured.
Minutes are of two cores that the parts shared with each other and with other work:

    part  parameters  updates x samples          minutes  on what is held out
    vae   1.0 M       3,000 x 8                  32       25.1 dB PSNR
    vlm   2.6 M       1,200 x 32 + 3,000 x 32    39 + 70  the nearest emoji to a sketch: R@1 65 %, R@5 89 % of captions
    dit   3.7 M       12,500 x 32 + 5,500 x 32   67 + 88  from layouts R@1 56 %, R@5 88 %; from words 3 %, 11 %; loss 0.284

The DiT's second go was planned for 6,000 updates and stopped at 5,500, where its rate was near zero. Its text encoder for words
began anew there, and hardly came to count beside layouts; after the first go, words alone gave R@1 61 %, R@5 90 %.
"""

from configs import common


def get_config(part: str):
  c = common.get_config("tiny")
  c.stage = f"pretrain_{part}"
  c.init = ""  # a model whose VLM or DiT goes on; empty: fresh weights
  c.output = "runs/pretrain/model"  # the model directory that the three parts fill
  c.checkpoint.every, c.eval.every, c.log.every = 500, 500, 50
  c.optim.weight_decay = 0.01
  if part == "vae":
    c.kl_weight = 5e-4
    c.steps, c.data.batch_size = 3000, 8
    c.optim.lr, c.optim.ema = 1.5e-3, 0.995
  elif part == "vlm":
    c.steps, c.data.batch_size = 4200, 16
    c.data.pattern = ("edit", "generate")
    c.optim.lr = 2e-3
  elif part == "dit":
    c.steps, c.data.batch_size = 18_500, 32
    c.edit_share = 0.35  # of micro-batches
    c.words_share = 0.1  # of generation
    c.drop, c.words_only, c.layout_only = 0.1, 0.3, 0.3  # shares without any text, or one kind of it; the rest has both
    c.layout_noise = 0.3  # at most, on colours in [-1,1]
    c.condition_noise = 0.5  # at most, on normalised conditioning
    c.context_slots, c.long_share = 132, 0.25  # an SCB sends a token a byte: as many as this; most batches have 40
    c.optim.lr, c.optim.ema = 1.5e-3, 0.999
  else:
    raise ValueError(f"part {part!r} must be vae, vlm or dit")
  return c
