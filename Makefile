# Needs Python >= 3.11 and make, nothing else: every target works inside its own .venv.
PYTHON ?= python3
# Which torch, and where pip may also look for it. For an NVIDIA GPU: make ... TORCH_INDEX= TORCH=torch
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
FUZZ_SEEDS ?= 5000
BENCH_ARGS ?=

# Absolute, so that it also leads PATH for whatever the commands start.
VENV := $(CURDIR)/.venv
CARD := hub_cards/confu-smollm2-135m-instruct
RUN := PATH="$(VENV)/bin:$$PATH" VIRTUAL_ENV="$(VENV)"
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format exactness fuzz bench cards

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## decode with a draft beside plain generate, on a small real model
	$(RUN) confu demo

test: lint  ## everything CI runs: lint, types, tests (PYTEST_ARGS="-m 'not slow'" for the quick part)
	$(RUN) OMP_NUM_THREADS=1 pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff and mypy, without changing a file
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: $(STAMP)  ## let ruff fix and format
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

exactness: $(STAMP)  ## the full comparison with plain generate; every tie is reported
	$(RUN) pytest -m "slow or not slow" --exactness=full tests/inference/test_exactness*.py

fuzz: $(STAMP)  ## random calls beside plain generate (FUZZ_SEEDS=5000)
	$(RUN) pytest tests/inference/test_fuzz.py --fuzz-seeds $(FUZZ_SEEDS)

bench: $(STAMP)  ## confu evaluate: speed, accepted length, costs, a report (BENCH_ARGS="--help")
	$(RUN) confu evaluate $(BENCH_ARGS)

cards: $(STAMP)  ## the folder in hub_cards/ again: links to the code, the card from its card.yaml
	cd $(CARD) && find . -type l ! -exec test -e {} \; -delete
	cd $(CARD) && ln -sf ../../src/transformers_confu/inference/[!_]*.py .
	$(RUN) confu publish $(CARD) demo transformers-confu/$(notdir $(CARD)) --card_only

# torch goes first: asked for by the package alone, pip would take the build with gigabytes of CUDA libraries.
# An index that cannot be reached is skipped at once and torch then comes from the default one.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Python {v} is too old: transformers-confu needs 3.11 or newer. Run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --retries 0 --timeout 15
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@
