# Every target sets up .venv by itself. `make` alone lists the targets.

PYTHON ?= python3
PROFILE ?= quick
NOTEBOOKS ?=
NAME ?=
TORCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin/python
PIP := $(BIN) -m pip install -q --disable-pip-version-check
LOCK := requirements-lock.txt
# Named after the content of the lock and written last: a changed lock or an interrupted
# installation leaves no valid stamp, a second `make` installs nothing.
STAMP := $(VENV)/.installed-$(shell cksum < $(LOCK) | tr -s ' \t' '-')
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help run test study publish clean

help: ## list the targets (default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PROFILE=$(PROFILE)       smoke | quick | cpu | full, or a JSON file (README, \"Your own data\")"
	@echo "  NOTEBOOKS=          which notebooks to run, for example NOTEBOOKS=\"02 04\"; empty: all"
	@echo "  PYTHON=$(PYTHON)      the Python (3.11 or newer) that .venv is made from"
	@echo "  NAME=               arms to study, for example NAME=\"margin scalar:1\"; empty: all"
	@echo "  TORCH_ARGS=         extra pip arguments for torch, for example the index of a CPU build"

run: $(STAMP) ## execute the notebooks in order into runs/PROFILE/
	@$(BIN) -m utils.experiments.run --profile $(PROFILE) $(if $(strip $(NOTEBOOKS)),--only $(NOTEBOOKS))

publish: $(STAMP) ## copy what runs/PROFILE/ holds into results/ and notebooks/
	@$(BIN) -m utils.experiments.run --profile $(PROFILE) --publish
	@$(BIN) -m utils.experiments.summary

study: $(STAMP) ## train what the studies lack (hours), or the arms in NAME; publish to results/
ifeq ($(strip $(NAME)),)
	@$(BIN) -m utils.experiments.study
	@$(BIN) -m utils.experiments.judge
	@$(BIN) -m utils.experiments.published
endif
	@$(BIN) -m utils.experiments.policy_study $(NAME)
	@$(BIN) -m utils.experiments.published

test: $(STAMP) ## check style, then run all tests, the smoke sequence included
	@echo "== ruff check"
	@$(BIN) -m ruff check
	@echo "== ruff format --check"
	@$(BIN) -m ruff format --check
	@echo "== pytest"
	@$(BIN) -m pytest -q

clean: ## remove runs/, the unpublished output; results/ and .venv stay
	@echo "== removing runs/"
	@rm -rf runs

$(STAMP):
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) not found. Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=..."; exit 1; }
	@rm -f $(VENV)/.installed-*
	@{ $(BIN) -c '$(NEW_ENOUGH)' && $(BIN) -m pip --version; } >/dev/null 2>&1 || \
		{ echo "== creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "== installing torch (once, some minutes)"
	@$(PIP) $(TORCH_ARGS) -c $(LOCK) "$$(grep '^torch==' $(LOCK))"
	@echo "== installing $(LOCK)"
	@$(PIP) --no-deps -r $(LOCK)
	@touch $@
