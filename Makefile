# Every target makes .venv by itself. PYTHON chooses the interpreter, 3.10 or newer. Tests run on
# three workers, a file on one of them, the longest first (tests/conftest.py): many wait for what
# they have started, so that three keep two cores busy.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-chat test test-all evidence-quick gpu-check docs lint format clean

demo: .venv/installed  ## train a small model on real text, export it, decode prompts: under ten minutes
	$(BIN)/python -m train.demo

demo-chat: .venv/installed  ## tune the demo's model on conversations, and ask it; runs the demo first
	test -d runs/demo/model || $(MAKE) demo
	rm -rf runs/demo-chat
	$(BIN)/python examples/fine_tune.py runs/demo/model runs/demo-chat

test: .venv/installed  ## everything CI runs
	$(PYTEST) -m "not slow"

test-all: .venv/installed  ## the tests that take minutes too
	$(PYTEST)

evidence-quick: .venv/installed  ## measures the README's claims again, in under ten minutes
	$(BIN)/python -m benchmarks.evidence

OUTPUT := gpu-check.json
gpu-check:  ## checks and measures stu on a GPU, in under eight minutes, into OUTPUT; installs nothing
	$(or $(wildcard $(BIN)/python),python3) -m benchmarks.gpu_check --output '$(OUTPUT)'

docs: .venv/installed  ## pages of docs/ and the API reference, in build/docs
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("stu needs Python 3.10 or newer: give it as in make PYTHON=python3.12")'
	test ! -e .venv/unfinished || rm -rf .venv
	$(PYTHON) -m venv .venv
	touch .venv/unfinished
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	rm .venv/unfinished
	touch $@
