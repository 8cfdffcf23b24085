.PHONY: help format lint quick test oldest kill-test mutation-test bench gpu demo readme clean
SHELL := bash
export PYTHONDONTWRITEBYTECODE :=  # tests start hundreds of processes: what they import is compiled once
BIN := $(CURDIR)/.venv/bin
TESTS := -m pytest -n auto --dist loadfile --no-loadscope-reorder

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/.done: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.done ## The five commands on the bundled digits, in demo/, with the time they took
	rm -rf demo && mkdir demo
	cd demo && export PATH="$(BIN):$$PATH" && time ( set -e; \
	  dfkd train-teacher; \
	  dfkd synthesize --recipe zskd-digits; \
	  dfkd distill --recipe digits; \
	  dfkd evaluate; \
	  dfkd compare student/ )

test: .venv/.done lint ## All tests, style and types
	OMP_NUM_THREADS=1 $(BIN)/python $(TESTS)

quick: .venv/.done ## The tests that run no whole commands: mathematics, files, settings
	OMP_NUM_THREADS=1 $(BIN)/python $(TESTS) -m "not slow"

lint: .venv/.done ## Style, unused code, docstrings, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy dfkd_cli

format: .venv/.done ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

oldest: ## The quick tests with the oldest versions that pyproject.toml allows; what libraries draw and write differs
	python3 -m venv .oldest
	.oldest/bin/pip install --quiet uv
	.oldest/bin/uv pip install --quiet --python .oldest --resolution lowest-direct -e . "pytest>=9" "pytest-xdist>=3.8"
	OMP_NUM_THREADS=1 .oldest/bin/python $(TESTS) -m "not slow" \
	  --deselect tests/report/test_readme.py::test_pictures_are_made_from_what_is_kept \
	  --deselect "tests/data/test_image_files.py::test_four_channels_are_those_of_the_file[YCbCr]"

kill-test: .venv/.done ## Kill commands of every kind at COUNT=100 random moments: the same hashes each time
	OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py $(COUNT)

mutation-test: .venv/.done ## Damage artifacts at random, COUNT=1500 times: what is not refused gives the same result
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py $(COUNT)

bench: .venv/.done ## Time every method's round against its bare loop; half an hour
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_synthesis.py

gpu: .venv/.done ## What ten minutes of a GPU are for, the most useful first; MINUTES=10, PLAN=1 only says what
	$(BIN)/python tests/gpu_runs.py --minutes $(or $(MINUTES),10) $(if $(PLAN),--plan)

readme: .venv/.done ## Write the tables of the READMEs anew, from results/ and the methods' files
	$(BIN)/python tests/readme.py README.md results/README.md

clean: ## Remove what the other targets made
	rm -rf demo build dist .venv .oldest *.egg-info .pytest_cache .ruff_cache .mypy_cache
