#!/usr/bin/env bash
# One TPU VM, a slice, or several slices: everything but the training itself.
#   bash experiments/launch/tpu.sh COMMAND      variables: settings.sh
# bucket   the bucket of all runs, once a project
# create   asks for the slices, and waits until they are there
# install  copies this checkout (its HEAD) to all workers and installs it
# train    starts the run on all workers, or leaves it running
# keep     create, install, train, and again after each preemption, to the end
# watch    the newest line of metrics.jsonl      logs  what worker 0 prints
# stop     SIGTERM on all workers: saves, and ends
# delete   gives the slices back; the bucket stays
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=experiments/launch/settings.sh
source experiments/launch/settings.sh
workdir=gs://$BUCKET/runs/$RUN

tpus() {
  gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

nodes() {
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

# Runs a command on every worker of every slice, all at once.
on_all() {
  local jobs=() failed=0 node job
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" --worker=all --command="$1" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return "$failed"
}

bucket() {
  # Folders that are renamed as a whole: so a checkpoint is whole or not there.
  gcloud storage buckets create "gs://$BUCKET" --project="$PROJECT" \
    --location="${ZONE%-*}" --uniform-bucket-level-access \
    --enable-hierarchical-namespace
}

state() {
  tpus queued-resources describe "$NAME" --format="value(state.state)" \
    2>/dev/null || echo NONE
}

create() {
  local ask=(--accelerator-type="$TYPE" --runtime-version="$VERSION"
    --scopes=https://www.googleapis.com/auth/cloud-platform)
  if ((SLICES == 1)); then
    ask+=(--node-id="$NAME")
  else
    ask+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  if ((SPOT)); then ask+=(--spot); fi
  tpus queued-resources create "$NAME" "${ask[@]}"
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    if [[ $now == FAILED || $now == SUSPENDED || $now == NONE ]]; then
      echo "error: the request $NAME is $now; see: gcloud compute tpus" \
        "queued-resources describe $NAME --zone=$ZONE" >&2
      return 1
    fi
    sleep "$POLL"
  done
}

install() {
  local code
  code=gs://$BUCKET/code/$(git rev-parse HEAD).tar.gz
  git archive --format=tar.gz HEAD | gcloud storage cp - "$code" &&
    on_all "systemctl is-active -q nl_jax || { mkdir -p nl_jax && cd nl_jax &&
      gcloud storage cat $code | tar xz &&
      PYTHON=$PYTHON bash experiments/launch/worker.sh install; }"
}

train() {
  local vars
  vars=$(printf "%s=%q " BUCKET "$BUCKET" CONFIG "$CONFIG" ARGS "$ARGS" \
    RUN "$RUN" DATA "$DATA")
  on_all "cd nl_jax && $vars bash experiments/launch/worker.sh start"
}

keep() {
  local fresh=1
  until gcloud storage ls "$workdir/results.json" >/dev/null 2>&1; do
    again "$fresh" && fresh=0 || fresh=1
    sleep "$POLL"
  done
  echo "done: $workdir/results.json"
}

# A slice that was taken away does not come back: it is asked for anew.
again() {
  local now fresh=$1
  now=$(state)
  if [[ $now != ACTIVE ]]; then
    echo "$NAME is $now" >&2
    if [[ $now != NONE ]]; then delete || return 1; fi
    create || return 1
    fresh=1
  fi
  if ((fresh)); then install && train; fi
}

watch() {
  gcloud storage cat "$workdir/metrics.jsonl" | tail -n 1
}

logs() {
  tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 \
    --command="journalctl --unit=nl_jax --lines=50 --follow"
}

stop() {
  on_all "sudo systemctl stop nl_jax"
}

delete() {
  tpus queued-resources delete "$NAME" --force
}

dispatch "bucket create install train keep watch logs stop delete" "$@"
