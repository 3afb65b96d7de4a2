"""Pre-trains the parts of the tiny base, one after the other, from nothing but training emoji and rendered words.

bash launch/pretrain_tiny.sh                                                              all three
python -m deepgen_jax.train --config configs/pretrain_tiny.py:vae --workdir runs/pretrain/vae
python -m deepgen_jax.train --config configs/pretrain_tiny.py:vlm --workdir runs/pretrain/vlm
python -m deepgen_jax.train --config configs/pretrain_tiny.py:dit --workdir runs/pretrain/dit     reads the VAE from `output`

The weights that ship came in goes, each from the weights before it (`--config.init`): first by this file as it stood in
commit 68f3c1e, without sketches and layouts; VLM and DiT then as in c7f5e5a, with layouts in the context; the DiT for 7,500
updates of forms that weren't kept, with layouts in the pooled vector too; for 5,500 by this file, with 0.4 for `edit_share`;
and at last, on one NVIDIA H200 and with a copy of deepgen_jax/assets/tiny as `output`,

python -m deepgen_jax.train --config configs/pretrain_tiny.py:dit --workdir runs/pretrain/dit --config.init=tiny \\
    --config.data.batch_size=256 --config.steps=7800 --config.optim.lr=2e-3 --config.eval.every=0 --config.log.every=200

which had 17 ms an update, in all 7 minutes, 4 of them for compilation. From nothing in one go, as the script does, is not
measured. Minutes are of two cores that the parts shared with each other and with other work:

    part  parameters  updates x samples                     minutes                on what is held out
    vae   1.0 M       3,000 x 8                             32                     25.1 dB PSNR
    vlm   2.6 M       (1,200 + 3,000) x 32                  39 + 70                nearest emoji to a sketch: R@1 65 %, R@5 89 %
    dit   3.7 M       (18,000 + 13,000) x 32 + 7,800 x 256  67 + 88 + 55 + 55 + 7  see below

What the DiT makes when it is told layouts and no text, of captions and edits that are held out (10 steps, guidance 2.5):

                          captions: from layouts   from guesses, three quarters right   edits: from what changes
    before the last go    R@1 46 %, R@5 79 %       12 %, 38 %                           39 %, 79 %; error outside 9.8
    after it              R@1 58 %, R@5 89 %       17 %, 44 %                           59 %, 91 %; error outside 6.8

That the pooled vector tells how a layout changes is for the SCB that comes to this DiT (`stages/layouts.py`). Words hardly came
to count beside layouts: alone they gave R@5 5 % after the go before the last, where after the first it was 90 %.
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
    c.steps, c.data.batch_size = 31_000, 32
    c.edit_share = 0.5  # of micro-batches
    c.words_share = 0.1  # of generation
    c.drop, c.words_only, c.layout_only = 0.1, 0.1, 0.7  # shares without any text, or one kind of it; the rest has both
    c.layout_blur = 0.01, 10.0  # variance of the noise that layouts are guessed through, from and to, relative to theirs
    c.condition_noise = 0.5  # at most, on a context with a mean square of 1
    c.context_slots, c.long_share = 132, 0.15  # an SCB sends a token a byte: as many as this; most batches have 40
    c.optim.lr, c.optim.ema, c.optim.warmup = 1.2e-3, 0.999, 0.02
  else:
    raise ValueError(f"part {part!r} must be vae, vlm or dit")
  return c
