# Each target sets up what it needs: a virtual environment of this folder's own, made once and
# again when setup.cfg changes. PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

.PHONY: demo test test-scripts lint format docs tutorials clean

demo: $(READY)
	$(BIN)/python -m experiments.permuted --out $(DEMO) --resume

test: $(READY)
	$(BIN)/python -m pytest

test-scripts: $(READY)
	$(BIN)/python -m pytest -m scripts

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site: built without the network, a warning is an error.
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Runs the notebooks of the site anew, minutes, and draws the pictures of the idea.
tutorials: $(VENV)/.ready-docs
	$(BIN)/python docs/draw_idea.py
	$(BIN)/python docs/run_tutorials.py

clean:
	rm -rf $(VENV) .cache build *.egg-info

$(VENV)/.ready-docs: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
