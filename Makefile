PYTHON := .venv/bin/python
COMPILE := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header
TESTS ?= tests/unit tests/integration

.DEFAULT_GOAL := help
.PHONY: help up down test check lab bench lock prepare-run prepare-test

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

up: ## a running virtual machine, from nothing; again: nothing changes
	@packaging/up

down: ## stop what `make up` started
	@packaging/down

test: check ## everything that must pass: check, then the tests (TESTS="tests/unit -k vm" for some)
	$(PYTHON) -m pytest $(TESTS)

check: prepare-test ## lint, format, types, import contracts
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTHON) -m mypy --strict
	.venv/bin/lint-imports

lab: prepare-test ## the tests that need a working KVM, inside a Debian guest that has one (root)
	$(PYTHON) tests/lab/run

bench: prepare-test ## measure what SPECIFICATION.md promises, beside bare QEMU (root)
	$(PYTHON) tests/performance/bench.py

lock: prepare-run ## renew requirements.lock and requirements-dev.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	$(COMPILE) --upgrade --extra server --extra postgresql pyproject.toml packaging/build.in -o requirements.lock
	$(COMPILE) --upgrade --extra server --extra postgresql --extra dev -c requirements.lock \
		pyproject.toml packaging/build.in -o requirements-dev.lock

prepare-run:
	@packaging/prepare run

prepare-test:
	@packaging/prepare test
