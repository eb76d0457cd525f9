#!/usr/bin/env bash
# TPU slices, one or more, as a queued resource; `resume` outlives preemption.
#
#   launch/queued_resources.sh create|wait|setup|stop|status|delete [--dry-run]
#   launch/queued_resources.sh run|resume [--dry-run] JOB --config=… --workdir=…
#
# `resume` creates what is missing, starts the job, and when the resource was preempted
# deletes it, creates it anew and starts the same command, which goes on from its last
# checkpoint. It ends with the job: 0 when done, 1 and 2 where a restart does not help.
# Variables: QUEUED_RESOURCE ZONE PROJECT; to create, ACCELERATOR_TYPE, RUNTIME_VERSION,
# NODE_COUNT (1: slices), and SERVICE_ACCOUNT, NETWORK, SUBNETWORK (the project's default
# ones); to create and run, PROVISIONING (on-demand, spot, reserved); to run,
# TPU_GENERATION (v5e v5p v6e), GRACE_S (300; spot: 30), CHECKPOINT_EVERY (spot: 200),
# CACHE_DIR (of compiled programs); to resume, POLL_S (60) and MAX_RESTARTS (10: of a job
# that failed by itself). launch/README.md explains them.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
require QUEUED_RESOURCE ZONE PROJECT
tpu_api
POLL_S=${POLL_S:-60}

queued() { # VERB WHAT FLAGS…
  run gcloud compute tpus queued-resources "$@" --zone="$ZONE" --project="$PROJECT"
}

every() { # a command for all hosts of all slices
  queued ssh "$QUEUED_RESOURCE" --node=all --worker=all --command="$1"
}

create() {
  require ACCELERATOR_TYPE RUNTIME_VERSION
  local nodes=(--node-id="$QUEUED_RESOURCE")
  machine_flags
  if ((${NODE_COUNT:-1} > 1)); then
    nodes=(--node-prefix="$QUEUED_RESOURCE" --node-count="$NODE_COUNT")
  fi
  queued create "$QUEUED_RESOURCE" "${nodes[@]}" ${MACHINE[@]+"${MACHINE[@]}"} \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION"
}

delete() { # --force: with its nodes
  queued delete "$QUEUED_RESOURCE" --force --quiet
}

state() { # ACTIVE, SUSPENDED, …; ABSENT; UNKNOWN, if Google does not answer
  local answer
  if answer=$(queued describe "$QUEUED_RESOURCE" --format="value(state.state)" 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

wait_for() {
  if "$DRY_RUN"; then
    state
    return
  fi
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      ABSENT | FAILED | SUSPENDING | SUSPENDED)
        echo "$QUEUED_RESOURCE is $now" >&2
        return 1
        ;;
    esac
    sleep "$POLL_S"
  done
}

setup() {
  pack && queued scp "$PACKED/sd3_jax.tgz" "$QUEUED_RESOURCE:sd3_jax.tgz" \
    --node=all --worker=all &&
    every "$(remote_setup)"
}

status() { # of the first host, whose end is every host's
  queued ssh "$QUEUED_RESOURCE" --node=0 --worker=0 --command="$(remote_status)"
}

start() { every "$(remote_start "$@")"; }
stop() { every "$(remote_stop)"; }
note() { echo "$(date +%T) $QUEUED_RESOURCE: $*" >&2; }

resume() {
  local now job restarts=0
  if "$DRY_RUN"; then
    echo "# again and again:" && state
    echo "# where it is SUSPENDED or FAILED:" && delete
    echo "# where it is absent:" && create
    echo "# where it is ACTIVE:" && status
    echo "# where no job runs there:" && setup && stop && start "$@"
    return
  fi
  while true; do
    now=$(state)
    case $now in
      ABSENT) note "creating" && { create || note "not created"; } ;;
      SUSPENDING | SUSPENDED | FAILED) note "is $now" && { delete || true; } ;;
      ACTIVE)
        job=$(status 2>/dev/null | tail -n 1) || job=unreachable
        case $job in
          "exit 0" | "exit 1" | "exit 2") note "the job ended: $job" && return "${job#exit }" ;;
          none) begin "$@" || note "not reachable" ;;
          "exit 143") again "$@" || note "not reachable" ;; # told to stop, and saved
          exit* | lost)
            note "the job ended: $job"
            ((restarts++ < ${MAX_RESTARTS:-10})) || return 1
            again "$@" || note "not reachable"
            ;;
        esac
        ;;
    esac
    sleep "$POLL_S"
  done
}

# Both are tried where a failure is survived, and `set -e` sleeps.
begin() { note "starting" && setup && again "$@"; }
again() { stop && start "$@"; } # some hosts may still run

verb=${1:-}
shift || true
case $verb in
  create | setup | stop | status | delete) "$verb" ;;
  wait) wait_for ;;
  run | resume)
    (($#)) || usage
    generation
    [[ $verb == run ]] || require ACCELERATOR_TYPE RUNTIME_VERSION
    grace 30
    job_flags "$@"
    host_variables
    if [[ $verb == run ]]; then start "${FLAGS[@]}"; else resume "${FLAGS[@]}"; fi
    ;;
  *) usage ;;
esac
