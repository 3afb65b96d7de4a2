"""Stages 1 and 2: what a config asks of a platform is refused where it can't be had."""

import pytest

from deepgen_jax.config import load_config
from deepgen_jax.errors import UserError
from deepgen_jax.models.config import SIZES
from deepgen_jax.stages.supervised import make_model


@pytest.mark.parametrize(
  "platform, options, expected",
  [
    ("tpu", [], "splash"),
    ("gpu", [], "cudnn"),
    ("gpu", ["attention=cudnn"], "cudnn"),
    ("gpu", ["dtype=float32"], "xla"),
    ("gpu", ["attention=xla"], "xla"),
    ("tpu", ["attention=xla"], "xla"),
    ("gpu", ["attention=splash"], UserError(r"config.attention=splash runs on TPU alone, not on gpu")),
    ("cpu", ["attention=cudnn"], UserError(r"config.attention=cudnn runs on GPU alone, not on cpu")),
    ("gpu", ["attention=cudnn", "dtype=float32"], UserError(r"cudnn computes in bfloat16, and config.dtype is float32")),
    ("cpu", ["attention=flash"], UserError(r"config.attention 'flash' is none of auto, xla, splash, cudnn")),
  ],
)
def test_attention_kernel_by_platform(platform, options, expected):
  config = load_config("configs/align.py:tiny", options)
  if isinstance(expected, str):
    assert make_model(config, SIZES["tiny"], platform).attention == expected
    return
  with pytest.raises(UserError, match=str(expected)):
    make_model(config, SIZES["tiny"], platform)
