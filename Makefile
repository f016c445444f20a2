# Two commands do everything from a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types pytest test-slow bench-reliability install clean

demo: .venv/.installed
	$(BIN)/mim demo

test: lint types pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy

pytest: .venv/.installed
	$(BIN)/python -m pytest

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

bench-reliability: .venv/.installed
	$(BIN)/python -m benchmarks.reliability --json reliability.json

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@echo "creating .venv and installing (about two minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
