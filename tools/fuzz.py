"""Compare any number of geometries with PyTorch: python -m tools.fuzz --count 10000 --seed 0.

It prints how many geometries of each op were compared, and every mismatch as a row for `tests/cases.py`. The exit
status is 1 if there is a mismatch.
"""

import argparse
import collections
import dataclasses
import itertools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import torch
from hypothesis import HealthCheck, Phase, settings

from jaxcnn.kernels import correlation
from tests.cases import Case
from tests.conformance.geometries import DTYPES, SHARES, STRATEGIES, Geometry, agree, pasteable

#: Geometries per turn, after which compiled programs are cleared; geometries per program; turns per process.
TURN, TOGETHER, TURNS = 100, 10, 10


@dataclasses.dataclass
class Found:
    """Results of one turn."""

    op: str
    compared: set[str] = dataclasses.field(default_factory=set)
    mismatches: list[str] = dataclasses.field(default_factory=list)


def turn(op: str, seed: int, count: int, note: Path | None = None) -> Found:
    """Compare ``count`` geometries of an op, continuing after a mismatch.

    ``note`` is a file that holds the geometries under comparison, in case the process dies.
    """
    found = Found(op)
    drawn = st.lists(st.tuples(STRATEGIES[op], DTYPES[op]), min_size=TOGETHER, max_size=TOGETHER)

    @hypothesis.seed(seed)
    @settings(max_examples=8 * count // TOGETHER + 8, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
              deadline=None, database=None)  # fmt: skip
    @hypothesis.given(drawn)
    def compare(drawn: list[tuple[Case | None, Any]]) -> None:
        new = {name(case, dtype): (case, dtype) for case, dtype in drawn if case is not None}
        left = [new[key] for key in new if key not in found.compared][: count - len(found.compared)]
        if left:
            compare_new(left)

    def compare_new(geometries: list[Geometry]) -> None:
        if note is not None:
            note.write_text("\n".join(pasteable(case) for case, _ in geometries))
        try:
            agree(geometries)
        except Exception:
            found.mismatches.extend(mismatches_alone(geometries))
        found.compared.update(itertools.starmap(name, geometries))

    compare()
    if note is not None:
        note.unlink()
    return found


def name(case: Case, dtype: Any) -> str:
    return f"{case} {jnp.dtype(dtype)}"


def mismatches_alone(geometries: list[Geometry]) -> Iterator[str]:
    """Return the geometries that fail individually, or all of them if none does."""
    said = []
    for case, dtype in geometries:
        try:
            agree([(case, dtype)])
        except Exception as error:
            what = "".join(traceback.format_exception_only(error)).strip()
            said.append(f"{pasteable(case)}  # {jnp.dtype(dtype)}\n{what}")
    return iter(said or ["together, not alone:\n" + "\n".join(pasteable(case) for case, _ in geometries)])


def turns(count: int, seed: int, ops: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield turns of the ops in proportion to their shares, with no seed used twice."""
    shares = {op: SHARES[op] for op in ops}
    left = {op: -(-count * share // sum(shares.values())) for op, share in shares.items()}
    for number in range(count):
        for op in ops:
            if left[op] > 0:
                yield op, seed * 1_000_000 + number, min(TURN, left[op])
                left[op] -= TURN
        if max(left.values()) <= 0:
            return


def in_process(task: tuple[str, int, int], notes: str) -> Found:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    torch.set_num_threads(1)
    correlation.SMALL = 0  # so that drawn convolutions use the lowerings of larger ones
    found = turn(*task, note=Path(notes, str(os.getpid())))
    jax.clear_caches()
    return found


def in_processes(tasks: Sequence[tuple[str, int, int]], processes: int, notes: str) -> Iterator[Found]:
    """Yield the result of each turn as it ends.

    Processes are replaced after some turns because their memory grows. ``max_tasks_per_child`` is not used, because
    with it the pool of Python 3.11 can wait forever (gh-115634).
    """
    at_once = processes * TURNS
    for start in range(0, len(tasks), at_once):
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            turns_of_these = [pool.submit(in_process, task, notes) for task in tasks[start : start + at_once]]
            yield from (turn.result() for turn in as_completed(turns_of_these))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="geometries in all")
    parser.add_argument("--seed", type=int, default=0, help="another one draws others")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ops", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES), metavar="OP")
    options = parser.parse_args(argv)
    started, drawn, distinct = time.monotonic(), collections.Counter(), collections.defaultdict(set)
    mismatches = 0
    tasks = list(turns(options.count, options.seed, options.ops))
    with TemporaryDirectory() as notes:
        try:
            for done, found in enumerate(in_processes(tasks, options.processes, notes), start=1):
                drawn[found.op] += len(found.compared)
                distinct[found.op] |= found.compared
                mismatches += len(found.mismatches)
                print(*found.mismatches, sep="\n", end="\n" if found.mismatches else "")
                minutes = (time.monotonic() - started) / 60
                print(f"{found.op}: {drawn.total()} compared, {mismatches} mismatches, {minutes:.1f} min, "
                      f"turn {done} of {len(tasks)}", flush=True)  # fmt: skip
        except BrokenProcessPool:
            mismatches += 1
            print("a process died while it compared one of these:")
            print(*(path.read_text() for path in Path(notes).iterdir()), sep="\n")
    for op in options.ops:
        print(f"{drawn[op]:7}  {op}, {len(distinct[op])} of them different")
    print(f"{drawn.total():7}  in all; {mismatches} mismatches")
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
