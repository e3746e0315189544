# Everything runs from a fresh clone with Python 3.11 or later, git and make.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
# What is installed as torch, before anything else so that no dependency chooses a build first.
# By its own pin alone: each build of it wants a triton of its own.
TORCH ?= $(shell grep '^torch==' constraints.txt)
EXTRAS ?= dev
# Ranks are processes here: one thread each, or four ranks on two cores fight over them.
export OMP_NUM_THREADS ?= 1
# DeepSpeed would compile its C++ operators while installing; none is needed.
export DS_BUILD_OPS := 0
PYTEST_ARGS ?=
# Such as --kills 200 --seed 7.
DRILL_ARGS ?= --kills 100
# Test processes of pytest-xdist; 0 runs in one. Distributed tests start 2 to 4 ranks themselves,
# which wait for one another much of the time.
JOBS ?= 2
# A file stays with one process: what its tests share is made once.
SPREAD := -n $(JOBS) --dist loadfile
QUICKSTART_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPP_FILES := $(wildcard model/*.cpp)
SHELL_FILES := $(wildcard slurm/*.sh) .ci/run

.PHONY: help setup quickstart test test-slow test-slurm drill bench lint types format constraints clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## install everything into .venv, once for each change of the pins

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"{sys.executable} is Python {sys.version.split()[0]}; longhaul needs 3.11 or later:" \
	  " make setup PYTHON=/path/to/python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): about two minutes'
	$(BIN)/python -m pip install --quiet $(TORCH)
	@# The other pins hold beside whichever torch is there now, and the triton that it brought.
	$(BIN)/python -m pip freeze | grep -E '^(torch|triton)==' > $(VENV)/torch.txt
	{ cat $(VENV)/torch.txt; cut -d= -f1 $(VENV)/torch.txt | sed 's/.*/^&==/' | \
	  grep -v -f - constraints.txt; } > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	touch $@

quickstart: $(READY)  ## set up, then pretrain a small model on this machine: four CPU ranks
	$(BIN)/longhaul prepare stdlib --output runs/quickstart-data --valid-fraction 0.1
	$(BIN)/torchrun --standalone --nproc-per-node=4 --no-python \
	  $(BIN)/longhaul pretrain configs/quickstart.yaml $(QUICKSTART_ARGS)

test: $(READY)  ## set up, then run the tests (without those marked slow)
	$(BIN)/python -m pytest $(SPREAD) -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY)  ## the tests marked slow, without those of the cluster
	$(BIN)/python -m pytest $(SPREAD) -m "slow and not slurm" $(PYTEST_ARGS)

test-slurm: $(READY)  ## jobs on a real one-machine SLURM: stopped, preempted, killed, resumed
	$(BIN)/python -m pytest -m slurm -rs tests/slurm $(PYTEST_ARGS)

drill: $(READY)  ## kill a short run at random moments, damage its checkpoints; docs/reliability.md
	$(BIN)/python -m tests.drill --output docs/reliability.md $(DRILL_ARGS)

bench: $(READY)  ## every benchmark beside its peers, three hours: runs/benchmarks/report.md
	$(BIN)/python -m benchmarks

lint: $(READY)  ## style, formatting, import contracts, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x $(SHELL_FILES)

types: $(READY)  ## mypy --strict
	$(BIN)/mypy

format: $(READY)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

constraints: $(READY)  ## write constraints.txt from what .venv holds
	{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$$//'; \
	} > $(VENV)/pins && mv $(VENV)/pins constraints.txt
	touch $(READY)

clean:  ## remove the environment and every cache (runs/ holds checkpoints and stays)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis \
	  .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
