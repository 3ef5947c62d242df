# The same verbs by hand and in CI. Everything lives in .venv; PYTHON= and CUDA= are explained in scripts/setup.sh.
.PHONY: setup check test test-long test-bounds demo bench tune proto proto-check sbom audit
.NOTPARALLEL:
BIN := .venv/bin
# A Hugging Face folder or hub id for `make demo`; empty means the model in demo/model.
MODEL ?=
# Extra arguments for pytest, as in `make test ARGS="-k shm -x"`; then all in one process.
ARGS ?=
PYTEST := $(BIN)/python -m pytest
PROCESSES := $(shell expr 2 \* $$(nproc))

setup:
	@bash scripts/setup.sh

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	bash scripts/stubs.sh check
	bash scripts/proto_check.sh

# In two processes per CPU, as many tests wait for a clock; but for what needs the machine to itself.
test: setup
ifeq ($(strip $(ARGS)),)
	$(PYTEST) -m "not long and not alone" -n $(PROCESSES) --maxprocesses 8 --dist worksteal -q
	$(PYTEST) -m "not long and alone" --durations=25 --durations-min=5
else
	$(PYTEST) -m "not long" $(ARGS)
endif

test-long: setup
	$(PYTEST) -m long $(ARGS)

# The oldest and newest versions that pyproject.toml allows; NAME=triton for the other one.
NAME ?= llvmlite
test-bounds: setup
	@bash scripts/bounds.sh $(NAME)

demo: setup
	@$(BIN)/python -m cli demo $(if $(MODEL),--model "$(MODEL)")

bench: setup
	$(BIN)/python -m bench $(ARGS)

# Tiles of the GPU kernels, measured on the GPU at hand; what was measured already is not measured again.
tune: setup
	$(BIN)/python -m bench.gpu --stages machine,tune --minutes 60 --out out/tune $(ARGS)
	$(BIN)/python -m bench.kernel_table out/tune --tiles

proto: setup
	bash scripts/stubs.sh

proto-check:
	bash scripts/proto_check.sh

# What is installed in .venv: its list as CycloneDX JSON, and its known weaknesses, where the index knows them.
sbom: setup
	$(BIN)/python scripts/supply.py sbom $(ARGS)

audit: setup
	$(BIN)/python scripts/supply.py audit $(ARGS)
