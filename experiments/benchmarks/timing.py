"""Timing of contenders that take turns in one process, and measurement of the machine in the same run."""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcnn.native import library

#: Seconds of a call that is timed only once.
LONG = 10.0


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each timed call of one contender."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Minimum of the seconds."""
        return min(self.seconds)

    @property
    def interquartile_range(self) -> float:
        """Interquartile range divided by the median; 0 for fewer than two numbers."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median


def in_rounds(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once per round. Each round begins with a different name."""
    for i in range(rounds):
        first = i % len(names)
        yield from (*names[first:], *names[:first])


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, Times]:
    """Return seconds per call; the contenders take turns, so that machine noise affects all of them equally.

    The time of a call ends when its arrays are computed. Each round begins with a different contender.
    """
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            jax.block_until_ready(contenders[name]())
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in in_rounds(names, rounds):
        seconds[name].append(_seconds(contenders[name]))
    return {name: Times(tuple(s)) for name, s in seconds.items()}


def in_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, *, most: float = 0.1, calls: int = 5, pause: float = 0.02
) -> dict[str, Times]:
    """Return seconds per call; in each turn, a contender runs several calls.

    A turn begins with a pause, in which threads of other libraries stop spinning, and a call that is not timed. Each
    round begins with a different contender. A contender whose call took `LONG` seconds gets no other turn.

    Args:
        contenders: Functions that return arrays.
        rounds: Number of turns per contender.
        most: Approximate maximum seconds of a turn.
        calls: Maximum number of calls of a turn.
        pause: Seconds before a turn.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in in_rounds(names, rounds):
        if seconds[name] and max(seconds[name]) > LONG:
            continue
        call = contenders[name]
        time.sleep(pause)
        spent = [_seconds(call)]
        if spent[0] <= LONG:
            spent = [_seconds(call)]
            while len(spent) < calls and sum(spent) < most:
                spent.append(_seconds(call))
        seconds[name] += spent
    return {name: Times(tuple(s)) for name, s in seconds.items()}


def _seconds(call: Callable[[], Any]) -> float:
    """Return the seconds until the arrays of a call are computed."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def machine(packages: tuple[str, ...], others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return versions of packages, the hardware, its load, its current GEMM and copy rates, and the use of oneDNN.

    Args:
        packages: Packages that are installed.
        others: Packages that are included if they are installed.
    """
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    block = jnp.ones(1 << 25)
    rates = interleaved({"gemm": lambda: multiply(a, a), "copy": lambda: copy(block)}, rounds=7)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "device": jax.devices()[0].device_kind,
        "gemm_gflops": round(2 * 2048**3 / rates["gemm"].minimum / 1e9, 1),
        "copy_gb_per_s": round(2 * block.nbytes / rates["copy"].minimum / 1e9, 1),
        "onednn": "in use" if library.is_enabled() else "not in use",
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        **{package: version for package in others if (version := _version(package)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name"))
    return next(names, platform.processor())
