# The targets that every package has; a package's Makefile sets NAME and includes this.

TOP := $(abspath $(dir $(lastword $(MAKEFILE_LIST)))/..)
VENV := $(TOP)/.venv
COMMAND := $(VENV)/bin/decathlon-$(NAME)
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup reproduce paper test bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:
	@$(MAKE) --no-print-directory -C $(TOP) setup

reproduce: setup ## Quick reproduction: table and figures, records in runs/$(NAME)/quick
	$(COMMAND) reproduce --config recipes/quick.yaml --output $(TOP)/runs/$(NAME)/quick --resume

paper: setup ## The setting of the paper; see the README for how long it takes
	$(COMMAND) reproduce --config $(PAPER_RECIPE) --output $(TOP)/runs/$(NAME)/paper --resume

test: setup ## Tests of this package
	$(VENV)/bin/python -m pytest .

bench: setup ## Speed against named peers
	cd $(TOP) && $(VENV)/bin/python -m pytest benchmarks/speed/test_$(subst -,_,$(NAME))_speed.py -s

clean: ## Remove the runs of this package
	rm -rf $(TOP)/runs/$(NAME)
