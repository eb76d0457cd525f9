#!/usr/bin/env bash
# TPU slices, one or more, as a queued resource; `resume` outlives preemption.
#
#   launch/queued_resources.sh create|wait|setup|stop|status|logs|delete [--dry-run]
#   launch/queued_resources.sh run|resume [--dry-run] JOB --config=… --workdir=…
#   launch/queued_resources.sh preflight [--dry-run] [train] --config=… --workdir=…
#
# `resume` creates what is missing and starts the job. When the resource is preempted, it
# deletes it, creates it anew and starts the same command, which continues from its last
# checkpoint. It exits as the job does: 0 when done, another code if restarting cannot help.
# `run`, `preflight` and `status` are those of tpu_vm.sh; `status` is of the first host.
# Variables: QUEUED_RESOURCE ZONE PROJECT; to create, ACCELERATOR_TYPE (v5p-256),
# RUNTIME_VERSION, NODE_COUNT (1: slices), and SERVICE_ACCOUNT, NETWORK, SUBNETWORK (the
# project's default ones); to create and to run, PROVISIONING (on-demand, spot, reserved);
# to run and for preflight, ACCELERATOR_TYPE or TPU_GENERATION (v5e v5p v6e), GRACE_S (300;
# spot: 30), CHECKPOINT_EVERY (spot: 200), CACHE_DIR (of compiled programs); to resume,
# POLL_S (60) and MAX_RESTARTS (10: of a job that failed by itself); for logs, NODE (0: the
# slice) and WORKER (0: its host). launch/README.md explains them.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
needs=(QUEUED_RESOURCE ZONE PROJECT)
POLL_S=${POLL_S:-60}

queued() { # VERB WHAT FLAGS…
  run gcloud compute tpus queued-resources "$@" --zone="$ZONE" --project="$PROJECT"
}

every() { # a command for all hosts of all slices
  queued ssh "$QUEUED_RESOURCE" --node=all --worker=all --command="$1"
}

create() {
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

logs() {
  queued ssh "$QUEUED_RESOURCE" --node="${NODE:-0}" --worker="${WORKER:-0}" \
    --command="tail -n 100 -F job.log"
}

start() { every "$(remote_start)"; }
stop() { every "$(remote_stop)"; }
note() { echo "$(date +%T) $QUEUED_RESOURCE: $*" >&2; }

resume() {
  local now job restarts=0
  if "$DRY_RUN"; then
    echo "# again and again:" && state
    echo "# where it is SUSPENDED or FAILED:" && delete
    echo "# where it is absent:" && create
    echo "# where it is ACTIVE:" && status
    echo "# where no job runs there:" && setup && stop && start
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
          none) begin || note "not reachable" ;;
          "exit 143") again || note "not reachable" ;; # told to stop, and saved
          "exit "[0-9]* | lost)
            note "the job ended: $job"
            if [[ $job == exit* ]] && ! retryable "${job#exit }"; then
              return "${job#exit }"
            fi
            ((restarts++ < ${MAX_RESTARTS:-10})) || return 1
            again || note "not reachable"
            ;;
        esac
        ;;
    esac
    sleep "$POLL_S"
  done
}

# Both are tried where a failure is survived, and `set -e` sleeps.
begin() { note "starting" && setup && again; }
again() { stop && start; } # some hosts may still run

job() { # JOB FLAGS…, into PROGRAM and HOST
  generation ACCELERATOR_TYPE
  grace 30
  program "$@"
  host_variables
}

verb=${1:-}
shift || true
case $verb in
  create) needs+=(ACCELERATOR_TYPE RUNTIME_VERSION) ;;
  run | preflight | resume)
    (($#)) || usage
    [[ $verb != resume && -n ${TPU_GENERATION:-} ]] || needs+=(ACCELERATOR_TYPE)
    [[ $verb != resume ]] || needs+=(RUNTIME_VERSION)
    ;;
  wait | setup | stop | status | logs | delete) ;;
  *) usage ;;
esac
require "${needs[@]}"
tpu_api
case $verb in
  wait) wait_for ;;
  run | resume)
    job "$@"
    if [[ $verb == run ]]; then start; else resume; fi
    ;;
  preflight)
    job preflight "$@"
    every "$(remote_wait)"
    ;;
  *) "$verb" ;;
esac
