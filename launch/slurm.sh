#!/usr/bin/env bash
# Trains on a SLURM cluster, one process a GPU; submits the job.
#   NODES=4 GPUS=8 bash launch/slurm.sh [--dry-run] -- --config configs/sft.py:full --workdir /shared/sft --config.init=/shared/align
# Set: NODES, GPUS (of each node). May be set: NAME (deepgen), PARTITION, ACCOUNT, TIME (of the job, e.g. 24:00:00), CPUS (of
# each process, 8), VENV (.venv, with the extra cuda12: bash launch/setup.sh demo,cuda12). The checkout, VENV and the
# workdir must be on a file system that all nodes see. Two minutes before its time is over, or when it is preempted, the job gets
# SIGTERM: it saves, and is queued again to go on from there. --dry-run prints the job script and submits nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.bash
dry_run=""
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    *) fail "unknown option $1; see the head of launch/slurm.sh" ;;
  esac
  shift
done
[[ $# -gt 0 ]] && shift
need NODES "how many nodes"
need GPUS "how many GPUs each node has"
[[ $NODES =~ ^[1-9][0-9]*$ && $GPUS =~ ^[1-9][0-9]*$ ]] || fail "NODES=$NODES and GPUS=$GPUS must be numbers"
training "$@"
python=${VENV:-.venv}/bin/python
[[ -n $dry_run || -x $python ]] || fail "$python is missing; run bash launch/setup.sh demo,cuda12, or name its folder with VENV=DIR"
[[ -n $dry_run ]] || command -v sbatch >/dev/null || fail "sbatch is missing: run this on a login node of the cluster"

name=${NAME:-deepgen}
job="#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gres=gpu:$GPUS
#SBATCH --cpus-per-task=${CPUS:-8}
#SBATCH --output=$name-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120"
[[ -z ${PARTITION:-} ]] || job+="
#SBATCH --partition=$PARTITION"
[[ -z ${ACCOUNT:-} ]] || job+="
#SBATCH --account=$ACCOUNT"
[[ -z ${TIME:-} ]] || job+="
#SBATCH --time=$TIME"
job+="
cd $(show "$PWD")
# The signal comes to this script: it passes it on to all processes, waits until they have saved, and asks to be queued again.
told=\"\"
trap 'told=1; scancel --signal=TERM \"\$SLURM_JOB_ID\"' TERM
srun --kill-on-bad-exit=1 $(show "$python" -m deepgen_jax.train "$@" --config.distributed=auto) &
step=\$!
code=0
wait \"\$step\" || code=\$?
if [[ -n \$told ]]; then
  wait \"\$step\" && code=0 || code=\$?
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$code\""
if [[ -n $dry_run ]]; then
  echo "$job"
else
  sbatch <<<"$job"
fi
