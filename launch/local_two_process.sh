#!/usr/bin/env bash
# A pod in small: two processes of four virtual CPU devices each, over loopback.
#
#   launch/local_two_process.sh [--dry-run] [FLAGS of train…]
#
# Trains configs/quickstart.py in runs/two_process unless --config or --workdir say
# otherwise. When one process fails the other is killed, and the exit code is the failing
# one's. Variables: PYTHON (.venv/bin/python), PORT (a free one).

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
cd "$ROOT"
check_flags "$@"
PYTHON=${PYTHON:-.venv/bin/python}
[[ " $*" == *" --config="* ]] || set -- --config=configs/quickstart.py "$@"
[[ " $*" == *" --workdir="* ]] || set -- "$@" --workdir=runs/two_process
free='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
PORT=${PORT:-$("$PYTHON" -c "$free")}

shared=(
  JAX_PLATFORMS=cpu
  NPROC=64 # XLA's threads: several for each device, or collectives can deadlock
  XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=4"
  SD3_COORDINATOR="127.0.0.1:$PORT"
  SD3_NUM_PROCESSES=2
)
pids=()
told=false
# shellcheck disable=SC2329 # the trap calls it
stop() { # a second time, at once
  told=true
  trap 'exit 143' TERM INT
  kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap 'kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT
trap stop TERM INT
for i in 0 1; do
  command=(env "${shared[@]}" SD3_PROCESS_ID="$i" "$PYTHON" -m sd3_jax.main train "$@")
  if "$DRY_RUN"; then
    run "${command[@]}"
  else
    "${command[@]}" </dev/null & # itself, not `run`, whose pid would be a shell's
    pids+=($!)
  fi
done
! "$DRY_RUN" || exit 0

code=0
for _ in 0 1; do
  wait -n || {
    code=$?
    break
  }
done
if "$told"; then # the trap cut wait short; they save, and end together
  code=0
  wait "${pids[@]}" || code=$?
fi
exit "$code"
