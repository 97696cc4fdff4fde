# The checks of this project. `make check` is what CI runs; the slow suites have a target each.
PYTHON ?= python

.PHONY: check lint format types floors test oracle families-table layouts reliability plan-tests quickstart base

check: lint format types floors test

lint:
	$(PYTHON) -m ruff check .

format:
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m pyright --pythonpath $$($(PYTHON) -c 'import sys; print(sys.executable)')

floors:
	lint-imports

test:
	$(PYTHON) -m pytest

# The whole comparison with transformers, PEFT and bitsandbytes.
oracle:
	$(PYTHON) -m pytest -m "oracle or not reliability" tests/oracle
	$(PYTHON) -m pytest -m "oracle" tests --ignore tests/oracle

# The family matrix alone, which writes what it measured to docs/families.md.
families-table:
	PYTHONPATH=tests/oracle:$(CURDIR) $(PYTHON) -m pytest --dist load -p families_table \
		-m "oracle or not reliability" tests/oracle/test_families.py

# Every layout of eight devices, which writes what it measured to docs/sharding.md.
layouts:
	PYTHONPATH=tests/parallel:$(CURDIR) $(PYTHON) -m pytest -n 0 -p layouts_table -m oracle \
		tests/parallel/test_devices.py

# Kills, signals, damage, full disks: many of each. Writes benchmarks/results and docs/reliability.md.
reliability:
	$(PYTHON) benchmarks/reliability
	$(PYTHON) -m pytest -n 0 -m "reliability" tests

# Llama 3 8B, also at 131,072 tokens, and 70B, and Mistral 7B, compiled for TPU slices that are not here; needs jaxlora[plan],
# 10 GiB of memory and about a quarter of an hour on 2 quiet cores.
plan-tests:
	$(PYTHON) -m pytest -n 0 -m "plan" tests/planning

quickstart:
	jaxlora train configs/quickstart.yml

# Rebuilds the embedded tiny Llama and the quickstart's data (see scripts/build_tiny_base.py).
base:
	$(PYTHON) scripts/build_tiny_base.py
