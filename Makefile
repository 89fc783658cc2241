# Two entrances: `make demo` runs the main job on the built-in clips, `make test` runs every check.
# Both set everything up first; a second run starts at once. Needs python3.11 or newer and nothing else.

PYTHON ?= python3
BIN := .venv/bin
UV := .uv/bin/uv

.PHONY: demo test setup clean

setup: .venv/installed

# One package cache for all checkouts, hard links into each: a second checkout costs almost no disk. Modules are
# compiled here, once: where Python may not write, every process would compile torch anew, which takes seconds.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cosettle-cache needs python3.11 or newer (make PYTHON=...)")'
	@test -x $(UV) || ($(PYTHON) -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check uv)
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[cpu,dev]'
	@touch $@

demo: setup
	@$(BIN)/cosettle-cache demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadfile

clean:
	rm -rf .venv .uv demo runs build dist
