# Everything sets up .venv by itself; python3 >= 3.11 and pip are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests share the cores by processes; torch's own threads would only fight over them.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(BIN)/python -m pytest

.PHONY: demo test check bench docs format clean

# One stamp per set of extras: an install runs again only when pyproject.toml changed.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "unmask needs Python >= 3.11, $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-photos  ## the main job, end to end, in minutes on two cores
	$(BIN)/unmask demo

test: $(VENV)/.installed-dev  ## everything, slow tests too
	$(PYTEST) -n $(WORKERS) --dist loadfile

check: $(VENV)/.installed-dev  ## what runs before each commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -n $(WORKERS) -m "not slow"

bench: $(VENV)/.installed-dev $(VENV)/.installed-bench  ## every claim about speed: ours and the peers in one run
	@set -e; for file in bench/*.py; do echo "== $$file"; $(BIN)/python $$file; done

docs: $(VENV)/.installed-docs  ## the pages, into site/
	$(BIN)/mkdocs build --strict

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)/.installed-* site .mypy_cache .ruff_cache .pytest_cache
