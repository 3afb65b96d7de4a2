#!/usr/bin/env bash
# Pre-trains the base that deepgen-tiny starts from: a VAE, a VLM, and a DiT with a text encoder that is thrown away.
#   bash launch/pretrain_tiny.sh [--config.KEY=VALUE ...]
# Run again, it goes on where it stopped. The result, runs/pretrain/model, is what deepgen_jax/assets/tiny ships; what it cost
# and how good it is stands in configs/pretrain_tiny.py.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh demo
python=${VENV:-.venv}/bin/python
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" # see quickstart.sh

for part in vae vlm dit; do # in this order: the DiT learns on latents of the VAE
  "$python" -m deepgen_jax.train --config "configs/pretrain_tiny.py:$part" --workdir "runs/pretrain/$part" "$@"
done
