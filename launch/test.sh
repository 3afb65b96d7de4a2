#!/usr/bin/env bash
# Installs what the tests need into .venv, checks the style and runs the tests. Arguments go to pytest:
#   bash launch/test.sh [-k NAME ...]
# PYTHON=python3.12 VENV=.venv312 bash launch/test.sh runs them on another Python (no PyTorch there: its tests skip).
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh test
export PYTHONDONTWRITEBYTECODE= # images set it: each process would compile all that it imports, 12 s for those of the tests
python=${VENV:-.venv}/bin/python

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m compileall -q deepgen_jax configs tests setup.py
# A process for each core, a file in one of them; tests/conftest.py sets the platform, eight CPU devices, and the files' order.
"$python" -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
