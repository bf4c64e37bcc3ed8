# `make` lists the targets. Every target that needs the environment makes .venv first, from constraints.txt.
#
# PYTHON=…       the interpreter for .venv (3.11 or newer); default: the first suitable one found
# TORCH_INDEX=…  one more package index for torch. On Linux PyPI's torch brings the CUDA libraries, about 3 GB that
#                a laptop without a GPU carries for nothing; the CPU build is a tenth of that:
#                    make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
# EXTRAS=…       extras of setup.py to install (default: test; on a GPU machine: test,gpu)
# PYTEST_ARGS=…  passed on to pytest, e.g. PYTEST_ARGS="-n 4 tests/unit"

SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXTRAS ?= test
# in the order of the files: else files of few tests, which are the long ones, would all come last
PYTEST_ARGS ?= -n 2 --dist loadscope --no-loadscope-reorder

SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	if $$p -c '$(SUITABLE)' >/dev/null 2>&1; then echo $$p; break; fi; done)

.PHONY: help venv docs quickstart smoke test test-newest test-transformers drill evidence check lint format clean

help:  ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## makes .venv from constraints.txt (done by the others when needed)

# Made again when setup.py, constraints.txt or pyproject.toml change; the stamp is written only when pip succeeded.
$(STAMP): setup.py constraints.txt pyproject.toml
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(SUITABLE)' 2>/dev/null; then \
		echo "error: no Python 3.11 or newer with the venv module was found$(if $(PYTHON), (tried $(PYTHON)))"; \
		echo "  fix:   install it (Debian, Ubuntu: apt install python3 python3-venv), or name one:"; \
		echo "         make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11"; \
		exit 1; \
	fi
	@echo "[venv 1/2] $(VENV) with $$($(PYTHON) --version) from $$(command -v $(PYTHON))"
	@$(PYTHON) -m venv $(VENV)
	@echo "[venv 2/2] installing the packages of constraints.txt: 2 to 10 minutes the first time, as the network is"
	@$(PY) -m pip install --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[$(EXTRAS)]'
	@touch $(STAMP)
	@echo "[venv] ready"

quickstart: $(STAMP)  ## the whole job on a real model, 7 to 17 minutes on 2 cores; ends with runs/quickstart/report.html
	$(PY) -m dev.quickstart.run

smoke: $(STAMP)  ## the same path with a tiny random model, under a minute
	$(PY) -m dev.quickstart.smoke

test: $(STAMP)  ## all tests, then the smoke run (what CI runs)
	$(PY) -m pytest $(PYTEST_ARGS)
	$(PY) -m dev.quickstart.smoke

test-newest: $(STAMP)  ## the tests that use Megatron, with the newest Megatron-Core that is supported
	PYTHONPATH=$$($(PY) tests/newest_megatron.py .cache) $(PY) -m pytest $(PYTEST_ARGS) tests/parity tests/distributed

test-transformers: $(STAMP)  ## the tests of decoding and generate, with the oldest transformers that is supported
	PYTHONPATH=$$($(PY) tests/oldest_transformers.py .cache) \
		$(PY) -m pytest $(PYTEST_ARGS) tests/parity/test_generate.py tests/parity/test_decode_oracle.py

drill: $(STAMP)  ## the fault drill on a real Slurm of this machine (root, Debian's packages): about 10 minutes
	$(PY) tests/slurm/drill.py

evidence: $(STAMP)  ## the models behind docs/evidence.md trained and measured: about 6 hours on 2 cores with AMX; goes on where it was
	$(PY) -m dev.evidence.train_arms --out runs/evidence
	$(PY) -m dev.evidence.train_arms --out runs/evidence --arms d4_half d4_quarter d2 random --seeds 0
	$(PY) -m dev.evidence.run_measurements --out runs/evidence --arms ar d4 d8 unshifted causal next_token ar_slow d4_slow
	$(PY) -m dev.evidence.run_measurements --out runs/evidence --few 64 --clock
	$(PY) -m dev.evidence.document runs/evidence --out docs

docs: $(STAMP)  ## the documentation site, in build/site: docs/ and an API reference from the docstrings
	@$(PY) -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || \
		$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open build/site/index.html, or: $(PY) -m mkdocs serve"

check: lint test  ## lint, format, types, import contract, tests, smoke

lint: $(STAMP)  ## ruff, format check, mypy, import contract
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(STAMP)  ## formats the code and applies safe lint fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## removes caches and build leftovers; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
