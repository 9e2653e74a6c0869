# `make help` prints the targets. Each sets up what it needs in .venv/ and does nothing twice. /bin/sh, a Python of 3.9 to
# 3.12 and a C++ compiler are enough.

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-input
CPP := $(shell find custom_ops -name '*.h' -o -name '*.cpp' -o -name '*.cc' -o -name '*.cuh' -o -name '*.cu')
# .venv has a Paddle for CPUs, so that no CUDA source is built into it
SOURCES := setup.py custom_ops/cuda/build_cuda.py $(filter-out %.cu %.cuh,$(CPP))
# $(call needs,KEY): the requirements that pyproject.toml lists under KEY.
needs = $(shell awk '/^$(1) = \[/ {on = 1} on {print} on && /\]$$/ {exit}' pyproject.toml | grep -o '"[^"]*"')

.PHONY: help setup demo demo-long test test-slow test-soak lint format bench clean

# A line "name: needs  ## what it does" is a target with its help.
help: ## this list (the default)
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/created:
	@command -v $${CXX:-g++} >/dev/null || { echo "No C++ compiler: install g++ (or set CXX) and run make again." >&2; exit 1; }
	@for python in python3.12 python3.11 python3.10 python3.9 python3; do \
	    $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 9) <= sys.version_info < (3, 13))' 2>/dev/null || continue; \
	    $$python -m venv --clear $(VENV) && touch $@ && exit 0; \
	done; \
	echo "No usable Python: install Python 3.9, 3.10, 3.11 or 3.12 with its venv module and run make again." >&2; exit 1

# The build uses the installed Paddle (--no-build-isolation), so Paddle and the build's other needs come first.
$(VENV)/paddle: $(VENV)/created pyproject.toml
	@echo "Set-up, once: Paddle and what it needs into $(VENV), the custom ops, the package; about two minutes on two cores."
	@echo "1 of 3: Paddle and what the build needs (downloads; most of the time) ..."
	@$(PIP) $(call needs,requires) $(call needs,cpu)
	@touch $@

$(VENV)/package: $(VENV)/paddle $(SOURCES)
	@echo "2 of 3: the custom ops (compiled, about half a minute) and the package ..."
	@$(PIP) --no-build-isolation --editable '.[cpu]'
	@touch $@

# The extras test, demo and lint.
$(VENV)/extra-%: $(VENV)/package
	@echo "3 of 3: what '$*' needs besides ..."
	@$(PIP) $(call needs,$*)
	@touch $@

setup: $(VENV)/package ## .venv/ with Paddle and this package, editable

demo: ## a small checkpoint finds what is hidden in documents 16 and 64 times its training length (minutes)
demo-long: ## the same in documents of 131,072 and 262,144 tokens
demo demo-long:
	@started=$$(date +%s) && $(MAKE) --silent --no-print-directory $(VENV)/extra-demo && \
	    echo "set-up took $$(( $$(date +%s) - started )) s"
	@$(PY) -W ignore tools/demo.py $(if $(filter demo-long,$@),--long)

test: $(VENV)/extra-test ## the tests, without those that take long, in two processes
	@$(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow and not soak"

test-slow: $(VENV)/extra-test ## those that take long
	@$(PY) -m pytest -m slow

test-soak: $(VENV)/extra-test ## those that take too long for every change (more than an hour)
	@$(PY) -m pytest -m soak

lint: $(VENV)/extra-lint ## ruff, clang-format, mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	@$(PY) -m mypy paddle_qwen1m

format: $(VENV)/extra-lint ## rewrites the sources in place
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CPP)

bench: $(VENV)/package ## speed beside Hugging Face transformers on this CPU
	@$(PY) -W ignore tools/benchmark_cpu.py

clean: ## removes .venv/, out/ and everything that was built
	rm -rf $(VENV) build out *.egg-info paddle_qwen1m/_ops.so
