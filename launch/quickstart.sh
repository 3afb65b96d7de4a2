#!/usr/bin/env bash
# The whole of it in miniature, on a CPU: starts from the tiny base that is shipped, aligns, fine-tunes, reinforces, and scores the
# model before and after each stage on emoji that it has never seen. Writes runs/quickstart/{report.html,report.png,scores.json}.
#   bash launch/quickstart.sh
# Run again, it goes on where it stopped; remove runs/quickstart to begin anew. QUICKSTART_STEPS=2 makes a rehearsal with
# two updates a stage and a small evaluation, in runs/quickstart-2. Stage 3 has a few updates here, enough to see it run.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh demo
export PYTHONDONTWRITEBYTECODE= # images set it: each command would compile all that it imports
python=${VENV:-.venv}/bin/python

# Two devices share a batch, and huge pages spare the kernel's work on fresh memory: 30 -> 40 images/s in stage 1 on 2 cores.
export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=2}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

output=runs/quickstart evaluation=(--captions 160 --edits 80)
# Scores come at the end, and checkpoints: an interrupted stage saves too.
training=(--config.eval.every=0 --config.checkpoint.every=1000)
if [[ -n ${QUICKSTART_STEPS:-} ]]; then
  output=runs/quickstart-$QUICKSTART_STEPS
  training+=("--config.steps=$QUICKSTART_STEPS")
  evaluation=(--captions 40 --edits 40 --steps 2)
fi

clock() { printf '\n[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

scored() { [[ -f $output/eval/$1/scores.json ]]; }

train() { # STAGE [OPTION ...]
  scored "$1" && return
  clock "$1: training"
  "$python" -m deepgen_jax.train --config "configs/$1.py:tiny" --workdir "$output/$1" "${@:2}" "${training[@]}"
}

# Small updates: of 32 samples they taught a young SCB less (configs/align.py). Stage 2 goes gently, or in so few updates it
# undoes what stage 1 has learned.
train align --config.data.batch_size=2 --config.steps=500 # two samples of a task at a time: eight an update
train sft --config.data.batch_size=4 --config.steps=100 --config.optim.lr=3e-4 "--config.init=$output/align"
# Without rendered words, whose reward needs the package's extra `ocr`; the evaluation judges the same reward.
emoji="(('emoji',{'emoji_similarity':1.0}),)"
train grpo "--config.init=$output/sft" --config.steps=6 --config.grpo.sft_weight=0 \
  --config.grpo.kl_weight=0 "--config.grpo.rewards=$emoji"

models=()
for stage in start align sft grpo; do
  model=$output/$stage
  [[ $stage == start ]] && model=tiny
  scored "$stage" || models+=(--stage "$stage=$model")
done
if ((${#models[@]})); then
  clock "held-out captions and edits, before and after each stage"
  "$python" -m deepgen_jax.evaluation --output "$output/eval" "${models[@]}" "${evaluation[@]}"
fi

clock "report"
drawn=()
for stage in start align sft grpo; do
  drawn+=(--stage "$stage=$output/eval/$stage")
  [[ $stage == start ]] || drawn+=(--run "$stage=$output/$stage")
done
"$python" -m deepgen_jax.report --output "$output" "${drawn[@]}"
clock "done: open $output/report.html"
