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

from jaxcnn.kernels import lowering
from tests.cases import Case
from tests.compilation import quickly
from tests.conformance.geometries import DTYPES, SHARES, STRATEGIES, Geometry, agree, pasteable

#: Geometries per turn, after which compiled programs are cleared; geometries per program; turns per process.
TURN, TOGETHER, TURNS = 100, 10, 10
#: How often Hypothesis draws again for a turn that has too few different geometries.
DRAWS = 8


@dataclasses.dataclass
class Result:
    """The geometries of one turn, and the mismatches among them."""

    op: str
    compared: set[str] = dataclasses.field(default_factory=set)
    mismatches: list[str] = dataclasses.field(default_factory=list)


def turn(op: str, seed: int, count: int, note: Path | None = None) -> Result:
    """Compare ``count`` geometries of an op, continuing after a mismatch.

    ``note`` is a file that holds the geometries under comparison, in case the process dies.
    """
    result = Result(op)
    geometries = distinct(op, seed, count)
    for start in range(0, len(geometries), TOGETHER):
        together = geometries[start : start + TOGETHER]
        if note is not None:
            note.write_text("\n".join(pasteable(case) for case, _ in together))
        try:
            agree(together)
        except Exception:
            result.mismatches.extend(mismatches_alone(together))
        result.compared.update(itertools.starmap(name, together))
    if note is not None:
        note.unlink(missing_ok=True)
    return result


def distinct(op: str, seed: int, count: int) -> list[Geometry]:
    """Draw ``count`` different geometries of an op, fewer if Hypothesis finds no more."""
    drawn: dict[str, Geometry] = {}
    several = st.lists(st.tuples(STRATEGIES[op], DTYPES[op]), min_size=TOGETHER, max_size=TOGETHER)
    for number in range(DRAWS):

        @hypothesis.seed(f"{seed} {number}")
        @settings(max_examples=2 + (count - len(drawn)) // TOGETHER, phases=[Phase.generate], deadline=None,
                  suppress_health_check=list(HealthCheck), database=None)  # fmt: skip
        @hypothesis.given(several)
        def draw(some: list[tuple[Case | None, Any]]) -> None:
            drawn.update({name(case, dtype): (case, dtype) for case, dtype in some if case is not None})

        draw()
        if len(drawn) >= count:
            break
    return list(drawn.values())[:count]


def name(case: Case, dtype: Any) -> str:
    return f"{case} {jnp.dtype(dtype)}"


def mismatches_alone(geometries: list[Geometry]) -> Iterator[str]:
    """Return the geometries that fail individually, or all of them if none does."""
    mismatches = []
    for case, dtype in geometries:
        try:
            agree([(case, dtype)])
        except Exception as error:
            what = "".join(traceback.format_exception_only(error)).strip()
            mismatches.append(f"{pasteable(case)}  # {jnp.dtype(dtype)}\n{what}")
    rows = "\n".join(pasteable(case) for case, _ in geometries)
    return iter(mismatches or [f"together, but not individually:\n{rows}"])


def turns(count: int, seed: int, ops: Sequence[str], size: int = TURN) -> Iterator[tuple[str, int, int]]:
    """Yield turns of ``size`` geometries of the ops, in proportion to their shares, with no seed used twice."""
    shares = {op: SHARES[op] for op in ops}
    left = {op: -(-count * share // sum(shares.values())) for op, share in shares.items()}
    for number in range(count):
        for op in ops:
            if left[op] > 0:
                yield op, seed * 1_000_000 + number, min(size, left[op])
                left[op] -= size
        if max(left.values()) <= 0:
            return


def in_process(task: tuple[str, int, int], notes: str) -> Result:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    torch.set_num_threads(1)
    lowering.SMALL = 0  # so that drawn convolutions use the lowerings of larger ones
    result = turn(*task, note=Path(notes, str(os.getpid())))
    jax.clear_caches()
    return result


def in_processes(tasks: Sequence[tuple[str, int, int]], processes: int, notes: str) -> Iterator[Result]:
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
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__.partition(": python")[0])
    parser.add_argument("--count", type=int, default=10_000, metavar="N",
                        help="number of geometries, over all ops (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the geometries (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, metavar="N",
                        help="number of processes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--ops", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES), metavar="OP",
                        help=f"ops to compare, some of {', '.join(STRATEGIES)} (default: all)")  # fmt: skip
    options = parser.parse_args(argv)
    quickly()  # for the new processes
    started, drawn, different = time.monotonic(), collections.Counter(), collections.defaultdict(set)
    mismatches = 0
    tasks = list(turns(options.count, options.seed, options.ops))
    with TemporaryDirectory() as notes:
        try:
            for done, result in enumerate(in_processes(tasks, options.processes, notes), start=1):
                drawn[result.op] += len(result.compared)
                different[result.op] |= result.compared
                mismatches += len(result.mismatches)
                print(*result.mismatches, sep="\n", end="\n" if result.mismatches else "")
                minutes = (time.monotonic() - started) / 60
                print(f"{result.op}: {drawn.total()} compared, {mismatches} mismatches, {minutes:.1f} min, "
                      f"turn {done} of {len(tasks)}", flush=True)  # fmt: skip
        except BrokenProcessPool:
            mismatches += 1
            print("a process died while it compared one of these:")
            print(*(path.read_text() for path in Path(notes).iterdir()), sep="\n")
    for op in options.ops:
        print(f"{drawn[op]:7}  {op}, {len(different[op])} of them different")
    print(f"{drawn.total():7}  in all; {mismatches} mismatches")
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
