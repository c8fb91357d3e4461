# `make card` and `make test` need Python 3.11 with venv and pip, and nothing else: all they install goes to .venv.

# The interpreter of the environment; by default the first of these that is installed and can use the locks.
PYTHON ?=
CANDIDATES := python3.11 python3 python3.12 python3.13
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# Which build of torch: cpu, cuda, or by itself: cuda beside an NVIDIA driver or where pip finds no CPU build.
TORCH ?=

CORES ?= all
SNAKEMAKE_ARGS ?=
PYTEST_ARGS ?=

# Two tests at a time, whatever the machine has: a whole build takes two cores itself.
PYTEST := python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

VENV := .venv
INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps
LOCKS := envs/build.lock envs/requirements.lock envs/torch-cpu.lock envs/torch-cuda.lock

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Programs that rules call by name come from the environment; packages of the user's home directory stay out of it.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONNOUSERSITE := 1

.PHONY: help card environment cluster test format lint unit faults lock wheelhouses clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "Settings: PYTHON=python3.11, TORCH=cpu, CORES=all, SNAKEMAKE_ARGS='--configfile mine.yaml', PYTEST_ARGS='-k nvfp4'"

card: $(VENV)/.installed  ## build the releases of the config, and model_card.md
	snakemake --cores $(CORES) model_card.md $(SNAKEMAKE_ARGS)

environment: $(VENV)/.installed  ## make .venv from the locks, checking every hash

cluster: $(VENV)/.installed-cluster  ## add what builds on Slurm and Kubernetes need (docs/cluster.md)

test: format lint $(VENV)/.installed-test  ## everything that continuous integration checks
	$(PYTEST) $(PYTEST_ARGS)

format: $(VENV)/.installed-test  ## are the Snakefiles formatted?
	snakefmt --check Snakefile rules

lint: $(VENV)/.installed-test  ## ruff and Snakemake's own lint
	ruff check
	snakemake --lint

unit: $(VENV)/.installed-test  ## the fast tests only
	$(PYTEST) -m "not workflow" $(PYTEST_ARGS)

faults: $(VENV)/.installed-test  ## kills, full disks, flipped bits and clocks set back, in faults/ (an hour)
	python -m tests.faults --into faults

lock: envs/build.in envs/requirements.in envs/cluster.in envs/test.in  ## resolve envs/*.in; UPGRADE=1: all anew (network, some minutes)
	rm -rf .venv-lock
	$(or $(PYTHON),python3.11) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet pip-tools==7.6.2
	.venv-lock/bin/python envs/lock.py $(if $(UPGRADE),--upgrade)
	rm -rf .venv-lock

wheelhouses:  ## after a change of the locks: the hashes that flake.nix pins (network, up to 3 GB)
	rm -rf .wheelhouses
	$(or $(PYTHON),python3.11) envs/wheelhouse.py .wheelhouses
	rm -rf .wheelhouses

clean:  ## delete caches; results stay (snakemake --delete-all-output deletes those)
	rm -rf .pytest_cache .ruff_cache .hypothesis .venv-lock .wheelhouses
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## delete caches and .venv
	rm -rf $(VENV) src/requant.egg-info

# A changed lock makes a new environment: nothing of the old one is left in it.
$(VENV)/.installed: $(LOCKS) pyproject.toml
	@for python in $(or $(PYTHON),$(CANDIDATES)); do \
	  if "$$python" -c '$(SUPPORTED)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "make: no usable Python among: $(or $(PYTHON),$(CANDIDATES)). The locks are for Python 3.11 (3.12 and 3.13" \
	    "resolve too) with venv and ensurepip (Debian: python3-venv). Name one: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$("$$found" --version): some minutes, once"; \
	"$$found" -m venv --clear $(VENV)
	$(INSTALL) -r envs/build.lock
	$(INSTALL) --no-build-isolation -r envs/requirements.lock
	@torch=$(or $(TORCH),$$(test -e /proc/driver/nvidia/version && echo cuda || echo any)); \
	if [ "$$torch" = any ]; then \
	  if $(INSTALL) -r envs/torch-cpu.lock 2>$(VENV)/torch-cpu.log; then exit 0; fi; \
	  echo "pip found no CPU build of torch (see $(VENV)/torch-cpu.log): installing the CUDA build, 5 GB"; \
	  torch=cuda; \
	fi; \
	$(INSTALL) -r envs/torch-$$torch.lock
	$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
	$(VENV)/bin/python -m pip check
	@touch $@

$(VENV)/.installed-cluster: envs/cluster.lock $(VENV)/.installed
	$(INSTALL) -r envs/cluster.lock
	$(VENV)/bin/python -m pip check
	@touch $@

# What clusters need is beside the environment: tests are held against one without it, but for those of clusters.
$(VENV)/.installed-test: envs/test.lock envs/cluster.lock $(VENV)/.installed
	rm -rf $(VENV)/cluster
	$(INSTALL) --target $(VENV)/cluster -r envs/cluster.lock
	$(INSTALL) -r envs/test.lock
	$(VENV)/bin/python -m pip check
	@touch $@
