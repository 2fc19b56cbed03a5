# Two commands do everything on a fresh machine: make train, make test.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help setup train tune test test-long test-quick storm lint bench bench-speed bench-survival bench-tuning clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(VENV)/ready  ## make .venv and install everything into it

train: setup  ## train the seed's model on two workers of a Ray cluster of its own
	$(RUN) -m job train configs/seed.toml

tune: setup  ## search a learning rate for a small model, on this machine, into runs/tune
	$(RUN) -m job tune configs/tune.toml

test: setup  ## all tests but the long ones (at most ten minutes on two cores; PYTEST="--time-table" and so on)
	$(RUN) -m pytest -m "not long" --numprocesses 2 --dist loadgroup $(PYTEST)

test-long: setup  ## the long tests: traces of the book, faults on several nodes, memory over 10,000 steps
	$(RUN) -m pytest -m long $(PYTEST)

test-quick: setup  ## the tests that need no Ray (under a minute)
	$(RUN) -m pytest -m "not cluster and not slow and not long" --numprocesses 2

storm: setup  ## the chaos test: one run, twelve faults, the same result (ten minutes; STORM="--mode fp64" and so on)
	$(RUN) -m tests.chaos $(STORM)

lint: setup  ## formatter, linter and type checker, as CI runs them
	$(RUN) -m ruff format --check job tests benchmarks
	$(RUN) -m ruff check job tests benchmarks
	$(RUN) -m mypy job benchmarks

bench: setup  ## the seed's loop, ours, and the job on one and two workers, side by side
	$(RUN) -m benchmarks.overhead

bench-speed: setup  ## a step against the plain one and the machine's limits; threads, two workers, generation
	$(RUN) -m benchmarks.speed
	$(RUN) -m benchmarks.threads
	$(RUN) -m benchmarks.two_workers
	$(RUN) -m benchmarks.generation

bench-survival: setup  ## what checkpoints, reproducibility and the death of a worker cost
	$(RUN) -m benchmarks.survival

bench-tuning: setup  ## what stopping hopeless trials early costs and spares (about a quarter of an hour)
	$(RUN) -m benchmarks.tuning

clean:  ## remove the environment and what tools left, but no run
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
