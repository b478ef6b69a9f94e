# Everything runs in .venv, made from the lock file: only Python (3.11 or 3.12) and make are needed.
PYTHON ?= python3
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python

.PHONY: demo test test-slow lint lock clean .venv

.venv: $(VENV)/installed ## The environment, with everything that tests and benchmarks need.

demo: $(VENV)/installed ## Makes a small corpus, trains on it with two workers, scores the model.
	$(RUN) jobs/make_shards.py demo --out demo-data --train 1280 --val 320
	$(VENV)/bin/python jobs/pretrain.py tiny --data.train 'demo-data/train-*.tar' --data.val 'demo-data/val-*.tar' \
		--train.samples 12288 --train.warmup-samples 2048 --train.checkpoint-samples 4096 --name demo

# Ray's workers have a niceness of 15, at which the tests of the other process would hardly let them run.
test: $(VENV)/installed lint ## Everything that CI checks.
	RAY_worker_niceness=0 $(RUN) -m pytest -m "not slow" -n 2 --dist loadgroup --no-loadscope-reorder

test-slow: $(VENV)/installed ## What takes minutes each.
	$(RUN) -m pytest -m slow --timeout 1800

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# uv reads the same lock file as pip would (`pip install --require-hashes -r requirements.lock`), faster.
# Compiled at once: where PYTHONDONTWRITEBYTECODE is set, each process of a run would compile all that it imports.
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python --require-hashes -r requirements.lock
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation -e .
	touch $@

lock: $(VENV)/installed ## Resolves pyproject.toml anew; names versions and hashes, no addresses.
	$(VENV)/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-header --no-emit-package muser-dist --quiet -o requirements.lock

clean: ## Removes the environment and what the demo made.
	rm -rf $(VENV) demo-data runs/demo
