#!/usr/bin/env bash
# A job on a GKE cluster through Cluster Toolkit, from launch/Dockerfile.tpu's image.
#
#   launch/cluster_toolkit.sh [--dry-run] JOB --config=… --workdir=…
#
# Variables: CLUSTER LOCATION (zone or region) PROJECT JOB_NAME (28 letters at most)
# COMPUTE_TYPE (ct5p-hightpu-4t) TOPOLOGY (4x4x4) TPU_GENERATION (v5e v5p v6e tpu7x)
# IMAGE; NUM_SLICES (1), MAX_RESTARTS (10), QUEUE (of Kueue).

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
require CLUSTER LOCATION PROJECT JOB_NAME COMPUTE_TYPE TOPOLOGY IMAGE
generation
(($#)) || usage

run gcluster job submit --cluster="$CLUSTER" --location="$LOCATION" \
  --project="$PROJECT" --name="$JOB_NAME" --compute-type="$COMPUTE_TYPE" \
  --topology="$TOPOLOGY" --num-slices="${NUM_SLICES:-1}" --image="$IMAGE" \
  --restarts="${MAX_RESTARTS:-10}" ${QUEUE:+--queue="$QUEUE"} \
  --command="TPU_GENERATION=$TPU_GENERATION launch/job.sh python -m sd3_jax.main $(spell "$@")"
