#!/usr/bin/env bash
# What tpu.sh does on every worker of a slice; nobody types it.
# install  PYTHON (one that the image offers), this checkout, gcsfuse
# start    mounts the bucket and starts the run, as units of systemd: a shutdown
#          is a SIGTERM, which the run answers by saving, before the bucket goes
set -euo pipefail
cd "$(dirname "$0")/../.."
mount=$HOME/bucket
# Of tpu.sh.
: "${BUCKET:=}" "${CONFIG:=}" "${ARGS:=}" "${RUN:=}" "${DATA:=}" "${PYTHON:=}"
quiet=(-qq -o DPkg::Lock::Timeout=600)  # Fresh machines install of their own.

install() {
  local source=https://packages.cloud.google.com/apt
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsS "$source/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get "${quiet[@]}" update
  sudo apt-get "${quiet[@]}" install -y gcsfuse \
    "python$PYTHON" "python$PYTHON-venv"
  "python$PYTHON" -m venv .venv
  .venv/bin/pip install -q -c requirements.txt -e '.[train,tpu]'
}

unit() {
  local name=$1
  shift
  sudo systemctl reset-failed "$name" 2>/dev/null || true
  sudo systemd-run --unit="$name" --uid="$(id -u)" --setenv=HOME="$HOME" \
    --working-directory="$PWD" --property=Restart=on-failure "$@"
}

start() {
  if [[ -n $DATA ]]; then
    mkdir -p "$HOME/data"
    gcloud storage rsync --recursive "gs://$BUCKET/$DATA" "$HOME/data"
  fi
  mkdir -p "$mount"
  # No caches: workers read what others wrote. No streaming: fsync means it.
  systemctl is-active -q nl_jax_bucket || unit nl_jax_bucket \
    --property=After=network-online.target \
    --property="ExecStopPost=-fusermount -uz $mount" \
    gcsfuse --foreground --metadata-cache-ttl-secs=0 \
    --enable-streaming-writes=false "$BUCKET" "$mount"
  until mountpoint -q "$mount"; do sleep 1; done
  local flags
  read -ra flags <<<"$ARGS"
  # 42: saved after SIGTERM. 10 failures an hour are a mistake, not bad luck.
  systemctl is-active -q nl_jax || unit nl_jax \
    --property=After=nl_jax_bucket.service --property=TimeoutStopSec=600 \
    --property=RestartForceExitStatus=42 --property=RestartSec=30 \
    --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=10 \
    "$PWD/.venv/bin/python" -m experiments.lm --config="$CONFIG" \
    --workdir="$mount/runs/$RUN" --compilation_cache="$HOME/compiled" \
    --preempted_exit_code=42 "${flags[@]}"
}

"$1"
