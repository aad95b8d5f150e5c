# Set-up, demo and checks. `make` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
# The first of these that is a Python 3.11; or name one: make setup PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { echo "$$p"; exit; }; \
	done; echo python3.11)
# One more package index to find torch in, for another build of it than the default index has.
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
# -qq: errors only.
PIP = $(BIN)/pip -qq
# Stages call `ldm` and `dvc` by name.
export PATH := $(abspath $(BIN)):$(PATH)

# No library calls home. The code sets the same, for those who do not come through make.
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1
export NO_ALBUMENTATIONS_UPDATE := 1
export WANDB_MODE := disabled
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-slow test-big lint format tiny bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The locked packages. torch comes first and with its dependencies, because a CUDA build needs
# nvidia packages that the lock does not name; it brings the locked setuptools, which builds the
# few packages without a wheel. The rest comes without dependencies, or img2dataset would bring the
# `dataclasses` backport (see requirements.lock).
$(VENV)/.locked: requirements.lock
	@echo "set-up: installing requirements.lock into $(VENV) (minutes, the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "set-up: $(VENV) is not Python 3.11; remove it and run: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PIP) install $(TORCH_INDEX:%=--extra-index-url %) --constraint requirements.lock \
		"$$(grep '^torch==' requirements.lock)"
	@$(PIP) install --no-deps --no-build-isolation --use-pep517 -r requirements.lock
	@if $(BIN)/python -m pip show --quiet dataclasses 2>/dev/null; then \
		echo "set-up: $(VENV) holds the dataclasses backport; run: $(BIN)/pip uninstall dataclasses" >&2; exit 1; fi
	@lacking=$$($(BIN)/pip check | grep -v -e 'requires dataclasses, which is not installed' \
		-e '^No broken requirements' || true); \
		test -z "$$lacking" || { echo "set-up: packages do not fit together:"; echo "$$lacking"; exit 1; } >&2
	@touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	@echo "set-up: installing ldm into $(VENV)"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

setup: $(VENV)/.installed ## make the Python environment

demo: $(VENV)/.installed ## the whole way on embedded data: scenes, retraining, promotion
	$(BIN)/ldm scenes
	$(BIN)/dvc commit --quiet data.dvc
	$(BIN)/python -m flows.retrain

# What an extra brings, which the tests try too. Aside: diffusers would import it in every process.
$(VENV)/extras: $(VENV)/.installed
	@$(PIP) install --upgrade --no-deps --target $@ bitsandbytes==0.50.2
	@touch $@

test: $(VENV)/extras ## run the tests; ARGS="-m 'not (slow or kills or big)'" for the quick ones
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.installed ## what runs in several processes, or is killed again and again
	$(BIN)/python -m pytest -m kills $(ARGS)

test-big: $(VENV)/.installed ## the preset sd14 at its size: 24 GB of memory, 45 of disk
	$(BIN)/python -m pytest -m big $(ARGS)

lint: $(VENV)/.installed ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tiny: $(VENV)/.installed ## make the embedded pretrained model anew
	infra/make-tiny.sh

bench: $(VENV)/.installed ## measure
	$(BIN)/python -m bench $(ARGS)

clean: ## remove artifacts/ and caches; data/, runs/ and the environment stay
	rm -rf artifacts .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	@echo "Kept: data/, runs/ (checkpoints), MLflow's records, DVC's cache and $(VENV)."
