"""Output of a run in the terminal: a banner, a line per epoch, and a progress bar, or plain lines for a pipe."""

import importlib.metadata
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from experiments.dataset import Dataset
from experiments.run_folder import Epoch, best

PACKAGES = ("jaxcnn", "jax", "jaxlib", "optax", "numpy")
PLAIN_INTERVAL = 10.0
"""Seconds between two lines within an epoch if there is no bar."""


def versions() -> dict[str, str]:
    """Return the version of Python and of each package that a result depends on."""
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            result[package] = "(not installed)"
    return result


def describe_device() -> str:
    """Return a description of the first device, e.g. "cpu (2 cores)", and the number of devices if there are more."""
    import jax

    devices = jax.devices()
    cores = f" ({os.cpu_count()} cores)" if devices[0].platform == "cpu" else ""
    return f"{devices[0].device_kind}{cores}" + (f", the first of {len(devices)}" if len(devices) > 1 else "")


def environment() -> dict[str, Any]:
    """Return the contents of environment.json: the exact command, the versions, and what results depend on."""
    prefixes = ("JAX_", "XLA_", "JAXCNN_", "CUDA_VISIBLE", "OMP_")
    return {
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "device": describe_device(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)},
    }


def describe_data(dataset: Dataset) -> str:
    """Return the name, sizes and hash of a data set in one line."""
    shape = "×".join(map(str, dataset.image_shape))
    return (
        f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images {shape}"
        f"{' with masks' if dataset.task == 'segmentation' else ''}, "
        f"{len(dataset.class_names)} classes, sha256 {dataset.sha256[:12]}, from {dataset.source}"
    )


def banner(facts: Mapping[str, str]) -> str:
    """Return `facts` as lines of two columns."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in facts.items())


def describe_epoch(row: Epoch, epochs: int) -> str:
    """Return one epoch in one line."""
    validated = f"validation loss {row.validation_loss:.4f} accuracy {row.validation_accuracy:.4f}"
    if row.of_masks:
        validated += f" mean IoU {row.validation_mean_iou:.4f}"
    validation = "not evaluated" if math.isnan(row.validation_loss) else validated
    return (
        f"epoch {row.epoch:>{len(str(epochs))}}/{epochs}   "
        f"train loss {row.train_loss:.4f} accuracy {row.train_accuracy:.4f}   {validation}   "
        f"{row.seconds:.1f} s, {row.images_per_second:,.0f} images/s"
    )


def summarize(rows: Sequence[Epoch], first_step: int, wall: float, tested: Mapping[str, float] | None) -> str:
    """Return a summary of the run in a few lines.

    Args:
        rows: The epochs of the run.
        first_step: Number of steps that were taken before this process; 0 unless the run was resumed.
        wall: Seconds from the first step to the last evaluation, in this process.
        tested: The test metrics, or None if the run has not finished.
    """
    if not rows:
        return "no epoch was finished"
    seconds = sum(row.seconds for row in rows)
    images = sum(row.seconds * row.images_per_second for row in rows)
    since = f" since step {first_step:,}, where the run was resumed" if first_step else ""
    lines = [
        f"trained {rows[-1].step:,} steps in {seconds:.1f} s, {images / seconds:,.0f} images/s; "
        f"{wall:.1f} s with evaluations and checkpoints{since}"
    ]
    row = best(rows)
    if row is not None:
        lines.append(f"validation {row.score_name} {row.score:.4f} after epoch {row.epoch}, the best one")
    test = "not measured, because the run has not finished" if tested is None else f"{tested['accuracy']:.4f}"
    test += f", mean IoU {tested['mean_iou']:.4f}" if tested is not None and "mean_iou" in tested else ""
    return "\n" + "\n".join([*lines, f"test accuracy {test}"])


class Progress(Protocol):
    """Receives the state of a running training."""

    def update(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show the state after `step` steps; may be called at any rate."""

    def line(self, text: str) -> None:
        """Write a permanent line."""


@contextmanager
def progress(total_steps: int, stream: TextIO | None = None) -> Iterator[Progress]:
    """Yield a bar with ETA on a terminal, plain lines otherwise; `stream` is stdout if None."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        with _bar(total_steps, stream) as bar:
            yield bar
    else:
        yield PlainLines(total_steps, stream)


class PlainLines:
    """Progress for logs and pipes: at most one line every PLAIN_INTERVAL seconds between the permanent lines."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self._total, self._stream = total_steps, stream
        self._last = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time of the first update, after compilation

    def update(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Write a line if PLAIN_INTERVAL seconds have passed since the last one."""
        now = time.monotonic()
        first_step, first = self._first = self._first or (step, now)
        if now - self._last >= PLAIN_INTERVAL and step < self._total:
            time_left = ""
            if step > first_step:
                time_left = f", {(now - first) / (step - first_step) * (self._total - step):.0f} s left"
            self.line(
                f"step {step}/{self._total}   loss {loss:.4f} accuracy {accuracy:.4f}   "
                f"{images_per_second:,.0f} images/s{time_left}"
            )

    def line(self, text: str) -> None:
        """Write a line and flush it, so that a reader of the log sees it immediately."""
        print(text, file=self._stream, flush=True)
        self._last = time.monotonic()


@contextmanager
def _bar(total_steps: int, stream: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(file=stream, highlight=False)
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[state]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )

    class Bar:
        def update(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
            state = f"loss {loss:.3f} accuracy {accuracy:.3f}  {images_per_second:,.0f} images/s"
            display.update(task, completed=step, state=state)

        def line(self, text: str) -> None:
            display.console.print(text, markup=False, soft_wrap=True)

    # Transient, because the permanent lines contain all information.
    with RichProgress(*columns, console=console, transient=True, expand=True) as display:
        task = display.add_task("", total=total_steps, state="")
        yield Bar()
