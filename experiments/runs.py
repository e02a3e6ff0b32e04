"""What a run leaves behind: a folder with config.json, metrics.csv, curves.png and weights.safetensors."""

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
from experiments.errors import RunError
from experiments.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


CLAIM = ".in-use"
"""The file that marks a folder as one run's own, until that run has ended."""


def check_folder(out: Path | None) -> None:
    """Raise RunError if no new folder can be made, before anything is read or computed. Nothing is made yet.

    Args:
        out: The folder that was asked for; None means one in runs/.
    """
    asked = (Path("runs") if out is None else out).absolute()
    if out is not None and asked.is_dir() and any(asked.iterdir()):
        held = "another run is using" if (asked / CLAIM).exists() else "holds files"
        raise RunError(f"--out {asked}: expected a new or empty folder, got one that {held}")
    nearest = next(path for path in (asked, *asked.parents) if path.exists())
    if not nearest.is_dir():
        raise RunError(f"--out {asked}: expected a folder or nothing, but {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"--out {asked}: expected a place to write to, but {nearest} is not writable")


@contextlib.contextmanager
def new_folder(out: Path | None, name: str, now: datetime | None = None) -> Iterator[Path]:
    """Make a folder that belongs to one run alone, and yield its absolute path.

    It is made atomically, so that of two runs started in the same moment each gets its own. A folder that was made
    here and is still empty when the block ends is removed again.

    Args:
        out: The folder to make, or an empty one; None means runs/<time>-<name>, with -2, -3, … where that is taken.
        name: What the run is of.
        now: The time in the name; None means the present.

    Raises:
        RunError: No folder can be made, or `out` holds files or is another run's. A run never overwrites another.
    """
    check_folder(out)
    if out is None:
        stem = Path("runs").absolute() / f"{now or datetime.now():%Y%m%d-%H%M%S}-{name}"
        names = (stem if n == 1 else stem.with_name(f"{stem.name}-{n}") for n in itertools.count(1))
    else:
        names = (path for path in (out.absolute(),))
    try:
        claims = ((folder, _claim(folder, may_be_there=out is not None)) for folder in names)
        folder, made = next(((folder, claim == "made") for folder, claim in claims if claim), (None, False))
    except OSError as error:
        raise RunError(f"--out: must be a place to write to, got {error.strerror}: {error.filename}") from error
    if folder is None:
        raise RunError(f"--out {out}: must be a new or empty folder, got one that another run is using")
    try:
        yield folder
    finally:
        (folder / CLAIM).unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # it holds what the run left
                folder.rmdir()


def _claim(folder: Path, *, may_be_there: bool) -> Literal["made", "found", ""]:
    """Make `folder`, or find it empty where it may be there, and mark it; "" means that it is another run's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    how: Literal["made", "found"] = "made"
    try:
        folder.mkdir()
    except FileExistsError:
        if not may_be_there:
            return ""
        how = "found"
    try:
        (folder / CLAIM).open("x").close()
    except (FileExistsError, FileNotFoundError):  # another run came first, or has just removed what it did not need
        return ""
    if [path.name for path in folder.iterdir()] != [CLAIM]:  # another run has ended since it was found empty
        (folder / CLAIM).unlink()
        return ""
    return how


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder. Each file appears whole or not at all, so what lies there is valid at any moment."""

    folder: Path

    @classmethod
    def start(cls, folder: Path, config: Mapping[str, Any]) -> "Run":
        """Make `folder` and write `config` (anything that json knows, and paths) into it."""
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        run.describe(config)
        return run

    def describe(self, config: Mapping[str, Any]) -> None:
        """Write `config` into config.json, in place of what stood there."""
        with replacing(self.folder / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2, default=str, ensure_ascii=False) + "\n", "utf-8")

    def kept(self) -> str:
        """Return which weights lie in the folder, in a few words."""
        step = checkpoints.metadata(self.weights).get("step")
        return "no weights were saved yet" if step is None else f"the weights after step {step} are in {self.weights}"

    @property
    def weights(self) -> Path:
        """Where the weights lie."""
        return self.folder / "weights.safetensors"

    def save(self, rows: Sequence[Epoch], params: checkpoints.Params, step: int) -> None:
        """Write the parameters after `step` steps, and the metrics so far."""
        checkpoints.save(self.weights, params, {"step": str(step)})
        with replacing(self.folder / "metrics.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in dataclasses.fields(Epoch))
            # An epoch that was not evaluated has empty cells, which every reader of CSV takes for missing.
            writer.writerows([_cell(value) for value in dataclasses.astuple(row)] for row in rows)

    def plot(self, rows: Sequence[Epoch], title: str) -> None:
        """Draw loss and accuracy over the epochs into curves.png; nothing is drawn where nothing was learnt."""
        if rows:
            with replacing(self.folder / "curves.png") as temporary:
                plot_curves(temporary, rows, title)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}" if isinstance(value, float) else str(value)


def plot_curves(path: Path, rows: Sequence[Epoch], title: str) -> None:
    """Write `draw_curves` as a PNG."""
    draw_curves(rows, title).savefig(path, format="png")


def draw_curves(rows: Sequence[Epoch], title: str) -> "Figure":
    """Return loss at the left, accuracy at the right; training dashed and grey, test solid; the key below both."""
    # The object interface, not pyplot: no global state, no window, nothing to close.
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
        axes.margins(y=0.16)
        beside = max(0.5, 0.07 * (epochs[-1] - epochs[0]))
        axes.set_xlim(epochs[0] - beside, epochs[-1] + beside)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
