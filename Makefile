# Everything runs in .venv; the stamp is renewed when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEROP := .venv-interop

.PHONY: demo test test-interop lint docs install clean

demo: install  ## the whole chain on the embedded data set, at most ten minutes
	$(BIN)/ldm demo

# a process a core, each with one thread; a file stays in one process, since its tests share what they trained
test: install  ## the test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# diffusers comes into an environment of its own that lies on top of the other one, so that it can change nothing there
test-interop: install  ## exported models loaded and run by diffusers itself
	test -x $(INTEROP)/bin/python || $(BIN)/python -m venv $(INTEROP)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(INTEROP)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	$(INTEROP)/bin/python -m pip install --quiet -e '.[interop]'
	$(INTEROP)/bin/python -m pytest tests/interop

lint: install  ## style, types, and whether the generated pages are those of the code
	$(BIN)/ruff check ldmcli tests docs
	$(BIN)/ruff format --check ldmcli tests docs
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: install  ## the pages that the code itself tells: settings and commands
	$(BIN)/python docs/generate.py

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $(STAMP)

clean:  ## remove the environment and caches; runs/ and outputs/ stay
	rm -rf $(VENV) $(INTEROP) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
