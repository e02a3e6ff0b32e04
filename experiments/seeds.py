"""Several runs that differ in their seeds, and the mean of their results."""

import dataclasses
import json
import statistics
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.run_folder import check_folder

if TYPE_CHECKING:
    from experiments.train import Config


def train(config: "Config", train_one: "Callable[[Config], int]") -> int:
    """Train once per seed, each in its own folder, and print the mean and standard deviation of the test accuracies,
    or of the mean IoUs of masks.

    The folders are OUT/seed-<number>, or runs/<time>-<model>-seed-<number>.

    Args:
        config: The options, with `seeds` > 1.
        train_one: Trains with the options of one run; returns its exit status.

    Returns:
        0, or the status of the first run that did not finish.
    """
    numbers = range(config.seed, config.seed + config.seeds)
    start = f"{datetime.now():%Y%m%d-%H%M%S}-{folder_name(config.model)}"
    folders = [Path("runs") / f"{start}-seed-{n}" if config.out is None else config.out / f"seed-{n}" for n in numbers]
    for folder in folders:
        check_folder(folder)
    results: list[dict[str, Any]] = []
    for number, folder in zip(numbers, folders, strict=True):
        if status := train_one(dataclasses.replace(config, seed=number, seeds=1, out=folder)):
            return status
        results.append(json.loads((folder / "config.json").read_text("utf-8")))
    name, key = ("mean IoU", "test_mean_iou") if "test_mean_iou" in results[0] else ("accuracy", "test_accuracy")
    scores = [result[key] for result in results]
    mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
    values = ", ".join(f"{score:.4f}" for score in scores)
    print(f"test {name} {mean:.4f} ± {deviation:.4f}, mean and standard deviation of {len(numbers)} seeds ({values})")
    return 0


def folder_name(model: str) -> str:
    """Return the name of a net as a part of a folder's name."""
    return model.replace(":", "-")
