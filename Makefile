# The two commands are `make demo` and `make test`; each sets up what it needs.
.DEFAULT_GOAL := help
.PHONY: help install demo test chaos bench-coserve bench-gateway check format lock clean

BIN := .venv/bin
STAMP := .venv/.installed

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## Make .venv with everything (once; a few minutes)

$(STAMP): requirements/dev.txt requirements/uv.txt requirements/install.sh pyproject.toml
	requirements/install.sh
	@touch $(STAMP)

demo: $(STAMP)  ## Watch it work: a streamed chat and a bulk job on one real engine
	$(BIN)/velocity demo

test: $(STAMP)  ## Prove it: every ring of tests, the end-to-end one on real vLLM
	tests/tools.sh
	$(BIN)/python -m pytest $(ARGS)

chaos: $(STAMP)  ## Kill, freeze and cut off everything while jobs run: make chaos SECONDS=600 SEED=7
	$(BIN)/python -m tests.chaos --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

bench-coserve: $(STAMP)  ## Measure what chat and bulk cost each other here: make bench-coserve ARGS=--quick
	$(BIN)/python -m bench.coserve $(ARGS)

bench-gateway: $(STAMP)  ## Measure what the gateway costs beside nginx and others: make bench-gateway ARGS=--quick
	$(BIN)/python -m bench.gateway $(ARGS)

check: $(STAMP)  ## Format, lint, strict types, import arrows, size limits, wheel build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/sizes.py
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null

format: $(STAMP)  ## Format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(STAMP)  ## Make the hash-pinned requirements anew from pyproject.toml
	requirements/export.sh

clean:  ## Remove .venv and every cache
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
