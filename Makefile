# make demo, make test: each sets up .venv by itself, once, with a torch that is already installed
# if there is one. PYTHON=python3.12 chooses the interpreter, ARGS="..." is handed on.
VENV := .venv
RUN := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10

demo: $(VENV)/ready-demo  ## the main job on Fashion-MNIST, under a minute; DATA=dir holds the data set
	$(VENV)/bin/gpupipe demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: lint  ## everything CI runs: lint, types, imports, the whole suite
	bash tools/pillows.sh
	$(RUN) -m pytest --durations=10 $(ARGS)

fast: $(VENV)/ready-dev  ## the suite without the slow tests
	$(RUN) -m pytest -m "not slow" $(ARGS)

lint: $(VENV)/ready-dev  ## ruff, mypy, import-linter
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

bench: $(VENV)/ready-dev  ## the benchmarks that need no GPU
	$(RUN) -m benchmarks $(ARGS)

gpu:  ## tests, compute-sanitizer and benchmarks on a GPU, with a python that has torch and CuPy
	bash tools/gpu.sh

$(VENV)/ready-demo $(VENV)/ready-dev: $(VENV)/ready-%: pyproject.toml
	bash tools/setup.sh $*

.PHONY: help demo test fast lint bench gpu
