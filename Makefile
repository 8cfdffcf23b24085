.PHONY: help install format lint type test kill-test bench demo clean
SHELL := bash
PYTHON ?= python

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: ## Install with everything that development needs
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev]'

format: ## Format the code
	ruff format .
	ruff check --fix .

lint: ## Check style, unused code and docstrings
	ruff format --check .
	ruff check .

type: ## Check types
	mypy dfkd_cli

test: ## Run all tests
	$(PYTHON) -m pytest -n auto --dist loadfile

kill-test: ## Kill the pipeline at twenty random moments: twenty times the same hashes
	DFKD_KILLS=20 $(PYTHON) -m pytest tests/test_resume.py -k killed_pipeline

bench: ## Time a synthesis round against its bare loop
	$(PYTHON) tests/bench_synthesis.py

demo: ## The five commands on the bundled digits, in demo/, with the time they took
	rm -rf demo && mkdir demo
	cd demo && time ( set -e; \
	  dfkd train-teacher; \
	  dfkd synthesize --method zskd --beta 1.0 0.1; \
	  dfkd distill --transfer-set shards/; \
	  dfkd evaluate; \
	  dfkd compare student/ )

clean: ## Remove what the other targets made
	rm -rf demo build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
