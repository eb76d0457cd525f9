#!/usr/bin/env bash
# A job on a GKE cluster through Cluster Toolkit, from launch/Dockerfile.tpu's image.
#
#   launch/cluster_toolkit.sh [--dry-run] JOB --config=… --workdir=…
#
# Variables: CLUSTER LOCATION (zone or region) PROJECT JOB_NAME (28 letters at most)
# COMPUTE_TYPE (ct5p-hightpu-4t) TOPOLOGY (4x4x4) IMAGE; NUM_SLICES (1), MAX_RESTARTS (10),
# QUEUE (of Kueue), SERVICE_ACCOUNT (of Kubernetes), GRACE_S (300; spot: 15), PROVISIONING
# (on-demand, spot, reserved: of nodes that GKE creates for the job; reserved needs
# RESERVATION), CHECKPOINT_EVERY (spot: 200), CACHE_DIR (of compiled programs),
# TPU_GENERATION (from COMPUTE_TYPE). The network is the cluster's, the extras the image's.
# gcluster passes no variables of yours (PASS_ENV): use gke/render.py --secret for a job
# that needs some. JOB is one of `sd3-jax --help`, or preflight. docs/how-to/launch.md explains
# them.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
require CLUSTER LOCATION PROJECT JOB_NAME COMPUTE_TYPE TOPOLOGY IMAGE
at_least 1 NUM_SLICES CHECKPOINT_EVERY
at_least 0 MAX_RESTARTS
generation COMPUTE_TYPE
(($#)) || usage
grace 15
program "$@"
host_variables
image_extras
# gcluster would have them in the command, which `ps` and the cluster show.
[[ -z ${PASS_ENV:-} ]] ||
  fail "PASS_ENV=$PASS_ENV: gcluster passes no variables; use launch/gke/render.py --secret"
passed 2>/dev/null
((${#PASSED[@]} == 0)) ||
  echo "the job does not get ${PASSED[*]}: use launch/gke/render.py --secret for that" >&2
nodes=()
case $PROVISIONING in
  spot) nodes=(--gke-nap-provisioning=spot) ;;
  reserved)
    require RESERVATION
    nodes=(--gke-nap-provisioning=reservation --gke-nap-reservation="$RESERVATION")
    ;;
esac

run gcluster job submit --cluster="$CLUSTER" --location="$LOCATION" \
  --project="$PROJECT" --name="$JOB_NAME" --compute-type="$COMPUTE_TYPE" \
  --topology="$TOPOLOGY" --num-slices="${NUM_SLICES:-1}" --image="$IMAGE" \
  --restarts="${MAX_RESTARTS:-10}" --grace-period="$((GRACE_S + 15))s" \
  --restart-on-exit-codes="3,$(seq -s, 128 255)" ${QUEUE:+--queue="$QUEUE"} \
  ${SERVICE_ACCOUNT:+--service-account="$SERVICE_ACCOUNT"} ${nodes[@]+"${nodes[@]}"} \
  --command="env $(spell "${HOST[@]}") launch/job.sh python $(spell "${PROGRAM[@]}")"
