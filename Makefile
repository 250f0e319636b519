# Two commands do all the set-up: `make demo` and `make test`. Both need Python 3.11.5 or later and
# nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
AXE := 4.14.1

.DEFAULT_GOAL := help
.PHONY: help demo test common oldest pythons torches browser lint types docs examples bench mutants clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(if $(CI),--quiet) --constraint constraints.txt --editable '.[dev]'
	@touch $@

DEMO := --out $(or $(OUT),out/demo)$(if $(THREADS), --threads $(THREADS))
DEMO := $(DEMO)$(if $(STEPS), --steps $(STEPS))$(if $(MINUTES), --minutes $(MINUTES))

demo: $(STAMP)  ## what experts are for, in minutes (THREADS=1 STEPS=600 MINUTES=4 OUT=out/demo)
	OMP_WAIT_POLICY=passive $(BIN)/moezoo demo $(DEMO)

test: $(STAMP)  ## all tests
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-ci} $(BIN)/python -m pytest -n 2 -q

# As root on Debian; elsewhere the tests in a browser skip themselves and say what they lack.
browser:  ## Chromium, its driver and an accessibility checker, for the tests of the report's page
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y \
	    --no-install-recommends chromium chromium-driver fonts-noto-core fonts-noto-color-emoji; }
	@test -f build/browser/package/axe.min.js || \
	  { command -v npm >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -q -y \
	    --no-install-recommends npm; \
	    mkdir -p build/browser && cd build/browser && npm pack --silent axe-core@$(AXE) && \
	    tar xzf axe-core-$(AXE).tgz; }

common: $(STAMP)  ## transformers' common tests on the wrapper, from its source distribution
	$(BIN)/python -m tests.hf.common

TRANSFORMERS ?= 5.18.0

oldest: $(STAMP)  ## tests of the wrapper with the oldest transformers that it serves (TRANSFORMERS=)
	rm -rf build/oldest
	$(BIN)/pip install --quiet --no-deps --target build/oldest transformers==$(TRANSFORMERS)
	PYTHONPATH=build/oldest $(BIN)/python -m pytest -q tests/hf --ignore tests/hf/common

# What other versions broke so far: private names, torch.jit, the command line, models, processes.
SELECTION ?= tests/test_private_torch.py tests/test_transforms.py tests/test_packaging.py tests/cli \
  tests/models tests/parallel
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
TORCHES ?= 2.10.0 2.14.1

pythons:  ## a selection of tests with each Python on the path (PYTHONS= SELECTION=tests)
	@for python in $(PYTHONS); do \
	  command -v $$python >/dev/null || { echo "no $$python on the path"; continue; }; \
	  $(MAKE) VENV=build/$$python PYTHON=$$python build/$$python/.installed && \
	  build/$$python/bin/python -m pytest -q $(SELECTION) || exit 1; done

torches: $(STAMP)  ## the same tests with the oldest and the newest torch (TORCHES= SELECTION=tests)
	@for torch in $(TORCHES); do \
	  rm -rf build/torch && $(BIN)/pip install --quiet --target build/torch torch==$$torch && \
	  PYTHONPATH=build/torch $(BIN)/python -m pytest -q $(SELECTION) || exit 1; done

lint: $(STAMP)  ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## mypy, strict, of the package and of a program that uses it
	$(BIN)/mypy --package moezoo
	$(BIN)/mypy tests/typed_program.py

docs: $(STAMP)  ## the documentation as a site in build/site; `make test` runs what stands on its pages
	$(BIN)/python docs/build_site.py build/site

examples: $(STAMP)  ## every example, as a program
	$(BIN)/python -m pytest -q tests/test_examples.py

bench: $(STAMP)  ## timings side by side with transformers
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks

mutants: $(STAMP)  ## seeded bugs; every one must be caught
	$(BIN)/python -m tests.mutants

clean:  ## remove the environment and outputs
	rm -rf $(VENV) out build *.egg-info
