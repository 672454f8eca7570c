# Everything runs from .venv, which scripts/bootstrap.py makes and keeps right. ARGS goes to the command behind a target.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup rollout test lint bench-rollout bench-kv bench-drafts bench-core clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## make .venv with vLLM for this machine, and the default model (6 minutes the first time)
	@$(PYTHON) scripts/bootstrap.py

rollout: setup ## sample 8 responses to each of 8 prompts on two engines of this machine
	@$(BIN)/seer rollout --engines 2 -n 8 --limit 8 --max-tokens 512 --chunk-size 64 $(ARGS)

test: lint ## lint, then run every test, real engines included
	$(BIN)/pytest $(ARGS)

lint: setup ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy scripts/bootstrap.py

bench-rollout: setup ## measure the rollout against its baselines on real engines
	@$(BIN)/seer bench fleet $(ARGS)

bench-kv: setup ## measure the KV pool on real engines
	@$(BIN)/seer bench kv $(ARGS)

bench-drafts: setup ## measure drafting on real engines
	@$(BIN)/seer bench drafts $(ARGS)

bench-core: setup ## measure the orchestrator alone
	@$(BIN)/seer bench core $(ARGS)

clean: ## remove .venv and the tools' caches; the default model stays in the user's cache
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
