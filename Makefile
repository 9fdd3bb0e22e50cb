# Every target is one line; what needs more is a Python file. Another Python: make setup PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Bytecode is kept: every test of processes and every notebook imports torch anew, four times as fast with it.
export PYTHONDONTWRITEBYTECODE :=
PROSE := README.md CONTRIBUTING.md book notebooks dnal_mini tests

.PHONY: setup test slow lint notebooks book lab clean

setup: $(READY)

test: $(READY)
	$(BIN)/python book/render.py && $(BIN)/python -m pytest -n 2 --dist loadfile --nbmake tests notebooks

slow: $(READY)
	$(BIN)/python book/render.py && $(BIN)/python -m pytest -m slow tests

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/codespell $(PROSE)

notebooks: $(READY)
	$(BIN)/python book/execute.py

book: $(READY)
	rm -rf _build && $(BIN)/jupyter-book build . -W --keep-going

lab: $(READY)
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf _build build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt .ci/environment.py
	$(PYTHON) .ci/environment.py .venv -c constraints.txt -e ".[data,book,export,devices,test,dev]" && touch $(READY)
