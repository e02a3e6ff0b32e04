"""Run folders with initial weights, for tests that need a net but no training."""

import dataclasses
from pathlib import Path

import jax

from experiments import checkpoints, data
from experiments.models import MODELS
from experiments.run_folder import Run


def untrained(model: str, folder: Path) -> Path:
    """Write what `experiments.train` writes to ``folder`` before its first step, but with nonzero biases."""
    sample = data.load("fashion-mnist-sample")
    config = {"model": model, "data": sample.name, "data_dir": None, "data_sha256": sample.sha256}
    config["inputs"] = dataclasses.asdict(sample.inputs)
    run = Run.start(folder, config)
    net = MODELS[model](len(sample.class_names))
    params = jax.jit(lambda: net.init(jax.random.key(0), sample.image_shape))()
    checkpoints.save(run.weights, jax.tree.map(lambda a: a if a.ndim > 1 else a + 0.1, params))
    return folder
