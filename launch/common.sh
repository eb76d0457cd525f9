# shellcheck shell=bash
# What the launchers share. Sourced without arguments, it takes --dry-run and --help out of
# the caller's. After --dry-run, `run CMD…` prints instead of running.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=false
HELP=false
words=()
for word in "$@"; do
  case $word in
    --dry-run) DRY_RUN=true ;;
    --help | -h) HELP=true ;;
    *) words+=("$word") ;;
  esac
done
set -- ${words[@]+"${words[@]}"}

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

require() { # names of variables; all that are missing are named at once
  local name missing=() list
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  ((${#missing[@]})) || return 0
  list=${missing[*]}
  list=${list// /, }
  [[ $list != *,* ]] || list="${list%, *} and ${missing[-1]}"
  fail "set $list; see launch/${0##*/} --help"
}

at_least() { # MINIMUM NAMES… of variables, which hold integers if they are set
  local name
  for name in "${@:2}"; do
    [[ -n ${!name:-} ]] || continue
    # No leading zero, which bash takes for octal; no more digits than it can count with.
    if ! [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!name} < $1)); then
      fail "$name=${!name}: expected an integer, $1 or more, without leading zeros"
    fi
  done
}

header() { # the caller's; Slurm runs a copy, which has another name
  local file=$ROOT/launch/${0##*/}
  [[ -e $file ]] || file=$0
  sed -n '/^#SBATCH/d; 2,/^$/s/^# \{0,1\}//p' "$file"
}

usage() {
  header >&2
  exit 2
}

unknown() { # VERB: one that the caller does not have, or none
  [[ -z $1 ]] || echo "$1: expected one of the words below" >&2
  usage
}

generation() { # VARIABLE: TPU_GENERATION, from the type of machine that VARIABLE holds
  local type=${!1:-} kind=""
  case $type in
    v5litepod-* | v5e-* | ct5lp-* | ct5l-*) kind=v5e ;;
    v5p-* | ct5p-*) kind=v5p ;;
    v6e-* | ct6e-*) kind=v6e ;;
    tpu7x-*) kind=tpu7x ;;
  esac
  if [[ -z ${TPU_GENERATION:-} ]]; then
    [[ -n $kind ]] || fail "$1=$type: expected v5litepod-N, v5p-N, v6e-N, …, or set TPU_GENERATION"
    TPU_GENERATION=$kind
  fi
  [[ -e $ROOT/launch/flags/$TPU_GENERATION.env ]] ||
    fail "TPU_GENERATION=$TPU_GENERATION: expected v5e, v5p, v6e or tpu7x"
  [[ ${kind:-$TPU_GENERATION} == "$TPU_GENERATION" ]] ||
    fail "$1=$type does not match TPU_GENERATION=$TPU_GENERATION; unset TPU_GENERATION," \
      "which follows from $1"
}

check_flags() { # FLAGS… of a job: an unset variable leaves an empty value
  local word
  for word in "$@"; do
    case $word in
      --workdir=) fail "--workdir= is empty: expected a folder that all hosts see (gs://…)" ;;
      --config=) fail "--config= is empty: expected configs/RECIPE.py" ;;
    esac
  done
}

check_job() { # JOB FLAGS…, before any machine is asked
  local jobs
  jobs=$(sed -n 's/^    "\([a-z]*\)": Job(.*/\1/p' "$ROOT/sd3_jax/jobs/__init__.py")
  jobs="${jobs//$'\n'/ } preflight"
  [[ " $jobs " == *" $1 "* ]] || fail "unknown job $1: expected one of ${jobs// /, }"
  check_flags "$@"
}

provisioning() { # PROVISIONING, checked
  case ${PROVISIONING:=on-demand} in
    on-demand | spot | reserved) ;;
    *) fail "PROVISIONING=$PROVISIONING: expected on-demand, spot or reserved" ;;
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

litepod() { # VARIABLE, which holds a TPU's type: v5e-N is v5litepod-N to Google's tools
  [[ ${!1:-} == v5e-* ]] || return 0
  printf -v "$1" %s "v5litepod-${!1#v5e-}"
  echo "$1=v5e-${!1#v5litepod-}: using ${!1}, the name in Google's tools" >&2
}

cloud_tpu() { # ACCELERATOR_TYPE and RUNTIME_VERSION, as the Cloud TPU API takes them
  local version=
  litepod ACCELERATOR_TYPE
  case $ACCELERATOR_TYPE in # https://cloud.google.com/tpu/docs/runtimes
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
  esac
  if [[ -z ${RUNTIME_VERSION:-} ]]; then
    RUNTIME_VERSION=$version
    require RUNTIME_VERSION
    echo "using RUNTIME_VERSION=$RUNTIME_VERSION for $ACCELERATOR_TYPE" >&2
  fi
  case $RUNTIME_VERSION in
    "$version") ;;
    v2-alpha-tpuv5-lite | v2-alpha-tpuv5 | v2-alpha-tpuv6e | tpu-ubuntu2204-base)
      [[ -z $version ]] || fail "RUNTIME_VERSION=$RUNTIME_VERSION is for other TPUs than" \
        "ACCELERATOR_TYPE=$ACCELERATOR_TYPE; set $version, or unset it"
      ;;
  esac
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
  at_least 0 GRACE_S
  provisioning
  if [[ $PROVISIONING == spot ]]; then
    GRACE_S=$1
    echo "PROVISIONING=spot: SIGKILL follows SIGTERM after $GRACE_S s" >&2
  fi
  GRACE_S=${GRACE_S:-300}
}

program() { # JOB FLAGS…, into PROGRAM: Python's arguments; Spot training saves more often
  check_job "$@"
  PROGRAM=(-m sd3_jax.main "$@")
  [[ $1 != preflight ]] || PROGRAM=(launch/preflight.py "${@:2}")
  [[ ${PROVISIONING:-} == spot && $1 == train ]] || return 0
  [[ " $*" != *" --config.checkpoint.every"* ]] || return 0
  PROGRAM+=("--config.checkpoint.every=${CHECKPOINT_EVERY:=200}")
  echo "PROVISIONING=spot: saving a checkpoint every $CHECKPOINT_EVERY steps" >&2
}

host_variables() { # into HOST: what job.sh is to have in its environment
  HOST=(TPU_GENERATION="$TPU_GENERATION" GRACE_S="$GRACE_S")
  if [[ -n ${CACHE_DIR:-} ]]; then # else beside the run's checkpoints
    HOST+=(JAX_COMPILATION_CACHE_DIR="$CACHE_DIR")
  fi
}

check_extras() { # EXTRAS, of setup.py
  [[ ${EXTRAS:-} =~ ^([a-z]+(,[a-z]+)*)?$ ]] ||
    fail "EXTRAS=$EXTRAS: expected extras of setup.py separated by commas, such as wandb,mlflow"
}

image_extras() { # where an image is run, it has its extras already
  check_extras
  [[ -z ${EXTRAS:-} ]] ||
    echo "EXTRAS=$EXTRAS: IMAGE needs them: docker build --build-arg EXTRAS=$EXTRAS" >&2
}

# Credentials and addresses of services. Their values are written to files that only you
# can read: never to a command line, which `ps` shows, and never to the output.

passed() { # into PASSED: names of the variables that the job gets from your environment
  local name
  PASSED=()
  for name in ${PASS_ENV-WANDB_API_KEY HF_TOKEN MLFLOW_TRACKING_URI}; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
      fail "PASS_ENV=$PASS_ENV: expected names of variables separated by spaces"
    [[ -n ${!name:-} || -z ${PASS_ENV:-} ]] || fail "PASS_ENV names $name, which is not set"
    [[ -n ${!name:-} ]] || continue
    [[ ${!name} != *$'\n'* ]] || fail "$name has more than one line and cannot be passed"
    PASSED+=("$name")
  done
  ((${#PASSED[@]} == 0)) || echo "the job gets ${PASSED[*]} from your environment" >&2
}

write_passed() { # FILE [quoted]: NAME=VALUE lines; quoted for a shell, else as they are
  local name value quote="'"
  (umask 077 && : >"$1")
  for name in ${PASSED[@]+"${PASSED[@]}"}; do
    value=${!name}
    [[ -z ${2:-} ]] || value="'${value//$quote/$quote\\$quote$quote}'"
    echo "$name=$value" >>"$1"
  done
}

retryable() { # CODE: whether a restart may help: sd3_jax/errors.py's 3, and signals
  (($1 == 3 || $1 >= 128))
}

# What TPU VMs are told through ssh. The tree lies in ~/sd3_jax; job.{log,pid,code} beside
# it are the running job's output, process and exit code. job.env holds what PASS_ENV
# names, until the job has read it.

SCRATCH=
scratch() { # a folder that goes when the script ends
  [[ -n $SCRATCH ]] || SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
}

pack() { # the last commit, as $SCRATCH/sd3_jax.tgz
  git -C "$ROOT" diff --quiet HEAD || echo "uncommitted changes are not copied" >&2
  scratch
  run git -C "$ROOT" archive --format=tar.gz --output="$SCRATCH/sd3_jax.tgz" HEAD
}

remote_setup() { # the images' Python is 3.10, so uv brings one
  echo "mkdir -p sd3_jax && tar -xzf sd3_jax.tgz -C sd3_jax && cd sd3_jax" \
    "&& python3 -m pip install --quiet --user uv" \
    "&& python3 -m uv venv --quiet --allow-existing --python 3.11 .venv" \
    "&& python3 -m uv pip install --quiet --python .venv/bin/python" \
    "-e '.[tpu${EXTRAS:+,$EXTRAS}]'"
}

remote_start() {
  echo "$(remote_passed)$(remote_idle) rm -f ../job.code;" \
    "nohup env $(spell "${HOST[@]}") JOB_CODE=../job.code launch/job.sh" \
    ".venv/bin/python $(spell "${PROGRAM[@]}")" \
    ">>../job.log 2>&1 </dev/null & echo \$! >../job.pid"
}

remote_wait() { # the same in the foreground, with its output and exit code
  echo "$(remote_passed)$(remote_idle) env $(spell "${HOST[@]}") launch/job.sh" \
    ".venv/bin/python $(spell "${PROGRAM[@]}")"
}

remote_passed() { # read job.env, which is then gone
  ((${#PASSED[@]} == 0)) || echo "set -a; . ./job.env; set +a; rm -f job.env; "
}

remote_idle() { # two jobs cannot share a TPU
  echo "cd sd3_jax || exit 1;" \
    "if $(alive); then echo 'a job is running: stop it first' >&2; exit 1; fi;"
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

if "$HELP"; then
  header
  exit
fi
