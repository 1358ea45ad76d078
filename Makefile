# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Modules are compiled by their first import, when all is installed, not all of them by pip: most of torch's are never
# imported.
unexport PYTHONDONTWRITEBYTECODE

# Two processes of one thread each; what a file's tests share is made once, and the longest files begin first.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-lowest lint docs gpu model clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile -e '.[dev]'
	$(BIN)/python -c 'import upop.cli.app'
	touch $@

demo: $(VENV)/installed  ## generate data, compress a small model 2x, show what it kept and lost
	$(BIN)/upop demo

test: $(VENV)/installed  ## what every change must pass, in minutes
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/installed  ## every case: all architectures of docs/coverage.md, every task killed and resumed
	$(PYTEST)

# Those that do not need the extras tasks and export, whose own bounds are newer.
LOWEST = tests/pruning/test_training.py tests/pruning/test_costs.py tests/pruning/test_calibrate.py \
  tests/pruning/test_uniform.py tests/test_compression.py tests/checkpoints/test_timm.py \
  tests/checkpoints/test_transformers.py tests/checkpoints/test_plain.py

test-lowest:  ## the method, and loading, with the oldest libraries that pyproject.toml takes, in an environment of their own
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet --no-compile -c tests/lowest.txt -e '.[cli,hf,timm]' \
	  accelerate hypothesis jinja2 matplotlib open_clip_torch packaging peft pytest pytest-xdist torchmetrics
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile -m 'not slow' $(LOWEST)

lint: $(VENV)/installed  ## ruff, and mypy in strict mode
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  ## the site of the documentation, with pages made from docstrings, in output/site
	$(BIN)/pip install --quiet --no-compile -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gpu:  ## right, fast, lean and how good on the GPU of this machine, with the torch, timm and transformers that it has
	PYTHONPATH=src $(PYTHON) benchmarks/gpu/run.py

model: $(VENV)/installed  ## train the demo's dense model again, from nothing
	PATH="$(abspath $(BIN)):$$PATH" bash assets/train_shapes_nlvr.sh

clean:
	rm -rf $(VENV) $(VENV)-lowest output build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
