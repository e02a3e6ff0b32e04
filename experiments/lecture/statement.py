"""Shared code of the scripts in this folder: a statement of the lecture, its checks, its figure, its verdict.

A script has a STATEMENT, and a function `show` that computes the checks and draws the figure. It ends with

    if __name__ == "__main__":
        sys.exit(main(STATEMENT, show))
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import cli
from experiments.errors import RunError
from experiments.files import replacing

if TYPE_CHECKING:  # importing matplotlib and jax takes seconds, and --help does not need them
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement of the lecture, and where this project implements it. Text is HTML, as on the page; see `plain`."""

    name: str
    """The script's, without ".py"."""
    section: str
    """As in §6–7: "6–7"."""
    title: str
    korean_title: str
    korean: str
    """The lecture's own words."""
    claim: str
    """What is shown."""
    formula: str
    functions: tuple[str, ...]
    """Where it stands in jaxcnn: "jaxcnn/ops/hidden.py: hidden_layer"."""
    test: str
    """The file that tests these functions."""
    errata: tuple[tuple[int, str], ...] = ()
    """The number of each erratum met here, and what is wrong and what is right."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One fact that the claim requires: its name, the measured value, the required value, and whether they agree."""

    what: str
    measured: str
    needed: str
    holds: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """The result of `show`: the checks, the figure, and a caption that describes it."""

    checks: tuple[Check, ...]
    figure: "Figure"
    caption: str

    @property
    def holds(self) -> bool:
        """Whether all checks hold."""
        return all(check.holds for check in self.checks)


def at_most(what: str, measured: Any, bound: float) -> Check:
    """Check that `measured`, one number, is ≤ `bound`; NaN fails."""
    return Check(what, number(float(measured)), f"≤ {number(bound)}", bool(measured <= bound))


def at_least(what: str, measured: Any, bound: float) -> Check:
    """Check that `measured`, one number, is ≥ `bound`; NaN fails."""
    return Check(what, number(float(measured)), f"≥ {number(bound)}", bool(measured >= bound))


def equal(what: str, measured: Any, expected: Any) -> Check:
    """Check that `measured` is exactly `expected`: shapes, numbers or arrays."""
    holds = np.shape(measured) == np.shape(expected) and bool(np.all(np.asarray(measured) == np.asarray(expected)))
    return Check(what, text(measured), f"= {text(expected)}", holds)


def refused(what: str, call: Callable[[], Any]) -> Check:
    """Check that `call` raises because the sizes do not fit."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return Check(what, str(error).splitlines()[0].rstrip("."), "an error", True)
    return Check(what, "it was computed", "an error", False)


def number(value: float) -> str:
    """Format `value` with few digits."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.1e}" if abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:.4g}"


def text(value: Any) -> str:
    """Format a shape as 24×24, an array in one line."""
    if isinstance(value, tuple):
        return "×".join(map(str, value)) if all(isinstance(n, int) for n in value) else ", ".join(map(text, value))
    if isinstance(value, str):
        return value
    if np.ndim(value) == 0:
        return number(float(value))
    return f"[{', '.join(map(text, np.asarray(value)))}]"


def relative(got: Any, expected: Any) -> float:
    """Return ‖got − expected‖ / ‖expected‖ of one array, or of all arrays in a list."""
    parts = list(zip(got, expected, strict=True)) if isinstance(got, list | tuple) else [(got, expected)]
    error = sum(float(np.sum(np.square(np.asarray(g, float) - np.asarray(e, float)))) for g, e in parts)
    size = sum(float(np.sum(np.square(np.asarray(e, float)))) for _, e in parts)
    return math.sqrt(error / size) if size else math.inf if error else 0.0


# ---- a script's run -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Show one statement of the lecture: print its checks and its verdict, save its figure.

    The exit status is 0 if the statement holds, and 1 otherwise.
    """

    out: Path = Path("runs/lecture")
    """Folder of the picture."""


def main(statement: Statement, show: Callable[[], Shown], argv: Sequence[str] | None = None) -> int:
    """Run a script with the command line `argv` (None: the process's own) and return the exit status."""

    def body(config: Config) -> int:
        return 0 if tell(statement, show, folder(config.out)).holds else 1

    return cli.run(Config, body, argv, prog=f"python -m experiments.lecture.{statement.name}")


def folder(out: Path) -> Path:
    """Create the folder `out` if needed; earlier figures are replaced. Raise RunError if that fails."""
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out}: expected a folder or nothing, got a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out}: must be a folder that can be made, got {error.strerror}") from error
    return out


def tell(statement: Statement, show: Callable[[], Shown], out: Path) -> Shown:
    """Compute in float64, print the result, save the figure as `out`/<name>.png."""
    import jax

    with jax.enable_x64(True):
        shown = show()
    path = picture_path(statement, out)
    with replacing(path) as temporary:
        shown.figure.savefig(temporary, format="png")
    print(report(statement, shown), f"  picture: {path}\n", sep="\n", flush=True)
    return shown


def picture_path(statement: Statement, out: Path) -> Path:
    """Return the path of the figure of a statement."""
    return out / f"{statement.name}.png"


def report(statement: Statement, shown: Shown) -> str:
    """Return the claim, the measurements and the verdict."""
    width = max(len(check.what) for check in shown.checks)
    lines = [f"§{statement.section}  {plain(statement.title)}"]
    lines += textwrap.wrap(plain(statement.claim), 118, initial_indent="  ", subsequent_indent="  ")
    for check in shown.checks:
        mark = "yes" if check.holds else "NO "
        lines.append(f"  {mark} {check.what.ljust(width)}   {check.measured}  {check.needed}")
    return "\n".join([*lines, f"  verdict: {verdict(shown)}"])


def verdict(shown: Shown) -> str:
    """Return the verdict in one line."""
    failed = sum(not check.holds for check in shown.checks)
    if failed:
        return f"does not hold ({failed} of {len(shown.checks)} checks failed)"
    return f"holds ({len(shown.checks)} checks)"


def plain(html: str) -> str:
    """Convert HTML text for a terminal."""
    import html as entities
    import re

    subscript = re.sub(r"<sub>(.*?)</sub>", r"_\1", html)
    return entities.unescape(re.sub(r"<[^>]*>", "", subscript))
