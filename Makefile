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

# Whole runs, on clusters of their own, want the machine for themselves: one after the other. Of the rest two files at a time: much of
# it waits, for processes that start and for time that is part of a fault.
RUNS := tests/jobs tests/cluster

test: setup
ifdef ARGS
	$(VENV)/bin/python -m pytest $(ARGS)
else
	failed=0; \
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix --ignore ,$(RUNS)) || failed=1; \
	$(VENV)/bin/python -m pytest $(RUNS) || failed=1; \
	exit $$failed
endif

clean:
	rm -rf $(VENV) runs
