"""Compiler options of the tests: fast compilation, because it takes most of their time."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

#: Whether XLA:CPU has an older emitter of fusions, which compiles faster. XLA ends the process at an unknown flag.
HAS_OLD_EMITTERS = jax.version.__version_info__ < (0, 11)

#: Compiler options that undo `quickly` for one function.
OPTIMIZED: dict[str, Any] = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    **({"xla_cpu_use_fusion_emitters": True} if HAS_OLD_EMITTERS else {}),
}


def quickly() -> None:
    """Turn off LLVM optimizations and XLA:CPU's newer emitters of fusions, and compile each program in one piece.

    By default, XLA:CPU splits a program into parts for its threads, which costs more than it saves for small programs.
    XLA's own passes all run.

    This applies to this process, if XLA has not started yet, and to its children.
    """
    flags = "--xla_cpu_parallel_codegen_split_count=1"
    if HAS_OLD_EMITTERS:
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


@contextlib.contextmanager
def with_optimizations() -> Iterator[None]:
    """Turn LLVM optimizations on for a part of a test that runs longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@contextlib.contextmanager
def none_is_small() -> Iterator[None]:
    """Compute small convolutions with the lowerings of larger ones; by default XLA computes them.

    JAX's caches hold earlier choices, so they are cleared.
    """
    from jaxcnn.kernels import lowering  # not above, because `quickly` runs before XLA starts

    jax.clear_caches()
    with mock.patch.object(lowering, "SMALL", 0):
        yield
    jax.clear_caches()


@contextlib.contextmanager
def lowered_for(platform: str) -> Iterator[None]:
    """Compute functions that have a lowering per platform with that of ``platform``, on the device that is there."""
    from jaxcnn.platforms import Implementation  # not above, because `quickly` runs before XLA starts

    def chosen(self: Implementation, *arrays: Any) -> Any:
        return dict(self.others).get(platform, self.default)(*arrays)

    def for_platforms(self: Implementation, platforms: Any) -> Any:
        return functools.partial(self._run, functools.partial(chosen, self))

    jax.clear_caches()
    with mock.patch.multiple(Implementation, _anywhere=chosen, for_platforms=for_platforms):
        yield
    jax.clear_caches()
