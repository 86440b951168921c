# `make repro` and `make test` are all that a newcomer needs; both install what they use into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1
export DVC_NO_ANALYTICS := 1
export NO_ALBUMENTATIONS_UPDATE := 1

.DEFAULT_GOAL := help
.PHONY: help setup repro test faults flips lint bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# The stamps carry the requirements' digest: an unchanged file installs nothing.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Capstan needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@cp requirements.txt $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@cp requirements-dev.txt $@

setup: $(VENV)/installed-dev  ## make .venv with users' and developers' requirements

repro: $(VENV)/installed  ## run what has changed of the pipeline: images to report
	@$(BIN)/python -m captioning check
	@$(BIN)/python -m captioning heal
	PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro
	@echo "report: reports/index.html (open it in a browser), reports/report.md"

test: $(VENV)/installed-dev  ## run all tests, the pipeline's through real dvc
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

faults: $(VENV)/installed-dev  ## kill, starve and damage runs: COUNT cases, the random ones of SEED, JOBS at a time; ONLY=<number> again
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=tests:. $(BIN)/python -m faults --count $(or $(COUNT),150) --seed $(or $(SEED),1) --jobs $(or $(JOBS),2) $(if $(ONLY),--only $(ONLY))

flips: $(VENV)/installed-dev  ## flip bits in and truncate every file format: COUNT of each
	PYTHONPATH=tests:. $(BIN)/python -m faults.flips --count $(or $(COUNT),1000) --seed $(or $(SEED),1)

lint: $(VENV)/installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed  ## measure speed beside peers and limits; writes benchmarks/results.json
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks

clean: $(VENV)/installed  ## name the results of captioners that params.yaml no longer lists (FORCE=1 deletes them)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m captioning clean $(if $(FORCE),--force)
