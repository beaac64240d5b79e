# `make train` and `make test` need only Python 3.11+ and make; everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: train test slow lint bench clean

train: $(STAMP)
	$(BIN)/knife-jax compare --preset matrix_drift --seeds 16

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "slow and not computes" -o addopts="--strict-markers"
	KNIFE_JAX_FAST_CODE=1 $(BIN)/python -m pytest -n 2 -m "slow and computes" -o addopts="--strict-markers"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m benchmarks.env_speed --scenarios 3m 2s3z --envs 32 256 --repeats 3
	$(BIN)/python -m benchmarks.replay_memory
	$(BIN)/python -m benchmarks.roofline --quick
	$(BIN)/python -m benchmarks.train_speed --quick

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,examples]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
