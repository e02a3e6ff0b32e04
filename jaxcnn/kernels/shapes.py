"""Shapes: arrays of fewer dims brought to the same number, and sizes compared that may be symbolic.

`jax.export` compiles a program for every batch, whose size is then a symbol such as ``n``. A comparison with a number
has no answer there. Every choice between two forms of one product asks `at_most`, which takes a symbol for large.
"""

from typing import Any, TypeVar

import jax
from jax import Array

A = TypeVar("A", Array, Any)


def beside(a: A, like: Array) -> A:
    """``a`` with leading dims of size 1, as many dims as ``like`` has.

    NumPy's broadcasting adds them as well, but JAX refuses it under ``jax.numpy_rank_promotion("raise")``.
    """
    return a.reshape((1,) * (like.ndim - a.ndim) + a.shape)


def at_most(n: Any, bound: int) -> bool:
    """Whether ``n <= bound``; False if ``n`` is symbolic and the answer depends on its value."""
    try:
        return bool(n <= bound)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def symbolic(n: Any) -> bool:
    """Whether a size is a symbol, not a number."""
    return not isinstance(n, int)


def empty(*arrays: Array) -> bool:
    """Whether an array has no entries. A symbolic size counts as positive."""
    return any(not symbolic(n) and n == 0 for a in arrays for n in a.shape)
