#!/usr/bin/env bash
# One TPU slice as a TPU VM: the same job on all of its hosts.
#
#   launch/tpu_vm.sh create|setup|stop|status|logs|delete [--dry-run]
#   launch/tpu_vm.sh run [--dry-run] JOB --config=… --workdir=…
#
# Variables: TPU_NAME ZONE PROJECT; to create, ACCELERATOR_TYPE and RUNTIME_VERSION, and
# SERVICE_ACCOUNT, NETWORK, SUBNETWORK (the project's default ones); to create and run,
# PROVISIONING (on-demand, spot, reserved); to run, TPU_GENERATION (v5e v5p v6e), GRACE_S
# (300; spot: 30), CHECKPOINT_EVERY (spot: 200) and CACHE_DIR (of compiled programs); for
# logs, WORKER (0). launch/README.md explains them.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
require TPU_NAME ZONE PROJECT
tpu_api

vm() { # VERB WHAT FLAGS…
  run gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --project="$PROJECT"
}

every() { # a command for all hosts
  vm ssh "$TPU_NAME" --worker=all --command="$1"
}

create() {
  require ACCELERATOR_TYPE RUNTIME_VERSION
  machine_flags
  vm create "$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --version="$RUNTIME_VERSION" ${MACHINE[@]+"${MACHINE[@]}"}
}

setup() {
  pack
  vm scp "$PACKED/sd3_jax.tgz" "$TPU_NAME:sd3_jax.tgz" --worker=all
  every "$(remote_setup)"
}

job() {
  (($#)) || usage
  generation
  grace 30
  job_flags "$@"
  host_variables
  every "$(remote_start "${FLAGS[@]}")"
}

verb=${1:-}
shift || true
case $verb in
  create | setup) "$verb" ;;
  run) job "$@" ;;
  stop) every "$(remote_stop)" ;;
  status) every "$(remote_status)" ;;
  logs)
    vm ssh "$TPU_NAME" --worker="${WORKER:-0}" --command="tail -n 100 -F job.log"
    ;;
  delete) vm delete "$TPU_NAME" --quiet ;;
  *) usage ;;
esac
