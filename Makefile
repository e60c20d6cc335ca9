# Each target sets up what it needs in .venv; nothing has to be installed before but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet
# One thread a process, since there is a process for each core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo demo-deployment test test-all test-processors check docs bench-digits bench-codec bench-deployment bench-simulation \
	bench-report bench-estimates bench-presets results fuzz build clean

demo: $(VENV)/.installed
	$(BIN)/fedobd compare digits

# A real deployment on this machine: SuperLink with TLS, three SuperNodes with keys, five rounds.
demo-deployment: $(VENV)/.installed-flower
	$(BIN)/python examples/deployment/demo.py

test: $(VENV)/.installed-dev check
	$(PYTEST) -n auto

# What is slow: the tests in the arithmetic of other processors, real deployments, Flower's simulation, the oldest
# and newest versions of Flower, MLflow, and the report in a browser, which is installed where apt can.
FLOWER_VERSIONS := 1.24.0 1.36.0 newest
test-all: $(VENV)/.installed-dev test-processors
	$(BIN)/python tests/flower_versions.py $(FLOWER_VERSIONS)
	command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		apt-get install -qq -y chromium chromium-driver; } || true
	$(BIN)/python -m pytest -m deployment -v

# The tests as x86 processors without AVX2 and without AVX-512 compute (elsewhere none): sums in another order round otherwise, and
# no test may fail for it. PyTorch's own loops, oneDNN, MKL and Numba are each told which instructions to use.
GENERIC := MKL_CBWR=COMPATIBLE NUMBA_CPU_NAME=generic NUMBA_CACHE_DIR=$(CURDIR)/$(VENV)/.numba-generic
test-processors: $(VENV)/.installed-dev
ifeq ($(shell uname -m),x86_64)
	$(GENERIC) ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) -n auto
	$(GENERIC) ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -n auto
endif

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict tests benchmarks examples

# The documentation site, in site/; a link that leads nowhere is an error.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The figures of benchmarks/RESULTS.md for the digits: five methods, three seeds, one process.
bench-digits: $(VENV)/.installed
	$(BIN)/fedobd compare digits --seeds 0,1,2

# Size, speed and memory of the codec; NVIDIA FLARE is installed in an environment of its own under a cache folder.
bench-codec: $(VENV)/.installed-dev
	$(INSTALL) pcodec
	$(BIN)/python benchmarks/codec.py

# FedAvg against FedOBD over a link of 10 Mbit/s between two network namespaces; needs root and
# iproute2, which it installs where apt can.
bench-deployment: $(VENV)/.installed-flower
	command -v tc >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get install -qq -y iproute2; } || true
	$(BIN)/python benchmarks/deployment.py

# Simulation beside a hand-written loop and other simulators, which are installed under a cache.
bench-simulation: $(VENV)/.installed
	$(BIN)/python benchmarks/simulation.py

# Size and opening time of a report of 50 runs with 200 rounds, in chromium and chromium-driver,
# which are installed where apt can.
bench-report: $(VENV)/.installed-dev
	command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		apt-get install -qq -y chromium chromium-driver; } || true
	$(BIN)/python benchmarks/report.py

# What `fedobd plan` estimates beside what was sent: the digits, and the records of `make results`.
bench-estimates: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/estimates.py --records benchmarks/comparison/records --data $(DATA)

# How long a run of each small preset takes, method by method.
bench-presets: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/presets.py --data $(DATA)

# The comparison on real data, docs/results.md: hours; a run that has a record is not made again.
DATA ?= ../shared/data
results: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/comparison --data $(DATA)

# Coverage-guided fuzzing of the decoder; SECONDS=1800 make fuzz for half an hour.
SECONDS ?= 60
fuzz: $(VENV)/.installed-dev
	$(INSTALL) atheris
	mkdir -p .fuzz
	$(BIN)/python tests/fuzz_payload.py -max_total_time=$(SECONDS) .fuzz

build: $(VENV)/.installed-dev
	$(BIN)/python -m build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --constraint constraints.txt --editable '.'
	touch $@

$(VENV)/.installed-flower: $(VENV)/.installed
	$(INSTALL) --constraint constraints.txt --editable '.[flower]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
