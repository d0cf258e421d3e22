# Everything runs in a virtual environment of the project's own, made on first use.
#   make fewshot    the main job on the embedded demo
#   make test       the tests
#   make upstream   the traps in the libraries below, shown on them alone
#   make style      format and mend what can be mended
#   make quality    all checks of style, docstrings and layers
#   make bench      the benchmarks at a small size

PYTHON ?= python3
VENV ?= .venv
# The torch release that the project is tested on; TORCH=torch takes the newest one.
TORCH ?= torch==2.14.1
BIN := $(VENV)/bin
SOURCES := hf_momentum recipes scripts tests
# One process on all cores (the launcher's default is one thread), and no traceback of the launcher's own after a
# user's mistake.
LAUNCH := accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell nproc 2>/dev/null || echo 1)

.PHONY: fewshot test demo-test upstream style quality bench clean
.DELETE_ON_ERROR:

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; $(PYTHON) is {sys.version.split()[0]}. Choose another: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# An extra's stamp: .venv/.demo holds the extra `demo`, .venv/.dev the extra `dev`.
$(VENV)/.%: setup.cfg pyproject.toml | $(VENV)/.python
	@echo "Installing hf_momentum[$*] and what it needs into $(VENV): a few minutes the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

fewshot: $(VENV)/.demo
	$(BIN)/$(LAUNCH) recipes/roberta_fewshot.py $(or $(ARGS),--optim sgdm)

# One thread per worker: the tests are many and small.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(ARGS)

demo-test: $(VENV)/.dev
	$(BIN)/hf-momentum demo
	$(BIN)/python -m pytest -m demo $(ARGS)

# The traps of the libraries below, shown on them alone: a failure says that a new release has mended one.
upstream: $(VENV)/.dev
	$(BIN)/python -m pytest -m upstream $(ARGS)

style: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache

bench: $(VENV)/.demo $(VENV)/.vision
	$(BIN)/python scripts/bench_all.py $(ARGS)
