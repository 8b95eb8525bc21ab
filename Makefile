# Two commands are all that a newcomer needs:
#
#   make demo    a small Goku learns real pictures and clips, is killed, resumed and sampled from
#   make test    lint, types, import contracts and all tests
#
# Both set up the same .venv from nothing. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
# Where a CPU build of torch is looked for beside what pip is configured with: an index address,
# `none` for pip's own configuration alone, or `auto`: PyTorch's CPU index on a Linux machine
# without an NVIDIA driver (the default build from PyPI brings gigabytes of CUDA libraries), else
# none.
TORCH_INDEX ?= auto
# 0, 1 or auto; see setup.py. Nothing that `make` runs on a machine without a GPU needs the CUDA
# module.
GOKU_CUDA ?= 0
# Extra arguments: make demo ARGS="--help", make pytest ARGS="tests/csrc -k combine"
ARGS ?=
WORKERS ?= 2

# Packages are installed without bytecode, which is written when it is first imported. Where that is turned off every
# process would compile torch anew, 7 s instead of 3 until goku.trainer is there.
export PYTHONDONTWRITEBYTECODE :=

CPU_INDEX := https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
EXTRAS := dev,tensorboard
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
SOURCES := pyproject.toml setup.py CMakeLists.txt \
           $(wildcard $(foreach kind,cpp h cu cuh,csrc/*/*.$(kind)))

# Stamps: what a target has already done to the environment. The value of GOKU_CUDA is part of the
# name.
TORCH := $(VENV)/.torch-ready
GOKU := $(VENV)/.goku-ready-cuda-$(GOKU_CUDA)
DEV := $(VENV)/.dev-ready-cuda-$(GOKU_CUDA)

# step(words, command): one line with the seconds it took; pip's own words go to the log, and its
# end is shown if the command fails.
define step
	@began=$$SECONDS; printf '%s ... ' "$(1)"; \
	if { $(2); } >>$(LOG) 2>&1; then echo "$$((SECONDS - began)) s"; \
	else echo "failed. The end of $(LOG):"; tail -n 40 $(LOG); exit 1; fi
endef

.PHONY: help
help:  ## what there is (this list)
	@echo "make TARGET [PYTHON=python3.12] [TORCH_INDEX=none|URL] [GOKU_CUDA=0|1|auto] [ARGS=...]"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1|\2/p' $(MAKEFILE_LIST) \
	  | awk -F'|' '{printf "  %-10s %s\n", $$1, $$2}'

# ---- the two commands ----------------------------------------------------------------------------

.PHONY: demo
demo: $(GOKU)  ## train, kill, resume and sample a small Goku; the results are demo-out/report.html and recipe.html
	@$(BIN)/goku demo $(ARGS)

.PHONY: test
test: check pytest  ## lint, types, import contracts, the tests that need no GPU but for `make long`

# ---- parts of `make test` ------------------------------------------------------------------------

.PHONY: check
check: lint types imports  ## lint, types and import contracts

.PHONY: lint
lint: $(DEV)  ## ruff and codespell
	@echo "lint"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check . >$(VENV)/format.log 2>&1 \
	  || { cat $(VENV)/format.log; echo "make format does it"; exit 1; }
	@$(BIN)/codespell

.PHONY: format
format: $(DEV)  ## rewrite the Python files in the project's format
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

.PHONY: types
types: $(DEV)  ## mypy
	@echo "types"
	@$(BIN)/mypy

.PHONY: imports
imports: $(DEV)  ## who may import whom (import-linter)
	@echo "import contracts"
	@$(BIN)/lint-imports >$(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log; exit 1; }

# One thread a process: two workers on two cores, and results that do not depend on the machine's
# number of cores. Triton interprets or compiles a kernel for good when it is imported, so the tests
# in its interpreter are runs of their own.
# Without the flag files of few tests come last, and those of several processes, the longest, have few.
RUN = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
INTERPRETER := tests/kernels/interpreter
PYTEST = $(RUN) --ignore=tests/gpu --ignore=$(INTERPRETER)

.PHONY: pytest
pytest: $(DEV)  ## the tests alone; ARGS are pytest's
	@$(PYTEST) $(if $(ARGS),$(ARGS),-m "not long")
	@$(if $(ARGS),,TRITON_INTERPRET=1 $(RUN) $(INTERPRETER) -m "not long")

.PHONY: long
long: $(DEV)  ## the tests that `make test` has no time for: every mesh, crashes, nvcc
	@$(PYTEST) -m long $(ARGS)
	@TRITON_INTERPRET=1 $(RUN) $(INTERPRETER) -m long $(ARGS)

.PHONY: quick
quick: $(DEV)  ## the tests that take less than about ten seconds each
	@$(PYTEST) -m "not slow" $(ARGS)

.PHONY: sanitize
sanitize: $(DEV)  ## the checkpoint engine's C++ tests under address, undefined and thread sanitizers
	@$(PYTEST) tests/csrc/test_sanitizers.py $(ARGS)

ATHERIS := atheris>=3,<4

.PHONY: fuzz
fuzz: $(DEV)  ## feed atheris's inputs to what reads a checkpoint's JSON files, a minute; ARGS="--seconds 300"
	@$(BIN)/python -c 'import atheris' 2>/dev/null \
	  || $(PIP) install --quiet --only-binary atheris "$(ATHERIS)" >>$(LOG) 2>&1 || true  # it says so itself
	@$(BIN)/python tests/runtime/checkpoint/fuzz.py $(ARGS)

.PHONY: interpreter
interpreter: $(DEV)  ## the Triton kernels in Triton's interpreter, all of it; ARGS are pytest's
	@TRITON_INTERPRET=1 $(RUN) $(INTERPRETER) $(ARGS)

# ---- compiled without a GPU ----------------------------------------------------------------------

TRITON ?=
OTHER := $(VENV)/triton-$(TRITON)

.PHONY: compiled
compiled: $(DEV)  ## what the Triton kernels compile to: docs/compiled.md; TRITON=3.6.0 for another version
	@if [[ -n "$(TRITON)" ]]; then \
	  $(PIP) install --quiet --no-deps --upgrade --target $(OTHER) "triton==$(TRITON)" >>$(LOG) 2>&1; fi
	@PYTHONPATH=$(if $(TRITON),$(OTHER)) $(BIN)/python -m bench.compiled --write
	@$(BIN)/python -m bench.compiled --render

# ---- the environment -----------------------------------------------------------------------------

.PHONY: shipped
shipped: $(DEV)  ## compile and judge every shipped configuration; `make test` does so where sources changed since
	@$(RUN) tests/kernels/compiled -m shipped $(ARGS)
	@$(if $(ARGS),,$(BIN)/python tests/kernels/verified.py shipped)

.PHONY: mutants
mutants: $(DEV)  ## wrong kernels that the interpreter's tests have to find; `make test` does so where sources changed since
	@$(RUN) tests/kernels/test_mutants.py -m mutants $(ARGS)
	@$(if $(ARGS),,$(BIN)/python tests/kernels/verified.py mutants)

.PHONY: venv
venv: $(DEV)  ## set up .venv with everything for development

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  echo "Goku needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks its venv module (Debian, Ubuntu: apt-get install python3-venv)."; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "A C++ compiler is needed, $${CXX:-c++} was not found (Debian, Ubuntu: apt-get install g++)."; \
	  exit 1; }
	@echo "$(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# Alone and first: what follows then finds a torch that fits and leaves it. Without its
# dependencies, so that a CPU index that does not answer costs one look-up and not one for each of
# them.
$(TORCH): constraints.txt | $(BIN)/python
	$(call step,torch,\
	  index="$(TORCH_INDEX)"; \
	  if [[ $$index == auto ]]; then index=none; \
	    if [[ $$(uname -s) == Linux ]] && ! command -v nvidia-smi; then index=$(CPU_INDEX); fi; fi; \
	  extra=(); \
	  if [[ $$index != none ]]; then extra=(--extra-index-url "$$index" --retries 0 --timeout 10); fi; \
	  $(PIP) install --no-compile --no-deps -c constraints.txt "$${extra[@]}" torch)
	@touch $@

$(GOKU): $(SOURCES) $(TORCH)
	$(call step,goku and what it needs,GOKU_CUDA=$(GOKU_CUDA) $(PIP) install --no-compile -c constraints.txt -e .)
	@touch $@

$(DEV): $(SOURCES) $(TORCH)
	$(call step,goku and the tools for its development,\
	  GOKU_CUDA=$(GOKU_CUDA) $(PIP) install --no-compile -c constraints.txt -e ".[$(EXTRAS)]")
	@touch $@ $(GOKU)

# ---- packages ------------------------------------------------------------------------------------

.PHONY: wheel
wheel: $(DEV)  ## sdist and wheel in dist/
	@GOKU_CUDA=$(GOKU_CUDA) $(BIN)/python -m build

.PHONY: clean
clean:  ## remove what builds and checks leave behind; .venv and demo-out stay
	@rm -rf build dist *.egg-info
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@rm -f runtime/goku_runtime/*.so kernels/goku_kernels/*.so
	@rm -f $(VENV)/.goku-ready-* $(VENV)/.dev-ready-*
	@find kernels runtime goku tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## remove .venv and demo-out too
	@rm -rf $(VENV) demo-out
