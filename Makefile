# `make help` lists the targets. Each sets up .venv first; PYTHON chooses the interpreter, ARGS is passed to the program.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PY     := $(VENV)/bin/python
PYTHON_COMPILED ?= python3.12
PYTEST := $(PY) -m pytest -n auto --dist worksteal --durations=20

.PHONY: help train lecture test test-full fuzz test-all coverage mutants native lint types docs build smoke smoke-runs smoke-benchmarks bench compiled check clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-10s %s\n", $$1, $$2}'

train: $(VENV)/experiments  ## train on the embedded images; ARGS="--data fashion-mnist --epochs 10"
	$(PY) -m experiments.train $(ARGS)

lecture: $(VENV)/experiments  ## run every statement of the lecture and write one page with figures
	$(PY) -m experiments.lecture $(ARGS)

test: $(VENV)/experiments,test $(VENV)/zennit  ## run a covering sample of the tests, about 6 minutes on 2 cores
	$(PYTEST) --quick $(ARGS)

test-full: $(VENV)/experiments,test $(VENV)/zennit  ## run all tests and doctests, as CI does
	$(PYTEST) $(ARGS)

test-all:  ## run all tests on each installed Python, in .venv-3.11, .venv-3.12, …
	$(PYTHON) -m tools.on_each_python $(ARGS)

coverage: $(VENV)/experiments,test $(VENV)/zennit  ## line coverage of jaxcnn/
	$(PYTEST) --cov=jaxcnn --cov-report=term-missing:skip-covered --cov-fail-under=97 $(ARGS)

mutants: $(VENV)/experiments,test $(VENV)/zennit  ## mutation testing of ops/ and geometry.py; ARGS="--sample 400"
	$(PY) -m tools.mutants $(ARGS)

fuzz: $(VENV)/experiments,test  ## compare 10,000 drawn geometries with PyTorch; ARGS="--count 1000 --seed 1"
	$(PY) -m tools.fuzz $(ARGS)

native: $(VENV)/onednn  ## compile the convolutions in oneDNN, which the tests then check as well; needs a C++ compiler
	$(PY) -m jaxcnn.native build

lint: $(VENV)/all  ## ruff check and ruff format --check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/all  ## mypy
	$(VENV)/bin/mypy

docs: $(VENV)/all  ## build the pages in docs/_build; warnings are errors
	$(VENV)/bin/sphinx-build -W -q -b html docs docs/_build

build: $(VENV)/all  ## build sdist and wheel in dist/, install the wheel in a new environment and train there
	rm -rf dist
	$(PY) -m build --outdir dist .
	$(PY) -m tools.check_dist dist

# Few optimizations, because each script compiles longer than it runs.
smoke-%: export XLA_FLAGS += --xla_backend_optimization_level=1
smoke: smoke-runs smoke-benchmarks  ## run every experiment briefly

smoke-runs: $(VENV)/all
	rm -rf runs/smoke
	$(PY) -m experiments.train --max-steps 3 --check-grads --out runs/smoke/train
	$(PY) -m experiments.train --model mlp --max-steps 3 --out runs/smoke/mlp
	$(PY) -m experiments.train --model lenet5 --max-steps 3 --out runs/smoke/lenet5
	$(PY) -m experiments.train --model tests.other_nets:Linen --data digits --max-steps 3 --optimizer adamw --ema 0.9 --augment crop mixup --out runs/smoke/linen
	$(PY) -m experiments.make_masks runs/smoke/items --count 40
	$(PY) -m experiments.train --model unet --data runs/smoke/items --batch-size 4 --max-steps 3 --augment crop --out runs/smoke/unet
	$(PY) -m experiments.predict runs/smoke/items/images/00000.png --run runs/smoke/unet --out runs/smoke/masks
	JAX_NUM_CPU_DEVICES=2 $(PY) -m experiments.train --model mlp --max-steps 2 --device cpu --devices 2 --seeds 2 --out runs/smoke/seeds
	$(PY) -m experiments.train --model mlp --max-steps 3 --private --clip-norm 1 --out runs/smoke/private
	two="$(PY) -m experiments.train --model mlp --max-steps 3 --out runs/smoke/two --coordinator localhost:12321 --processes 2" && \
		{ $$two --process 1 & } && $$two --process 0 && wait $$!
	$(PY) -m experiments.chaos --kills 1 --epochs 1 --batch-size 500 --save-every 4 --out runs/smoke/chaos
	$(PY) -m experiments.runs runs/smoke --plot runs/smoke/runs.png
	$(PY) -m experiments.predict docs/images --run runs/smoke/train
	$(PY) -m experiments.export runs/smoke/lenet5 --format safetensors npz stablehlo pytorch onnx
	$(PY) -m experiments.lecture.s09_delta --out runs/smoke/lecture
	$(PY) -m experiments.deltas --run runs/smoke/lenet5 --images 0 --out runs/smoke/deltas
	$(PY) -m experiments.attributions --run runs/smoke/train --images 0 --out runs/smoke/attributions
	$(PY) -m experiments.alignment --rules exact sign-symmetric --seeds 1 --steps 3 --out runs/smoke/alignment
	$(PY) -m experiments.scaling --net lecture
	JAXCNN_TUTORIAL_STEPS=3 $(PY) -m experiments.tutorial

smoke-benchmarks: $(VENV)/all
	rm -rf runs/smoke-benchmarks
	mkdir -p runs/smoke-benchmarks
	$(PY) -m experiments.benchmarks.step --contenders "flax nnx" torch --rounds 1 --batch-size 8 --out runs/smoke-benchmarks/step.json
	$(PY) -m experiments.benchmarks.ops --quick --only kron_up --out runs/smoke-benchmarks/ops.json
	$(PY) -m experiments.benchmarks.lowerings --drawn 3 --rounds 1 --out runs/smoke-benchmarks/lowerings.json
	$(PY) -m experiments.benchmarks.memory --nets lenet5 --batch-size 8 --out runs/smoke-benchmarks/memory.json
	$(PY) -m experiments.benchmarks.compile --net lenet5 --libraries "flax nnx" --rounds 1 --out runs/smoke-benchmarks/compile.json
	$(PY) -m experiments.benchmarks.growth --what channels --most 8 --rounds 1 --out runs/smoke-benchmarks/growth.json
	$(PY) -m experiments.benchmarks.per_example --net lenet5 --libraries "flax nnx" --batch-size 4 --rounds 1 --out runs/smoke-benchmarks/per_example.json
	$(PY) -m experiments.benchmarks.accuracy --data fashion-mnist-sample --libraries jaxcnn torch --max-steps 2 --out runs/smoke-benchmarks/accuracy.json
	$(PY) -m experiments.zoo --nets linen --batch-size 1 --rounds 1 --modes training --out runs/smoke-benchmarks/zoo.json

bench: $(VENV)/all  ## time training steps side by side with other libraries
	$(PY) -m experiments.benchmarks.step $(ARGS)

compiled: .venv-compiled/ready  ## compile every op for a TPU or GPU, without one; ARGS="--platform cuda-h100 --only pool"
	.venv-compiled/bin/python -m experiments.benchmarks.compiled $(ARGS)

check: lint types test-full docs build smoke  ## run everything that CI runs

clean:  ## delete environments, runs, builds and caches
	rm -rf $(VENV) .venv-3.* .venv-compiled runs dist .pytest_cache .mypy_cache .ruff_cache

# Without dependencies, because torchvision would install another PyTorch.
$(VENV)/zennit: $(VENV)/experiments,test
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps zennit==0.5.1
	@touch "$@"

# The compilers for TPU and GPU, with Python 3.12. The plugin for CUDA compiles without NVIDIA's libraries.
.venv-compiled/ready: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON_COMPILED) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[experiments,tpu]" "flax>=0.12"
	version=$$($(@D)/bin/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		"jax-cuda12-plugin==$$version" "jax-cuda12-pjrt==$$version"
	@touch "$@"

# One stamp file per set of extras; it is newer than pyproject.toml if that set is installed.
$(VENV)/%: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch "$@"
