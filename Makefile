# make demo · make test · make test-all · make lab · make docs · make bench
# Every target prepares .venv first: Python 3.11 or 3.12 is all that has to be there.
# ARGS goes to the program: make test ARGS="-k settings", make demo ARGS="--seed 1"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lab docs bench export

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq -c constraints.txt
JOBS ?= 2
ARGS ?=

help:
	@echo "make demo      fine-tune the embedded any-to-any model on this machine, and write its report"
	@echo "make test      every notebook and every test; make test-all runs the slow ones too"
	@echo "make lab       JupyterLab on the notebooks"
	@echo "make docs      build the site locally and check its links"
	@echo "make bench     the benchmarks, quick form"
	@echo "make export    notebooks -> omnilab/, notebooks cleaned, README.md made from nbs/index.ipynb"

# The stamp is newer than what it was made from, or everything is installed again (seconds, if nothing changed).
setup: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt
	@[ -x $(PY) ] || tools/venv.sh "$(PYTHON)"
	@echo "installing into .venv, with the versions of constraints.txt (some minutes the first time)"
	@$(PIP) torch                  # first and alone: a CPU or CUDA build that pip was pointed at stays
	@$(PIP) -e '.[dev]'
	@touch $@

demo: setup
	@.venv/bin/omnilab demo $(ARGS)

# One thread a process: many small processes on few cores otherwise wait for each other.
test test-all: export OMP_NUM_THREADS = 1
test: setup
	@$(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)
test-all: setup
	@$(PY) -m pytest -n $(JOBS) --dist worksteal --run-slow $(ARGS)

lab: setup
	@$(PY) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/index.ipynb $(ARGS)

docs: setup
	@$(PY) tools/docs.py $(ARGS)

bench: setup
	@tools/peers.sh || echo "ms-swift could not be installed: benchmarks will say that it is missing"
	@for f in $$(grep -l '^def main' omnilab/bench/*.py); do OMP_NUM_THREADS=1 $(PY) -m omnilab.bench.$$(basename $$f .py) --quick $(ARGS); done

export: setup
	@$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export()"
	@$(PY) -c "from nbdev.clean import nbdev_clean; nbdev_clean()"
	@$(PY) tools/readme.py
