import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def _highest_precision():
  with jax.default_matmul_precision("highest"):
    yield
