# `make demo` and `make test` set everything up in .venv, from nothing, without root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
TEST_PROCESSES ?= 3

.PHONY: setup extras wheels demo test docs faults audit lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

# All optional packages: engines, trackers, exporters, and what the tests and documents need. FFCV
# is compiled here: it needs libopencv-dev, libturbojpeg0-dev and pkg-config. Its declared
# dependencies are more than it uses.
EXTRAS := dev,dali,docs,energy,export,ffcv,moto,profile,remote,rivals,sources,timm,torchcodec,trackers

extras: $(VENV)/.extras

$(VENV)/.extras: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[$(EXTRAS)]"
	$(BIN)/pip install --quiet --no-deps ffcv==1.0.2
	touch $@

# The dependencies that a rented GPU machine, which has torch and the usual packages, lacks: less
# than 1 MB. Without network and without installing fastlab, in a copy of the checkout there:
#   python3 -m pip install --no-index --no-deps --target build/site wheels/*.whl
#   PYTHONPATH=build/site:. python3 -m fastlab --help
WHEELS_PYTHON ?= 3.12
wheels: setup
	rm -rf wheels
	$(BIN)/pip download --quiet --dest wheels --no-deps --only-binary=:all: \
	  --python-version $(WHEELS_PYTHON) --platform manylinux_2_28_x86_64 \
	  --platform manylinux2014_x86_64 --platform any \
	  braceexpand nvidia-ml-py simplejpeg tomli-w webdataset

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
	$(BIN)/lint-imports
	$(BIN)/ty check

# The tests, and what they ran of each module.
test: setup lint
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/python -m tests.covered

# The documents and the references made from the code, as a site in build/site-docs.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@

# All faults, about an hour; `make test` has a short version.
faults: setup
	$(BIN)/python -m tests.faults --full

# Known vulnerabilities of what is installed. Asks pypi.org: without network it fails, and CI has none.
audit: extras
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --skip-editable --progress-spinner off

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache
