PYTHON ?= python3
VENV ?= .venv
# constraints-oldest.txt tests with the oldest torch that pyproject.toml allows; give it a VENV of its own.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
BASE := $(VENV)/.base
READY := $(VENV)/.ready
# What an editable install has to be told of: new packages, and the compiled kernels.
SOURCES := $(shell find src csrc -name __init__.py -o -name '*.cpp' -o -name '*.h')

.PHONY: demo test lint bench results results-quick slow sanitize docs clean

demo: $(BASE)
	$(BIN)/rarefy run examples/gpt_stdlib_rigl.yaml --compare_dense 20

# A file is one process's, so that what its tests share is made once; the long ones come early. Threads that wait for
# others do not spin on the two cores. Bytecode is kept, whatever the environment says: the processes that tests start
# import the package, too.
test: $(READY)
	PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(READY)
	$(BIN)/pytest -n 2 -m slow

sanitize: $(READY)
	$(BIN)/pip install -q -c $(CONSTRAINTS) 'nanobind>=2.4' cmake
	PYTHON=$(BIN)/python sh csrc/sanitize.sh -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

# Every table; each goes on where it was cut short. QUALITY="methods --task mnist1d_mlp" does one table, or one task of it.
results: $(VENV)/.results
	PYTHONPATH=benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m quality --jobs 2 $(QUALITY)
	$(BIN)/python docs/scripts/results_page.py

results-quick: $(VENV)/.results
	PYTHONPATH=benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m quality --quick --jobs 2 $(QUALITY)

$(VENV)/.results: $(READY)
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e '.[results]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(READY)
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

# torch first and pinned: an unpinned request would fetch a build with gigabytes of GPU libraries.
$(BASE): pyproject.toml $(CONSTRAINTS) CMakeLists.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c $(CONSTRAINTS) torch
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e .
	touch $@

$(READY): $(BASE)
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
