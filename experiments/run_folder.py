"""The folder of a run: its configuration, environment, metrics, checkpoints, weights and figures."""

import contextlib
import csv
import dataclasses
import errno
import itertools
import json
import math
import os
import shlex
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import checkpoints
from experiments.errors import ExperimentError, RunError, WriteError, bad_value
from experiments.files import replacing, sync

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One row of metrics.csv; the fields are its columns, in order.

    Training loss and accuracy are means over the epoch's steps, with dropout active and changing parameters. Validation
    loss and accuracy are means over all validation examples at the end of the epoch, NaN if there was no validation.
    `seconds` is the time of the training steps only. The mean IoU is that of masks; labels have none, and its column is
    omitted.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float
    images_per_second: float
    validation_mean_iou: float = math.nan

    @property
    def of_masks(self) -> bool:
        """Whether the validation examples have masks, and not labels."""
        return not math.isnan(self.validation_mean_iou)

    @property
    def score(self) -> float:
        """The number by which the best epoch is chosen: the mean IoU of masks, the accuracy of labels."""
        return self.validation_mean_iou if self.of_masks else self.validation_accuracy

    @property
    def score_name(self) -> str:
        """The name of `score`."""
        return "mean IoU" if self.of_masks else "accuracy"


TRAIN, REPORT = "python -m experiments.train", "python -m experiments.report"
"""The commands that write into the folder of a run."""
CLAIM = ".in-use"
"""The file that a run locks while it writes into its folder. The lock ends with the process, even after SIGKILL."""


@dataclasses.dataclass
class History:
    """The metrics of a run up to a step: its finished epochs, and sums over the steps of the unfinished one."""

    epochs: list[Epoch] = dataclasses.field(default_factory=list)
    steps: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the history as JSON values, in which NaN is null."""
        rows = [{key: finite_or_none(value) for key, value in dataclasses.asdict(row).items()} for row in self.epochs]
        return {**dataclasses.asdict(self), "epochs": rows}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "History":
        """Return the history that `as_json` was called on."""
        rows: list[dict[str, Any]] = value["epochs"]
        epochs = [Epoch(**{**row, **{key: math.nan for key, x in row.items() if x is None}}) for row in rows]
        fields: dict[str, Any] = {**value, "epochs": epochs}
        return cls(**fields)


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None if it is NaN or infinite, which JSON does not have."""
    return value if math.isfinite(value) else None


def best(rows: Iterable[Epoch]) -> Epoch | None:
    """Return the first epoch of the highest score and then the lowest validation loss; None if there is none."""
    validated = [row for row in rows if math.isfinite(row.validation_loss)]
    return max(validated, key=lambda row: (row.score, -row.validation_loss), default=None)


def read_epochs(path: Path) -> list[Epoch]:
    """Return the rows of a metrics.csv, with NaN for empty cells; none if the file is missing or not a table."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_epoch(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError):
        return []


def _epoch(row: Mapping[str, str]) -> Epoch:
    values = {field.name: float(row.get(field.name) or "nan") for field in dataclasses.fields(Epoch)}
    return Epoch(int(values.pop("epoch")), int(values.pop("step")), **values)


def curves_title(config: Mapping[str, Any]) -> str:
    """Return the title of curves.png for the contents of a config.json."""
    return f"{config['model']} on {Path(config['data']).name}, seed {config.get('seed', 0)}"


def check_run(folder: Path, name: object, kind: type[ExperimentError]) -> None:
    """Raise an error of a kind, which says what `name` must be, unless `folder` is a folder."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise bad_value(kind, name, "the folder of a run", got)


def check_folder(out: Path | None) -> None:
    """Raise RunError if no new folder can be created, before anything is read or computed. Create nothing.

    Args:
        out: The requested folder; None means one in runs/.
    """
    folder = (Path("runs") if out is None else out).absolute()
    name = f"--out {folder}"
    if out is not None and folder.is_dir() and any(folder.iterdir()):
        got = "one that another run is using" if is_locked(folder) else _CONTAINS
        raise bad_value(RunError, name, "a new or empty folder", got)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise bad_value(RunError, name, "a new or empty folder", f"{nearest}, which is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise bad_value(RunError, name, "in a writable folder", f"{nearest}, which is not writable")


_CONTAINS = "one that contains files"


@contextlib.contextmanager
def new_folder(
    out: Path | None, name: str, now: datetime | None = None, files: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Create a folder for exactly one run, with its first files, and yield its absolute path.

    It appears atomically under its name, complete, so two runs that start at the same moment get different folders. If
    the block ends and nothing was added, the folder is removed if it was created here, and the files in any case.

    Args:
        out: The folder to create, or an empty one; None means runs/<time>-<name>, with -2, -3, … if that exists.
        name: The last part of the folder's name.
        now: The time in the name; None means the current time.
        files: The contents of the first files, by name.

    Raises:
        RunError: No folder can be created, or `out` contains files or is used by another run. A run never overwrites
            another.
    """
    check_folder(out)
    files = dict(files or {})
    with contextlib.ExitStack() as stack:
        existed = out is not None and out.is_dir()
        try:
            if out is None:
                stem = Path("runs").absolute() / f"{now or datetime.now():%Y%m%d-%H%M%S}-{name}"
                names = (stem if n == 1 else stem.with_name(f"{stem.name}-{n}") for n in itertools.count(1))
                folder = _create(names, files, stack)
            elif out.is_dir():
                folder = _claim_empty(out.absolute(), files, stack)
            else:
                folder = _create([out.absolute()], files, stack)
        except WriteError as error:
            raise bad_value(RunError, "--out", "a folder that can be created", error) from error
        except OSError as error:
            got = f"{error.strerror}: {error.filename}"
            raise bad_value(RunError, "--out", "a folder that can be created", got) from error
        try:
            yield folder
        finally:
            _remove_unused(folder, files, created=not existed)
            (folder / CLAIM).unlink(missing_ok=True)


def _create(names: Iterable[Path], files: Mapping[str, str], stack: contextlib.ExitStack) -> Path:
    """Create the first of the folders `names` that does not exist, locked and with `files` in it."""
    staging = None
    for folder in names:
        if staging is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            staging.mkdir()
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            stack.enter_context(locked(staging))
            for file, text in files.items():
                (staging / file).write_text(text, "utf-8")
        try:
            # The target is never empty, because a folder appears with its lock file, so this cannot replace one.
            staging.rename(folder)
            return folder
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
    raise bad_value(RunError, f"--out {folder}", "a new or empty folder", "one that another run is using")


def _claim_empty(folder: Path, files: Mapping[str, str], stack: contextlib.ExitStack) -> Path:
    """Lock an empty folder that exists, and write `files` into it."""
    stack.enter_context(locked(folder, f"--out {folder}", "a new or empty folder"))
    if [path.name for path in folder.iterdir()] != [CLAIM]:  # another run ended after the folder was seen empty
        raise bad_value(RunError, f"--out {folder}", "a new or empty folder", _CONTAINS)
    for file, text in files.items():
        with replacing(folder / file) as temporary:
            temporary.write_text(text, "utf-8")
    return folder


def _remove_unused(folder: Path, files: Mapping[str, str], *, created: bool) -> None:
    """Remove the first files, and the folder if it was created, unless the run has added others."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {CLAIM, *files}:
            for file in files:
                (folder / file).unlink(missing_ok=True)
            if created:
                (folder / CLAIM).unlink(missing_ok=True)
                folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path, name: str = "", expected: str = "a run that no other process is writing") -> Iterator[None]:
    """Hold the lock of a run's folder; raise RunError if another process holds it, or the folder is not writable.

    Args:
        folder: The folder, which exists.
        name: The name of the folder in messages; "" means its path.
        expected: What the folder must be.
    """
    import filelock

    lock = filelock.FileLock(folder / CLAIM, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise bad_value(RunError, name or folder, expected, "one that another run is using") from None
    except OSError as error:
        raise bad_value(RunError, name or folder, "a writable folder", error.strerror) from error
    try:
        yield
    finally:
        (folder / CLAIM).unlink(missing_ok=True)
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether another process is writing a run into `folder`."""
    import filelock

    if not (folder / CLAIM).exists():
        return False
    try:
        with filelock.FileLock(folder / CLAIM, blocking=False):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # not writable
        return False


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
            temporary.write_text(as_json(config), "utf-8")

    def add_environment(self, environment: Mapping[str, Any]) -> None:
        """Add the environment in which the run was resumed to environment.json."""
        path = self.folder / "environment.json"
        try:
            first = json.loads(path.read_text("utf-8"))
            resumed = [*first.get("resumed", []), environment]
        except (OSError, ValueError, AttributeError):
            first, resumed = {}, [environment]
        with replacing(path) as temporary:
            temporary.write_text(as_json({**first, "resumed": resumed}), "utf-8")

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append one line for each record (a step's metrics) to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(_finite(record)) + "\n" for record in records))
        except OSError as error:
            hint = "the run can be resumed from its last checkpoint"
            raise bad_value(WriteError, path, "writable", error.strerror or error, hint) from error

    def rewind(self, history: History, step: int) -> None:
        """Remove the metrics after `step` from metrics.jsonl and metrics.csv."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if 0 < _step(line) <= step), "utf-8")
        self.save_metrics(history.epochs)

    def saved_weights(self) -> str:
        """Return a short description of the weights in the folder."""
        step = self.saved_step()
        return "no weights were saved yet" if step is None else f"the weights after step {step} are in {self.weights}"

    def saved_step(self) -> int | None:
        """Return the step of the weights file, or None if there is none."""
        step = checkpoints.metadata(self.weights).get("step")
        return None if step is None else int(step)

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        return f"{TRAIN} --resume {shlex.quote(str(_relative(self.folder)))}"

    @property
    def report_command(self) -> str:
        """The command that writes report.html and curves.png again."""
        return f"{REPORT} {shlex.quote(str(_relative(self.folder)))}"

    @property
    def weights(self) -> Path:
        """The path of the weights file."""
        return self.folder / "weights.safetensors"

    def save(
        self, rows: Sequence[Epoch], params: checkpoints.Params, step: int, config: Mapping[str, Any] | None = None
    ) -> None:
        """Write the parameters after `step` steps, with `config` in the same file, and the metrics so far."""
        described = {} if config is None else {"config": as_json(config)}
        checkpoints.save(self.weights, params, {"step": str(step), **described})
        self.save_metrics(rows)

    def save_metrics(self, rows: Sequence[Epoch]) -> None:
        """Write metrics.csv, and wait until metrics.jsonl is on the disk."""
        with replacing(self.folder / "metrics.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            names = [field.name for field in dataclasses.fields(Epoch)]
            names = names if any(row.of_masks for row in rows) else names[:-1]
            writer.writerow(names)
            # An epoch that was not evaluated has empty cells, which every CSV reader treats as missing.
            writer.writerows([_cell(getattr(row, name)) for name in names] for row in rows)
        if (path := self.folder / "metrics.jsonl").exists():
            sync(path)

    def plot(self, rows: Sequence[Epoch], title: str) -> None:
        """Draw loss and accuracy over the epochs into curves.png; draw nothing if there are no epochs."""
        if rows:
            with replacing(self.folder / "curves.png") as temporary:
                plot_curves(temporary, rows, title)


class Unwritten(Run):
    """The folder of a run that another process writes: nothing is written."""

    def describe(self, config: Mapping[str, Any]) -> None:
        """Do nothing."""

    def add_environment(self, environment: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def rewind(self, history: History, step: int) -> None:
        """Do nothing."""

    def save(
        self, rows: Sequence[Epoch], params: checkpoints.Params, step: int, config: Mapping[str, Any] | None = None
    ) -> None:
        """Do nothing."""

    def save_metrics(self, rows: Sequence[Epoch]) -> None:
        """Do nothing."""

    def plot(self, rows: Sequence[Epoch], title: str) -> None:
        """Do nothing."""


def _relative(folder: Path) -> Path:
    """Return the shortest path of a folder that is valid in the current folder."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def as_json(config: Mapping[str, Any]) -> str:
    """Return the text of config.json."""
    return json.dumps(config, indent=2, default=str, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """Return `value` with "nan", "inf" and "-inf" for the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> int:
    """Return the step of a line of metrics.jsonl, or 0 for an incomplete line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}" if isinstance(value, float) else str(value)


def plot_curves(path: Path, rows: Sequence[Epoch], title: str) -> None:
    """Write `draw_curves` as a PNG."""
    draw_curves(rows, title).savefig(path, format="png")


def draw_curves(rows: Sequence[Epoch], title: str) -> "Figure":
    """Return a figure with loss at the left and accuracy at the right: training dashed gray, validation solid blue."""
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
        validation = [getattr(row, f"validation_{quantity}") for row in rows]
        axes.plot(epochs, train, "--", color="0.45", marker=marker, markersize=3, label="training, mean over the epoch")
        label = "validation, at the end of the epoch"
        axes.plot(epochs, validation, "-", color="tab:blue", marker=marker, markersize=4, label=label)
        evaluated = [n for n, value in enumerate(validation) if math.isfinite(value)]
        if evaluated:
            last = evaluated[-1]
            axes.annotate(
                f"{validation[last]:.4f}",
                (epochs[last], validation[last]),
                xytext=(0, 7 if validation[last] > train[last] else -15),  # away from the other line
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
