# Every target does its own set-up in .venv; Python >= 3.11 is all a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests that wait for processes leave the cores to others; each file stays with one worker.
WORKERS ?= 2
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: up test faults sim sim-short check bench proto clean

up: $(STAMP)
	@exec $(BIN)/mlx-cluster up $(ARGS)

test: $(DEV_STAMP)
	$(BIN)/python -m pytest tests --ignore=tests/sim --ignore=tests/faults -n $(WORKERS) --dist loadfile $(ARGS)

# Seeded histories of the election under faults; a failing one prints its seed, --only SEED repeats it.
sim: $(DEV_STAMP)
	$(BIN)/python -m tests.sim.run --histories 20000 --processes 2 $(ARGS)

sim-short: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/sim $(ARGS)

# Real processes are killed, frozen and told to go under load; no stream may notice more than a pause.
faults: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/faults -n $(WORKERS) --dist loadfile $(ARGS)

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV_STAMP)
	$(BIN)/python benchmarks/hop.py --json .run/hop.json
	$(BIN)/python benchmarks/fill.py --json .run/fill.json
	$(BIN)/python benchmarks/peers.py --scenario quantized dense defaults prefill --json .run/peers.json
	$(BIN)/python benchmarks/gateway.py --mlx-lm --json .run/gateway.json
	$(BIN)/python benchmarks/mask.py --json .run/mask.json
	$(BIN)/python benchmarks/schemas.py --json .run/schemas.json
	$(BIN)/python benchmarks/failover.py --json .run/failover.json

proto: $(DEV_STAMP)
	$(BIN)/python proto/generate.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlx-cluster needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(STAMP)

clean:
	rm -rf $(VENV) .run build *.egg-info
