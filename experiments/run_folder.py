"""The folder that a run writes: config.json, metrics.csv, curves.png and weights.safetensors."""

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
    """One row of metrics.csv; the fields are its columns, in order.

    Training loss and accuracy are means over the epoch's steps, with dropout active and parameters changing. Test loss
    and accuracy are of all test examples at the end of the epoch. `seconds` is the time of the training steps only.
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
    """Raise RunError if no new folder can be created, before anything is read or computed. Creates nothing.

    Args:
        out: The requested folder; None means one in runs/.
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
    """Create a folder for exactly one run, and yield its absolute path.

    It is created atomically, so two runs that start at the same moment get different folders. A folder that was created
    here and is still empty when the block ends is removed.

    Args:
        out: The folder to create, or an empty one; None means runs/<time>-<name>, with -2, -3, … if that exists.
        name: The last part of the folder's name.
        now: The time in the name; None means the current time.

    Raises:
        RunError: No folder can be created, or `out` holds files or belongs to another run. A run never overwrites
            another.
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
            with contextlib.suppress(OSError):  # it holds the results of the run
                folder.rmdir()


def _claim(folder: Path, *, may_be_there: bool) -> Literal["made", "found", ""]:
    """Create `folder`, or accept an empty one if `may_be_there`, and mark it; "" means that another run uses it."""
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
    except (
        FileExistsError,
        FileNotFoundError,
    ):  # another run came first, or has just removed a folder that it did not need
        return ""
    if [path.name for path in folder.iterdir()] != [CLAIM]:  # another run has ended since the folder was found empty
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

    def kept(self) -> str:
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
    """Return a figure: loss left, accuracy right; training dashed and gray, test solid; one legend."""
    # The object interface instead of pyplot: no global state, no window, nothing to close.
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
                xytext=(0, 7 if test[last] > train[last] else -15),  # on the side opposite to the other line
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
