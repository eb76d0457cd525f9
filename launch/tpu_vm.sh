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
# NETWORK, SUBNETWORK (the project's default ones); to create and to run, PROVISIONING (on-demand, spot, reserved); to run and for preflight,
# ACCELERATOR_TYPE or TPU_GENERATION (v5e v5p v6e), GRACE_S (300; spot: 30),
# CHECKPOINT_EVERY (spot: 200) and CACHE_DIR (of compiled programs); for logs, WORKER (0).
# launch/README.md explains them.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
at_least 1 CHECKPOINT_EVERY
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

job() { # JOB FLAGS…, into PROGRAM and HOST
  generation ACCELERATOR_TYPE
  grace 30
  program "$@"
  host_variables
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
  *) usage ;;
esac
require "${needs[@]}"
tpu_api
case $verb in create | resume) cloud_tpu ;; esac
case $verb in
  create | setup) "$verb" ;;
  run)
    job "$@"
    every "$(remote_start)"
    ;;
  preflight)
    job preflight "$@"
    every "$(remote_wait)"
    ;;
  stop) every "$(remote_stop)" ;;
  status) every "$(remote_status)" ;;
  logs)
    vm ssh "$TPU_NAME" --worker="${WORKER:-0}" --command="tail -n 100 -F job.log"
    ;;
  delete) vm delete "$TPU_NAME" --quiet ;;
esac
