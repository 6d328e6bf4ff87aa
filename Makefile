# make demo: a real model, improved, measured, judged and promoted.   make test: the test suite.   make lint: ruff and mypy.
PYTHON ?= python3
# A CPU needs no CUDA packages: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
RECIPE ?= smollm2-concise
BIN := .venv/bin

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[dev]' -c constraints.txt
	touch $@

demo: .venv/installed
	$(BIN)/prefbuild build $(RECIPE)
	$(BIN)/prefbuild promote $(RECIPE)

test: .venv/installed
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build/[!.]* build/.work
