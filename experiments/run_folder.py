"""The folder of a run: config.json, metrics.csv, curves.png and weights.safetensors."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import checkpoints
from experiments.errors import RunError, bad_value
from experiments.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One row of metrics.csv; the fields are its columns, in order.

    Training loss and accuracy are means over the epoch's steps, with dropout active and changing parameters. Test loss
    and accuracy are means over all test examples at the end of the epoch. `seconds` is the time of the training steps
    only.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float
    images_per_second: float


CLAIM = ".in-use"
"""The file that reserves a folder for a run until that run has ended."""


def check_folder(out: Path | None) -> None:
    """Raise RunError if no new folder can be created, before anything is read or computed. Create nothing.

    Args:
        out: The requested folder; None means one in runs/.
    """
    folder = (Path("runs") if out is None else out).absolute()
    name = f"--out {folder}"
    if out is not None and folder.is_dir() and any(folder.iterdir()):
        got = "one that another run is using" if (folder / CLAIM).exists() else "one that contains files"
        raise bad_value(RunError, name, "a new or empty folder", got)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise bad_value(RunError, name, "a new or empty folder", f"{nearest}, which is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise bad_value(RunError, name, "in a writable folder", f"{nearest}, which is not writable")


@contextlib.contextmanager
def new_folder(out: Path | None, name: str, now: datetime | None = None) -> Iterator[Path]:
    """Create a folder for exactly one run, and yield its absolute path.

    It is created atomically, so two runs that start at the same moment get different folders. If the folder was created
    here and is still empty when the block ends, it is removed.

    Args:
        out: The folder to create, or an empty one; None means runs/<time>-<name>, with -2, -3, … if that exists.
        name: The last part of the folder's name.
        now: The time in the name; None means the current time.

    Raises:
        RunError: No folder can be created, or `out` contains files or is used by another run. A run never overwrites
            another.
    """
    check_folder(out)
    if out is None:
        stem = Path("runs").absolute() / f"{now or datetime.now():%Y%m%d-%H%M%S}-{name}"
        names = (stem if n == 1 else stem.with_name(f"{stem.name}-{n}") for n in itertools.count(1))
    else:
        names = (path for path in (out.absolute(),))
    try:
        claims = ((folder, _claim(folder, may_exist=out is not None)) for folder in names)
        folder, created = next(((folder, claim == "created") for folder, claim in claims if claim), (None, False))
    except OSError as error:
        got = f"{error.strerror}: {error.filename}"
        raise bad_value(RunError, "--out", "a folder that can be created", got) from error
    if folder is None:
        raise bad_value(RunError, f"--out {out}", "a new or empty folder", "one that another run is using")
    try:
        yield folder
    finally:
        (folder / CLAIM).unlink(missing_ok=True)
        if created:
            with contextlib.suppress(OSError):  # the folder contains results
                folder.rmdir()


def _claim(folder: Path, *, may_exist: bool) -> Literal["created", "existed", ""]:
    """Create `folder`, or accept an empty one if `may_exist`, and mark it; "" means that another run uses it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    how: Literal["created", "existed"] = "created"
    try:
        folder.mkdir()
    except FileExistsError:
        if not may_exist:
            return ""
        how = "existed"
    try:
        (folder / CLAIM).open("x").close()
    except (FileExistsError, FileNotFoundError):  # another run reserved the folder first, or has just removed it
        return ""
    if [path.name for path in folder.iterdir()] != [CLAIM]:  # another run ended after the folder was seen empty
        (folder / CLAIM).unlink()
        return ""
    return how


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder. Files are written atomically, so its contents are valid at any time."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, config: Mapping[str, Any]) -> "Run":
        """Create `folder` and write `config` (JSON values and paths) into it."""
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        run.describe(config)
        return run

    def describe(self, config: Mapping[str, Any]) -> None:
        """Write `config` into config.json, replacing its contents."""
        with replacing(self.folder / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2, default=str, ensure_ascii=False) + "\n", "utf-8")

    def saved_weights(self) -> str:
        """Return a short description of the weights in the folder."""
        step = checkpoints.metadata(self.weights).get("step")
        return "no weights were saved yet" if step is None else f"the weights after step {step} are in {self.weights}"

    @property
    def weights(self) -> Path:
        """The path of the weights file."""
        return self.folder / "weights.safetensors"

    def save(self, rows: Sequence[Epoch], params: checkpoints.Params, step: int) -> None:
        """Write the parameters after `step` steps, and the metrics so far."""
        checkpoints.save(self.weights, params, {"step": str(step)})
        with replacing(self.folder / "metrics.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in dataclasses.fields(Epoch))
            # An epoch that was not evaluated has empty cells, which every CSV reader treats as missing.
            writer.writerows([_cell(value) for value in dataclasses.astuple(row)] for row in rows)

    def plot(self, rows: Sequence[Epoch], title: str) -> None:
        """Draw loss and accuracy over the epochs into curves.png; draw nothing if there are no epochs."""
        if rows:
            with replacing(self.folder / "curves.png") as temporary:
                plot_curves(temporary, rows, title)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}" if isinstance(value, float) else str(value)


def plot_curves(path: Path, rows: Sequence[Epoch], title: str) -> None:
    """Write `draw_curves` as a PNG."""
    draw_curves(rows, title).savefig(path, format="png")


def draw_curves(rows: Sequence[Epoch], title: str) -> "Figure":
    """Return a figure with loss at the left and accuracy at the right; training is dashed gray, test solid blue."""
    # The object interface has no global state and needs no window, unlike pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) < 30 else ""
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        train = [getattr(row, f"train_{quantity}") for row in rows]
        test = [getattr(row, f"test_{quantity}") for row in rows]
        axes.plot(epochs, train, "--", color="0.45", marker=marker, markersize=3, label="training, mean over the epoch")
        axes.plot(
            epochs, test, "-", color="tab:blue", marker=marker, markersize=4, label="test, at the end of the epoch"
        )
        evaluated = [n for n, value in enumerate(test) if math.isfinite(value)]
        if evaluated:
            last = evaluated[-1]
            axes.annotate(
                f"{test[last]:.4f}",
                (epochs[last], test[last]),
                xytext=(0, 7 if test[last] > train[last] else -15),  # away from the other line
                textcoords="offset points",
                ha="center",
                color="tab:blue",
                fontsize=9,
            )
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.margins(y=0.16)
        margin = max(0.5, 0.07 * (epochs[-1] - epochs[0]))
        axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
