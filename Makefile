# `make train` and `make test` do everything, set-up included; `make help` lists the rest.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup train test test-quick lint format clean

help:
	@echo "make train       train on real digits (CPU, five to seven minutes), print the likelihood, draw samples"
	@echo "make test        run all tests that need no GPU"
	@echo "make test-quick  leave out the slow ones"
	@echo "make lint        linter, formatter, type checker"
	@echo "make format      format the code"
	@echo "make setup       make the environment in $(VENV)"
	@echo "make clean       remove the environment"

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
	$(PYTEST) -m "not gpu" --numprocesses 2 --dist worksteal

test-quick: setup
	$(PYTEST) -m "not gpu and not slow" --numprocesses 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
