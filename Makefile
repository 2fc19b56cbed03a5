# On a fresh machine, `make train` and `make test` are enough: both install what they need.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help setup train tune test test-gpu test-long test-quick storm lint docs reference bench bench-speed bench-gpu \
        bench-corpora bench-stores bench-survival bench-tuning clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 23

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

setup: $(VENV)/ready  ## create .venv and install everything into it

train: setup  ## train configs/seed.toml on a local Ray cluster
	$(RUN) -m job train configs/seed.toml

tune: setup  ## search for a learning rate on this machine; results in runs/tune
	$(RUN) -m job tune configs/tune.toml

test: setup  ## all tests but the long ones (13 to 15 minutes on two cores; PYTEST="--time-table" and so on)
	$(RUN) -m pytest -m "not long" --numprocesses 2 --dist loadgroup $(PYTEST)

test-long: setup  ## the long tests: traces of the book, faults on several nodes, memory over 10,000 steps, sanitizers
	$(RUN) -m pytest -m long $(PYTEST)

test-quick: setup  ## the tests that need no Ray (a minute)
	$(RUN) -m pytest -m "not cluster and not slow and not long" --numprocesses 2 --dist loadgroup --hypothesis-profile quick

test-gpu: setup  ## the tests of GPUs: on CUDA if there is a GPU, else what a CPU can run, and a list of what needs CUDA
	$(RUN) -m pytest -m gpu $(PYTEST)

storm: setup  ## the chaos test: twelve faults and a slow object store, the same result (12 minutes; STORM="--mode fp64" and so on)
	$(RUN) tests/chaos.py $(STORM)

lint: setup  ## formatters, linters, type checker, spelling: all hooks of .pre-commit-config.yaml, as CI runs them
	$(VENV)/bin/pre-commit run --all-files --show-diff-on-failure

docs: setup  ## the documentation as pages, in site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

reference: setup  ## write what is generated: configs/schema.json, docs/configuration.md, the table of third-party licences
	$(RUN) -m scripts.generate_reference
	$(RUN) -m scripts.generate_notices

bench: setup  ## overhead of the job on one and two workers over a plain training loop
	$(RUN) -m benchmarks.overhead

bench-speed: setup  ## time of a training step, threads, two workers, generation
	$(RUN) -m benchmarks.speed
	$(RUN) -m benchmarks.threads
	$(RUN) -m benchmarks.two_workers
	$(RUN) -m benchmarks.generation

bench-gpu: setup  ## training steps on a GPU against plain nn modules (BENCH="--seconds 150 --json FILE" and so on)
	$(RUN) -m benchmarks.gpu $(BENCH)

bench-stores: setup  ## memory, first step and reading of windows with a token store of 4 GB and of 1 MiB
	$(RUN) -m benchmarks.stores

bench-survival: setup  ## cost of checkpoints, reproducibility, long runs, and recovery from a worker's death
	$(RUN) -m benchmarks.survival
	$(RUN) -m benchmarks.long_runs

bench-corpora: setup  ## time and memory of preparing 1 GB of text, and its speed on two cores
	$(RUN) -m benchmarks.corpora

bench-tuning: setup  ## what ASHA costs and saves (about 15 minutes)
	$(RUN) -m benchmarks.tuning

clean:  ## remove the environment and caches, but no runs
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
