#!/usr/bin/env bash
# A job on a GKE cluster through XPK, from an image made by launch/Dockerfile.tpu.
#
#   launch/xpk.sh [--dry-run] JOB --config=… --workdir=…
#
# Variables: CLUSTER ZONE PROJECT WORKLOAD (its name) TPU_TYPE (v6e-256, tpu7x-4x4x4)
# IMAGE; NUM_SLICES (1), MAX_RESTARTS (10), GRACE_S (300; spot: 15), PROVISIONING (as the
# cluster was created: on-demand, spot, reserved), CHECKPOINT_EVERY (spot: 200), CACHE_DIR
# (of compiled programs), TPU_GENERATION (from TPU_TYPE), PASS_ENV (names of variables that
# the job gets; those set of WANDB_API_KEY HF_TOKEN MLFLOW_TRACKING_URI). The service
# account and the network are the cluster's, the extras the image's. JOB is one of
# `sd3-jax --help`, or preflight. docs/how-to/launch.md explains them.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
require CLUSTER ZONE PROJECT WORKLOAD TPU_TYPE IMAGE
at_least 1 NUM_SLICES CHECKPOINT_EVERY
at_least 0 MAX_RESTARTS
litepod TPU_TYPE
generation TPU_TYPE
(($#)) || usage
grace 15
program "$@"
host_variables
passed
image_extras
pass=()
if ((${#PASSED[@]})); then
  scratch
  write_passed "$SCRATCH/job.env"
  pass=(--env-file="$SCRATCH/job.env")
fi

# XPK itself restarts at 42 and 127-255; 3 is sd3_jax's code for "start it again".
run xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="${NUM_SLICES:-1}" \
  --docker-image="$IMAGE" ${pass[@]+"${pass[@]}"} --max-restarts="${MAX_RESTARTS:-10}" \
  --restart-on-exit-codes=3 --termination-grace-period-seconds="$((GRACE_S + 15))" \
  --command="env $(spell "${HOST[@]}") launch/job.sh python $(spell "${PROGRAM[@]}")"
