# make train: set up, tokenize the built-in corpus, train the tiny model.   make test: set up, run the tests.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

.PHONY: setup train test clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

train: setup
	$(VENV)/bin/python -m jobs.train --config jobs/configs/tiny.yaml $(ARGS)

test: setup
	$(VENV)/bin/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) runs
