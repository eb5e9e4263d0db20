# Sourced by the launchers: printing instead of running, asking for variables, starting again.

say() { echo "$(basename "$0"): $*" >&2; }

die() { say "$*"; exit 2; }

# Prints the comment at the head of the script that sources this file.
print_help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Runs a command, or prints it, quoted for pasting, with DRY_RUN=1.
run() {
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# require NAME MEANING: the environment variable NAME must be set.
require() { [[ -n "${!1:-}" ]] || die "set $1: $2 (--help says more)"; }

# stage_module NAME: launch.stage3 for stage3; only programs that may run on several hosts.
stage_module() {
  case "$1" in
    stage1 | stage2 | stage3 | ode_pairs | encode_prompts) echo "launch.$1" ;;
    *) die "there is no stage '$1'; there are stage1, stage2, stage3, ode_pairs, encode_prompts" ;;
  esac
}

# Whether a run that ended with this status goes on when it is started again: not all processes
# came (3), one was lost (4), hung (5), died (134, 137), or was told to stop (143); 255 is ssh's.
resumable() {
  case "$1" in
    3 | 4 | 5 | 134 | 137 | 143 | 255) return 0 ;;
    *) return 1 ;;
  esac
}

# keep_running FUNCTION...: starts it again while it is resumable, at most MAX_RESTARTS times.
# Between two starts BEFORE_RESTART is called, where it is the name of a function.
keep_running() {
  local restarts=0 status
  while true; do
    status=0
    "$@" || status=$?
    resumable "$status" || return "$status"
    restarts=$((restarts + 1))
    if ((restarts > ${MAX_RESTARTS:-100})); then
      say "ended with status $status, after $((restarts - 1)) restarts; not started again"
      return "$status"
    fi
    say "ended with status $status; starting it again ($restarts), it goes on from its checkpoint"
    sleep "${RESTART_SECONDS:-10}"
    if [[ -n "${BEFORE_RESTART:-}" ]]; then "$BEFORE_RESTART"; fi
  done
}
