"""Rank promotion, and comparisons of sizes that may be symbolic.

`jax.export` can compile one program for every batch size, which is then a symbol such as ``n``. Comparing a symbol with
a number may be inconclusive. Every choice between two forms of a product uses `at_most`, which treats a symbol as
large.
"""

from typing import Any, TypeVar

import jax
from jax import Array

A = TypeVar("A", Array, Any)


def beside(a: A, like: Array) -> A:
    """Return ``a`` with leading dims of size 1, so that it has as many dims as ``like``.

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
    """Whether any of the arrays is empty. A symbolic size counts as positive."""
    return any(not symbolic(n) and n == 0 for a in arrays for n in a.shape)
