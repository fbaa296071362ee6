#!/usr/bin/env bash
# One slice or several on GKE, by xpk (pip install xpk; also docker, kubectl).
#   bash experiments/launch/xpk.sh COMMAND      variables: settings.sh
# image    builds and pushes the image of this checkout
# cluster  a cluster with SLICES slices of TYPE, and the bucket in it, once
# train    the run, restarted after preemptions and failures, up to 100 times
# watch    the state of the job      logs  what its first worker prints
# stop     ends the job              delete  gives the cluster back
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=experiments/launch/settings.sh
source experiments/launch/settings.sh
: "${CLUSTER:=$NAME}"
: "${IMAGE:=${ZONE%-*}-docker.pkg.dev/$PROJECT/nl-jax/train:latest}"
where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
slices=(--tpu-type="$TYPE" --num-slices="$SLICES")

image() {
  docker build -t "$IMAGE" --build-arg=PYTHON="$PYTHON" \
    -f experiments/launch/tpu.Dockerfile .
  docker push "$IMAGE"
}

cluster() {
  local kind=--on-demand
  if ((SPOT)); then kind=--spot; fi
  xpk cluster create "${where[@]}" "${slices[@]}" "$kind" \
    --enable-workload-identity --enable-gcsfuse-csi-driver
  # As in worker.sh: no caches, no streaming.
  xpk storage attach nl-jax-bucket "${where[@]}" --type=gcsfuse \
    --bucket="$BUCKET" --mount-point=/bucket --readonly=false --size=1 \
    --auto-mount=false --mount-options="metadata-cache:ttl-secs:0,\
write:enable-streaming-writes:false"
}

train() {
  # exec: SIGTERM goes to Python. 1: what a worker says that lost another one.
  xpk workload create "${where[@]}" "${slices[@]}" --workload="$NAME" \
    --docker-image="$IMAGE" --storage=nl-jax-bucket --max-restarts=100 \
    --restart-on-exit-codes=1 --termination-grace-period-seconds=600 \
    --command="exec python -m experiments.lm --config=$CONFIG \
--workdir=/bucket/runs/$RUN --compilation_cache=/tmp/compiled \
--preempted_exit_code=42 $ARGS"
}

watch() {
  xpk workload list "${where[@]}" --filter-by-job="$NAME"
}

logs() {
  kubectl logs --follow --container=jax-tpu --prefix \
    --selector="jobset.sigs.k8s.io/jobset-name=$NAME,\
jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

stop() {
  xpk workload delete "${where[@]}" --workload="$NAME"
}

delete() {
  xpk cluster delete "${where[@]}"
}

dispatch "image cluster train watch logs stop delete" "$@"
