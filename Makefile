# Every command works in a virtual environment, which the first one makes.
PYTHON ?= python3
VENV ?= .venv
# The TransformerLens to compare with: bridge (4.3.0) or hooked (3.9.0).
REFERENCE ?= bridge
# PyTorch is pinned, and installed first, so that no other package chooses a build of it.
TORCH ?= torch==2.13.0
# More arguments for the command, such as ARGS=--quick or ARGS="-k attention".
ARGS ?=

# One thread in each process: the threads of several processes would wait for each other. Python
# stores compiled modules, even if the environment forbids it: the tests start many processes.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4

.PHONY: setup parity test test-all test-hooked test-lowest test-newest test-arm coverage fuzz bench \
	startup sensitivity corpus demo-model notebooks format check

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --editable ".[$(REFERENCE),dev]"
	touch $@

parity: setup
	$(VENV)/bin/clean-transformer parity $(ARGS)

# The tests that guard every change.
test: setup
	$(PYTEST) $(ARGS)

# The tests that guard every change, then the slow ones, then those that compare with a reference,
# beside TransformerLens 3. Coverage is of the slow tests: measuring the others costs minutes.
test-all: test
	$(PYTEST) -m slow --cov=clean_transformer --cov-report= $(ARGS)
	@echo "The slow tests run" \
		"$$($(VENV)/bin/python -m coverage report --format=total)% of the package's lines."
	$(MAKE) test-hooked

# The tests that compare with a reference, beside the last TransformerLens with HookedTransformer.
# Planted faults are caught alike beside either reference, and take long.
test-hooked:
	$(MAKE) setup VENV=.venv-hooked REFERENCE=hooked
	$(MAKE) test VENV=.venv-hooked REFERENCE=hooked ARGS='-m reference --ignore tests/parity/faults'

# The fast tests with the oldest Python and the lowest versions that pyproject.toml declares, and
# with the newest versions that pip finds. Packages that others need are the newest that fit. On
# Linux, PyPI's PyTorch brings CUDA: UV_TORCH_BACKEND=cpu or PIP_EXTRA_INDEX_URL avoids this.
test-lowest: PYTHON = python3.10
test-lowest:
	test -d .venv-lowest || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python \
		--resolution lowest-direct --extra dev --requirements pyproject.toml
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --no-deps --editable .
	touch .venv-lowest/.installed
	$(MAKE) test VENV=.venv-lowest

test-newest:
	$(MAKE) test VENV=.venv-newest TORCH=torch

# The package on emulated 64-bit Arm processors. Needs root, 2 GB in $$ARM_HOME, and an hour or more.
# ARGS=sve256 chooses the runs whose name contains this text.
test-arm:
	PYTHON=$(PYTHON) .ci/test-arm $(ARGS)

# The lines of the package that the fast tests do not run; with ARGS='-m ""', that no test runs.
# Measuring them makes the tests take half as long again.
coverage: setup
	$(PYTEST) --cov=clean_transformer $(ARGS)

# Damaged files of every format: each target reads FUZZ inputs, about ten in a second.
FUZZ ?= 2000
fuzz: setup
	FUZZ_EXAMPLES=$(FUZZ) $(PYTEST) tests/weights/test_fuzz.py $(ARGS)

# The engines are optional: one that cannot be installed is reported as NOT MEASURED.
$(VENV)/.engines: $(VENV)/.installed
	-$(VENV)/bin/pip install --quiet --editable ".[bench]" && touch $@

# Beside both TransformerLenses, each in its own environment, and beside the engines.
bench: setup $(VENV)/.engines
	$(MAKE) setup VENV=.venv-hooked REFERENCE=hooked
	$(VENV)/bin/clean-transformer bench --goals --hooked-python .venv-hooked/bin/python $(ARGS)

# The time that the command line and the package take to start.
startup: setup
	$(VENV)/bin/python -m benchmarks.startup $(ARGS)

# The largest ratios of healthy runs, which the bounds of the parity suite must allow.
sensitivity: setup
	$(VENV)/bin/python -m benchmarks.sensitivity $(ARGS)

# The planted faults that are caught, and the false alarms on a healthy machine, by use.
corpus: setup
	$(VENV)/bin/python -m benchmarks.corpus $(ARGS)

# Writes the stories, and trains the tokenizer and the model that the package ships.
demo-model: setup
	$(VENV)/bin/python -m clean_transformer.demo.make

# Runs the walkthroughs and writes them with their outputs. The figures need Chrome or Chromium.
notebooks: setup
	$(VENV)/bin/python -m clean_transformer.notebooks.make $(ARGS)

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
