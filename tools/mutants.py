"""Mutation testing of jaxcnn/ops, arguments.py and geometry.py: python -m tools.mutants [--sample 400 --seed 0].

mutmut's operators make the mutants. The runner is not mutmut's, because Python, JAX and pytest take longer to start
than most mutants live. A parent process imports the slow modules and nothing of jaxcnn. Each mutant runs in a forked
child, which imports the mutated source in place of the file. Only `runs/mutants` is written to.

The child runs `--seconds` worth of tests that reach the mutated line, according to the coverage of one run of the whole
suite, and stops at the first failure. A mutant that survives these might be killed by others, so the reported share of
killed mutants is a lower bound. At the end, all tests that killed a mutant run without a mutant and must pass.

Equivalent mutants are listed in `mutants.md`, each with a reason, and are counted separately. The exit status is 1 if
less than nine tenths of the others are killed.

With ``--compare``, each mutant also meets the tests of the quick run (`make test`) that reach it. The program prints
which share of the mutants that are killed at all the quick run kills; the exit status is 1 if it is less than 95 %.
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

OPS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("jaxcnn/ops/[a-z]*.py"))
FILES = ["jaxcnn/arguments.py", "jaxcnn/geometry.py", *OPS]
#: Folder of the records of one run of the suite: which tests reach a line, and how long each takes.
RECORDS = ROOT / "runs" / "mutants"
#: The share of mutants that must be killed, and the share of those that the quick run must kill.
WANTED, WANTED_QUICK = 0.9, 0.95
#: Modules that the tests import and that are slow to import. None of them starts a backend.
SLOW = (
    "jax", "jax.experimental", "jax.test_util", "captum.attr", "chex", "hypothesis.strategies", "matplotlib.image",
    "mpmath", "numpy.testing", "optax", "pytest", "scipy.optimize", "scipy.signal", "skimage.feature", "sympy",
    "torch.nn.functional",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The tests


def record(*tests: str) -> None:
    """Run the suite, or only the new tests given, and record what each reaches.

    JAX's caches are cleared after each test, because a test that finds a traced function there does not run its lines.
    """
    RECORDS.mkdir(parents=True, exist_ok=True)
    note = ["--cov=jaxcnn", "--cov-context=test", "--cov-report=", f"--junitxml={RECORDS}/{time.time_ns()}.xml"]
    which = ["--cov-append", *tests] if tests else ["-n", "auto", "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "-q", "--clear-every", "1", *note, *which]
    subprocess.run(command, env=os.environ | {"COVERAGE_FILE": str(RECORDS / "contexts")}, check=True)


@functools.cache
def durations() -> dict[str, float]:
    """Return the duration of each test, by its name in pytest's reports."""
    cases = [case for path in RECORDS.glob("*.xml") for case in ElementTree.parse(path).iter("testcase")]
    return {f"{case.get('classname')}::{case.get('name')}": float(case.get("time", 0)) for case in cases}


@functools.cache
def tests_by_line(path: str) -> dict[int, set[str]]:
    """Return the tests that reach each line of a file."""
    data = coverage.CoverageData(str(RECORDS / "contexts"))
    data.read()
    by_line = data.contexts_by_lineno(str(ROOT / path)).items()
    return {line: {context.rpartition("|")[0] for context in contexts} - {""} for line, contexts in by_line}


@functools.cache
def lines_by_test(path: str) -> dict[str, frozenset[int]]:
    """Return the lines of a file that each test reaches."""
    by_test = collections.defaultdict(set)
    for line, tests in tests_by_line(path).items():
        for test in tests:
            by_test[test].add(line)
    return {test: frozenset(lines) for test, lines in by_test.items()}


def quick_tests() -> set[str]:
    """Return the tests of the quick run."""
    command = [sys.executable, "-m", "pytest", "--quick", "--collect-only", "-q"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_DISABLE_PLUGIN_AUTOLOAD"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return {line for line in output.splitlines() if "::" in line}


def select(mutant: Mutant, budget: float, among: set[str] | None = None) -> list[str]:
    """Select tests that reach a mutant and take ``budget`` seconds together; only those of ``among`` if it is given.

    Time is divided evenly between test functions, and between tests that reach different lines of the file. Among
    similar tests the shortest comes first.
    """
    tests: set[str] = set()
    for lines in mutant.lines:
        reaching = {test for line in lines for test in tests_by_line(mutant.path).get(line, ())}
        tests = tests or (reaching if among is None else reaching & among)

    def took(test: str) -> float:
        path, _, name = test.partition("::")
        return durations().get(f"{path.removesuffix('.py').replace('/', '.')}::{name}", 1)

    spent: collections.Counter[Any] = collections.Counter()
    turns = []
    for test in sorted(tests, key=lambda test: (took(test), test)):
        alike = test.partition("[")[0], lines_by_test(mutant.path)[test]
        spent.update(dict.fromkeys(alike, took(test)))
        turns.append((sum(spent[kind] for kind in alike), test))
    ordered = [test for _, test in sorted(turns)]
    before = itertools.accumulate(map(took, ordered), initial=0)
    return [test for test, sofar in zip(ordered, before, strict=False) if sofar < budget]


# ---------------------------------------------------------------------------------------------------------------------
# The children


class MutantLoader(importlib.machinery.SourceFileLoader):
    """Import hook that finds and loads one module: a mutant."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(mutant.path.removesuffix(".py").replace("/", "."), str(ROOT / mutant.path))
        self.source = mutant.source

    def find_spec(self, name: str, *_: Any) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def start_child(mutant: Mutant | None, tests: Sequence[str], note: Path, limit: int) -> int:
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
            sys.meta_path.insert(0, MutantLoader(mutant))
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
    plugins = ["-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "-p", "pytest_timeout"]
    options = ["-x", "--tb=native", "--timeout=0", *plugins]
    ignored = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # about modules that the parent has imported
    return pytest.main([*options, *ignored, *tests], plugins=[Note()])


def outcomes(
    sampled: Iterator[Mutant], budget: float, jobs: int, notes: Path, among: set[str] | None = None
) -> Iterator[tuple[Mutant, str, str]]:
    """Yield each mutant as it finishes, its outcome and the test that killed it.

    The outcome is "killed", "timeout" or "survived". The test is empty if the mutant was killed at import.
    """
    running: dict[int, tuple[Mutant, Path]] = {}
    for mutant in itertools.chain(sampled, itertools.repeat(None)):
        if mutant is not None:
            note = notes / mutant.digest
            tests = select(mutant, budget, among)
            if not tests:  # pytest would run the whole suite
                yield mutant, "survived", ""
                continue
            running[start_child(mutant, tests, note, 60 + 4 * int(budget))] = mutant, note
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
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__.partition(": python")[0])
    parser.add_argument("--sample", type=int, default=sys.maxsize, metavar="N",
                        help="number of mutants, sampled at random from all files (default: all mutants)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES, metavar="FILE",
                        help="files to mutate, such as jaxcnn/geometry.py (default: all)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=30,
                        help="total duration of the tests that run on each mutant (default: %(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at the same time (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="count mutants that earlier runs killed as killed")
    parser.add_argument("--record", nargs="+", default=(), metavar="TEST",
                        help="add these tests to the records, because they are newer")  # fmt: skip
    parser.add_argument("--compare", action="store_true", help="measure which share of the killed the quick run kills")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    if options.record or not (RECORDS / "contexts").exists():
        record(*options.record)
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()  # so that the children's garbage collector skips these objects
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    started, known = time.monotonic(), equivalent()
    counts = {path: collections.Counter[str]() for path in options.files}
    killers: set[str] = set()
    by_suite: dict[Mutant, tuple[str, str]] = {}
    (log := RECORDS / "killed").touch()
    before = dict(line.split(" ", 1) for line in log.read_text().splitlines()) if options.resume else {}

    def not_killed_before() -> Iterator[Mutant]:
        for mutant in itertools.islice(mutants(options.files, options.seed), options.sample):
            counts[mutant.path].update(["mutants"] + ["equivalent"] * (mutant.key in known))
            if killer := before.get(mutant.digest):
                counts[mutant.path]["killed"] += 1
                killers.add(killer)
                by_suite[mutant] = "killed", killer
            elif mutant.key not in known:
                yield mutant

    with TemporaryDirectory() as notes:
        results = outcomes(not_killed_before(), options.seconds, options.jobs, Path(notes))
        for number, (mutant, what, killer) in enumerate(results, start=1):
            counts[mutant.path][what] += 1
            by_suite[mutant] = what, killer
            if what == "killed" and killer:
                killers.add(killer)
                with log.open("a") as lines:
                    print(mutant.digest, killer, file=lines)
            print(f"{number}, {(time.monotonic() - started) / 60:.1f} min: {what} {killer}\n  {mutant}", flush=True)
        enough = not options.compare or compare(by_suite, 4 * options.seconds, options.jobs, Path(notes))

    survivors = [mutant for mutant, (what, _) in by_suite.items() if what == "survived"]
    print(f"\n{len(survivors)} survived", *sorted(map(str, survivors)), sep="\n  ")
    whole = sum(counts.values(), collections.Counter[str]())
    for path, count in [*counts.items(), ("in all", whole)]:
        each = ", ".join(f"{count[what]} {what}" for what in ("mutants", "equivalent", "killed", "timeout", "survived"))
        print(f"{100 * share(count):5.1f} %  {path}: {each}")
    print(f"seed {options.seed}, {'a sample' if options.sample < sys.maxsize else 'all'}; {options.seconds} s of tests")
    start_child(None, sorted(killers) or ["tests/test_geometry.py"], alone := RECORDS / "alone", 7200)
    if failed := os.wait()[1]:
        print("a test that killed a mutant also fails without one:", alone.with_suffix(".out"))
    return int(bool(failed) or share(whole) < WANTED or not enough)


def compare(by_suite: dict[Mutant, tuple[str, str]], budget: float, jobs: int, notes: Path) -> bool:
    """Print which share of the killed mutants the quick run kills; return whether it is enough.

    The quick run kills a mutant if it contains the test that killed it, or if one of its other tests fails. Those that
    reach the mutant run for ``budget`` seconds.
    """
    tests = quick_tests()
    print(f"\nthe quick run, {len(tests)} tests, on the mutants that its tests have not killed yet", flush=True)
    own = {*tests, ""}  # no name: killed at import
    killed = {mutant for mutant, (what, killer) in by_suite.items() if what == "killed" and killer in own}
    others = [mutant for mutant in by_suite if mutant not in killed]
    for mutant, what, killer in outcomes(iter(others), budget, jobs, notes, tests):
        killed |= {mutant} if what != "survived" else set()
        print(f"{what} {killer}\n  {mutant}", flush=True)
    by_any = killed | {mutant for mutant, (what, _) in by_suite.items() if what != "survived"}
    missed = sorted(by_any - killed, key=str)
    print("\nkilled by the suite, not by the quick run:", *(f"{m}\n    {by_suite[m][1]}" for m in missed), sep="\n  ")
    of_killed = len(killed) / max(len(by_any), 1)
    print(f"{100 * of_killed:5.1f} %  the quick run kills {len(killed)} of the {len(by_any)} mutants that are killed")
    return of_killed >= WANTED_QUICK


if __name__ == "__main__":
    sys.exit(main())
