#!/usr/bin/env bash
# Trains on a Cloud TPU pod: asks for it as a queued resource, waits, installs this checkout on every host, starts all hosts.
#   PROJECT=my-project ZONE=us-east5-a ACCELERATOR=v5p-64 bash launch/tpu.sh [--spot] [--dry-run] -- \
#     --config configs/sft.py:full --workdir gs://bucket/sft --config.init=gs://bucket/align
# Set: PROJECT, ZONE, ACCELERATOR (the slice, e.g. v5p-64, v6e-16). May be set: NAME (deepgen), RUNTIME (the VM image; by default
# that of the accelerator). Needs gcloud, signed in. Run again, it finds the same resource, and training goes on from the newest
# checkpoint in the workdir. --dry-run prints the commands. It doesn't give the TPU back; the last line says how.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.bash
dry_run="" spot=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --spot) spot=(--spot) ;;
    --dry-run) dry_run=1 ;;
    *) fail "unknown option $1; see the head of launch/tpu.sh" ;;
  esac
  shift
done
[[ $# -gt 0 ]] && shift
need PROJECT "the Google Cloud project that pays"
need ZONE "where the TPU is, e.g. us-east5-a"
need ACCELERATOR "the slice, e.g. v5p-64 or v6e-16"
training "$@"
shared_workdir "$@"
[[ -n $dry_run ]] || command -v gcloud >/dev/null || fail "gcloud is missing: install the Google Cloud CLI and sign in"

name=${NAME:-deepgen}
case $ACCELERATOR in
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac
runtime=${RUNTIME:-$runtime}
place=(--project="$PROJECT" --zone="$ZONE")
every_host=(gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all)
to_hosts=(gcloud compute tpus tpu-vm scp "${place[@]}" --worker=all)

exists() { [[ -z $dry_run ]] && gcloud compute tpus queued-resources describe "$name" "${place[@]}" >/dev/null 2>&1; }

exists || run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
  --accelerator-type="$ACCELERATOR" --runtime-version="$runtime" ${spot[@]+"${spot[@]}"}

state=""
while [[ -z $dry_run && $state != ACTIVE ]]; do
  state=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')
  case $state in FAILED | SUSPENDED | SUSPENDING) fail "the queued resource $name is $state; delete it and run this again" ;; esac
  [[ $state == ACTIVE ]] || { echo "$name is $state; waiting" && sleep 60; }
done

archive=${TMPDIR:-/tmp}/$name.tar.gz
run git archive --format=tar.gz --output="$archive" HEAD
run "${to_hosts[@]}" "$archive" "$name:$name.tar.gz"
python="command -v python3.11 || (sudo apt-get update && sudo apt-get install -y python3.11 python3.11-venv)" # images have 3.10
install="$python && mkdir -p $name && tar -xzf $name.tar.gz -C $name && cd $name && bash launch/setup.sh demo,tpu"
run "${every_host[@]}" --command="$install"
# exec: a signal, or the end of the connection, reaches the training itself.
train=$(show .venv/bin/python -m deepgen_jax.train "$@" --config.distributed=auto)
run "${every_host[@]}" --command="cd $name && exec $train"
echo "give the TPU back: $(show gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force)"
