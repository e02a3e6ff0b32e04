"""Show all statements of the lecture: python -m experiments.lecture --help."""

import dataclasses
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.lecture.statement import folder, run

SCRIPTS = (
    "s02_network",
    "s02_order",
    "s03_sigmoid",
    "s04_differences",
    "s06_relu",
    "s06_sizes",
    "s07_kronecker",
    "s09_delta",
    "s09_literal_up",
    "s10_same_step",
    "s11_flip",
    "s13_triangles",
    "s14_matching",
    "s14_autocorrelation",
    "s15_flipped",
)
"""The scripts in the lecture's order."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Check every statement of the lecture, print the verdicts, and write the figures and a page, lecture.html.

    The exit status is 0 if all statements hold, and 1 otherwise.
    """

    out: Path = Path("runs/lecture")
    """Folder of the figures and the page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    return cli.run(Config, show_all, argv, prog="python -m experiments.lecture")


def show_all(config: Config) -> int:
    """Run all scripts, then write the page."""
    out = folder(config.out)
    from experiments import terminal
    from experiments.lecture import page

    began, results = time.perf_counter(), []
    for name in SCRIPTS:
        script = importlib.import_module(f"experiments.lecture.{name}")
        results.append((script.STATEMENT, run(script.STATEMENT, script.show, out)))
    seconds = time.perf_counter() - began
    versions = terminal.versions()
    facts = {name: versions[name] for name in ("jaxcnn", "jax", "numpy")}
    path = out / "lecture.html"
    page.write(path, results, {**facts, "on": terminal.describe_device(), "in": f"{seconds:.0f} s"})
    failed = [f"§{statement.section} {statement.name}" for statement, result in results if not result.holds]
    print(f"{len(results) - len(failed)} of {len(results)} statements hold, in {seconds:.0f} s; page: {path}")
    if failed:
        print(f"these do not: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
