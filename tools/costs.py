"""Write tests/costs.json, the durations that the quick run samples by: python -m tools.costs full.xml quick.xml.

The reports are those of `make test-full ARGS=--junitxml=full.xml` and of quick runs. In the whole suite a case may find
programs that another test has compiled; in a quick run it compiles its own. The larger mean counts. With --keep, a
quick run is enough, in which tests that the file lacks ran whole: they are added, and the other entries stay.
"""

import argparse
import collections
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
COSTS = ROOT / "tests" / "costs.json"
#: A test whose cases take less than this many seconds together is not sampled.
CHEAP = 1.0
#: Tests that run whole.
WHOLE = ("tests/test_planted_errors.py::test_caught",)


def durations(report: Path) -> dict[str, list[float]]:
    """Return the seconds of the cases of each test that has parameters, by the test's name in pytest."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        function, bracket, _ = case.get("name", "").partition("[")
        path = Path(*case.get("classname", "").split(".")).with_suffix(".py")
        if bracket and (ROOT / path).exists():
            found[f"{path.as_posix()}::{function}"].append(float(case.get("time", 0)))
    return found


def costs(reports: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return the seconds of one case of each expensive test, the largest of the reports' means."""
    found = {}
    for test in sorted(set().union(*reports) - {*WHOLE}):
        means = [sum(report[test]) / len(report[test]) for report in reports if report.get(test)]
        cases = max(len(report.get(test, ())) for report in reports)
        if cases > 1 and max(means) * cases >= CHEAP:
            found[test] = round(max(means), 3)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.costs", description=__doc__.partition(": python")[0])
    parser.add_argument("reports", type=Path, nargs="+", help="JUnit XML of the whole suite, then of quick runs")
    parser.add_argument("--keep", action="store_true", help="add tests that are not in the file, change no others")
    arguments = parser.parse_args(argv)
    found = costs([durations(report) for report in arguments.reports])
    if arguments.keep:
        found = dict(sorted({**found, **json.loads(COSTS.read_text(encoding="utf-8"))}.items()))
    COSTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} tests are sampled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
