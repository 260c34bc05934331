# `make demo` and `make test` do all their own set-up, in .venv; `make help` lists the rest.
# Nothing is left outside this folder but the package manager's cache.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
# A worker a core, each with one thread; a worker takes over tests from another that has more left.
TEST = $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist=worksteal --basetemp=.cache/pytest
READY := .venv/.ready

export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format bench bench-networks bench-gpu asan sanitize-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## train a small ACmix network on real digits; pictures in runs/digits/
	@$(BIN)/acmix fit --config recipes/digits.yaml

test: $(READY) | .cache ## the whole test suite
	$(TEST)

test-fast: $(READY) | .cache ## the core of every part in two minutes: what is not marked slow
	$(TEST) -m 'not slow'

.cache:
	mkdir $@

lint: $(READY) ## lint, format and type checks over the whole tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## write the format that lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## time and memory beside the 3x3 convolution, into benchmarks/results/
	$(BIN)/python benchmarks/run.py

bench-networks: $(READY) ## the same with whole networks
	$(BIN)/python benchmarks/run.py --networks

bench-gpu: ## the same on a GPU: correctness first, then layers, networks, other ways, roofline
	PYTHONPATH=src $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py

asan: ## the CPU kernel under the address and undefined-behaviour sanitizers
	sh tests/asan/build.sh build/asan

sanitize-gpu: ## the GPU kernels under compute-sanitizer: memory and races
	for tool in memcheck racecheck; do PYTHONPATH=src PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	  $(or $(wildcard $(BIN)/python),$(PYTHON)) -m pytest -x tests/ops/triton/test_kernels.py \
	  -k 'test_attention or test_aggregation or head_dim or mix or heads' || exit 1; done

clean: ## remove everything that make made, the environment too
	rm -rf .venv .cache build runs *.egg-info src/*.egg-info src/acmix/_kernel*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml setup.py $(wildcard $(CONSTRAINTS) src/acmix/csrc/*/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
	  "acmix needs Python 3.10 or newer, found %d.%d: name one with make PYTHON=..." % v[:2])'
	@if command -v uv >/dev/null; then \
	  set -x; \
	  test -x $(BIN)/python || uv venv --python $(PYTHON) .venv; \
	  uv pip install --python $(BIN)/python $(CONSTRAINTS:%=-c %) -e '.[dev]'; \
	else \
	  set -x; \
	  test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
	  $(BIN)/python -m pip install --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e '.[dev]'; \
	fi
	@touch $@
