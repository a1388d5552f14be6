# Two commands: `make demo` and `make test`. Both create .venv if it is not there.
PYTHON ?= python3
BIN := .venv/bin
# Ray binds to every interface unless told otherwise; these commands run on one machine.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER := 0
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

# Processes that share the quick tests, file by file. What needs Ray is left out, for two Rays disturb each other.
JOBS ?= 2
QUICK := not slow and not gpu

.NOTPARALLEL:
.PHONY: help demo test test-slow lint format clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: .venv/ready  ## The whole line, small, on this machine; then open demo/index.html.
	$(BIN)/reelway demo

test: .venv/ready lint  ## Lint, types, and every quick test.
	$(BIN)/python -m pytest -m "$(QUICK) and not ray" -n $(JOBS) --dist loadfile --max-worker-restart=0
	$(BIN)/python -m pytest -m "$(QUICK) and ray"

test-slow: .venv/ready  ## The tests that take minutes.
	$(BIN)/python -m pytest -m "slow"

lint: .venv/ready  ## Form, rules and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=.venv/src $(BIN)/mypy --strict -p reelway.kernels

format: .venv/ready  ## Format and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and pinned: whatever depends on torch then finds it installed.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch setuptools
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	mkdir -p .venv/src && ln -sfn ../.. .venv/src/reelway  # for mypy, which does not follow editable installs
	touch $@

clean:  ## Remove the environment and caches (not runs/ and demo/).
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
