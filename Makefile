# Each target sets itself up; a machine needs only python3 (3.11 or newer) and make.
PYTHON  ?= python3
WORKDIR ?= runs/quickstart

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help quickstart test test-long chaos lint

help:
	@echo "make quickstart   distil the tiny teacher into the tiny student (WORKDIR=$(WORKDIR))"
	@echo "make test         lint, types and tests"
	@echo "make test-long    the tests that take minutes"
	@echo "make chaos        kills a tiny run 50 times, and one of two processes 50 times (15 minutes)"
	@echo "make lint         lint and types only"
	@echo "PYTHON=python3.12 chooses the interpreter that makes $(VENV)"

quickstart: $(VENV)/.run
	$(BIN)/python -m distill.quickstart --workdir=$(WORKDIR)

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "" tests/long
	$(BIN)/python -m pytest -q -m long tests

chaos: $(VENV)/.dev
	$(BIN)/python -m tests.support.chaos --kills=50
	$(BIN)/python -m tests.support.chaos --kills=50 --processes=2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Stamp files: the virtual environment is made once, and installs rerun when their list changes.
$(VENV)/.made:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
	  echo "error: '$(PYTHON)' is not Python 3.11 or newer: make PYTHON=/path/to/python3.12" >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: requirements.txt $(VENV)/.made
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(PIP) -r requirements-dev.txt
	@touch $@
