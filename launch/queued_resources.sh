#!/usr/bin/env bash
# TPU slices, one or more, as a queued resource; `resume` outlives preemption.
#
#   launch/queued_resources.sh create|wait|setup|stop|status|logs|delete [--dry-run]
#   launch/queued_resources.sh run|resume [--dry-run] JOB --config=… --workdir=…
#   launch/queued_resources.sh preflight [--dry-run] [train] --config=… --workdir=…
#
# `resume` creates what is missing and starts the job. When the resource is preempted, it
# deletes it, creates it anew and starts the same command, which continues from its last
# checkpoint. It exits as the job does: 0 when done on all hosts, another code if restarting
# cannot help, and with 255 if the hosts cannot be reached 10 times in a row.
# `run`, `preflight` and `status` are those of tpu_vm.sh.
# Variables: QUEUED_RESOURCE ZONE PROJECT; to create, ACCELERATOR_TYPE (v5p-256; v5e-16 is
# v5litepod-16), RUNTIME_VERSION (the one that JAX wants on that type), NODE_COUNT (1:
# slices), and SERVICE_ACCOUNT, NETWORK, SUBNETWORK (the project's default ones); to create
# and to run, PROVISIONING (on-demand, spot, reserved); to set up, EXTRAS (of setup.py:
# wandb,mlflow); to run and for preflight, ACCELERATOR_TYPE or TPU_GENERATION (v5e v5p
# v6e), GRACE_S (300; spot: 30), CHECKPOINT_EVERY (spot: 200), CACHE_DIR (of compiled
# programs) and PASS_ENV (names of variables that the job gets; those set of WANDB_API_KEY
# HF_TOKEN MLFLOW_TRACKING_URI); to resume, POLL_S (60) and MAX_RESTARTS (10: of a job that
# failed by itself); for logs, NODE (0: the slice) and WORKER (0: its host).
# docs/how-to/launch.md explains them.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
at_least 0 MAX_RESTARTS POLL_S
at_least 1 NODE_COUNT CHECKPOINT_EVERY
check_extras
scratch
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
  # gcloud warns on stderr even when it succeeds.
  if queued describe "$QUEUED_RESOURCE" --format="value(state.state)" \
    2>"$SCRATCH/stderr"; then
    return
  elif grep -q NOT_FOUND "$SCRATCH/stderr"; then
    echo ABSENT
  else
    cat "$SCRATCH/stderr" >&2
    echo UNKNOWN
  fi
}

wait_for() {
  if "$DRY_RUN"; then
    state
    return
  fi
  local now shown=""
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now == "$shown" ]] || note "is $now"
    shown=$now
    case $now in
      ABSENT | FAILED | SUSPENDING | SUSPENDED)
        return 1
        ;;
    esac
    sleep "$POLL_S"
  done
}

setup() {
  pack && queued scp "$SCRATCH/sd3_jax.tgz" "$QUEUED_RESOURCE:sd3_jax.tgz" \
    --node=all --worker=all &&
    every "$(remote_setup)"
}

status() { every "$(remote_status)"; }

job_status() { # the one that decides; unreachable, with the reason in $SCRATCH/stderr
  local statuses
  # gcloud may succeed though ssh to some of several hosts did not.
  if statuses=$(status 2>"$SCRATCH/stderr") &&
    ! grep -q "failed with exit status" "$SCRATCH/stderr"; then
    deciding <<<"$statuses"
  else
    echo unreachable
  fi
}

# A host that is told to stop records 143, and all others 0, as when the job is done.
deciding() { # of the hosts' statuses, a line each, the one that says what to do
  local line rank highest=0 choice=unreachable
  while read -r line; do
    case $line in
      "exit 0") rank=1 ;; # done, if it is so on all hosts
      none) rank=2 ;;
      running) rank=3 ;;
      "exit 143") rank=4 ;;
      lost | exit) rank=5 line=lost ;; # a reboot, or an empty file
      "exit "[0-9]*) if retryable "${line#exit }"; then rank=5; else rank=6; fi ;;
      *) rank=0 ;; # a host's greeting
    esac
    ((rank <= highest)) || { highest=$rank choice=$line; }
  done
  echo "$choice"
}

logs() {
  queued ssh "$QUEUED_RESOURCE" --node="${NODE:-0}" --worker="${WORKER:-0}" \
    --command="tail -n 100 -F job.log"
}

start() { send_passed && every "$(remote_start)"; }

send_passed() { # to all hosts, before the job that reads it
  ((${#PASSED[@]})) || return 0
  write_passed "$SCRATCH/job.env" quoted &&
    queued scp "$SCRATCH/job.env" "$QUEUED_RESOURCE:job.env" --node=all --worker=all
}

stop() { every "$(remote_stop)"; }
note() { echo "$(date +%T) $QUEUED_RESOURCE: $*" >&2; }

resume() {
  local now job shown="" restarts=0
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
    [[ $now == "$shown" ]] || note "is $now"
    shown=$now
    case $now in
      ABSENT) note "creating" && { create || note "not created"; } ;;
      SUSPENDING | SUSPENDED | FAILED) delete || true ;;
      ACTIVE)
        job=$(job_status)
        case $job in
          unreachable) unreached "$(grep . "$SCRATCH/stderr" | tail -n 1)" ;;
          running) ATTEMPTS=0 ;;
          none) attempt begin ;;
          "exit 143") attempt again ;; # told to stop, and saved
          "exit "[0-9]* | lost)
            note "the job ended: $job"
            if [[ $job == exit* ]] && ! retryable "${job#exit }"; then
              return "${job#exit }"
            fi
            ((restarts++ < ${MAX_RESTARTS:-10})) || return 1
            attempt again
            ;;
        esac
        ;;
    esac
    [[ $now == ACTIVE ]] || ATTEMPTS=0
    sleep "$POLL_S"
  done
}

ATTEMPTS=0 # in a row, to reach the hosts
attempt() { # begin or again
  if "$1"; then ATTEMPTS=0; else unreached "the job is not started"; fi
}

unreached() { # REASON: a host that boots or is preempted is not, for some minutes
  note "not reachable: $1"
  ((++ATTEMPTS < 10)) && return
  note "not reachable 10 times: giving up; the machines stay until you delete them"
  exit 255
}

# Both are tried where a failure is survived, and `set -e` sleeps.
begin() { note "starting" && setup && again; }
again() { stop && start; } # some hosts may still run

job() { # JOB FLAGS…, into PROGRAM, HOST and PASSED
  generation ACCELERATOR_TYPE
  grace 30
  program "$@"
  host_variables
  passed
}

verb=${1:-}
shift || true
case $verb in
  create) needs+=(ACCELERATOR_TYPE) ;;
  run | preflight | resume)
    (($#)) || usage
    [[ $verb != resume && -n ${TPU_GENERATION:-} ]] || needs+=(ACCELERATOR_TYPE)
    ;;
  wait | setup | stop | status | logs | delete) ;;
  *) unknown "$verb" ;;
esac
require "${needs[@]}"
tpu_api
case $verb in create | resume) cloud_tpu ;; esac
case $verb in
  wait) wait_for ;;
  run | resume)
    job "$@"
    if [[ $verb == run ]]; then start; else resume; fi
    ;;
  preflight)
    job preflight "$@"
    send_passed
    every "$(remote_wait)"
    ;;
  *) "$verb" ;;
esac
