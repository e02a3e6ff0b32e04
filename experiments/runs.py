"""What a run leaves behind: a folder with config.json, metrics.csv, curves.png and weights.safetensors."""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments import checkpoints
from experiments.errors import RunError
from experiments.files import replacing


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One row of metrics.csv, in its order.

    Training loss and accuracy are means over the epoch's steps, with dropout on and parameters on the move; test
    loss and accuracy are of all test examples at its end. `seconds` is of the training steps alone.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float
    images_per_second: float


def choose_folder(out: Path | None, model: str, now: datetime | None = None) -> Path:
    """Return the absolute path of the folder that a run will make; make nothing yet.

    None means runs/<time>-<model>, numbered when a run of the same second has it. Raises RunError where no folder can
    be made, or where one already holds files: a run never overwrites another.
    """
    if out is None:
        stem = f"{now or datetime.now():%Y%m%d-%H%M%S}-{model}"
        names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, 1000))
        out = next(path for name in names if not (path := Path("runs") / name).exists())
    out = out.absolute()
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"--out {out}: expected a new or empty folder, got one that holds files")
    nearest = next(path for path in (out, *out.parents) if path.exists())
    if not nearest.is_dir():
        raise RunError(f"--out {out}: expected a folder or nothing, but {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"--out {out}: expected a place to write to, but {nearest} is not writable")
    return out


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder. Each file appears whole or not at all, so what lies there is valid at any moment."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, config: Mapping[str, Any]) -> "Run":
        """Make `folder` and write `config` (anything that json knows, and paths) into it."""
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        with replacing(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2, default=str, ensure_ascii=False) + "\n", "utf-8")
        return run

    @property
    def weights(self) -> Path:
        """Where the weights lie."""
        return self.folder / "weights.safetensors"

    def save(self, rows: Sequence[Epoch], params: checkpoints.Params, step: int) -> None:
        """Write the metrics so far, and the parameters after `step` steps."""
        with replacing(self.folder / "metrics.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in dataclasses.fields(Epoch))
            # An epoch that was not evaluated has empty cells, which every reader of CSV takes for missing.
            writer.writerows([_cell(value) for value in dataclasses.astuple(row)] for row in rows)
        checkpoints.save(self.weights, params, {"step": str(step)})

    def plot(self, rows: Sequence[Epoch], title: str) -> None:
        """Draw loss and accuracy over the epochs into curves.png; nothing is drawn where nothing was learnt."""
        if rows:
            with replacing(self.folder / "curves.png") as temporary:
                plot_curves(temporary, rows, title)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}" if isinstance(value, float) else str(value)


def plot_curves(path: Path, rows: Sequence[Epoch], title: str) -> None:
    """Write a PNG: loss at the left, accuracy at the right; training dashed and grey, test solid."""
    # The object interface, not pyplot: no global state, no window, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) < 30 else ""
    for axes, quantity, corner in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("upper right", "lower right"), strict=True
    ):
        train = [getattr(row, f"train_{quantity}") for row in rows]
        test = [getattr(row, f"test_{quantity}") for row in rows]
        axes.plot(epochs, train, "--", color="0.45", marker=marker, markersize=3, label="training, while it learns")
        axes.plot(epochs, test, "-", color="tab:blue", marker=marker, markersize=4, label="test, after the epoch")
        evaluated = [n for n, value in enumerate(test) if math.isfinite(value)]
        if evaluated:
            last = evaluated[-1]
            axes.annotate(
                f"{test[last]:.4f}",
                (epochs[last], test[last]),
                xytext=(0, 7 if test[last] > train[last] else -15),  # on the side where the other line is not
                textcoords="offset points",
                ha="center",
                color="tab:blue",
                fontsize=9,
            )
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.margins(x=0.07, y=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc=corner)
    figure.savefig(path, format="png")
