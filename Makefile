# Two commands do all: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
TESTS := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n 2

.PHONY: demo test test-all lint clean

demo: $(STAMP)
	$(BIN)/adafreeze demo

test: lint
	$(TESTS)

# And the slow ones, and what needs environments of its own (noxfile.py), made in .nox the first time.
test-all: test
	$(TESTS) -m slow
	$(BIN)/nox

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# torch first and alone: left to a dependency, pip may take a CUDA build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt requirements-demo.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-demo.txt
	touch $@

clean:
	rm -rf $(VENV) .nox
