#!/usr/bin/env bash
# Trains on GKE as a JobSet, one pod a host, on TPU slices or GPU nodes; prints or applies the manifest.
#   IMAGE=REGISTRY/deepgen:1 HOSTS=4 TPU=tpu-v5p-slice TOPOLOGY=2x2x4 bash launch/gke.sh [--dry-run] -- \
#     --config configs/sft.py:full --workdir gs://bucket/sft
# Set: IMAGE (this checkout installed, with the extra tpu or cuda12, as the working directory), HOSTS (pods), and TPU (node
# selector cloud.google.com/gke-tpu-accelerator) with TOPOLOGY, or GPUS (of each pod). May be set: NAME (deepgen), CHIPS (TPU
# chips of a host, 4), RESTARTS (of the whole job, 10), SERVICE_ACCOUNT (that may write the workdir). Needs kubectl with a context, and
# JobSet installed in the cluster. A pod that is evicted gets SIGTERM and two minutes: it saves, the JobSet starts anew, and
# training goes on. --dry-run prints the manifest and applies nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.bash
dry_run=""
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    *) fail "unknown option $1; see the head of launch/gke.sh" ;;
  esac
  shift
done
[[ $# -gt 0 ]] && shift
need IMAGE "the container image with this checkout installed"
need HOSTS "how many pods, one a host"
[[ $HOSTS =~ ^[1-9][0-9]*$ ]] || fail "HOSTS=$HOSTS is no number of pods"
if [[ -n ${TPU:-} ]]; then
  need TOPOLOGY "the slice's topology, e.g. 2x2x4"
  selector="
              nodeSelector: {cloud.google.com/gke-tpu-accelerator: $TPU, cloud.google.com/gke-tpu-topology: $TOPOLOGY}"
  resource="google.com/tpu: ${CHIPS:-4}"
else
  need GPUS "of each pod; or TPU and TOPOLOGY for a TPU slice"
  selector="" resource="nvidia.com/gpu: $GPUS"
fi
training "$@"
shared_workdir "$@"
[[ -n $dry_run ]] || command -v kubectl >/dev/null || fail "kubectl is missing: install it and choose the cluster's context"

name=${NAME:-deepgen}
account=""
[[ -z ${SERVICE_ACCOUNT:-} ]] || account="
              serviceAccountName: $SERVICE_ACCOUNT"
# The first pod of the job is where the others find the run; its name is known beforehand.
coordinator="$name-train-0-0.$name:12765"
command="exec $(show python -m deepgen_jax.train "$@") --config.distributed=$coordinator/$HOSTS/\$JOB_COMPLETION_INDEX"
quoted=${command//\'/\'\'}
manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy: {maxRestarts: ${RESTARTS:-10}}
  network: {enableDNSHostnames: true, subdomain: $name}
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120$account$selector
              containers:
                - name: train
                  image: $IMAGE
                  command: [bash, -c, '$quoted']
                  ports: [{containerPort: 12765}]
                  resources: {limits: {$resource}}"
if [[ -n $dry_run ]]; then
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
  echo "follow it: kubectl logs --follow $(show "job/$name-train-0")"
fi
