# `make` lists the targets.
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.edgekv-ready
# Tests hold a gigabyte of torch's objects in each process: in huge pages they take two thirds of the time where memory is slow.
# What tests start has neither setting (tests/conftest.py).
PYTEST := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONMALLOC=malloc $(VENV)/bin/pytest -q -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-chat test test-slow test-exhaustive soak arm64 sanitize wheels check duplicates map bench bench-flash bench-inline format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(STAMP) ## environment and all that the targets need (idempotent)

$(STAMP): pyproject.toml tools/setup.sh $(shell find runtime/native -type f 2>/dev/null)
	@tools/setup.sh $(VENV)
	@touch $@

demo: setup ## the main job: export the bundled model, run it under a phone's memory, show what happened
	@$(PY) examples/demo.py

demo-chat: setup ## the same with a real chat model, SmolLM2-135M-Instruct (fetches 93 MB)
	@$(PY) examples/demo_chat.py

test: setup ## the suite, as CI runs it
	@$(PYTEST)

test-slow: setup ## the slow tests
	@$(PYTEST) -m "slow and not exhaustive"

test-exhaustive: setup ## longer forms of tests that CI runs: every value and pair, thousands of faults, 300 interruptions
	@$(PYTEST) -m exhaustive

soak: setup ## half an hour of random options, kills and pressure; MINUTES=N, or SEED=N ROUND=K for a round that failed
	@$(PY) -m tests.soak --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED)) $(if $(ROUND),--round $(ROUND))

arm64: setup ## the kernels and the ExecuTorch shim, cross-compiled, under qemu; says why where that cannot be
	@tools/arm64.sh

sanitize: setup ## the native kernels and their tests under AddressSanitizer, UBSan and ThreadSanitizer
	@tools/sanitize.sh

wheels: setup ## wheels for Linux, x86-64 and aarch64, into dist/, each run where no compiler is
	@tools/wheels.sh

check: setup duplicates ## lint, types, repeated code and quick tests
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy && $(PYTEST) -x

duplicates: setup ## places outside tests that share eight lines or more of code
	@$(VENV)/bin/pylint --disable=all --enable=duplicate-code --min-similarity-lines=8 --ignore-imports=y --ignore-signatures=y \
		--ignore-docstrings=y --ignore-comments=y --score=n edgekv export runtime device_profiles benchmarks tools examples

map: setup ## draw the picture of the folders in docs/architecture.md anew
	@$(PY) -m tools.draw_map

format: setup ## format the code
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

bench: setup ## speed against peers: JSON lines, then a table of every bar with its ratio; exit 1 when one is missed
	@$(PY) -m benchmarks.speed.bench

BENCH_BUNDLE ?= $(if $(EDGEKV_PEERS),$(EDGEKV_PEERS)/edgekv-int4.edgekv,bench-output/demo.edgekv)
bench-flash: setup ## the flash tier: exact streaming against compute and the medium; exit 1 when the bar is missed
	@[ -e $(BENCH_BUNDLE) ] || $(VENV)/bin/edgekv export demo --out $(BENCH_BUNDLE)
	@$(PY) -m benchmarks.flash.streaming $(BENCH_BUNDLE)

bench-inline: setup ## the inline form beside the split form: memory, speed, bytes; exit 1 when a bar is missed
	@$(PY) -m benchmarks.speed.inline

clean: ## remove the environment and what was built
	rm -rf $(VENV) build demo-output bench-output
