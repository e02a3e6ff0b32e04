"""Mutation testing of jaxcnn/ops and geometry.py: python -m tools.mutants [--sample 400 --seed 0].

mutmut's operators make the mutants. The runner is not mutmut's, because Python, JAX and pytest take longer to start
than most mutants live. A parent process imports the slow modules and nothing of jaxcnn. Each mutant runs in a forked
child, which imports the mutated source in place of the file. Only `runs/mutants` is written to.

The child runs `--seconds` worth of tests that reach the mutated line, according to the coverage of one run of the whole
suite, and stops at the first failure. A mutant that survives these might be killed by others, so the reported share of
killed mutants is a lower bound. At the end, all tests that killed a mutant run without a mutant and must pass.

Equivalent mutants are listed in `mutants.md`, each with a reason, and are counted separately. The exit status is 1 if
less than nine tenths of the others are killed.
"""

import argparse
import collections
import functools
import gc
import importlib.machinery
import importlib.util
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import coverage

from tools.mutation_operators import ROOT, Mutant, equivalent, mutants

FILES = ["jaxcnn/geometry.py", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("jaxcnn/ops/[a-z]*.py"))]
#: Observations of the suite: which tests reach a line, and how long each takes.
SEEN = ROOT / "runs" / "mutants"
#: The share of mutants that must be killed.
WANTED = 0.9
#: Modules that the tests import and that are slow to import. None of them starts a backend.
SLOW = (
    "jax", "jax.experimental", "jax.test_util", "captum.attr", "chex", "hypothesis.strategies", "matplotlib.image",
    "mpmath", "numpy.testing", "optax", "pytest", "scipy.optimize", "scipy.signal", "skimage.feature", "sympy",
    "torch.nn.functional",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The tests


def see(*tests: str) -> None:
    """Run the suite, or only the new tests given, and record what each reaches."""
    SEEN.mkdir(parents=True, exist_ok=True)
    note = ["--cov=jaxcnn", "--cov-context=test", "--cov-report=", f"--junitxml={SEEN}/{time.time_ns()}.xml"]
    command = [sys.executable, "-m", "pytest", "-q", *note, *(["--cov-append", *tests] if tests else ["-n", "2"])]
    subprocess.run(command, env=os.environ | {"COVERAGE_FILE": str(SEEN / "contexts")}, check=True)


@functools.cache
def seconds() -> dict[str, float]:
    """Return the duration of each test, by its name in pytest's reports."""
    cases = [case for path in SEEN.glob("*.xml") for case in ElementTree.parse(path).iter("testcase")]
    return {f"{case.get('classname')}::{case.get('name')}": float(case.get("time", 0)) for case in cases}


@functools.cache
def reached(path: str) -> dict[int, set[str]]:
    """Return the tests that reach each line of a file."""
    data = coverage.CoverageData(str(SEEN / "contexts"))
    data.read()
    by_line = data.contexts_by_lineno(str(ROOT / path)).items()
    return {line: {context.rpartition("|")[0] for context in contexts} - {""} for line, contexts in by_line}


@functools.cache
def reach(path: str) -> dict[str, frozenset[int]]:
    """Return the lines of a file that each test reaches."""
    by_test = collections.defaultdict(set)
    for line, tests in reached(path).items():
        for test in tests:
            by_test[test].add(line)
    return {test: frozenset(lines) for test, lines in by_test.items()}


def chosen(mutant: Mutant, budget: float) -> list[str]:
    """Select tests that reach a mutant and take ``budget`` seconds together.

    Time is divided evenly between test functions, and between tests that reach different lines of the file. Among
    similar tests the shortest comes first.
    """
    tests: set[str] = set()
    for among in mutant.lines:
        tests = tests or {test for line in among for test in reached(mutant.path).get(line, ())}

    def took(test: str) -> float:
        path, _, name = test.partition("::")
        return seconds().get(f"{path.removesuffix('.py').replace('/', '.')}::{name}", 1)

    spent: collections.Counter[Any] = collections.Counter()
    turns = []
    for test in sorted(tests, key=lambda test: (took(test), test)):
        alike = test.partition("[")[0], reach(mutant.path)[test]
        spent.update(dict.fromkeys(alike, took(test)))
        turns.append((sum(spent[kind] for kind in alike), test))
    ordered = [test for _, test in sorted(turns)]
    before = itertools.accumulate(map(took, ordered), initial=0)
    return [test for test, sofar in zip(ordered, before, strict=False) if sofar < budget]


# ---------------------------------------------------------------------------------------------------------------------
# The children


class Planted(importlib.machinery.SourceFileLoader):
    """Import hook that finds and loads one module: a mutant."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(mutant.path.removesuffix(".py").replace("/", "."), str(ROOT / mutant.path))
        self.source = mutant.source

    def find_spec(self, name: str, *_: Any) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def in_child(mutant: Mutant | None, tests: Sequence[str], note: Path, limit: int) -> int:
    """Fork a child that exits with status 0 if the tests pass, and return its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        # Limit processor time, because others may use the machine. The clock limit is only for processes that wait
        # forever.
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
        signal.alarm(20 * limit)
        out = os.open(note.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        if mutant is not None:
            sys.meta_path.insert(0, Planted(mutant))
        status = run(tests, note)
    finally:
        os._exit(status)


def run(tests: Sequence[str], note: Path) -> int:
    import pytest

    import jaxcnn  # first, so that doctests use the mutant

    class Note:
        """Plugin that records which test failed."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                note.write_text(report.nodeid)
                os._exit(1)  # at once: pytest's teardown takes longer than most tests

    assert Path(jaxcnn.__file__).is_relative_to(ROOT)
    options = ["-x", "--tb=native", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin"]
    ignored = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # about modules that the parent has imported
    return pytest.main([*options, *ignored, *tests], plugins=[Note()])


def outcomes(drawn: Iterator[Mutant], budget: float, jobs: int, notes: Path) -> Iterator[tuple[Mutant, str, str]]:
    """Yield each mutant as it finishes, its outcome and the test that killed it.

    The outcome is "killed", "timeout" or "survived". The test is empty if the mutant was killed at import.
    """
    running: dict[int, tuple[Mutant, Path]] = {}
    for mutant in itertools.chain(drawn, itertools.repeat(None)):
        if mutant is not None:
            note = notes / mutant.digest
            running[in_child(mutant, chosen(mutant, budget), note, 60 + 4 * int(budget))] = mutant, note
        if not running:
            return
        if mutant is None or len(running) == jobs:
            child, status = os.wait()
            done, note = running.pop(child)
            late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
            what = "timeout" if late else "killed" if status else "survived"
            yield done, what, note.read_text() if note.exists() else ""


def share(count: collections.Counter[str]) -> float:
    """Return the share of killed mutants among those that are not equivalent."""
    return (count["killed"] + count["timeout"]) / max(count["mutants"] - count["equivalent"], 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=sys.maxsize, help="so many, drawn from all alike; else all")
    parser.add_argument("--seed", type=int, default=0, help="another one draws others")
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=30, help="of tests against each mutant")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="what earlier runs killed need not be killed again")
    parser.add_argument("--see", nargs="+", default=(), help="tests that are new since the whole suite was seen")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    if options.see or not (SEEN / "contexts").exists():
        see(*options.see)
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()  # so that the children's garbage collector skips these objects
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    started, known = time.monotonic(), equivalent()
    counts = {path: collections.Counter[str]() for path in options.files}
    killers, survivors = set(), []
    (log := SEEN / "killed").touch()
    before = dict(line.split(" ", 1) for line in log.read_text().splitlines()) if options.resume else {}

    def others() -> Iterator[Mutant]:
        for mutant in itertools.islice(mutants(options.files, options.seed), options.sample):
            counts[mutant.path].update(["mutants"] + ["equivalent"] * (mutant.key in known))
            if killer := before.get(mutant.digest):
                counts[mutant.path]["killed"] += 1
                killers.add(killer)
            elif mutant.key not in known:
                yield mutant

    with TemporaryDirectory() as notes:
        found = outcomes(others(), options.seconds, options.jobs, Path(notes))
        for number, (mutant, what, killer) in enumerate(found, start=1):
            counts[mutant.path][what] += 1
            survivors += [mutant] * (what == "survived")
            if what == "killed" and killer:
                killers.add(killer)
                with log.open("a") as lines:
                    print(mutant.digest, killer, file=lines)
            print(f"{number}, {(time.monotonic() - started) / 60:.1f} min: {what} {killer}\n  {mutant}", flush=True)

    print(f"\n{len(survivors)} survived", *sorted(map(str, survivors)), sep="\n  ")
    whole = sum(counts.values(), collections.Counter[str]())
    for path, count in [*counts.items(), ("in all", whole)]:
        each = ", ".join(f"{count[what]} {what}" for what in ("mutants", "equivalent", "killed", "timeout", "survived"))
        print(f"{100 * share(count):5.1f} %  {path}: {each}")
    print(f"seed {options.seed}, {'a sample' if options.sample < sys.maxsize else 'all'}; {options.seconds} s of tests")
    in_child(None, sorted(killers) or ["tests/test_geometry.py"], alone := SEEN / "alone", 7200)
    if failed := os.wait()[1]:
        print("a test that killed fails without a mutant, too:", alone.with_suffix(".out"))
    return int(bool(failed) or share(whole) < WANTED)


if __name__ == "__main__":
    sys.exit(main())
