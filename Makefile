# Every target is one readable command; `make help` lists them. Packages are found, not listed.

PACKAGES := $(patsubst packages/%/pyproject.toml,%,$(wildcard packages/*/pyproject.toml))
BASE_PYTHON := $(shell command -v python3.11 || command -v python3)
PYTHON := .venv/bin/python
STAMP := .venv/installed
DISTRIBUTIONS := shared $(addprefix packages/,$(PACKAGES))

# more threads than cores make small fits slower, not faster
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup test reproduce bench lint format report compare baseline wheels peers clean \
	$(PACKAGES:%=test-%) $(PACKAGES:%=reproduce-%) test-shared

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make test-NAME          Test one of: shared $(PACKAGES)"
	@echo "  make reproduce-NAME     Quick reproduction of one of: $(PACKAGES)"

setup: $(STAMP) ## Make .venv with everything, as pinned in constraints.txt

# the last line: rivals whose pins are narrower than what they run with; their needs are in requirements-dev.txt
$(STAMP): constraints.txt requirements-dev.txt $(DISTRIBUTIONS:%=%/pyproject.toml)
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt \
		--editable ./shared[test] $(PACKAGES:%=--editable ./packages/%[test])
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-deps ngboost treeffuser
	touch $@

test: setup ## Run all tests
	$(PYTHON) -m pytest shared packages benchmarks/tests

test-shared: setup
	$(PYTHON) -m pytest shared

$(PACKAGES:%=test-%): test-%: setup
	$(PYTHON) -m pytest packages/$*

reproduce: setup ## Run the quick reproduction of every package and write runs/report.html
	$(PYTHON) -m benchmarks.quality

$(PACKAGES:%=reproduce-%): reproduce-%: setup
	$(PYTHON) -m benchmarks.quality $*

bench: setup ## Quality and speed of all packages, compared with the stored baselines
	$(PYTHON) -m benchmarks.quality
	$(PYTHON) -m pytest benchmarks/speed -s
	$(PYTHON) -m benchmarks.compare

compare: setup ## Hold the records in runs/ against benchmarks/baselines
	$(PYTHON) -m benchmarks.compare

baseline: setup ## Take the records in runs/ as the new baselines
	$(PYTHON) -m benchmarks.compare --update

report: setup ## Write runs/report.html from the records in runs/
	$(PYTHON) -m benchmarks.report

lint: setup ## Format, rules, import contracts, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	for name in $(PACKAGES); do .venv/bin/lint-imports --config packages/$$name/pyproject.toml || exit 1; done
	MYPYPATH=$(subst $() ,:,$(DISTRIBUTIONS:%=%/src)) .venv/bin/mypy $(DISTRIBUTIONS:%=%/src)

format: setup ## Format the code and mend what ruff can mend
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

wheels: setup ## Build the wheel of every distribution into dist/
	for d in $(DISTRIBUTIONS); do $(PYTHON) -m build --wheel --outdir dist $$d || exit 1; done
	.venv/bin/twine check dist/*.whl

peers: .venv-peers/installed ## Make .venv-peers for rivals that clash with the stack

.venv-peers/installed: benchmarks/peers-requirements.txt shared/pyproject.toml packages/dbt/pyproject.toml
	test -x .venv-peers/bin/python || $(BASE_PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement benchmarks/peers-requirements.txt
	.venv-peers/bin/python -m pip install --quiet --no-deps treeffuser==0.2.0
	.venv-peers/bin/python -m pip install --quiet --editable ./shared --editable ./packages/dbt
	touch $@

clean: ## Remove environments, runs and build products
	rm -rf .venv .venv-peers .tox dist runs .pytest_cache .mypy_cache .ruff_cache
