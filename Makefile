# make train: set up, tokenize the built-in corpus, train the tiny model.   make test: set up, run the tests.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# Packages are compiled when they are first imported, not at set-up: few of their modules ever are. That has to be kept then.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup train test clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

train: setup
	$(VENV)/bin/python -m jobs.train --config jobs/configs/tiny.yaml $(ARGS)

# What needs neither a cluster nor rank processes is tested on every core; then the rest, one test after another: it needs the
# whole machine.
ALONE := tests/orchestrator tests/dashboards tests/actors/model tests/jobs/test_plan.py

test: setup
ifdef ARGS
	$(VENV)/bin/python -m pytest $(ARGS)
else
	failed=0; \
	$(VENV)/bin/python -m pytest -n auto $(ALONE) || failed=1; \
	$(VENV)/bin/python -m pytest $(addprefix --ignore ,$(ALONE)) || failed=1; \
	exit $$failed
endif

clean:
	rm -rf $(VENV) runs
