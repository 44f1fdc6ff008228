# Everything happens in a virtual environment that the first command makes.
PYTHON ?= python3
VENV ?= .venv
# Which TransformerLens to compare with: bridge (4.3.0) or hooked (3.9.0).
REFERENCE ?= bridge
# Pinned, and installed first, so that no other package chooses a build of PyTorch.
TORCH ?= torch==2.13.0
ARGS ?=
# The tests whose outcome depends on the reference that is installed.
WITH_REFERENCE = tests/modules tests/weights/test_processing.py tests/weights/test_load.py \
	tests/weights/test_hooked_transformer.py tests/parity/test_same_function.py \
	tests/parity/test_compare.py tests/parity/test_references.py tests/test_transplant.py \
	tests/test_variants.py tests/parity/test_gradients.py

.PHONY: setup parity test test-hooked bench sensitivity demo-model format check

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --editable ".[$(REFERENCE),dev]"
	touch $@

parity: setup
	$(VENV)/bin/clean-transformer parity $(ARGS)

test: setup
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 $(ARGS)

# The same parity, against the last TransformerLens that has HookedTransformer.
test-hooked:
	$(MAKE) test VENV=.venv-hooked REFERENCE=hooked ARGS="$(WITH_REFERENCE) $(ARGS)"

# Nobody has to have them.
$(VENV)/.engines: $(VENV)/.installed
	-$(VENV)/bin/pip install --quiet --editable ".[bench]" && touch $@

# Beside both TransformerLenses, each in an environment of its own, and the engines that install.
bench: setup $(VENV)/.engines
	$(MAKE) setup VENV=.venv-hooked REFERENCE=hooked
	$(VENV)/bin/clean-transformer bench --hooked-python .venv-hooked/bin/python $(ARGS)

# The ratios that healthy runs have, by which the suite's bounds are judged.
sensitivity: setup
	$(VENV)/bin/python -m benchmarks.sensitivity $(ARGS)

# Writes the stories, and trains the tokenizer and the model that the package ships.
demo-model: setup
	$(VENV)/bin/python -m clean_transformer.demo.make

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
