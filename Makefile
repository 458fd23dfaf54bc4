# Everything works on a fresh machine: a virtual environment is made in the checkout, the extension is built in place.
#
#   make demo    the main job on real input: quantize a sentence encoder, compare quality and speed
#   make test    build and test                            make test ARGS='-k isa'
#   make build   build only (incremental)                  make bench   GEMM and end to end
#   make lint    what pre-commit checks                    make asan    kernel tests under Address and UB sanitizers
#   make gpu     check and measure on a CUDA card           make gpu-sanitize   compute-sanitizer over its kernels
#
# PYTHON=python3.12 names the interpreter to start from. A torch that it already has is used, else $(TORCH) is installed.
# pip's own settings (PIP_INDEX_URL, ...) and the build's (CXX, MAX_JOBS, DEBUG) apply.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
BUILD := $(BIN)/python setup.py -q build_ext --inplace
USABLE_TORCH := -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null

# An environment is kept until pyproject.toml changes or another PYTHON is asked for.
ifeq ($(origin PYTHON),file)
MADE_FROM := $(shell cat $(VENV)/made-from 2>/dev/null || echo '$(PYTHON)')
else
MADE_FROM := $(shell command -v $(PYTHON) || echo '$(PYTHON)')
endif
ifneq ($(shell cat $(VENV)/made-from 2>/dev/null),$(MADE_FROM))
.PHONY: $(VENV)/made-from
endif

.PHONY: demo test build bench lint asan gpu gpu-sanitize clean
.DEFAULT_GOAL := build

$(VENV)/made-from:
	@echo "Making $(VENV) from $(MADE_FROM)"
	@rm -f $(VENV)/installed
	@if $(MADE_FROM) $(USABLE_TORCH); then \
	    $(MADE_FROM) -m venv --clear --system-site-packages $(VENV) && \
	    { $(BIN)/python $(USABLE_TORCH) || \
	      $(MADE_FROM) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	          > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/made-from.pth"; }; \
	else \
	    $(MADE_FROM) -m venv --clear $(VENV); \
	fi
	@echo '$(MADE_FROM)' > $@

$(VENV)/installed: $(VENV)/made-from pyproject.toml
	@$(PIP) 'setuptools>=77' wheel 'pybind11>=2.12' ninja
	@$(BIN)/python $(USABLE_TORCH) || { echo "Installing $(TORCH)"; $(PIP) '$(TORCH)'; }
	@$(BUILD)
	@echo "Installing bertkern with its test and benchmark dependencies"
	@$(PIP) --no-build-isolation -e '.[test,bench]'
	@touch $@

build: $(VENV)/installed
	@$(BUILD)

test: build
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

demo: build
	$(BIN)/python -m bertkern demo $(ARGS)

bench: build
	$(BIN)/python -m bertkern bench $(ARGS)

lint: $(VENV)/installed
	@$(PIP) pre-commit
	$(BIN)/python -m pre_commit run --all-files

# The library with sanitizers goes elsewhere and is loaded in place of the usual one; Python itself has no sanitizer, so
# the runtime is preloaded, and libstdc++ with it for exceptions to be seen.
SANITIZED := build/sanitized
RUNTIME = $(shell $${CXX:-c++} -print-file-name=libasan.so) $(shell $${CXX:-c++} -print-file-name=libstdc++.so)
asan: $(VENV)/installed
	BERTKERN_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED)
	LD_PRELOAD='$(RUNTIME)' ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    BERTKERN_LIBRARY=$(SANITIZED)/bertkern/_C.abi3.so $(BIN)/python -m pytest -m 'not slow' $(or $(ARGS),tests/ops)

gpu: build
	$(BIN)/python -m benchmarks.gpu $(ARGS)

gpu-sanitize: build
	$(BIN)/python -m benchmarks.gpu --sections sanitizer --again --budget 1800 $(ARGS)

clean:
	rm -rf build dist *.egg-info bertkern/*.so
