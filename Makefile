# One obvious command each. `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
# `make test PYTHON=python3.13` has an environment of its own, beside the usual one: .venv-python3.13.
VENV := $(if $(filter command line,$(origin PYTHON)),.venv-$(notdir $(PYTHON)),.venv)
BIN := $(VENV)/bin
UV := $(BIN)/uv
MEMBERS := $(patsubst %/pyproject.toml,%,$(wildcard packages/*/pyproject.toml)) servers
PROJECTS := $(addsuffix /pyproject.toml,$(MEMBERS))
# For uv: our own packages are installed from this checkout, and named in no list of versions.
NOT_OURS := $(foreach member,$(MEMBERS),--no-emit-package mainstay-$(subst _,-,$(notdir $(member))))
PACKAGE ?=
QUICK ?=
ENGINE ?= embedded
PURCHASES ?=
export UV_NO_PROGRESS := 1

.PHONY: setup demo test test-lowest check lint layers types format api errors new dashboards docs bench services lock clone-check clean
.DEFAULT_GOAL := setup

# The environment: third-party code exactly as locked, by hash; our own packages as links into this checkout.
setup: $(VENV)/.members
	@:

$(VENV)/.locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Mainstay needs Python 3.11 or newer; name one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.11")'
	@bash tools/venv.sh $(PYTHON) $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.txt
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/uv.txt
	@echo "installing what requirements.lock names into $(VENV)"
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes --no-deps -r requirements.lock
	@touch $@

$(VENV)/.members: $(VENV)/.locked $(PROJECTS)
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation $(addprefix -e ./,$(MEMBERS))
	@touch $@

# Names, versions and hashes, and no addresses: where packages come from is each machine's own configuration.
# It needs no environment but uv, and the versions that are locked stay until UPGRADE=1 asks for newer ones.
lock: $(VENV)/.locked
	@$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras \
	  --group pyproject.toml:dev --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	  $(NOT_OURS) \
	  $(if $(UPGRADE),--upgrade) $(PROJECTS) -o requirements.lock

# The ticket office, killed several times on the way: ENGINE=embedded (SQLite, no server) or full (Kafka, PostgreSQL),
# PURCHASES=file for other purchases than its own.
demo: setup
	@PYTHONPATH=examples ENGINE=$(ENGINE) PURCHASES="$(PURCHASES)" $(BIN)/python -m ticketing demo

# Every package by its own tests, from Python 3.12 on with its own coverage, and the tests of all together, six suites
# at a time. PACKAGE=events for one, PYTHON=python3.13 on another Python, COVERAGE=no to measure nothing. Each server is started
# once for all of them.
test: setup
	@$(BIN)/python -m mainstay_servers run -- $(BIN)/python tools/run_tests.py $(PACKAGE)

# The same with the lowest versions that are declared, by the packages and for development, in an environment of its own.
test-lowest:
	@$(MAKE) --no-print-directory VENV=.venv-lowest .venv-lowest/.lowest
	@$(MAKE) --no-print-directory VENV=.venv-lowest test

$(VENV)/.lowest: $(VENV)/.members
	@$(UV) pip compile --quiet --resolution lowest-direct --python $(BIN)/python --all-extras --group pyproject.toml:dev \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links $(NOT_OURS) $(PROJECTS) -o $(VENV)/lowest.txt
	@echo "installing the lowest versions that are declared into $(VENV)"
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps -r $(VENV)/lowest.txt
	@touch $@

# What needs no test run. `make -k check` goes on after the first part that fails.
check: lint layers types

lint: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/codespell $$(git ls-files)
	$(BIN)/validate-pyproject $(PROJECTS) pyproject.toml

layers: setup
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/api.py
	$(BIN)/python tools/private_use.py

types: setup
	$(BIN)/mypy packages servers tools benchmarks tests examples
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# The public API of every package as text, for the diff: packages/*/api.txt.
api: setup
	@$(BIN)/python tools/api.py --write

# The catalogue of all error codes: docs/errors.md.
errors: setup
	@$(BIN)/python tools/errors_page.py --write

# Grafana's dashboards from their one description: dashboards/*.json.
dashboards: setup
	@$(BIN)/python tools/dashboards.py

# A package that passes every check, to begin with: PACKAGE=ledger. CONTRIBUTING.md tells the way from there.
new: setup
	@$(BIN)/python tools/new_package.py "$(PACKAGE)"
	@$(MAKE) --no-print-directory setup
	@$(MAKE) --no-print-directory api errors

# The documentation as a site, in build/site; a broken link or a wrong docstring fails it.
docs: setup
	@$(BIN)/python tools/docs_site.py

# Measurements: benchmarks/README.md. PACKAGE=events for one package, QUICK=1 for a rough look.
bench: setup
	@$(BIN)/python -m benchmarks $(PACKAGE) $(if $(QUICK),--quick)

# Kafka, PostgreSQL and Redis for people: prints their addresses and keeps them until Ctrl-C.
services: setup
	@$(BIN)/python -m mainstay_servers

# What a newcomer does: a clone of what is committed, the commands of the README, an environment of its own.
clone-check:
	@bash tools/clone_check.sh

clean:
	rm -rf build dist .venv .venv-* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
