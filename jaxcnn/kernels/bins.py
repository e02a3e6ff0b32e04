"""Bins: a row of n entries in m windows of nearly equal size, which adaptive pooling takes.

Bin o runs from ⌊o·n/m⌋ to ⌈(o + 1)·n/m⌉, so that every entry is in one, neighbours share at most one, and m may be
larger than n.  Entry i is in bin o exactly if o·n < (i + 1)·m and i·m < (o + 1)·n: a relation that is the same seen
from the other side.  The bins that hold entry i are bin i of m entries in n.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.kernels.shapes import beside


@functools.cache
def bins(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """``(m, most)``: the entries of every bin, and which of them are its own (the others repeat its last)."""
    starts = np.arange(m) * n // m
    ends = -(-(np.arange(m) + 1) * n // m)
    at = starts[:, None] + np.arange(max(ends - starts, default=1))
    # int32 whether 64-bit types are on or not: JAX keeps one program for both.
    return np.minimum(at, ends[:, None] - 1).astype(np.int32), at < ends[:, None]


def counts(n: int, m: int) -> np.ndarray:
    """The entries of every bin."""
    return bins(n, m)[1].sum(1)


def bin_sum(size: tuple[int, ...], x: Array) -> Array:
    """The sum of every bin of a picture ``(N, *spatial, C)``, ``(N, *size, C)``; 16-bit floats are summed in float32.

    Its own adjoint, with ``size`` and the spatial dims exchanged.
    """
    total = x.astype(accumulator(x.dtype))
    for axis, m in enumerate(size, start=1):
        rows, own = _rows(total, axis, m)
        total = jnp.where(own, rows, 0).sum(axis + 1)
    return total.astype(x.dtype)


def bin_largest(size: tuple[int, ...], x: Array) -> tuple[Array, Array]:
    """The largest entry of every bin, and its number in the flattened spatial dims, int32.

    Ties go to the first in row-major order, NaN wins over numbers.  One dim after the other, the last first.
    """
    spatial = x.shape[1:-1]
    index = jnp.arange(math.prod(spatial), dtype=jnp.int32).reshape(1, *spatial, 1)
    y, index = x, jnp.broadcast_to(index, x.shape)
    for axis in reversed(range(1, x.ndim - 1)):
        rows, own = _rows(y, axis, size[axis - 1])
        y = rows.max(axis + 1)  # what is not a bin's own repeats its last entry
        wins = beside(own, rows) & ((rows == jnp.expand_dims(y, axis + 1)) | (rows != rows))
        first = jnp.expand_dims(jnp.argmax(wins, axis + 1), axis + 1)
        index = jnp.squeeze(jnp.take_along_axis(_rows(index, axis, size[axis - 1])[0], first, axis + 1), axis + 1)
    return y, index


def _rows(x: Array, axis: int, m: int) -> tuple[Array, np.ndarray]:
    """Along an axis, ``(…, m, most, …)``: the entries of every bin, and which are its own."""
    n = x.shape[axis]
    at, own = bins(n, m)
    beside = x.reshape(*x.shape[:axis], m, n // m, *x.shape[axis + 1 :]) if n % m == 0 else None
    rows = jnp.take(x, at, axis=axis, mode="clip") if beside is None else beside
    return rows, own.reshape(*own.shape, *(1,) * (x.ndim - axis - 1))
