#!/usr/bin/env bash
# One host's command, with its TPU generation's flags; every route ends here.
#
#   TPU_GENERATION=v6e launch/job.sh python -m sd3_jax.main train --config=… --workdir=…
#
# SIGTERM is passed on: training saves and ends with 0, as when it is done. So that a
# supervisor starts it again, this then ends with 143.
# Variables: TPU_GENERATION (v5e v5p v6e tpu7x; none: no flags), GRACE_S (300: seconds
# until SIGKILL follows), JOB_CODE (a file for the exit code).

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
(($#)) || usage

if [[ -n ${TPU_GENERATION:-} ]]; then
  generation
  given=${LIBTPU_INIT_ARGS:-} # the last of two wins
  # shellcheck source=launch/flags/v5e.env
  source "launch/flags/$TPU_GENERATION.env"
  export LIBTPU_INIT_ARGS="$LIBTPU_INIT_ARGS $given"
fi
if "$DRY_RUN"; then
  echo "LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}"
  run "$@"
  exit
fi

told=false
[[ -z ${JOB_CODE:-} ]] || trap 'echo $? >"$JOB_CODE"' EXIT
trap 'told=true; kill -TERM -- "-$job" 2>/dev/null || true' TERM INT HUP
set -m # a process group of its own, which -$job names
"$@" </dev/null &
job=$!
code=0
wait "$job" || code=$?
"$told" || exit "$code"
for ((i = 0; i < ${GRACE_S:-300}; i++)); do # the trap cut wait short
  kill -0 -- "-$job" 2>/dev/null || exit 143
  sleep 1
done
kill -KILL -- "-$job" 2>/dev/null || true
exit 143
