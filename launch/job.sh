#!/usr/bin/env bash
# One host's command, with its TPU generation's flags; every route ends here.
#
#   TPU_GENERATION=v6e launch/job.sh [--dry-run] python -m sd3_jax.main train --config=… --workdir=…
#
# SIGTERM is passed on: training saves and exits with 0, as when it is done. job.sh then
# exits with 143, so that a supervisor restarts the run. If the job exits with 1 or 2, so
# does job.sh: a restart would not help.
# Variables: TPU_GENERATION (v5e v5p v6e tpu7x; none: no flags), GRACE_S (300: seconds
# until SIGKILL follows), JOB_CODE (a file for the exit code, or a folder with one for each
# SLURM_PROCID), and those of sd3_jax, such as JAX_COMPILATION_CACHE_DIR. The job finds
# GRACE_S as SD3_GRACE_S.

set -euo pipefail
cd "$(dirname "$0")/.."
all=("$@")
# shellcheck source=launch/common.sh
source launch/common.sh "${1:-}" # --dry-run and --help in later words are the command's
set -- "${all[@]}"
! "$DRY_RUN" || shift
(($#)) || usage
GRACE_S=${GRACE_S:-300}
at_least 0 GRACE_S
export SD3_GRACE_S=$GRACE_S

if [[ -n ${TPU_GENERATION:-} ]]; then
  generation TPU_GENERATION
  given=${LIBTPU_INIT_ARGS:-} # the last of two wins
  # shellcheck source=launch/flags/v5e.env
  source "launch/flags/$TPU_GENERATION.env"
  for word in "$@"; do # some jobs have flags of their own, as v6e.sample.env
    if [[ $word =~ ^[a-z]+$ && -e launch/flags/$TPU_GENERATION.$word.env ]]; then
      # shellcheck source=launch/flags/v6e.sample.env
      source "launch/flags/$TPU_GENERATION.$word.env"
    fi
  done
  export LIBTPU_INIT_ARGS="$LIBTPU_INIT_ARGS $given"
fi
if "$DRY_RUN"; then
  echo "LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}"
  echo "SD3_GRACE_S=$SD3_GRACE_S"
  run "$@"
  exit
fi

told=false
[[ ! -d ${JOB_CODE:-} ]] || JOB_CODE+=/${SLURM_PROCID:-0}
[[ -z ${JOB_CODE:-} ]] || trap 'echo $? >"$JOB_CODE"' EXIT
trap 'told=true; kill -TERM -- "-$job" 2>/dev/null || true' TERM INT HUP
set -m # a process group of its own, which -$job names
"$@" </dev/null &
job=$!
code=0
wait "$job" || code=$?
"$told" || exit "$code"
for ((i = 0; i < GRACE_S; i++)); do # the trap cut wait short
  kill -0 -- "-$job" 2>/dev/null || break
  sleep 1
done
kill -KILL -- "-$job" 2>/dev/null || true # a child of the job may outlive it
code=0
wait "$job" || code=$?
((code == 1 || code == 2)) || code=143
exit "$code"
