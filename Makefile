# make train · make test · make check.  Each sets up what it needs in .venv first; PYTHON chooses the interpreter.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PY     := $(VENV)/bin/python

.PHONY: train lecture test fuzz test-all coverage mutants lint types docs build smoke bench check clean

train: $(VENV)/experiments  ## train on the embedded images; ARGS="--data fashion-mnist --epochs 10"
	$(PY) -m experiments.train $(ARGS)

lecture: $(VENV)/experiments  ## every statement of the lecture, with pictures
	$(PY) -m experiments.lecture $(ARGS)

test: $(VENV)/experiments,test $(VENV)/zennit  ## all tests and doctests
	$(PY) -m pytest -n 2 $(ARGS)

test-all:  ## the suite on each Python that is installed, in .venv-3.11, .venv-3.12, …
	$(PYTHON) -m tests.on_each_python $(ARGS)

coverage: $(VENV)/experiments,test $(VENV)/zennit  ## lines of jaxcnn/ that no test reaches
	$(PY) -m pytest -n 2 --cov=jaxcnn --cov-report=term-missing:skip-covered --cov-fail-under=97 $(ARGS)

mutants: $(VENV)/experiments,test $(VENV)/zennit  ## small errors in ops/ and geometry.py, that tests must find; ARGS="--sample 400"
	$(PY) -m tests.mutants $(ARGS)

fuzz: $(VENV)/experiments,test  ## 10,000 geometries against PyTorch; ARGS="--count 1000 --seed 1"
	$(PY) -m tests.conformance.fuzz $(ARGS)

lint: $(VENV)/all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/all
	$(VENV)/bin/mypy

docs: $(VENV)/all  ## the pages in docs/_build, warnings as errors
	$(VENV)/bin/sphinx-build -W -q -b html docs docs/_build

build: $(VENV)/all  ## wheel and sdist in dist/, each installed in an environment of its own, where it trains
	rm -rf dist
	$(PY) -m build --outdir dist .
	$(PY) -m tests.built dist

smoke: $(VENV)/all  ## a short run of every experiment
	rm -rf runs/smoke
	$(PY) -m experiments.train --max-steps 3 --check-grads --out runs/smoke/train
	$(PY) -m experiments.train --model mlp --max-steps 3 --out runs/smoke/mlp
	$(PY) -m experiments.train --model lenet5 --max-steps 3 --out runs/smoke/lenet5
	$(PY) -m experiments.lecture.s09_delta --out runs/smoke/lecture
	$(PY) -m experiments.deltas --run runs/smoke/lenet5 --images 0 --out runs/smoke/deltas
	$(PY) -m experiments.attributions --run runs/smoke/train --images 0 --out runs/smoke/attributions
	$(PY) -m experiments.alignment --rules exact sign-symmetric --seeds 1 --steps 3 --out runs/smoke/alignment
	JAXCNN_TUTORIAL_STEPS=3 $(PY) -m experiments.tutorial
	$(PY) -m experiments.benchmarks.step --contenders "flax nnx" torch --rounds 1 --batch-size 8 --out runs/smoke/step.json
	$(PY) -m experiments.benchmarks.ops --quick --only kron_up --out runs/smoke/ops.json
	$(PY) -m experiments.benchmarks.memory --nets lenet5 --batch-size 8 --out runs/smoke/memory.json
	$(PY) -m experiments.benchmarks.compile --net lenet5 --libraries "flax nnx" --rounds 1 --out runs/smoke/compile.json
	$(PY) -m experiments.benchmarks.growth --what channels --most 8 --rounds 1 --out runs/smoke/growth.json
	$(PY) -m experiments.benchmarks.examples --net lenet5 --libraries "flax nnx" --batch-size 4 --rounds 1 --out runs/smoke/examples.json
	$(PY) -m experiments.benchmarks.accuracy --data fashion-mnist-sample --libraries jaxcnn torch --max-steps 2 --out runs/smoke/accuracy.json

bench: $(VENV)/all  ## training steps side by side with other libraries
	$(PY) -m experiments.benchmarks.step $(ARGS)

check: lint types test docs build smoke  ## all that CI runs

clean:
	rm -rf $(VENV) .venv-3.* runs dist .pytest_cache .mypy_cache .ruff_cache

# Without its dependencies: its torchvision would bring another PyTorch.
$(VENV)/zennit: $(VENV)/experiments,test
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps zennit==0.5.1
	@touch "$@"

# One stamp for each set of extras, newer than pyproject.toml when it is installed.
$(VENV)/%: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch "$@"
