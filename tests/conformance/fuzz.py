"""Geometries without end against PyTorch: python -m tests.conformance.fuzz --count 10000 --seed 0.

Prints how many of each op were compared, and every mismatch, made as small as Hypothesis can, as a row for
`tests/cases.py`.  Exits with 1 if there was any.
"""

import argparse
import collections
import dataclasses
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import torch
from hypothesis import HealthCheck, Phase, settings

from tests.conformance.geometries import DTYPES, SHARES, STRATEGIES, agrees, pasteable

#: Geometries of one turn, after which the compiled programs are forgotten.
TURN = 50


@dataclasses.dataclass
class Found:
    """What one turn compared."""

    op: str
    compared: set[str] = dataclasses.field(default_factory=set)
    mismatch: str = ""


def turn(op: str, seed: int, count: int, shrink: bool = True) -> Found:
    """So many geometries of an op."""
    found, smallest = Found(op), []
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    @hypothesis.seed(seed)
    @settings(max_examples=count, phases=phases, suppress_health_check=list(HealthCheck), deadline=None, database=None)
    @hypothesis.given(STRATEGIES[op], DTYPES[op])
    def compare(case: Any, dtype: Any) -> None:
        try:
            agrees(case, dtype)
        except Exception:
            smallest[:] = [(case, dtype)]
            raise
        found.compared.add(f"{case} {jnp.dtype(dtype)}")

    try:
        compare()
    except Exception as error:
        ((case, dtype),) = smallest or [(None, None)]
        said = "".join(traceback.format_exception_only(error)).strip()
        found.mismatch = f"{pasteable(case) if case else op}  # {dtype and jnp.dtype(dtype)}, seed {seed}\n{said}"
    return found


def turns(count: int, seed: int, ops: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """The ops by their shares, no seed twice."""
    shares = {op: SHARES[op] for op in ops}
    left = {op: -(-count * share // sum(shares.values())) for op, share in shares.items()}
    for number in range(count):
        for op in ops:
            if left[op] > 0:
                yield op, seed * 1_000_000 + number, min(TURN, left[op])
                left[op] -= TURN
        if max(left.values()) <= 0:
            return


def in_process(task: tuple[str, int, int]) -> Found:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    torch.set_num_threads(1)
    found = turn(*task)
    jax.clear_caches()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="geometries in all")
    parser.add_argument("--seed", type=int, default=0, help="another one draws others")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ops", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES), metavar="OP")
    options = parser.parse_args(argv)
    started, drawn, distinct = time.monotonic(), collections.Counter(), collections.defaultdict(set)
    mismatches = []
    tasks = list(turns(options.count, options.seed, options.ops))
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=10) as pool:
        for done, found in enumerate(pool.imap_unordered(in_process, tasks), start=1):
            drawn[found.op] += len(found.compared)
            distinct[found.op] |= found.compared
            if found.mismatch:
                mismatches.append(found.mismatch)
                print(f"\n{found.mismatch}", flush=True)
            minutes = (time.monotonic() - started) / 60
            print(f"\r{drawn.total()} compared, {len(mismatches)} mismatches, {minutes:.1f} min, "
                  f"turn {done} of {len(tasks)} ", end="", flush=True)  # fmt: skip
    print()
    for op in options.ops:
        print(f"{drawn[op]:7}  {op}, {len(distinct[op])} of them different")
    print(f"{drawn.total():7}  in all; {len(mismatches)} mismatches")
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
