# One command each: sets up all it needs in .venv, then does its job.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Options of `make train`; for instance: make train TRAIN="--updates 50"
TRAIN ?=

.PHONY: train test check lint types docs clean

train: $(READY)  ## train a GPT on two workers through PACI
	$(BIN)/paci train --config examples/first.toml $(TRAIN)

test: $(READY)  ## run all tests, a file to each core at a time
	$(BIN)/python -m pytest -n auto --dist loadfile

check: lint types test  ## what CI runs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)  ## write the pictures and tables of docs/ again
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and by its exact version, so that pip takes that build and no other comes in with
# another package.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "paci needs Python 3.11 or newer, got %d.%d; pass PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep -E '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
