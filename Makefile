# Set-up and calls only. `make demo` and `make test` work on a machine with nothing but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
# Two threads on a busy two-core machine are up to 20 times slower than one; tests run in two
# processes of one thread.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-lora demo-ppt-lora test test-all check bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[evaluate]"
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

DEMO := demo-run
DEMO_RUN := --model mini-sdxl --photos $(DEMO)/photos --class-noun robot --steps 400 --batch-size 4 \
	--seed 0 --no-samples --overwrite

# The two runs side by side, one a core; each one's output in one piece, at its end.
demo: .venv/installed
	$(BIN)/python -m fastppt.mini photos $(DEMO)/photos
	@echo "two runs are trained now, side by side: about a minute"
	$(MAKE) --jobs=2 --output-sync=target --no-print-directory demo-lora demo-ppt-lora
	$(BIN)/fastppt evaluate $(DEMO)/lora $(DEMO)/ppt-lora --samples 24 --sampler-steps 12 --output $(DEMO)

demo-lora:
	$(BIN)/fastppt train --recipe lora $(DEMO_RUN) --output $(DEMO)/lora

demo-ppt-lora:
	$(BIN)/fastppt train --recipe ppt-lora $(DEMO_RUN) --output $(DEMO)/ppt-lora

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
