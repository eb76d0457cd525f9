# make quickstart: train, sample, score and report, from nothing but Python 3.11
# make test: every promise at least once; CI as well
# make test-slow: the same promises on more meshes, orders of devices and kinds of fault
# make docs: the site of docs/, into build/site; a warning is an error
# make package: the wheel, built, installed and run from an empty folder; CI as well
# make chaos: faults thrown at real runs, and what was lost; ten minutes at most
# make bench: us and PyTorch on the clock, into benchmarks/; an idle machine, half an hour
# make bench-guard: the same cases again, and what is more than 15 % worse than that
# make plan: the large recipes compiled for TPU slices, without a TPU; half an hour

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
SD3 = $(VENV)/bin/sd3-jax

.PHONY: quickstart digits plan chaos bench bench-guard test test-slow lint docs package clean

quickstart: $(VENV)/installed
	$(SD3) train --config=configs/quickstart.py --workdir=$(RUN)
	$(SD3) sample --config=configs/quickstart.py --workdir=$(RUN)
	$(SD3) evaluate --config=configs/quickstart.py --workdir=$(RUN)
	$(SD3) report --config=configs/quickstart.py --workdir=$(RUN)

digits: $(VENV)/installed
	$(SD3) train --config=configs/digits.py --workdir=runs/digits
	$(SD3) evaluate --config=configs/digits.py --workdir=runs/digits
	$(SD3) report --config=configs/digits.py --workdir=runs/digits

plan: $(VENV)/installed-test
	$(VENV)/bin/python benchmarks/plan.py

chaos: $(VENV)/installed-test
	$(VENV)/bin/python tests/chaos.py $(SEED)

BENCH = $(SD3) benchmark --config=configs/benchmark.py
CASES = --config.benchmark.scaling.kinds= --config.benchmark.startup=0

bench: $(VENV)/installed-test
	$(BENCH) $(CASES) --workdir=runs/speed_cpu
	$(BENCH) --config.benchmark.cases= --workdir=runs/scaling_cpu
	cp runs/speed_cpu/benchmark.svg benchmarks/speed_cpu.svg
	for run in speed scaling; do for kind in json md; do \
		cp runs/$${run}_cpu/benchmark.$$kind benchmarks/$${run}_cpu.$$kind; done; done

bench-guard: $(VENV)/installed-test
	$(BENCH) $(CASES) --workdir=runs/bench-guard \
		--config.benchmark.guard=benchmarks/speed_cpu.json

# A file's tests share fixtures, so a worker takes whole files. pytest-xdist 3.8 hangs when
# it replaces a worker that died: the run ends instead, and names the test.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	--max-worker-restart=0

test: $(VENV)/installed-test lint
	$(PYTEST)

test-slow: $(VENV)/installed-test
	$(PYTEST) -m slow

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/python tests/house.py
	$(VENV)/bin/python tests/prose.py

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

package: $(VENV)/installed-test
	tests/package.sh $(VENV)/bin/python

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) runs tests/.cache build dist *.egg-info
