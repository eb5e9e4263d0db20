#!/usr/bin/env bash
# Trains on a GKE cluster of TPUs with XPK (github.com/AI-Hypercomputer/xpk).
#
#   launch/xpk.sh run NAME STAGE FLAGS...     starts launch.STAGE as the workload NAME
#   launch/xpk.sh stop NAME                   deletes the workload; its pods save and stop
#   launch/xpk.sh list                        shows the workloads
#
# STAGE is stage1, stage2, stage3, ode_pairs or encode_prompts. XPK packs this folder into an image,
# and Kubernetes starts the workload again when a pod is lost or preempted; it goes on from its last
# checkpoint. Give runs a --workdir on object storage; weights and data must be on a volume that all
# pods mount (`xpk storage attach` with --auto-mount=true makes one).
#
# Environment:
#   CLUSTER       made with `xpk cluster create`
#   PROJECT ZONE  of Google Cloud
#   TPU_TYPE      such as v5p-128 (64 chips) or v6e-64
#   BUCKET        gs://NAME, for compiled programs
#   SLICES        default 1
#   IMAGE         base image with Python 3.11 or newer; default python:3.12
#   MAX_RESTARTS  default 20
#   DRY_RUN=1     print the commands, run nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

if [[ $# -eq 0 || "$1" == --help || "$1" == -h ]]; then print_help; exit 0; fi
action=$1
shift
require CLUSTER "the GKE cluster"
require PROJECT "the Google Cloud project"
require ZONE "the zone of the cluster"
where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")

case "$action" in
  run)
    [[ $# -ge 2 ]] || die "run NAME STAGE FLAGS..."
    require TPU_TYPE "such as v5p-128"
    require BUCKET "gs://NAME for compiled programs"
    name=$1
    module=$(stage_module "$2")
    shift 2
    arguments=$(printf ' %q' "$@")
    # exec: the signal that announces a preemption must reach Python
    run xpk workload create --workload="$name" "${where[@]}" \
      --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" \
      --max-restarts="${MAX_RESTARTS:-20}" --restart-on-user-code-failure \
      --termination-grace-period-seconds=180 \
      --base-docker-image="${IMAGE:-python:3.12}" --script-dir=. \
      --command="pip install --quiet --editable '.[tpu,train,storage]' && \
export JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled && \
exec python -m $module --distributed$arguments"
    ;;
  stop)
    [[ $# -eq 1 ]] || die "stop NAME"
    run xpk workload delete --workload="$1" "${where[@]}"
    ;;
  list) run xpk workload list "${where[@]}" ;;
  *) die "there is no '$action'; there are run, stop and list" ;;
esac
