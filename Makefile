# `make demo` and `make test` do all their own set-up on a machine with Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint check format bench-depo lock clean

demo: $(VENV)/.demo
	$(BIN)/depo-gateway demo $(ARGS)

# JOBS processes, one per core; each uses one thread for torch, so that they do not compete.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# DEPO against GRPO, DAPO and others on a small policy: about an hour on two cores; ARGS="--jobs 8" on more.
bench-depo: $(VENV)/.dev
	$(BIN)/python -m benchmarks.depo.run $(ARGS)
	$(BIN)/python -m benchmarks.depo.report

# A stamp per set of dependencies; the demo's set has no torch.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing what serving and the demo need into $(VENV) (once)"
	@$(PIP) -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing torch and the development tools into $(VENV) (once)"
	@$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

# Rewrites constraints.txt from a fresh environment with the newest versions that pyproject allows.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	.venv-lock/bin/python -m pip install --quiet -e '.[dev]'
	.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//' > constraints.txt
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) .venv-* .newest .trl-oldest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
