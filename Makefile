# Set-up and calls only. `make demo` and `make test` work on a machine with nothing but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
# Two threads on a busy two-core machine are up to 20 times slower than one; tests run in two
# processes of one thread.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-all check bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: .venv/installed
	$(BIN)/python -m fastppt.mini photos demo-run/photos
	$(BIN)/fastppt train --recipe ppt-lora --model mini-sdxl --photos demo-run/photos --class-noun robot --output demo-run/robot --steps 100 --seed 0 --overwrite

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m fastppt_kernels.aot

bench: .venv/installed-test
	$(BIN)/python -m pytest bench --benchmark-only

clean:
	rm -rf .venv demo-run
