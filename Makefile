# finegrid: every target sets up what it needs. `make` alone lists them.
PYTHON ?= python3
UV_VERSION := 0.13.8
OUT ?= runs/demo
JOBS ?= 2
UV := $(shell command -v uv 2>/dev/null || echo .cache/uv/bin/uv)
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-gpu ui clean lock

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

setup: .venv/.ready ## the environment in .venv, from requirements.lock (about 3 GB of wheels, no GPU needed)

.cache/uv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit("finegrid needs Python 3.11 or newer; this is %s. Name another one: make PYTHON=python3.12" % sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .cache/uv uv==$(UV_VERSION)

.venv/.ready: requirements.lock pyproject.toml | $(filter .cache/%,$(UV))
	@$(PYTHON) -c 'import sys; sys.exit("finegrid needs Python 3.11 or newer; this is %s. Name another one: make PYTHON=python3.12" % sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(UV) venv --quiet --allow-existing --python $$(command -v $(PYTHON)) .venv
	$(UV) pip sync --quiet --python $(PY) --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## the main study on the tiny profile: 22 arms trained, evaluated, reported (about ten minutes on two cores)
	$(PY) -m grid.run experiments/full_ablation.yaml --profile tiny --out $(OUT)

test: setup ## the whole test suite, two files at a time (more: make test JOBS=8)
	$(PY) -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 15

check: setup ## lint, types and the fast tests
	$(PY) -m ruff check .
	$(PY) -m mypy grid trainers datasets_ray
	$(PY) -m pytest tests -m "not slow" -n $(JOBS) --dist loadfile

bench: setup ## measure against the peers into experiments/measurements/ (BENCH="step input": only these)
	$(PY) -m tests.bench $(BENCH)

bench-gpu: setup ## the training step at 7B shapes on one GPU
	$(PY) -m tests.bench.gpu_step

ui: setup ## MLflow on the demo's results, http://127.0.0.1:5000 (another run: make ui OUT=runs/NAME)
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(PY) -m mlflow server --backend-store-uri sqlite:///$(abspath $(OUT))/mlflow.db --host 127.0.0.1 --port 5000 --workers 1

lock: ## resolve requirements.lock anew (no registry address in it)
	$(UV) pip compile --universal --generate-hashes --no-emit-index-url --no-header --extra dev --python-version 3.11 -q -o requirements.lock pyproject.toml

clean: ## remove the environment and caches (runs/ stays)
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache *.egg-info build dist
