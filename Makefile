# make run    execute the notebooks in order and show a table of results
# make test   run the tests, notebooks included
# make lab    open the notebooks in JupyterLab
# make setup  only install, into .venv

PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: run test lab setup clean

run: setup
	$(BIN)/python -m backpack_lib.running

test: .venv/tested-with
	$(BIN)/python -m pytest

lab: setup
	$(BIN)/jupyter lab notebooks

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv (some minutes the first time) ..."
	$(INSTALL) .
	@touch $@

.venv/tested-with: .venv/installed
	$(INSTALL) '.[test]'
	@touch $@

clean:
	rm -rf .venv runs
