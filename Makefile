# make demo | test | lint | format | build | bench | clean        everything happens in .venv; nothing else is installed or changed
# make bench-gpu        builds into a Python that has torch and measures the ops on a GPU: no network, no .venv; BENCH_GPU='--quick'
# make test-sglang      makes .venv-sglang, an environment with SGLang for the CPU (2.3 GB; `make sglang-env` alone), and runs the tests that
#                       need it; AREAL_SGLANG_PYTHON=FILE takes the interpreter of another one
#   PYTHON=python3.12     interpreter (>= 3.11) to make .venv with
#   TORCH_INDEX=URL       package index for torch alone, for instance PyTorch's own of CPU-only builds
#   AREAL_CUDA=OFF        leave the CUDA kernels out (AUTO, ON, OFF)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build

VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
TORCH_INDEX ?=
AREAL_CUDA ?= AUTO
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet
# A shim may be there without its interpreter, so each candidate is run.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# The package is installed in place: Python files are live, so only what is compiled or declared needs a new installation.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(wildcard kernels/*)
CPP := $(wildcard csrc/*.h csrc/*.cpp kernels/*.cu kernels/*.cuh tests/cuda_on_host/*.h)

# A file of tests is one process's, and a test takes a core or two. JOBS=0 runs them one after the other, here.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
IN_PARALLEL = -n $(JOBS) --dist loadfile

.PHONY: demo test test-sglang stress sglang-env lint format build bench bench-gpu clean venv

demo: $(VENV)/.train
	$(BIN)/areal train examples/arithmetic.yaml

test: $(VENV)/.test
	$(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

# Without these tests' environment `make test` skips them and says so.
test-sglang: $(VENV)/.test $(if $(AREAL_SGLANG_PYTHON),,sglang-env)
	$(BIN)/python -m pytest -m sglang $(IN_PARALLEL) $(PYTEST_ARGS)

# Rollout servers killed with -9 at the worst moments of a weight update, 20 times each; over an hour on a small machine.
stress: $(VENV)/.test $(if $(AREAL_SGLANG_PYTHON),,sglang-env)
	AREAL_STRESS_REPEATS=20 $(BIN)/python -m pytest tests/test_server_kills.py $(PYTEST_ARGS)

sglang-env: $(VENV)/.torch
	PYTHONPATH=python TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python -m areal.inference.sglang_cpu_env $(SGLANG_VENV)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

build: $(VENV)/.train

# BENCH='--op gae --plot gae.png' for one; without it all ops, their figures kept, then the whole system.
bench: $(VENV)/.test
ifdef BENCH
	$(BIN)/python -m benchmarks $(BENCH)
else
	$(BIN)/python -m benchmarks --op all --json benchmarks/results/ops_cpu.json --plot benchmarks/results/ops_cpu.png
	$(BIN)/python -m benchmarks async_vs_sync code_reward engine interruption weight_sync
endif

# The Python that is asked for, else the one of .venv if there is one, else python3: whichever has torch for the GPU.
bench-gpu: GPU_PYTHON := $(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON),$(if $(wildcard $(BIN)/python),$(BIN)/python,python3))
bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --cuda $(AREAL_CUDA) $(BENCH_GPU)

venv: $(VENV)/.test

clean:
	rm -rf $(VENV) $(SGLANG_VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch first and by itself, in exactly the tested range: the calls after it find it installed and leave it alone.
$(VENV)/.torch:
	@[[ -n "$(PYTHON)" ]] || { echo "error: no Python >= 3.11 found; hint: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch>=2.11,<2.14'
	touch $@

$(VENV)/.train: $(VENV)/.torch $(SOURCES)
	$(PIP_INSTALL) --config-settings=cmake.define.AREAL_CUDA=$(AREAL_CUDA) -e '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP_INSTALL) --config-settings=cmake.define.AREAL_CUDA=$(AREAL_CUDA) -e '.[train,test]'
	touch $(VENV)/.train $@
