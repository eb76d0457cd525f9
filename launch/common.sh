# shellcheck shell=bash
# What the launchers share. Sourced without arguments, it takes --dry-run out of the
# caller's; then `run CMD…` prints instead of running.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=false
words=()
for word in "$@"; do
  if [[ $word == --dry-run ]]; then DRY_RUN=true; else words+=("$word"); fi
done
set -- "${words[@]}"

run() {
  if "$DRY_RUN"; then spell "$@"; else "$@"; fi
}

spell() { # a command as one could type it
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}

fail() {
  echo "$0: $*" >&2
  exit 2
}

require() { # names of variables
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || fail "$name is not set"
  done
}

usage() { # the caller's header
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

generation() { # TPU_GENERATION, which must have a file of flags
  require TPU_GENERATION
  [[ -e $ROOT/launch/flags/$TPU_GENERATION.env ]] ||
    fail "TPU_GENERATION=$TPU_GENERATION: wanted v5e, v5p, v6e or tpu7x"
}

provisioning() { # PROVISIONING, checked
  case ${PROVISIONING:=on-demand} in
    on-demand | spot | reserved) ;;
    *) fail "PROVISIONING=$PROVISIONING: wanted on-demand, spot or reserved" ;;
  esac
}

tpu_api() { # TPU VMs and queued resources are the Cloud TPU API's, which ends with v6e
  case ${TPU_GENERATION:-} in tpu7x) refuse_tpu7x "TPU_GENERATION=$TPU_GENERATION" ;; esac
  case ${ACCELERATOR_TYPE:-} in
    tpu7x* | v7x*) refuse_tpu7x "ACCELERATOR_TYPE=$ACCELERATOR_TYPE" ;;
  esac
}

refuse_tpu7x() {
  fail "$1: TPU7x is on GKE only; use launch/gke/render.py, launch/xpk.sh or" \
    "launch/cluster_toolkit.sh"
}

machine_flags() { # into MACHINE: gcloud's flags for what the hosts are and may do
  provisioning
  MACHINE=()
  [[ $PROVISIONING == on-demand ]] || MACHINE+=("--$PROVISIONING")
  [[ -z ${SERVICE_ACCOUNT:-} ]] || MACHINE+=(--service-account="$SERVICE_ACCOUNT")
  [[ -z ${NETWORK:-} ]] || MACHINE+=(--network="$NETWORK")
  [[ -z ${SUBNETWORK:-} ]] || MACHINE+=(--subnetwork="$SUBNETWORK")
}

# Compute Engine takes a Spot machine 30 s after its notice, and GKE leaves 15 s of them
# to pods, whatever a longer grace period says.
grace() { # SPOT_SECONDS: GRACE_S, which is as long as a machine leaves for the last save
  provisioning
  if [[ $PROVISIONING == spot ]]; then
    GRACE_S=$1
    echo "PROVISIONING=spot: SIGKILL follows SIGTERM after $GRACE_S s" >&2
  fi
  GRACE_S=${GRACE_S:-300}
}

job_flags() { # JOB FLAGS…, into FLAGS: a Spot machine's training saves more often
  FLAGS=("$@")
  [[ $PROVISIONING == spot && $1 == train ]] || return 0
  [[ " $*" != *" --config.checkpoint.every"* ]] || return 0
  FLAGS+=("--config.checkpoint.every=${CHECKPOINT_EVERY:=200}")
  echo "PROVISIONING=spot: a checkpoint every $CHECKPOINT_EVERY steps" >&2
}

host_variables() { # into HOST: what job.sh is to have in its environment
  HOST=(TPU_GENERATION="$TPU_GENERATION" GRACE_S="$GRACE_S")
  if [[ -n ${CACHE_DIR:-} ]]; then # else beside the run's checkpoints
    HOST+=(JAX_COMPILATION_CACHE_DIR="$CACHE_DIR")
  fi
}

retryable() { # CODE: whether a restart may help; sd3_jax/errors.py has the codes
  (($1 == 3 || $1 == 42 || $1 >= 127))
}

# What TPU VMs are told through ssh. The tree lies in ~/sd3_jax; job.{log,pid,code} beside
# it are the running job's output, process and exit code.

PACKED=
pack() { # the last commit, as $PACKED/sd3_jax.tgz
  git -C "$ROOT" diff --quiet HEAD || echo "uncommitted changes stay here" >&2
  [[ -n $PACKED ]] || PACKED=$(mktemp -d)
  trap 'rm -rf "$PACKED"' EXIT
  run git -C "$ROOT" archive --format=tar.gz --output="$PACKED/sd3_jax.tgz" HEAD
}

remote_setup() { # the images' Python is 3.10, so uv brings one
  echo "mkdir -p sd3_jax && tar -xzf sd3_jax.tgz -C sd3_jax && cd sd3_jax" \
    "&& python3 -m pip install --quiet --user uv" \
    "&& python3 -m uv venv --quiet --allow-existing --python 3.11 .venv" \
    "&& python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"
}

remote_start() { # JOB FLAGS…
  echo "cd sd3_jax || exit 1;" \
    "if $(alive); then echo 'a job is running: stop it first' >&2; exit 1; fi;" \
    "rm -f ../job.code;" \
    "nohup env $(spell "${HOST[@]}") JOB_CODE=../job.code launch/job.sh" \
    ".venv/bin/python -m sd3_jax.main $(spell "$@")" \
    ">>../job.log 2>&1 </dev/null & echo \$! >../job.pid"
}

remote_stop() { # job.sh passes SIGTERM on, and kills what does not end of it
  echo "cd sd3_jax 2>/dev/null || exit 0; if $(alive); then" \
    "kill -TERM \$(cat ../job.pid); while $(alive); do sleep 1; done; fi;" \
    "rm -f ../job.pid ../job.code"
}

remote_status() { # running, exit N, lost or none
  echo "cd sd3_jax 2>/dev/null || { echo none; exit; };" \
    "if $(alive); then echo running;" \
    "elif [ -e ../job.code ]; then echo exit \$(cat ../job.code);" \
    "elif [ -e ../job.pid ]; then echo lost; else echo none; fi"
}

alive() { # by name too: after a reboot the number may be another's
  echo "grep -qs launch/job.sh /proc/\$(cat ../job.pid 2>/dev/null)/cmdline"
}
