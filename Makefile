# make demo: the main job on digits. make bench: the timings. make drill: faults. make ablation: the paper's findings,
# switched off one by one. make notebooks: executes the notebooks in place. make docs: the site, in site/. make test: the
# tests. make test-gpu: the acceptance run on a CUDA device. All install what they need into .venv. make test-floor: the
# tests with the lowest versions that pyproject.toml allows, in .venv-floor. make dist: wheel and sdist, built anew and
# checked. make test-wheel: the commands, by that wheel and its own dependencies alone, in .venv-wheel and from an empty
# folder.
PYTHON ?= python3
BIN := .venv/bin
FLOOR := .venv-floor
WHEEL := .venv-wheel

.PHONY: demo bench drill ablation notebooks test test-slow test-gpu test-floor test-wheel dist lint docs

# Python compiles what it imports; compiling all of what is installed takes as long as installing it.
INSTALL := pip install --quiet --no-compile

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv .venv
	$(BIN)/$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

$(FLOOR)/installed: pyproject.toml
	$(PYTHON) -m venv $(FLOOR)
	sed -n '/^dependencies/,/^\[tool/p' pyproject.toml | grep -oE '[A-Za-z0-9-]+>=[0-9.]+' | sed 's/>=/==/' > $(FLOOR)/floors.txt
	$(FLOOR)/bin/$(INSTALL) --constraint $(FLOOR)/floors.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m experiments.demo

bench: .venv/installed
	$(BIN)/python -m experiments.bench

drill: .venv/installed
	$(BIN)/python -m experiments.drill

ablation: .venv/installed
	$(BIN)/python -m experiments.ablation

notebooks: .venv/installed
	$(BIN)/python -m experiments.notebooks

# The models of the tests are tiny: more threads would wait for one another. Files are shared out over WORKERS processes.
test test-slow test-floor: export OMP_NUM_THREADS ?= 1
WORKERS ?= 2

test: .venv/installed
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-slow: .venv/installed
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "slow and not gpu"

test-floor: $(FLOOR)/installed
	$(FLOOR)/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-gpu: .venv/installed
	$(BIN)/python -m sit_atconv.bench.gpu --out runs/gpu

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html is the site; its search needs a server: $(BIN)/python -m http.server --directory site"

dist: .venv/installed
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

test-wheel: dist
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/$(INSTALL) --constraint constraints.txt dist/*.whl
	$(WHEEL)/bin/python tests/installed.py
