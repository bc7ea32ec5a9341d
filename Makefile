# `make setup` needs only Python 3.11 or newer and make.
PYTHON ?= python3
# Point VENV at an existing environment to use that one: make test VENV=~/envs/retort
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.retort-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench results gpu clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make the environment and install retort in it, editable, with its tools

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamp makes this incremental: pip runs again only when what it installs may have changed.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup ## distil, sample, grade and report on this machine's CPU, in minutes
	$(BIN)/retort demo

# One thread for each process: the tests start processes of their own, and idle OpenMP threads spin.
# A file's tests stay together: what they share is made once, and runs that are forked find a server.
# Files keep the order that tests/conftest.py gives them: those that take longest come first.
test: setup ## run the tests, two at a time (no network, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## measure decoding, prefill, training and the targets on this machine's CPU
	$(BIN)/retort bench decode --out benchmarks/results
	$(BIN)/retort bench prefill --out benchmarks/results
	$(BIN)/retort bench train --out benchmarks/results
	$(BIN)/retort bench targets --repeats 7 --out benchmarks/results

results: setup ## make the tables and figures of README and docs/results.md from the raw numbers
	$(BIN)/python benchmarks/results.py

gpu: setup ## on an NVIDIA GPU: its tests (they compile every kernel), then all that is measured there
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit( \
	  f'make gpu: torch {torch.__version__} sees no GPU; install its CUDA build, then try again')"
	$(BIN)/python benchmarks/gpu.py

clean: ## remove caches and build results; environments and runs stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
