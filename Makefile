# Everything lives in .venv; nothing else on the machine is touched.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# Where the index offers a CPU build, this pin takes it and spares several GB. With a GPU: make demo TORCH='torch>=2.11'
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup proto check test test-fast demo bench docs clean

help:
	@echo "make demo      install, fetch the model, answer a prompt through separate prefill and decode workers"
	@echo "make test      the whole CPU test suite"
	@echo "make check     ruff, types, import arrows, stub freshness"
	@echo "make test-fast the tests that need neither Ray nor the real model"
	@echo "make bench     every CPU figure in a short form beside what is promised, in ten minutes"
	@echo "make docs      the documentation as a site in build/site"
	@echo "make proto     write the gRPC stubs anew"

setup: $(STAMP)

.venv/bin/python:
	@test -n "$(PYTHON)" || \
	  { echo "Python >= 3.11 with venv is needed; name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(STAMP): pyproject.toml | .venv/bin/python
	@echo "Installing into .venv (the first time takes some minutes) …"
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -e ".[test]"
	@touch $@

proto: $(STAMP)
	$(BIN)/python -m pdspec.wire.stubs

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pdspec.wire.stale_check

test: $(STAMP)
	$(BIN)/python -m pytest -q

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -m "not cluster and not model and not slow" tests/unit tests/contract

demo: $(STAMP)
	@$(BIN)/pdspec demo

bench: $(STAMP)
	$(BIN)/pdspec bench short

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
