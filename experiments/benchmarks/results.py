"""Output of the benchmarks: a table on the terminal, JSON with all numbers, and a chart of ratios."""

import contextlib
import dataclasses
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.timing import Times
from experiments.cli import INTERRUPTED
from experiments.errors import UsageError, bad_value, explain
from experiments.files import creating

OURS, THEIRS = "#c0392b", "#95a5a6"


def check_out(out: Path | None) -> None:
    """Raise UsageError if `--out` is a folder, or if one of its files exists."""
    if out is None:
        return
    if out.is_dir():
        raise bad_value(UsageError, "--out", "a file", f"the folder {out}")
    for path in (out, out.with_suffix(".png")):
        if path.exists():
            raise bad_value(UsageError, "--out", "a new file", f"{path}, which exists")


@contextlib.contextmanager
def until_stopped(has_results: Callable[[], Any]) -> Iterator[list[int]]:
    """Let Ctrl-C or an error end the block early, so that the measurements so far are reported and written.

    Args:
        has_results: Called then; returns whether there are results to report. If not, the exception is raised again.

    Yields:
        A list to which the script's exit status is added if the block ends early.
    """
    status: list[int] = []
    try:
        yield status
    except KeyboardInterrupt:
        if not has_results():
            raise
        status.append(INTERRUPTED)
        print("interrupted; the results so far:", flush=True)
    except Exception as error:
        if isinstance(error, BrokenPipeError) or not has_results():
            raise
        status.append(1)
        print(explain(error) or "".join(traceback.format_exception(error)), file=sys.stderr)
        print("stopped by an error; the results so far:", flush=True)


def heading(machine: Mapping[str, Any], title: str) -> None:
    """Print the machine and the packages, then the title."""
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    print(title)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under their columns: the first left-aligned, the others right-aligned."""
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *numbers in lines:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *cells]).rstrip())


def contenders(times: Mapping[str, Times], base: str, more: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Print one line per library with its times, their ratio to those of `base`, and the columns of `more`."""
    more = more or {}
    rows = []
    for name, t in times.items():
        ratio = f"{t.median / times[base].median:.2f} ({t.minimum / times[base].minimum:.2f})"
        rows.append([name, seconds(t.median), seconds(t.minimum), f"{t.interquartile_range:.0%}", ratio])
        rows[-1] += [column.get(name, "") for column in more.values()]
    table(["", "median", "minimum", "IQR", f"time / {base}", *more], rows)
    print("ratio of medians (of minima); IQR: interquartile range / median")


def report(
    out: Path | None,
    machine: Mapping[str, Any],
    config: Any,
    title: str,
    times: Mapping[str, Times],
    base: str,
    ours: str,
) -> None:
    """Print a heading and one line per library; write the numbers and the chart of ratios if `out` is given."""
    heading(machine, title)
    contenders(times, base)
    if out is not None:
        write(out, machine, config, seconds=times)
        ratios = {name: t.median / times[base].median for name, t in times.items()}
        label = f"time / time of {base} (medians)"
        bars(out.with_suffix(".png"), title, label, ratios, ours=ours)


def seconds(s: float) -> str:
    """Return a time in seconds, milliseconds or microseconds."""
    return f"{s:.2f} s" if s >= 1 else f"{s * 1e3:.1f} ms" if s >= 1e-3 else f"{s * 1e6:.0f} µs"


def megabytes(count: float) -> str:
    """Return a byte count in units of 10⁶ bytes."""
    return f"{count / 1e6:.2f} MB"


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean, or NaN if there are no ratios."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def write(path: Path, machine: Mapping[str, Any], config: Any, **results: Any) -> None:
    """Write the machine, the options and the results as JSON; `Times` become lists of seconds."""
    numbers = {"machine": machine, "config": dataclasses.asdict(config), **results}
    with creating(path) as temporary:
        temporary.write_text(json.dumps(numbers, indent=1, default=_to_json, ensure_ascii=False))


def _to_json(value: Any) -> Any:
    if isinstance(value, Times):
        return value.seconds
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)  # type: ignore[arg-type]


def bars(
    path: Path,
    title: str,
    label: str,
    ratios: Mapping[str, float],
    *,
    notes: Sequence[str] = (),
    ours: str | None = None,
    dots: Mapping[str, Mapping[str, float]] | None = None,
    log: bool = False,
) -> None:
    """Draw one bar per ratio, in ascending order; `dots` are additional ratios by label."""
    from matplotlib.figure import Figure

    notes = notes or [f"{ratio:.2f}×" for ratio in ratios.values()]
    order = sorted(range(len(ratios)), key=lambda i: list(ratios.values())[i])
    names, values = [list(ratios)[i] for i in order], [list(ratios.values())[i] for i in order]
    figure = Figure(figsize=(7 if not log else 9, 0.9 + (0.36 if not log else 0.19) * len(names)), layout="constrained")
    axes = figure.subplots()
    red = [name == ours if ours else ratio < 1 for name, ratio in zip(names, values, strict=True)]
    # On a logarithmic axis a bar begins at 1, and ratios below 1 extend to the left.
    left = 1.0 if log else 0.0
    container = axes.barh(names, [v - left for v in values], left=left, color=[OURS if one else THEIRS for one in red])
    axes.bar_label(container, [notes[i] for i in order], padding=4, fontsize=None if not log else 6)
    axes.invert_yaxis()
    if log:
        for color, (what, others) in zip(("#2980b9", "#27ae60"), (dots or {}).items(), strict=False):
            at = [name for name in names if name in others]
            axes.scatter([others[name] for name in at], at, s=9, color=color, label=what, zorder=3)
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.tick_params("y", labelsize=6)
        axes.margins(y=0.005)
        if dots:
            axes.legend(loc="lower right", fontsize=8)
    else:
        axes.set_xlim(0, max(values) * 1.25)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def lines(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],
    label: str,
) -> None:
    """Draw one panel per quantity; `panels` is {quantity: {library: {size: cost}}}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (what, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for color, (name, curve) in zip((OURS, "#2c3e50", "#2980b9", "#27ae60"), curves.items(), strict=False):
            axes.plot(list(curve), list(curve.values()), "o-", color=color, label=name, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(what)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel(label)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with creating(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
