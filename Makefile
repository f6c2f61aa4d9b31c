# make demo and make test start from a bare clone: Python >= 3.11 and, for the native code, a C++17
# compiler. Both live in .venv with the versions of constraints.txt; a second run installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# One pytest worker a core, at most four: each holds torch in memory, and its BLAS takes its share of
# the cores (tests/conftest.py).
WORKERS ?= $(shell $(BIN)/python -c "import os; print(min(4, os.cpu_count() or 1))")
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

NATIVE_SOURCES := $(shell find csrc -type f)

.PHONY: demo test test-all lint build clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/normwear-fast encode examples/cohort --weights examples/weights/tiny --output out/demo
	$(BIN)/normwear-fast report out/demo

test: $(VENV)/.installed
	$(PYTEST)

test-all: $(VENV)/.installed
	$(PYTEST) -m "" --outcomes=bench/results/test-all.json tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: $(VENV)/.installed
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf build dist out *.egg-info normwear_fast/_C*.so
	rm -f $(VENV)/.installed
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# torch first: everything else accepts the torch that is there. A CPU build of torch brings no Triton;
# the oldest supported one then stands in, for its interpreter and compiler need no GPU.
$(VENV)/.environment: constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "$(PYTHON) is older than Python 3.11; name another with make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools pybind11 ninja
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) "triton==3.6.0; sys_platform == 'linux'"
	@touch $@

# Editable: Python changes need nothing, a change in csrc/ compiles what it touches.
$(VENV)/.installed: $(VENV)/.environment pyproject.toml setup.py $(NATIVE_SOURCES)
	$(PIP) --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -m normwear_fast.build
	@touch $@
