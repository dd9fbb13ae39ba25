# On a fresh machine `make sweep` and `make test` need nothing but Python.
#
#   make test PYTHON=python3.12 VENV=.venv312     another interpreter, beside the first
#   make test ARGS='-k attention'                 any options of pytest

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# A file's tests go to one worker, which makes its fixtures once; files in the order of tests/conftest.py, the longest
# first, and not those with the most tests. tests/golden is one file, one test a folder.
PYTEST := -n 2 --dist loadfile --no-loadscope-reorder
# Without the checks of annotated shapes: `make test` runs the same code under them, and they take a fifth of the time.
UNCHECKED := --jaxtyping-packages=
MINUTES ?= 10
# Empty for a sample, as in CI.
SCALE ?= --all-meshes
FLIPS ?= 200
KILLS ?= 50
WORKDIR ?= workdir/digits_token_budget
# An argument of the sweep's config: `make sweep SWEEP=:full WORKDIR=workdir/full`.
SWEEP ?=
# Processes of the sweep, which divide the CPUs: its small steps leave a second one idle.
PROCESSES ?= $(if $(filter 1,$(shell nproc 2>/dev/null)),1,2)
# A fixed release: an open range takes the newest build, with several GB of CUDA packages. The CPU
# build serves as well where the package index offers it.
TORCH ?= torch==2.13.0
# The release made for it; without what it asks for, so that it never brings another build of torch, and
# in a folder of its own, which only tests/parity/conftest.py puts on the path.
TORCHVISION ?= torchvision==0.28.0
# Likewise without what it asks for, such as an earlier av; what it imports is in the extra parity. Only the process
# and the tests of tests/parity/test_lmms_eval.py have its folder on the path.
LMMS_EVAL ?= lmms-eval==0.7.3

# Gradio asks for an earlier Pillow: it has a folder of its own, with all that it asks for, which only the page in
# tests/processes/test_demo.py has on its path.
GRADIO ?= gradio==6.31.0
# A headless Chromium for that page, from the npm registry; with CHROMIUM=/usr/bin/chromium in the environment the tests
# use that one instead.
BROWSER ?= @sparticuz/chromium@153.0.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: sweep test parity lint types imports smoke golden processes fuzz faults soak scale docs

sweep: $(VENV)/.core  ## the main job: accuracy against the token budget
	$(BIN)/python -m vlm_jax.cli.sweep --config=configs/sweeps/digits_token_budget.py$(SWEEP) \
		--workdir=$(WORKDIR) --processes=$(PROCESSES)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST) $(ARGS)

parity: $(VENV)/.parity  ## against live torch models
	$(BIN)/python -m pytest $(PYTEST) $(UNCHECKED) tests/parity $(ARGS)

golden: $(VENV)/.test  ## against arrays of the official implementations
	$(BIN)/python -m pytest -n 2 $(UNCHECKED) tests/golden $(ARGS)

processes: $(VENV)/.test $(VENV)/.demo  ## commands and notebooks as processes: killed, full disks, several hosts; ten seconds a fuzz target
	$(BIN)/python -m pytest $(PYTEST) tests/processes $(ARGS)
	$(BIN)/python -m pytest -n 2 tests/fuzz $(ARGS)

fuzz: $(VENV)/.test  ## malformed inputs of all readers, for MINUTES
	$(BIN)/python -m tests.fuzz.run --minutes=$(MINUTES) $(ARGS)

faults: $(VENV)/.test  ## checkpoints whose files are damaged: FLIPS bits of each; runs that are killed KILLS times
	$(BIN)/python -m pytest $(UNCHECKED) tests/faults --flips=$(FLIPS) --kills=$(KILLS) $(ARGS)

soak: $(VENV)/.test  ## a training process for MINUTES, whose memory, open files and threads must be flat; 30 show most
	$(BIN)/python -m tests.faults.soak --minutes=$(MINUTES) $(ARGS)

scale: $(VENV)/.test  ## small releases trained by 2 and 4 processes on many meshes, one of which is killed
	$(BIN)/python -m pytest $(UNCHECKED) tests/scale $(SCALE) $(ARGS)

docs: $(VENV)/.docs  ## the pages, without a warning, into build/site; and every command of them
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m pytest -n 2 tests/docs $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.dev
	$(BIN)/lint-imports

smoke: $(VENV)/.core  ## every runnable config, a few steps each, through the command line
	$(BIN)/python tests/smoke/run.py $(ARGS)

# A stamp is newer than setup.py once its extra is installed.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: setup.py | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(VENV)/.test: setup.py | $(BIN)/python
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.demo: Makefile | $(BIN)/python
	$(PIP) --upgrade --target $(VENV)/demo '$(GRADIO)'
ifeq ($(CHROMIUM),)
	npm install --prefix $(VENV)/browser --ignore-scripts --no-audit --no-fund --loglevel=error '$(BROWSER)'
endif
	touch $@

$(VENV)/.docs: setup.py | $(BIN)/python
	$(PIP) --editable '.[test,docs]'
	touch $@

$(VENV)/.dev: setup.py | $(BIN)/python
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.parity: setup.py | $(BIN)/python
	$(PIP) '$(TORCH)'
	$(PIP) --no-deps --upgrade --target $(VENV)/torchvision '$(TORCHVISION)'
	$(PIP) --no-deps --upgrade --target $(VENV)/lmms_eval '$(LMMS_EVAL)'
	$(PIP) --editable '.[test,parity]'
	touch $@
