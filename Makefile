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

# Two files at a time: most tests wait, for processes that start and for time that is part of a fault. Files as they are found, so
# that the many short ones of orchestrator/ come last.
test: setup
	$(VENV)/bin/python -m pytest $(or $(ARGS),-n 2 --dist loadfile --no-loadscope-reorder)

clean:
	rm -rf $(VENV) runs
