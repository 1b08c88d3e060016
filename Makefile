# `make demo` and `make test` set everything up in .venv, from nothing, without root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: setup demo test lint bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

demo: setup
	rm -rf $(DEMO)/run
	$(BIN)/fastlab synth $(DEMO)/originals --classes 10 --per-class 200 --force
	$(BIN)/fastlab convert $(DEMO)/originals $(DEMO)/dataset --force
	$(BIN)/fastlab train --config configs/demo.toml --out $(DEMO)/run
	$(BIN)/fastlab report $(DEMO)/run --out $(DEMO)/report.html
	@echo "Open $(DEMO)/report.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: setup lint
	$(BIN)/pytest

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache
