#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice with gcloud.
#
#   launch/tpu_pod.sh create                  asks for the slice and waits until it is there
#   launch/tpu_pod.sh install                 copies this commit to all hosts, installs, mounts BUCKET
#   launch/tpu_pod.sh run STAGE FLAGS...      runs launch.STAGE on all hosts until it is finished
#   launch/tpu_pod.sh stop                    tells all hosts to save and stop
#   launch/tpu_pod.sh delete                  gives the slice back
#
# STAGE is stage1, stage2, stage3, ode_pairs or encode_prompts. On every host the bucket is mounted
# at shared/ in the project's folder, for weights and data; give runs a --workdir under $BUCKET.
# `run` stays until the run has ended, so start it where nothing disconnects it (tmux on a small VM).
# A run that lost a host, hung or was preempted is started again; a spot slice that was taken away is
# asked for anew. It goes on from its last checkpoint.
#
# Environment:
#   TPU_NAME      of the slice, as you like
#   PROJECT ZONE  of Google Cloud; default: gcloud's own settings
#   BUCKET        gs://NAME, in the region of the slice
#   ACCELERATOR   such as v5p-128 (64 chips) or v6e-64
#   RUNTIME       software version; default v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
#   SPOT=1        cheaper, and may be taken away
#   MAX_RESTARTS  default 100
#   DRY_RUN=1     print the commands, run nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

if [[ $# -eq 0 || "$1" == --help || "$1" == -h ]]; then print_help; exit 0; fi
action=$1
shift
require TPU_NAME "a name for the slice"
where=()
if [[ -n "${PROJECT:-}" ]]; then where+=("--project=$PROJECT"); fi
if [[ -n "${ZONE:-}" ]]; then where+=("--zone=$ZONE"); fi

tpu() { run gcloud compute tpus "$@" "${where[@]}"; }

# on_all_hosts COMMAND: one string for the remote shell.
on_all_hosts() { tpu tpu-vm ssh "$TPU_NAME" --worker=all "--command=$1"; }

runtime() {
  case "$ACCELERATOR" in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "set RUNTIME: the software version for $ACCELERATOR" ;;
  esac
}

create() {
  require ACCELERATOR "such as v5p-128"
  local version=${RUNTIME:-} spot=()
  if [[ -z "$version" ]]; then version=$(runtime); fi
  if [[ "${SPOT:-0}" == 1 ]]; then spot=(--spot); fi
  tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$version" "${spot[@]}"
  while [[ "${DRY_RUN:-0}" != 1 ]]; do
    case "$(state)" in
      ACTIVE) break ;;
      FAILED | SUSPENDED) die "the slice was refused: gcloud compute tpus queued-resources describe $TPU_NAME" ;;
    esac
    sleep 30
  done
}

state() {
  gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

install() {
  require BUCKET "gs://NAME for weights, data and runs"
  archive=$(mktemp)
  trap 'rm -f "$archive"' EXIT
  run git archive --format=tar.gz --output="$archive" HEAD
  tpu tpu-vm scp "$archive" "$TPU_NAME:omniforcing_jax.tar.gz" --worker=all
  on_all_hosts "set -e
    mkdir -p omniforcing_jax/shared && tar -xzf omniforcing_jax.tar.gz -C omniforcing_jax
    cd omniforcing_jax
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      sudo apt-get update -q && sudo apt-get install -qy python3.11 python3.11-venv; }
    test -x .venv/bin/python || \$(command -v python3.11 || echo python3) -m venv .venv
    .venv/bin/python -m pip install --quiet --editable '.[tpu,train,storage]'
    command -v gcsfuse || sudo snap install gcsfuse || sudo apt-get install -qy gcsfuse
    mountpoint -q shared || gcsfuse --implicit-dirs ${BUCKET#gs://} shared"
}

# Every host must start anew: one that is still busy with the last run would hold its chips.
stop_hosts() {
  on_all_hosts "cd omniforcing_jax && if test -s run.pid; then
    kill -TERM \$(cat run.pid) 2>/dev/null || true
    for i in \$(seq 120); do kill -0 \$(cat run.pid) 2>/dev/null || break; sleep 1; done
    kill -KILL \$(cat run.pid) 2>/dev/null || true; rm -f run.pid; fi"
}

recover() {
  case "$(state)" in
    ACTIVE) stop_hosts || true ;;
    *)
      say "the slice is gone; asking for another"
      tpu queued-resources delete "$TPU_NAME" --force --quiet || true
      create
      install
      ;;
  esac
}

case "$action" in
  create) create ;;
  install) install ;;
  run)
    require BUCKET "gs://NAME for weights, data and runs"
    [[ $# -gt 0 ]] || die "run what? stage1, stage2, stage3, ode_pairs or encode_prompts"
    module=$(stage_module "$1")
    shift
    arguments=$(printf ' %q' "$@")
    command="cd omniforcing_jax && echo \$\$ > run.pid && exec env \
JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled .venv/bin/python -m $module --distributed$arguments"
    BEFORE_RESTART=recover
    keep_running on_all_hosts "$command"
    ;;
  stop) stop_hosts ;;
  delete) tpu queued-resources delete "$TPU_NAME" --force --quiet ;;
  *) die "there is no '$action'; there are create, install, run, stop and delete" ;;
esac
