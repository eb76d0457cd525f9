#!/usr/bin/env bash
# One TPU slice as a TPU VM: the same job on all of its hosts.
#
#   launch/tpu_vm.sh create|setup|stop|status|logs|delete [--dry-run]
#   launch/tpu_vm.sh run [--dry-run] JOB --config=… --workdir=…
#   launch/tpu_vm.sh preflight [--dry-run] [train] --config=… --workdir=…
#
# `run` starts the job and returns. `preflight` checks all hosts and returns the result.
# `status` prints a line per host: running, exit N, lost (the process is gone and left no
# exit code: the host was rebooted) or none (no job was started since create or stop).
# Variables: TPU_NAME ZONE PROJECT; to create, ACCELERATOR_TYPE (v6e-16; v5e-16 is
# v5litepod-16), RUNTIME_VERSION (the one that JAX wants on that type), SERVICE_ACCOUNT,
# NETWORK, SUBNETWORK (the project's default ones); to create and to run, PROVISIONING
# (on-demand, spot, reserved); to set up, EXTRAS (of setup.py: wandb,mlflow); to run and
# for preflight, ACCELERATOR_TYPE or TPU_GENERATION (v5e v5p v6e), GRACE_S (300; spot: 30),
# CHECKPOINT_EVERY (spot: 200), CACHE_DIR (of compiled programs) and PASS_ENV (names of
# variables that the job gets; those set of WANDB_API_KEY HF_TOKEN MLFLOW_TRACKING_URI);
# for logs, WORKER (0). docs/how-to/launch.md explains them.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
at_least 1 CHECKPOINT_EVERY
check_extras
needs=(TPU_NAME ZONE PROJECT)

vm() { # VERB WHAT FLAGS…
  run gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --project="$PROJECT"
}

every() { # a command for all hosts
  vm ssh "$TPU_NAME" --worker=all --command="$1"
}

create() {
  machine_flags
  vm create "$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --version="$RUNTIME_VERSION" ${MACHINE[@]+"${MACHINE[@]}"}
}

setup() {
  pack
  vm scp "$SCRATCH/sd3_jax.tgz" "$TPU_NAME:sd3_jax.tgz" --worker=all
  every "$(remote_setup)"
}

job() { # JOB FLAGS…, into PROGRAM, HOST and PASSED
  generation ACCELERATOR_TYPE
  grace 30
  program "$@"
  host_variables
  passed
}

send_passed() { # to all hosts, before the job that reads it
  ((${#PASSED[@]})) || return 0
  scratch
  write_passed "$SCRATCH/job.env" quoted
  vm scp "$SCRATCH/job.env" "$TPU_NAME:job.env" --worker=all
}

verb=${1:-}
shift || true
case $verb in
  create) needs+=(ACCELERATOR_TYPE) ;;
  run | preflight)
    (($#)) || usage
    [[ -n ${TPU_GENERATION:-} ]] || needs+=(ACCELERATOR_TYPE)
    ;;
  setup | stop | status | logs | delete) ;;
  *) unknown "$verb" ;;
esac
require "${needs[@]}"
tpu_api
case $verb in create | resume) cloud_tpu ;; esac
case $verb in
  create | setup) "$verb" ;;
  run)
    job "$@"
    send_passed
    every "$(remote_start)"
    ;;
  preflight)
    job preflight "$@"
    send_passed
    every "$(remote_wait)"
    ;;
  stop) every "$(remote_stop)" ;;
  status) every "$(remote_status)" ;;
  logs)
    vm ssh "$TPU_NAME" --worker="${WORKER:-0}" --command="tail -n 100 -F job.log"
    ;;
  delete) vm delete "$TPU_NAME" --quiet ;;
esac
