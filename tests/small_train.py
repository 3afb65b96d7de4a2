"""`python -m deepgen_jax.train` with the small model in the place of `tiny`, for tests that start it as a process."""

from deepgen_jax import train
from deepgen_jax.errors import run_command
from deepgen_jax.models.config import SIZES
from tests.small import CONFIG

if __name__ == "__main__":
  SIZES["tiny"] = CONFIG
  run_command(train.main)
