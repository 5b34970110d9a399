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

# The tests of orchestrator/ need a core and nothing else: they run in what the others, which mostly wait, leave of it.
test: setup
	@nice -n 19 $(VENV)/bin/python -m pytest tests/orchestrator $(ARGS) > $(VENV)/orchestrator.txt 2>&1 & pure=$$!; \
	$(VENV)/bin/python -m pytest --ignore=tests/orchestrator $(ARGS); others=$$?; \
	wait $$pure; code=$$?; cat $(VENV)/orchestrator.txt; exit $$((others || code))

clean:
	rm -rf $(VENV) runs
