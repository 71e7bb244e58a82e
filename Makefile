# `make train` and `make test` do everything, set-up included; `make help` lists the rest.
VENV ?= .venv
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
UV ?= .venv-uv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
TWO := --numprocesses 2 --dist worksteal
ALL_TESTS := -m "not gpu" $(TWO)

.PHONY: help setup train test test-quick test-all test-oldest test-newest lint format clean

help:
	@echo "make train        train on real digits (CPU, five to seven minutes), print the likelihood, draw samples"
	@echo "make test         run all tests that need no GPU"
	@echo "make test-quick   leave out the slow ones"
	@echo "make test-all     with hundreds of further cases of the quick ones"
	@echo "make test-oldest  run all tests with the lowest versions that pyproject.toml names, on Python 3.12"
	@echo "make test-newest  run all tests with the newest versions, on Python 3.13"
	@echo "make lint         linter, formatter, type checker"
	@echo "make format       format the code"
	@echo "make setup        make the environment in $(VENV)"
	@echo "make clean        remove the environments"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "nvae needs Python 3.11 or newer: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "making $(VENV) failed: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

train: setup
	$(BIN)/python train.py

test: setup
	$(PYTEST) -m "not gpu and not exhaustive" $(TWO)

test-all: setup
	$(PYTEST) $(ALL_TESTS)

test-quick: setup
	$(PYTEST) -m "not gpu and not slow" --numprocesses 2 --dist worksteal

# pip cannot resolve to the lowest versions, uv can; it also finds the Python, or fetches it
$(UV)/bin/uv:
	$(PYTHON) -m venv $(UV)
	$(UV)/bin/python -m pip install --quiet uv

$(OLDEST)/.installed: python = 3.12
$(OLDEST)/.installed: resolution = lowest-direct
$(NEWEST)/.installed: python = 3.13
$(NEWEST)/.installed: resolution = highest
$(OLDEST)/.installed $(NEWEST)/.installed: pyproject.toml | $(UV)/bin/uv
	$(UV)/bin/uv venv --quiet --clear --seed --python $(python) $(@D)
	$(UV)/bin/uv pip install --quiet --python $(@D) --resolution $(resolution) --editable '.[dev]'
	@touch $@

test-oldest: $(OLDEST)/.installed
test-newest: $(NEWEST)/.installed
test-oldest test-newest:
	$(<D)/bin/python -m pytest $(ALL_TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(UV)
