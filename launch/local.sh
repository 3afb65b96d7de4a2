#!/usr/bin/env bash
# Trains with several processes on this machine, as a cluster would with one on each host: for trying out a distributed run.
#   bash launch/local.sh --processes 2 [--devices 4] [--port 12765] [--dry-run] -- --config configs/align.py:tiny --workdir DIR ...
# What follows -- goes to deepgen_jax.train. --devices N gives each process N simulated CPU devices; without it, processes
# share the machine's GPUs evenly. Ctrl-C and SIGTERM reach all of them, and they save a checkpoint. --dry-run prints what
# would run. When a process fails, the others end within minutes, with a message.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.bash
processes="" devices="" port=12765 dry_run=""
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --processes) processes=$(value "$@"); shift 2 ;;
    --devices) devices=$(value "$@"); shift 2 ;;
    --port) port=$(value "$@"); shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    *) fail "unknown option $1; see the head of launch/local.sh" ;;
  esac
done
[[ $# -gt 0 ]] && shift
training "$@"
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "give --processes N, how many to start on this machine"
python=${VENV:-.venv}/bin/python
[[ -n $dry_run || -x $python ]] || fail "$python is missing; run bash launch/setup.sh demo, or name its folder with VENV=DIR"

gpus=0
if [[ -n $devices ]]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
elif command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
  ((gpus % processes == 0)) || fail "$processes processes can't share $gpus GPUs evenly"
fi

pids=()
for ((index = 0; index < processes; index++)); do
  command=("$python" -m deepgen_jax.train "$@" "--config.distributed=localhost:$port/$processes/$index")
  if ((gpus)); then # each sees its own
    first=$((index * gpus / processes)) last=$(((index + 1) * gpus / processes - 1))
    command=(env "CUDA_VISIBLE_DEVICES=$(seq -s, "$first" "$last")" "${command[@]}")
  fi
  if [[ -n $dry_run ]]; then
    [[ -n $devices ]] && printf 'JAX_PLATFORMS=%q XLA_FLAGS=%q ' "$JAX_PLATFORMS" "$XLA_FLAGS"
    show "${command[@]}"
    continue
  fi
  "${command[@]}" &
  pids+=($!)
  echo "process $index of $processes: pid $!"
done
[[ -z $dry_run ]] || exit 0

trap 'told=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
code=0
for pid in "${pids[@]}"; do # where one fails, the others end by themselves
  told=1
  while [[ -n $told ]]; do # again, if it was a signal that ended the waiting
    told="" status=0
    wait "$pid" || status=$?
  done
  ((code)) || code=$status
done
exit "$code"
