# Each target sets up what it needs in .venv; nothing has to be installed before but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench-digits bench-codec fuzz build clean

demo: $(VENV)/.installed
	$(BIN)/fedobd compare digits

test: $(VENV)/.installed-dev check
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict tests benchmarks

# The figures of benchmarks/RESULTS.md for the digits: five methods, three seeds, one process.
bench-digits: $(VENV)/.installed
	$(BIN)/fedobd compare digits --seeds 0,1,2

# Size, speed and memory of the codec; NVIDIA FLARE is installed in an environment of its own under a cache folder.
bench-codec: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet pcodec
	$(BIN)/python benchmarks/codec.py

# Coverage-guided fuzzing of the decoder; SECONDS=1800 make fuzz for half an hour.
SECONDS ?= 60
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet atheris
	mkdir -p .fuzz
	$(BIN)/python tests/fuzz_payload.py -max_total_time=$(SECONDS) .fuzz

build: $(VENV)/.installed-dev
	$(BIN)/python -m build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
