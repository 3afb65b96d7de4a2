# What the launch scripts share; they source it from the root of the checkout.

fail() {
  echo "error: $*" >&2
  exit 2
}

# The value of an option: value --port 1234 -> 1234.
value() { [[ $# -gt 1 && -n $2 && $2 != --* ]] && echo "$2" || fail "$1 needs a value"; }

# A variable of the environment that must be set: need PROJECT "the Google Cloud project".
need() { [[ -n ${!1:-} ]] || fail "set $1: $2"; }

# Prints a command so that a shell would run it.
show() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Runs a command, or with dry_run prints it.
run() { if [[ -n $dry_run ]]; then show "$@"; else "$@"; fi; }

# Checks what goes to deepgen_jax.train.
training() {
  local words=" $* "
  [[ $words == *" --config "* || $words == *" --config="* ]] || fail "after -- give the options of training, --config among them"
  [[ $words == *" --workdir "* || $words == *" --workdir="* ]] || fail "after -- give the options of training, --workdir among them"
  [[ $words != *" --config.distributed"* ]] || fail "leave --config.distributed to this script"
}

# Hosts of a cluster share a workdir.
shared_workdir() {
  local words=" $* "
  [[ $words == *"--workdir gs://"* || $words == *"--workdir=gs://"* ]] || fail "--workdir must be on gs://, which all hosts see"
}
