#!/usr/bin/env bash
# Makes the virtual environment of the other commands, .venv in the checkout, and installs this package there:
#   bash launch/setup.sh demo|test
# It does nothing where setup.py hasn't changed since. PYTHON=python3.12 chooses the interpreter, VENV=DIR another folder.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:?which extra of setup.py? demo or test}
venv=${VENV:-.venv}

fail() {
  echo "error: $*" >&2
  exit 2
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

find_python() {
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  fail "no Python 3.11 or newer found as ${PYTHON:-python3.11 to python3}; install one, or name it with PYTHON=..."
}

if [[ ! -x $venv/bin/python ]]; then
  python=$(find_python)
  "$python" -m venv "$venv" || fail "$python can't make a virtual environment (on Debian: apt-get install python3-venv)"
elif [[ -n ${PYTHON:-} ]]; then
  python=$(find_python)
  if [[ $(version_of "$python") != "$(version_of "$venv/bin/python")" ]]; then
    fail "$venv has another Python than PYTHON=$PYTHON; remove it, or choose another folder with VENV=DIR"
  fi
fi

stamp=$venv/.installed-$extra
if ! cmp --silent setup.py "$stamp"; then
  echo "installing deepgen_jax[$extra] into $venv"
  # Errors only; bytecode is written where a module is first imported, much of it never.
  pip=("$venv/bin/python" -m pip --disable-pip-version-check install --no-compile -qq)
  "${pip[@]}" --upgrade pip || true # older ones, which Python brings, take twice as long for what follows
  if [[ $extra == test && $(version_of "$venv/bin/python") == 3.11 ]]; then
    "${pip[@]}" torch==2.13.0 # first and alone, so that nothing else decides which build of it
  fi
  "${pip[@]}" --editable ".[$extra]"
  if [[ $extra == test ]]; then
    "${pip[@]}" --no-deps brisque==0.2.0 # two of its files are read; what it depends on would need a compiler
  fi
  cp setup.py "$stamp"
fi
