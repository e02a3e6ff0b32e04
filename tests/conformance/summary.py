"""Counts of the cases that agreed with each source, recorded by the tests in this folder and printed at the end.

The counts travel as properties of test reports, so they also reach the main process of pytest-xdist.
"""

import collections
from collections.abc import Iterable
from typing import Any

AGREED, LEFT_OUT = "conformance", "left out of conformance"


def agreed(record: Any, source: str, op: str, cases: int = 1) -> None:
    """Record compared cases; ``record`` is the `record_property` fixture of the test that compared them."""
    record(AGREED, [source, op, cases])


def left_out(record: Any, source: str, reason: str, cases: int = 1) -> None:
    record(LEFT_OUT, [source, reason, cases])


def lines(counted: Iterable[tuple[str, str, int]]) -> list[str]:
    """Return one line per source, with its counts per kind."""
    sources: dict[str, collections.Counter[str]] = {}
    for source, kind, cases in counted:
        sources.setdefault(source, collections.Counter())[kind] += cases
    return [
        f"{kinds.total():6}  {source}: " + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
        for source, kinds in sorted(sources.items())
    ]


def show(terminalreporter: Any) -> None:
    """Print the counts of the tests that passed."""
    passed = [report for report in terminalreporter.stats.get("passed", ()) if report.when == "call"]
    properties = [(name, tuple(value)) for report in passed for name, value in report.user_properties]
    counted, others = ([value for name, value in properties if name == wanted] for wanted in (AGREED, LEFT_OUT))
    if counted:
        terminalreporter.section("cases in which other implementations agree, forward and gradient")
        for line in lines(counted):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"{sum(cases for *_, cases in counted):6}  in all; left out:")
        for line in lines(others):
            terminalreporter.write_line(line)
