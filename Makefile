# Every target sets up .venv by itself. Tools run as `.venv/bin/python -m ...`: the scripts beside it carry the
# absolute path of the interpreter in their first line, which breaks where that path has a space or moves.
# All paths are relative for the same reason.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo demo-quick demo-data needle clean-demo test test-oldest lint format bench bench-gpu slurm-test faults

PYTHON ?= python3
venv_python := .venv/bin/python
installed := .venv/installed

help:
	@echo 'make demo        train a small model through all stages, show what it learned (runs/demo/)'
	@echo 'make demo-quick  the same with few tokens: all of it at work, little learned'
	@echo 'make needle      find facts in long text before and after stage 3 (about 40 minutes; docs/needle.md)'
	@echo 'make demo-data   prepare the corpora of the demo and nothing else (data/small/)'
	@echo 'make clean-demo  forget the demo: the next one starts over'
	@echo 'make test        lint, types, then every test'
	@echo 'make test-oldest the tests with the oldest releases that pyproject.toml allows (downloads gigabytes)'
	@echo 'make bench       measure speed beside peers, into docs/performance.md (nothing else should run)'
	@echo 'make bench-gpu   the same at full width, on a GPU'
	@echo 'make slurm-test  install SLURM (Debian, apt) and run a job under it that is preempted and requeued'
	@echo 'make faults      kill, starve, fill and damage a small run in every way, into docs/reliability.md'
	@echo 'make lint        ruff and mypy only'
	@echo 'make format      let ruff mend what it can'
	@echo 'make setup       only install into .venv (PYTHON=python3.12 picks the interpreter)'

setup: $(installed)

# Installs again only when what is to be installed changed.
$(installed): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'Python 3.11 or newer is needed; PYTHON=/path/to/python3 picks one.' >&2; exit 2; }
	@if ! $(venv_python) -c '' 2>/dev/null; then echo 'Creating .venv'; rm -rf .venv; $(PYTHON) -m venv .venv; fi
	@echo 'Installing into .venv (a minute or two, the first time)'
	@$(venv_python) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(installed)

demo: $(installed)
	@$(venv_python) -m demo.run

demo-quick: $(installed)
	@$(venv_python) -m demo.run --quick

needle: $(installed)
	@$(venv_python) -m demo.needle

demo-data: $(installed)
	@$(venv_python) -m demo.corpora

clean-demo:
	@rm -rf runs/demo runs/demo-quick runs/needle data/small

test: lint
	@$(venv_python) -m pytest

# In a .venv-oldest of its own, from scratch. pip has no way to choose the oldest; uv has.
test-oldest:
	@rm -rf .venv-oldest
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	@.venv-oldest/bin/python -m uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct -e '.[dev]'
	@.venv-oldest/bin/python -m pytest

# Where it is not installed yet, that takes the rights to do so.
slurm-test: $(installed)
	@command -v sbatch >/dev/null && PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null || { \
		root=; [ "$$(id -u)" = 0 ] || root=sudo; \
		$$root apt-get update -qq && $$root apt-get install -y -qq --no-install-recommends slurm-wlm; }
	@$(venv_python) -m pytest tests/slurm

faults: $(installed)
	@$(venv_python) -m faults.run

lint: $(installed)
	@$(venv_python) -m ruff check --quiet .
	@$(venv_python) -m ruff format --check --quiet .
	@$(venv_python) -m mypy

bench: $(installed)
	@$(venv_python) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(venv_python) -m demo.corpora
	@$(venv_python) -m benchmarks.run

bench-gpu: $(installed)
	@$(venv_python) -m benchmarks.gpu

format: $(installed)
	@$(venv_python) -m ruff check --fix .
	@$(venv_python) -m ruff format .
