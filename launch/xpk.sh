#!/usr/bin/env bash
# A job on a GKE cluster through XPK, from an image made by launch/Dockerfile.tpu.
#
#   launch/xpk.sh [--dry-run] JOB --config=… --workdir=…
#
# Variables: CLUSTER ZONE PROJECT WORKLOAD (its name) TPU_TYPE (v6e-256, tpu7x-4x4x4)
# TPU_GENERATION (v5e v5p v6e tpu7x) IMAGE; NUM_SLICES (1), MAX_RESTARTS (10).

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
require CLUSTER ZONE PROJECT WORKLOAD TPU_TYPE IMAGE
generation
(($#)) || usage

run xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="${NUM_SLICES:-1}" \
  --docker-image="$IMAGE" --max-restarts="${MAX_RESTARTS:-10}" \
  --termination-grace-period-seconds=330 \
  --command="TPU_GENERATION=$TPU_GENERATION launch/job.sh python -m sd3_jax.main $(spell "$@")"
