"""List the runs in a folder, and compare their curves: python -m experiments.runs --help."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from experiments import cli
from experiments.errors import CheckpointError, UsageError, bad_value
from experiments.files import creating
from experiments.restore import read_config
from experiments.run_folder import Epoch, Run, best, is_locked, read_epochs

PROG = "python -m experiments.runs"


@dataclasses.dataclass(frozen=True)
class Config:
    """Print one line for each run, the newest first, and draw their validation curves over each other."""

    folders: Positional[tuple[Path, ...]] = (Path("runs"),)
    """Folders of runs, or folders that contain such folders."""
    plot: Annotated[Path | None, arg(metavar="PNG")] = None
    """File for the curves of all listed runs; if omitted, none are drawn."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """A run: its folder, its options, how it ended, and the rows of its metrics.csv."""

    folder: Path
    config: dict[str, Any]
    end: str
    rows: list[Epoch]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, compare, argv, prog=PROG)


def compare(config: Config) -> int:
    """Print the table and draw the curves; raise UsageError if there is no run."""
    runs = find(config.folders)
    if not runs:
        got = ", ".join(str(folder.absolute()) for folder in config.folders)
        raise bad_value(UsageError, "folders", "folders that contain runs", got)
    print(table(runs))
    if config.plot is not None:
        with creating(config.plot) as path:
            draw(runs, path)
        print(f"curves in {config.plot}")
    return 0


def find(folders: Sequence[Path]) -> list[Listed]:
    """Return the runs in `folders` and the runs that are `folders`, newest first. Other folders are omitted."""
    candidates = [path for folder in folders for path in (folder, *sorted(folder.glob("*")), *folder.glob("*/run"))]
    found: dict[Path, Listed] = {}
    for folder in candidates:
        try:
            config = read_config(Run(folder))
        except CheckpointError:  # not a run
            continue
        end = "running" if is_locked(folder) else config.get("end", "killed")
        found[folder.resolve()] = Listed(folder, config, end, read_epochs(folder / "metrics.csv"))
    return sorted(found.values(), key=lambda run: (run.folder / "config.json").stat().st_mtime, reverse=True)


def table(runs: Sequence[Listed]) -> str:
    """Return the table of runs as text. The validation and test columns are accuracies, or mean IoUs of masks."""
    header = ("run", "model", "data", "optimizer", "rate", "batch", "seed", "steps", "validation", "test", "end")
    lines = [header]
    for run in runs:
        row = best(run.rows)
        tested = run.config.get("test_mean_iou", run.config.get("test_accuracy"))
        options = [run.config.get(name, "") for name in ("optimizer", "learning_rate", "batch_size", "seed")]
        steps = run.config.get("steps", run.rows[-1].step if run.rows else 0)
        data = Path(str(run.config["data"])).name
        validated = None if row is None else row.score
        accuracies = ["" if x is None else f"{x:.4f}" for x in (validated, tested)]
        lines.append((run.folder.name, run.config["model"], data, *map(str, options), str(steps), *accuracies, run.end))
    widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def draw(runs: Sequence[Listed], path: Path) -> None:
    """Write a PNG with the loss and accuracy of each run over its steps: training dashed, validation solid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for n, run in enumerate(runs):
            steps = [row.step for row in run.rows]
            for part, style in (("train", "--"), ("validation", "-")):
                values = [getattr(row, f"{part}_{quantity}") for row in run.rows]
                label = run.folder.name if part == "validation" else None
                axes.plot(steps, values, style, color=f"C{n % 10}", marker="o", markersize=3, label=label)
        axes.set(xlabel="step", ylabel=f"{quantity}: training dashed, validation solid")
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    sys.exit(main())
