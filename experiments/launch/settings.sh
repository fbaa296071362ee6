# shellcheck shell=bash
# What a run is. Sourced by the other scripts; the environment comes first:
# `NAME=mine TYPE=v5litepod-256 bash experiments/launch/tpu.sh create`.

: "${PROJECT:=}"                      # Google Cloud project.
: "${ZONE:=us-west4-a}"               # Where TYPE is offered.
: "${BUCKET:=$PROJECT-nl-jax}"        # Without gs://; `tpu.sh bucket` makes it.
: "${NAME:=nl-jax}"                   # Of the slice, or of the cluster's job.
: "${TYPE:=v5litepod-8}"              # One VM; v5litepod-256 is 64 VMs.
: "${VERSION:=v2-alpha-tpuv5-lite}"   # Image: v2-alpha-tpuv5 (v5p), -tpuv6e.
: "${PYTHON:=3.11}"                  # Of the workers: 3.11, 3.12 or 3.13.
: "${SLICES:=1}"                      # More: config.mesh.replica is as many.
: "${SPOT:=1}"                        # 1: cheaper, and taken away at any time.
: "${CONFIG:=hope_1b3}"               # Of experiments.lm.
: "${ARGS:=}"                         # Its other flags, separated by spaces.
: "${RUN:=$CONFIG}"                   # The workdir: gs://BUCKET/runs/RUN.
: "${DATA:=}"                         # Of gs://BUCKET: copied to ~/data first.
: "${POLL:=60}"                       # Seconds between two looks.

if [[ -z $PROJECT ]]; then
  echo "error: set PROJECT to your Google Cloud project" >&2
  exit 1
fi
export BUCKET CONFIG ARGS RUN DATA

# Runs the command that is named by the first argument.
dispatch() {
  local known=$1 command=${2:-}
  if [[ " $known " != *" $command "* ]]; then
    echo "error: ${command:-no command} is none of: $known" >&2
    exit 1
  fi
  "$command"
}
