# `make lab` is the first hour: install, train, build the book. `make help` lists the rest.
# Variables: PYTHON (interpreter, >= 3.11), STEPS, OUT, VENV, TORCH_INDEX_URL (where torch comes from).

ifeq ($(OS),Windows_NT)
$(error labpkg needs Linux or macOS: install WSL with `wsl --install`, open its shell and run make there)
endif

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs_out/train
PORT ?= 8000

BIN := $(VENV)/bin
READY := $(VENV)/.ready
STEP := scripts/step.sh
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
BROWSER_TESTS := tests/book
WORKFLOW_TESTS := tests/test_lab.py

.NOTPARALLEL:
.PHONY: help lab train test lint unit notebooks-test book-test lab-test soak book execute \
	figures laws parity calibrate screenshots notebook serve test-gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 16

# ---- environment ---------------------------------------------------------------

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "labpkg needs Python >= 3.11, but PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	  "name another one: make PYTHON=python3.12 ..."; exit 2; }
	@$(STEP) -q "Create the environment $(VENV)" $(PYTHON) -m venv $(VENV)
ifdef TORCH_INDEX_URL
	@$(STEP) -q "Install torch from $(TORCH_INDEX_URL)" $(PIP) \
	  --index-url $(TORCH_INDEX_URL) "$$(grep '^torch==' requirements.txt)"
endif
	@$(STEP) -q "Install requirements.txt (some minutes, torch is large)" $(PIP) -r requirements.txt
	@$(STEP) -q "Install labpkg from this folder" $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# ---- the main job --------------------------------------------------------------

lab: train book  ## install, train the GPT, build the book (STEPS=20: the short form)
	@echo "Read it: $(CURDIR)/_build/html/index.html, or run: make serve"

train: $(READY)
	@$(STEP) "Train a small GPT on the standard library's source" \
	  $(BIN)/labpkg train $(if $(STEPS),--steps $(STEPS)) --out $(OUT)

# ---- the book ------------------------------------------------------------------

book: $(READY)  ## build the book into _build/html; a warning is an error
	@$(STEP) -q "Build the book" $(BIN)/jupyter-book build . -W -n --keep-going

execute: $(READY)  ## run the notebooks and store their outputs (ONLY=book/x.ipynb: one)
	@$(STEP) "Execute the notebooks" $(BIN)/python scripts/notebooks.py execute $(ONLY)

figures: $(READY)  ## draw the figures that no notebook draws
	@$(STEP) -q "Draw the chapter map" $(BIN)/python scripts/chapter_map.py

laws: $(READY)  ## hold every engine to its laws, write what they measure into the book
	@$(STEP) "Measure the laws of every engine" $(BIN)/python -m pytest -q -m "soak or not soak" \
	  --laws book/data/laws.json tests/parallelism/test_laws.py
	@$(STEP) -q "Write the page of the laws" $(BIN)/python scripts/laws.py

parity: $(READY)  ## train every layout with every feature, write the deviations into the book
	@$(STEP) "Train the parity matrix (some 20 minutes on two cores)" \
	  $(BIN)/python -m scripts.parity

calibrate: $(READY)  ## fit the planner to published runs (DATA=their folder), write its errors
	@$(STEP) "Fit and cross-validate the planner" \
	  $(BIN)/python -m scripts.calibrate $(DATA)

screenshots: book  ## photograph every page into _build/screenshots (needs Chromium)
	@$(STEP) "Take screenshots" $(BIN)/python scripts/browser.py _build/html _build/screenshots

notebook: $(READY)  ## open the book in JupyterLab
	@$(BIN)/python -c 'import jupyterlab' 2>/dev/null || \
	  $(STEP) -q "Install JupyterLab" $(PIP) jupyterlab
	$(BIN)/jupyter lab --ip 127.0.0.1 book

serve: book  ## serve the built book on 127.0.0.1 (PORT=8000)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

# ---- tests ---------------------------------------------------------------------

test: lint unit notebooks-test book-test lab-test  ## everything that must hold

lint: $(READY)  ## ruff and pyright
	@$(STEP) "Check the format" $(BIN)/ruff format --check .
	@$(STEP) "Lint" $(BIN)/ruff check .
	@$(STEP) "Check the types" $(BIN)/pyright

unit: $(READY)
	@$(STEP) "Unit and fault tests" $(BIN)/python -m pytest -n 2 --dist loadfile -m "not soak" \
	  --ignore $(BROWSER_TESTS) --ignore $(WORKFLOW_TESTS) tests

notebooks-test: $(READY)
	@files=$$($(BIN)/python scripts/notebooks.py list) || exit 1; \
	$(STEP) "Run every notebook" $(BIN)/python -m pytest --timeout 0 --nbval-lax \
	  --nbval-current-env --nbval-cell-timeout=300 --nbval-kernel-startup-timeout=120 \
	  --durations=5 $$files

book-test: $(READY)
	@$(STEP) "Build the book and look at it in the browser" \
	  $(BIN)/python -m pytest --durations=5 $(BROWSER_TESTS)

lab-test: $(READY)
	@$(STEP) "make lab STEPS=20 in a temporary folder" \
	  $(BIN)/python -m pytest --durations=5 $(WORKFLOW_TESTS)

soak: $(READY)  ## the long repetitions: launches, kills, random configurations
	@$(STEP) "Soak tests" $(BIN)/python -m pytest -m soak --timeout 3600 tests

test-gpu:  ## tests of the library with PYTHON as it is; installs nothing
	$(PYTHON) scripts/test_gpu.py

clean:  ## remove what was built, keep the environment
	rm -rf _build build dist runs_out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
