#!/usr/bin/env bash
# Trains on this machine alone: a laptop, or a host with one or several GPUs or TPU chips.
#
#   launch/local.sh stage1|stage2|stage3 --config=configs/stage3.py:tiny --workdir=RUN [FLAGS]
#
# What the stage's program takes is passed on to it. A run that crashed in a way that another start
# mends goes on from its last checkpoint. Ctrl-C (for all processes of a service: SIGTERM) stops it
# after the current step, with a checkpoint.
#
# Environment:
#   PLATFORM      cpu, cuda or tpu; by default what JAX finds
#   PYTHON        by default .venv/bin/python, where it exists, or else python3
#   CACHE         folder of compiled programs, default ~/.cache/omniforcing_jax/compiled
#   MAX_RESTARTS  default 3
#   DRY_RUN=1     print the command, run nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

if [[ $# -eq 0 || "$1" == --help || "$1" == -h ]]; then print_help; exit 0; fi
module=$(stage_module "$1")
shift
python=${PYTHON:-python3}
if [[ -z "${PYTHON:-}" && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
MAX_RESTARTS=${MAX_RESTARTS:-3}
environment=("JAX_COMPILATION_CACHE_DIR=${CACHE:-$HOME/.cache/omniforcing_jax/compiled}")
if [[ -n "${PLATFORM:-}" ]]; then environment+=("JAX_PLATFORMS=$PLATFORM"); fi
if [[ "${PLATFORM:-}" == cuda ]]; then environment+=("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"); fi

once() {
  local status=0
  run env "${environment[@]}" "$python" -m "$module" "$@" || status=$?
  # whoever stopped it wants it stopped; 143 restarts elsewhere, where machines are taken away
  if [[ $status == 143 ]]; then exit 143; fi
  return "$status"
}
keep_running once "$@"
