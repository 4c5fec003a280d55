# Everything runs in .venv; the stamp is renewed when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEROP := .venv-interop
PEERS := .venv-peers

.PHONY: demo test test-interop bench-peers lint docs install clean

demo: install  ## the whole chain on the embedded data set, at most ten minutes
	$(BIN)/ldm demo

# a process a core, each with one thread; a file stays in one process, since its tests share what they trained
test: install  ## the test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# diffusers comes into an environment of its own that lies on top of the other one, so that it can change nothing there
define with-diffusers
	test -x $(1)/bin/python || $(BIN)/python -m venv $(1)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	$(1)/bin/python -m pip install --quiet -e '.[interop]'
endef

test-interop: install  ## exported models loaded and run by diffusers itself
	$(call with-diffusers,$(INTEROP))
	$(INTEROP)/bin/python -m pytest tests/interop

bench-peers: install  ## speed against diffusers with the same weights; PEERS_OPTIONS=--quick takes half of the time
	$(call with-diffusers,$(PEERS))
	$(PEERS)/bin/python docs/measure/against_diffusers.py $(PEERS_OPTIONS)

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
	rm -rf $(VENV) $(INTEROP) $(PEERS) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
