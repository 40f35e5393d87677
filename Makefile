# `make demo` and `make test` set up everything they need in $(VENV); the rest is for working on SparseRT.
VENV  ?= .venv
JOBS  ?= 2
TORCH ?= torch
ARGS  ?=
BIN    = $(VENV)/bin
STAMPS = $(VENV)/.installed
FAST   = not full and not peers
# what the full tier compares with, beyond the extras
PEERS  = bench,mkl,tflite

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test full bench lint format wheel clean

help:
	@echo "make demo    set up $(VENV), compile and time the pruned layers of two public networks, draw a chart"
	@echo "make test    set up $(VENV), run the fast tests (needs neither torch nor onnxruntime)"
	@echo "make full    install the peers, run every test, the long ones too"
	@echo "make bench   install the peers, time the standard problems (ARGS='--problems mobilenet_v1 --json out.json')"
	@echo "make lint    ruff, mypy --strict, import contracts"
	@echo "make format  let ruff format and repair"
	@echo "make wheel   build the wheel into dist/ and check it in an empty environment"
	@echo "make clean   remove environments, caches and builds"

demo: $(STAMPS)-demo
	$(BIN)/sparsert demo $(ARGS)

test: $(STAMPS)-test
	$(BIN)/python -m pytest -n $(JOBS) -m '$(FAST)' $(ARGS)

full: $(STAMPS)-full
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

bench: $(STAMPS)-bench
	$(BIN)/sparsert bench kernels $(ARGS)

lint: $(STAMPS)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

format: $(STAMPS)-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(STAMPS)-dev
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python .ci/check_wheel.py dist/*.whl

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# A stamp is made once what it names is installed, so later calls need neither time nor a network.
$(STAMPS)-demo $(STAMPS)-test $(STAMPS)-dev $(STAMPS)-bench: $(STAMPS)-%: $(STAMPS)-venv pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(STAMPS)-full: $(STAMPS)-venv pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,$(PEERS)]'
	@touch $@

# The first of these that is Python 3.11 or newer makes the environment (PYTHON=... chooses another).
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))

$(STAMPS)-venv:
	@test -n "$(PYTHON)" || { echo "SparseRT needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
