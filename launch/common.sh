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

provisioning() { # gcloud's flag for PROVISIONING
  case ${PROVISIONING:-on-demand} in
    on-demand) ;;
    spot | reserved) echo "--$PROVISIONING" ;;
    *) fail "PROVISIONING=$PROVISIONING: wanted on-demand, spot or reserved" ;;
  esac
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
    "nohup env TPU_GENERATION=$TPU_GENERATION JOB_CODE=../job.code launch/job.sh" \
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
