"""A statement of the lecture with its checks, figure and verdict; shared by the scripts in this folder.

A script has a STATEMENT and a function `show` that computes the checks and draws the figure. It ends with

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
from experiments.errors import RunError, bad_value
from experiments.files import replacing

if TYPE_CHECKING:  # importing matplotlib and jax takes seconds, and --help does not need them
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement of the lecture, and where jaxcnn implements it. All texts are HTML; `plain` converts them."""

    name: str
    """Name of the script, without ".py"."""
    section: str
    """Section number, or a range such as "6–7"."""
    title: str
    korean_title: str
    korean: str
    """The lecture's own words."""
    claim: str
    """The statement that the checks verify."""
    formula: str
    functions: tuple[str, ...]
    """The functions in jaxcnn, such as "jaxcnn/ops/hidden.py: hidden_layer"."""
    test: str
    """The file that tests these functions."""
    errata: tuple[tuple[int, str], ...] = ()
    """The number of each erratum of this section, and its correction."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One fact that the claim requires: its name, the measured and the required value, and whether they agree."""

    what: str
    measured: str
    required: str
    holds: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
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


def raises(what: str, call: Callable[[], Any]) -> Check:
    """Check that `call` raises a TypeError or ValueError, as for sizes that do not match."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return Check(what, str(error).splitlines()[0].rstrip("."), "an error", True)
    return Check(what, "no error", "an error", False)


def number(value: float) -> str:
    """Format `value` with few digits."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.1e}" if abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:.4g}"


def text(value: Any) -> str:
    """Format a shape as 24×24 and an array in one line."""
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


# ---- running a script ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Check one statement of the lecture, print the verdict, and save the figure.

    The exit status is 0 if the statement holds, and 1 otherwise.
    """

    out: Path = Path("runs/lecture")
    """Folder of the figure."""


def main(statement: Statement, show: Callable[[], Result], argv: Sequence[str] | None = None) -> int:
    """Run a script with the command line `argv` (None: the process's own) and return the exit status."""

    def body(config: Config) -> int:
        return 0 if run(statement, show, folder(config.out)).holds else 1

    return cli.run(Config, body, argv, prog=f"python -m experiments.lecture.{statement.name}")


def folder(out: Path) -> Path:
    """Create the folder `out` if it does not exist, and return it; raise RunError if that fails."""
    if out.exists() and not out.is_dir():
        raise bad_value(RunError, f"--out {out}", "a folder", "a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_value(RunError, f"--out {out}", "a folder that can be created", error.strerror) from error
    return out


def run(statement: Statement, show: Callable[[], Result], out: Path) -> Result:
    """Compute in float64, print the result, and save the figure as `out`/<name>.png."""
    import jax

    with jax.enable_x64(True):
        result = show()
    path = figure_path(statement, out)
    with replacing(path) as temporary:
        result.figure.savefig(temporary, format="png")
    print(report(statement, result), f"  figure: {path}\n", sep="\n", flush=True)
    return result


def figure_path(statement: Statement, out: Path) -> Path:
    """Return the path of the figure of a statement."""
    return out / f"{statement.name}.png"


def report(statement: Statement, result: Result) -> str:
    """Return the claim, the measurements and the verdict."""
    width = max(len(check.what) for check in result.checks)
    lines = [f"§{statement.section}  {plain(statement.title)}"]
    lines += textwrap.wrap(plain(statement.claim), 118, initial_indent="  ", subsequent_indent="  ")
    for check in result.checks:
        mark = "yes" if check.holds else "NO "
        lines.append(f"  {mark} {check.what.ljust(width)}   {check.measured}  {check.required}")
    return "\n".join([*lines, f"  verdict: {verdict(result)}"])


def verdict(result: Result) -> str:
    """Return the verdict in one line."""
    failed = sum(not check.holds for check in result.checks)
    if failed:
        return f"does not hold ({failed} of {len(result.checks)} checks failed)"
    return f"holds ({len(result.checks)} checks)"


def plain(html: str) -> str:
    """Convert HTML text for a terminal."""
    import html as entities
    import re

    subscript = re.sub(r"<sub>(.*?)</sub>", r"_\1", html)
    return entities.unescape(re.sub(r"<[^>]*>", "", subscript))
