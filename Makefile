# SPDX-License-Identifier: BSD-3-Clause
# `make demo` and `make test` need Linux, Python >= 3.10, a C++17 compiler and make; they set up the rest in .venv, once.
#
#   make demo                the main job: training with torch's loss and with softce's, compared
#   make test                the tests, in a process a core (PYTEST_ARGS="-k pool"; "-n 0": in one process)
#   make bench               the benchmarks, side by side with torch (BENCH_ARGS=--quick)
#   make build               the libraries, in place, for development
#   make lint                ruff, mypy, clang-format
#   make asan                the kernels' tests under AddressSanitizer and UBSan
#   make test-second-torch   one wheel, built with TORCH, tested with TORCH2
#   make gpu                 everything that needs a GPU: tests, then benchmarks
#   make wheel | clean | distclean
#
# TORCH=2.14.1 takes another torch, PYTHON=python3.12 another Python, VENV=DIR another environment.
# SOFTCE_CUDA=0|1|auto decides about the CUDA library; by default it is built where there is an NVIDIA driver.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

TORCH ?= 2.13.0
TORCH2 ?= 2.11.0
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
export SOFTCE_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)

BIN := $(VENV)/bin
STAMP := $(VENV)/.softce
SOURCES := setup.py softce/_version.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# A file's tests stay in one process, for they share what is slow to make; tests/conftest.py says how many there are.
PYTEST = -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo test bench build lint asan test-second-torch gpu wheel clean distclean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# ---- set-up, each step once ----

$(STAMP)/torch-$(TORCH):
	@test -n "$(PYTHON)" || { echo "softce needs Python >= 3.10: none found; say PYTHON=..." >&2; exit 1; }
	@echo "setting up $(VENV) with torch $(TORCH)"
	$(PYTHON) -m venv $(VENV) || { echo "no venv module? (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PIP) torch==$(TORCH) "setuptools>=77" wheel
	rm -rf $(STAMP) && mkdir -p $(STAMP) && touch $@

# The extra named by the stamp, and the package itself, built and editable.
$(STAMP)/extra-%: $(STAMP)/torch-$(TORCH) pyproject.toml
	$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $(STAMP)/build $@

$(STAMP)/build: $(STAMP)/torch-$(TORCH) $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# ---- jobs ----

build: $(STAMP)/build

demo: $(STAMP)/extra-demo $(STAMP)/build
	$(BIN)/python -m softce demo $(DEMO_ARGS)

test: $(STAMP)/extra-test $(STAMP)/build
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

bench: $(STAMP)/extra-bench $(STAMP)/build
	$(BIN)/python -m bench $(BENCH_ARGS)

gpu: export SOFTCE_CUDA = 1
gpu: $(STAMP)/extra-test
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m bench.gpu $(GPU_ARGS)

lint: $(STAMP)/extra-lint $(STAMP)/extra-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check softce bench tests setup.py
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

# Python itself is not built with sanitizers, so their runtime is loaded before it, with the C++ runtime whose
# exceptions it intercepts. Python never frees all it allocates: leaks are not looked for.
ASAN_TESTS ?= tests/test_ops.py tests/test_pool.py $(wildcard tests/test_kernels*.py) \
	tests/test_package.py::test_sanitizers_are_awake_in_a_sanitized_build
asan: export SOFTCE_CUDA = 0
asan: $(STAMP)/extra-test
	SOFTCE_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/asan
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	SOFTCE_LIBRARY=$(CURDIR)/build/asan/softce/libsoftce.so \
	$(BIN)/python -m pytest $(ASAN_TESTS) $(PYTEST_ARGS)

wheel: $(STAMP)/torch-$(TORCH)
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# The tests are copied: beside the sources, Python would import the package from there instead of the wheel's.
# The interpreter of torch 2.11's Triton does not go with a later NumPy.
SECOND_NUMPY ?= "numpy<2.4"
SECOND := build/torch-$(TORCH2)
test-second-torch: wheel
	test -e $(SECOND)/venv/ready || { $(PYTHON) -m venv $(SECOND)/venv && \
	  $(SECOND)/venv/bin/python -m pip install --quiet torch==$(TORCH2) && touch $(SECOND)/venv/ready; }
	$(SECOND)/venv/bin/python -m pip install --quiet "$$(ls dist/softce-*.whl)[test]" $(SECOND_NUMPY)
	$(SECOND)/venv/bin/python -m pip install --quiet --no-deps --force-reinstall dist/softce-*.whl
	rm -rf $(SECOND)/tree && mkdir -p $(SECOND)/tree && cp -r tests bench docs csrc README.md pyproject.toml $(SECOND)/tree
	cd $(SECOND)/tree && ../venv/bin/python -m softce info && ../venv/bin/python $(PYTEST) $(PYTEST_ARGS)

clean:
	rm -rf build dist softce.egg-info softce/*.so softce/_build.json .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -rf $(STAMP)/build $(STAMP)/extra-*

distclean: clean
	rm -rf $(VENV)
