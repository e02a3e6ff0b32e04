"""Write tests/costs.json, the durations that the quick run samples by: python -m tools.costs report.xml.

The report is that of the whole suite: make test-full ARGS=--junitxml=report.xml.
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
CHEAP = 3.0


def durations(report: Path) -> dict[str, list[float]]:
    """Return the seconds of the cases of each test that has parameters, by the test's name in pytest."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        function, bracket, _ = case.get("name", "").partition("[")
        path = Path(*case.get("classname", "").split(".")).with_suffix(".py")
        if bracket and (ROOT / path).exists():
            found[f"{path.as_posix()}::{function}"].append(float(case.get("time", 0)))
    return found


def costs(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean seconds of one case of each expensive test."""
    return {
        test: round(sum(seconds) / len(seconds), 3)
        for test, seconds in sorted(found.items())
        if len(seconds) > 1 and sum(seconds) >= CHEAP
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.costs", description=__doc__.partition(": python")[0])
    parser.add_argument("report", type=Path, help="JUnit XML of the whole suite")
    found = costs(durations(parser.parse_args(argv).report))
    COSTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} tests are sampled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
