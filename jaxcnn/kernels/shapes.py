"""Rank promotion, and arithmetic of sizes that may be symbolic.

`jax.export` can compile one program for every batch size, which is then a symbol such as ``n``. Comparing a symbol with
a number may be inconclusive. Every choice between two forms of a product uses `known_at_most`, which treats a symbol as
large.
"""

from typing import Any, TypeVar

import jax
from jax import Array

A = TypeVar("A", Array, Any)


def expand_rank(a: A, like: Array) -> A:
    """Return ``a`` with leading dims of size 1, so that it has as many dims as ``like``.

    NumPy's broadcasting adds them as well, but JAX refuses it under ``jax.numpy_rank_promotion("raise")``.
    """
    return a.reshape((1,) * (like.ndim - a.ndim) + a.shape)


def known_at_most(n: Any, bound: int) -> bool:
    """Whether ``n <= bound``; False if ``n`` is symbolic and the answer depends on its value."""
    try:
        return bool(n <= bound)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def is_symbolic(n: Any) -> bool:
    """Whether a size is a symbol, not a number."""
    return not isinstance(n, int)


def largest_divisor(n: int, bound: int) -> int:
    """Return the largest divisor of ``n`` that is at most ``bound``, and at least 1; 0 if ``n`` is 0, 1 if symbolic."""
    if is_symbolic(n):
        return 1
    return next((k for k in range(min(n, max(bound, 1)), 0, -1) if n % k == 0), 0)
