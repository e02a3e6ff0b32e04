"""Timing of benchmarks: the contenders take turns in one process, and the machine is measured in the same run."""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of every round of one contender."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over all rounds."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Minimum over all rounds."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, relative to the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, Times]:
    """Return seconds per call; the contenders alternate, so that machine noise affects all of them equally.

    A call returns arrays, whose computation is waited for. Each round begins with a different contender.
    """
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            jax.block_until_ready(contenders[name]())
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            jax.block_until_ready(contenders[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(s)) for name, s in seconds.items()}


def in_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, *, most: float = 0.1, calls: int = 5, pause: float = 0.02
) -> dict[str, Times]:
    """Return seconds per call; the contenders take turns of several calls each, after one call that is not counted.

    A turn is up to `calls` calls and about `most` seconds. It is preceded by a pause, in which threads of other
    libraries stop spinning. The results of a call are waited for. Each round begins with a different contender.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            call = contenders[name]
            time.sleep(pause)
            jax.block_until_ready(call())
            spent: list[float] = []
            while len(spent) < calls and (not spent or sum(spent) < most):
                start = time.perf_counter()
                jax.block_until_ready(call())
                spent.append(time.perf_counter() - start)
            seconds[name] += spent
    return {name: Times(tuple(s)) for name, s in seconds.items()}


def machine(packages: tuple[str, ...], others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the packages, the hardware, its load, and its current GEMM and copy rates.

    `packages` must be installed; those of `others` are included if they are installed.
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
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        **{package: found for package in others if (found := _version(package)) is not None},
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
