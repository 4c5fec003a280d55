# Everything runs in .venv; the stamp is renewed when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint install clean

demo: install  ## the whole chain on the embedded data set, at most ten minutes
	$(BIN)/ldm demo

test: install  ## the test suite
	$(BIN)/python -m pytest

lint: install  ## style and types
	$(BIN)/ruff check ldmcli tests
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $(STAMP)

clean:  ## remove the environment and caches; runs/ and outputs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
