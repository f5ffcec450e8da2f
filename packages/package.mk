# The targets that every package has; a package's Makefile sets NAME and PAPER_RECIPE, maybe PAPER_COMMAND, and includes
# this.

TOP := $(abspath $(dir $(lastword $(MAKEFILE_LIST)))/..)
PYTHON := $(TOP)/.venv/bin/python
COMMAND := $(TOP)/.venv/bin/decathlon-$(NAME)
RUNS := $(TOP)/runs/$(NAME)
PAPER_COMMAND ?= reproduce

# more threads than cores make small fits slower, not faster
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup reproduce paper test bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:
	@$(MAKE) --no-print-directory -C $(TOP) setup

# always anew: a run of earlier code must not pass for one of this code
reproduce: setup ## Quick reproduction: tables, claims and figures, about three minutes
	rm -rf $(RUNS)/quick
	$(COMMAND) reproduce --config recipes/quick.yaml --output $(RUNS)/quick

# long, so it goes on where it was stopped; `make clean` first to begin again
paper: setup ## The setting of the paper; the README says how long it takes
	$(COMMAND) $(PAPER_COMMAND) --config $(PAPER_RECIPE) --output $(RUNS)/paper --resume

test: setup ## Tests of this package
	$(PYTHON) -m pytest .

bench: setup ## Speed against named peers
	cd $(TOP) && $(PYTHON) -m pytest benchmarks/speed/test_$(subst -,_,$(NAME))_speed.py -s

clean: ## Remove the runs of this package
	rm -rf $(RUNS)
