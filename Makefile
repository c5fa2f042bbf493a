# Each target makes its own virtual environment in .venv and installs what it
# needs; again only when setup.cfg or pyproject.toml has changed.
#
#   make train                  train the tiny model; again: continue or finish
#   make test                   run all tests, e.g. ARGS="-k hash" JOBS=4
#   make lab                    all studies, at smoke scale; SCALE=cpu the real
#                               ones: hours, and going on where they stopped
#   make lint                   ruff: rules and format
#   make docs                   pages and API reference into build/docs
#   make clean                  remove .venv and build products, never runs/
#   make ... PYTHON=python3.13  with this Python instead of the first found

CONFIG ?= experiments/configs/tiny.py
WORKDIR ?= runs/tiny
# JAX keeps several cores busy by itself.
JOBS ?= 2
SCALE ?= smoke
# Processes of one thread each, which share the runs of a study.
WORKERS ?= 2
ARGS ?=
VENV ?= .venv

export PIP_DISABLE_PIP_VERSION_CHECK = 1

STAMPS := $(addprefix $(VENV)/.installed-,train test docs dev)
PYTHONS := $(or $(PYTHON),python3.12 python3.13 python3.11 python3)
# A name on the path may be a version manager's shim that runs nothing, and
# some systems ship Python without ensurepip: only running it tells.
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

ifdef PYTHON
# The Python asked for wins over the one that .venv was made with.
IDENTITY := import sys; print(sys.base_prefix, sys.version)
ifneq ($(shell $(PYTHON) -c '$(IDENTITY)' 2>/dev/null || echo missing),$(shell \
  $(VENV)/bin/python -c '$(IDENTITY)' 2>/dev/null || echo none))
REBUILD := 1
.PHONY: $(STAMPS)
endif
endif

.PHONY: train test lab lint docs clean

train: $(VENV)/.installed-train
	$(VENV)/bin/python -m experiments.pretrain --config=$(CONFIG) \
	  --workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile \
	  --no-loadscope-reorder $(ARGS)

lab: $(VENV)/.installed-train
	$(VENV)/bin/python -m experiments.lab --scale=$(SCALE) \
	  --workers=$(WORKERS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

# The theme's advertisement is not about these pages.
docs: export NO_MKDOCS_2_WARNING = 1
# Not --quiet, which would hide the warnings from --strict.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m mkdocs build --strict
	@echo "Open build/docs/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find engram_jax experiments tests -name __pycache__ -prune \
	  -exec rm -rf {} +

$(STAMPS): $(VENV)/.installed-%: setup.cfg pyproject.toml
	@if [ -n "$(REBUILD)" ] || \
	  ! $(VENV)/bin/python -c 'import pip; $(USABLE)' 2>/dev/null; then \
	  for python in $(PYTHONS); do \
	    if $$python -c '$(USABLE)' 2>/dev/null; then \
	      echo "Making $(VENV) with $$($$python -V) ($$python)"; \
	      exec $$python -m venv --clear $(VENV); \
	    fi; \
	  done; \
	  echo "PYTHON: $(PYTHONS); valid: one that runs, is 3.11 or newer and" \
	    "has venv, as in make PYTHON=/usr/bin/python3.12" >&2; \
	  exit 1; \
	fi
	@echo "Installing engram_jax and what it needs into $(VENV)"
	@$(VENV)/bin/python -m pip install --quiet \
	  --editable '.$(if $(filter-out train,$*),[$*])'
	@touch $@
