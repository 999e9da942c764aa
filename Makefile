# Each target sets itself up; a machine needs only python3 (3.11 or newer) and make.
PYTHON  ?= python3
WORKDIR ?= runs/quickstart

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help quickstart study test test-long chaos lint fuzz audit lock

help:
	@echo "make quickstart   distil the tiny teacher into the tiny student (WORKDIR=$(WORKDIR))"
	@echo "make study        trains and measures what study NAME compares, and writes results/NAME"
	@echo "make test         lint, types and tests"
	@echo "make test-long    the tests that take minutes"
	@echo "make chaos        kills a tiny run 50 times, and one of two processes 50 times (15 minutes)"
	@echo "make lint         lint and types only"
	@echo "make fuzz         100,000 hostile inputs to every parser together; FUZZ_INPUTS and FUZZ_SEED"
	@echo "make audit        bandit, and known vulnerabilities of what is installed"
	@echo "make lock         requirements-lock.txt, with hashes, for a release"
	@echo "PYTHON=python3.12 chooses the interpreter that makes $(VENV)"

quickstart: $(VENV)/.run
	$(BIN)/python -m distill.quickstart --workdir=$(WORKDIR)

study: $(VENV)/.run
	@test -n "$(NAME)" || { \
	  echo "error: make study NAME=a: NAME is missing; the studies are" >&2; \
	  $(BIN)/python -m studies.run >&2; \
	  exit 2; }
	$(BIN)/python -m studies.run --study=$(NAME)

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

# FUZZ_INPUTS is the number of inputs of each of the cheap parsers; all together take nearly ten times as many.
fuzz: $(VENV)/.dev
	FUZZ_INPUTS=$${FUZZ_INPUTS:-11000} $(BIN)/python -m pytest -q tests/fuzz
	$(BIN)/python -m pip show --quiet atheris 2>/dev/null || $(PIP) 'atheris>=3.0'
	for parser in rows messages config.json safetensors adapter; do \
	  JAX_PLATFORMS=cpu $(BIN)/python -m tests.fuzz.guided $$parser -runs=20000 -max_len=8192 -len_control=0 || exit 1; done

audit: $(VENV)/.dev
	$(PIP) 'bandit>=1.9' 'pip-audit>=2.10'
	$(BIN)/bandit -q -r distill models configs --skip B101,B103,B105,B108,B311,B403,B404,B603,B606,B615
	$(BIN)/pip-audit --skip-editable

lock: $(VENV)/.made
	$(PIP) 'pip-tools>=7.6'
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header \
	  --output-file=requirements-lock.txt requirements.txt

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
