#!/usr/bin/env bash
# usage: tests/package.sh PYTHON
# Builds the sdist and from it the wheel, checks both, installs the wheel alone, and runs
# it in an empty folder. PYTHON is of the environment with the dependencies and ".[test]".
set -euo pipefail
if (($# != 1)); then
  echo "usage: tests/package.sh PYTHON" >&2
  exit 2
fi
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

"$python" -m build --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$python" -m twine check --strict "$work"/dist/*

# A fresh environment: the dependencies by path, without the editable install of PYTHON's,
# which works by a .pth file and those are read in an environment's own folder alone.
"$python" -m venv --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$python" -c 'import site; print(site.getsitepackages()[0])' >"$site/dependencies.pth"
"$python" -m pip --quiet --python "$work/venv/bin/python" install --no-deps \
  --ignore-installed "$work"/dist/*.whl
installed=$(find "$site" -mindepth 1 -maxdepth 1 ! -name "*.dist-info" ! -name "*.pth" -printf "%f ")
[[ $installed == "sd3_jax " ]] || { echo "installs $installed, wanted sd3_jax/" >&2; exit 1; }

mkdir "$work/empty" && cd "$work/empty"
export PATH=$work/venv/bin:$PATH JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0
where=$(python -c 'import sd3_jax; print(sd3_jax.__file__)')
[[ $where == "$site"/* ]] || { echo "runs $where, wanted $site" >&2; exit 1; }
python -c 'from sd3_jax.configs import quickstart; quickstart.get_config("tiny")'
sd3-jax train --config=quickstart:tiny --workdir=run --config.train.sample_every=99
sd3-jax sample --config=quickstart.py:tiny --workdir=run --config.sample.prompt="a red one"
sd3-jax plan --config=configs/sd3_2b.py:tiny --workdir=plan \
  --config.plan.slices=v5e-1 --config.plan.per_chip=1
