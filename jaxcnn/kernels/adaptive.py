"""Bins: m windows of nearly equal size over n positions, as used in adaptive pooling.

Bin o runs from ⌊o·n/m⌋ to ⌈(o + 1)·n/m⌉. Every position is in at least one bin, neighboring bins share at most one
position, and m may be larger than n. Position i is in bin o exactly if o·n < (i + 1)·m and i·m < (o + 1)·n. This
relation is symmetric: the bins that contain position i are bin i of m positions in n.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcnn.kernels.dtypes import to_accumulator
from jaxcnn.kernels.reductions import largest
from jaxcnn.kernels.shapes import expand_rank


@functools.cache
def bins(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of every bin, ``(m, largest bin)``, and a mask of those inside it.

    Positions outside a bin repeat its last one.
    """
    starts = np.arange(m) * n // m
    ends = -(-(np.arange(m) + 1) * n // m)
    positions = starts[:, None] + np.arange(max(ends - starts, default=1))
    # int32 whether or not 64-bit types are enabled: JAX caches one program for both.
    return np.minimum(positions, ends[:, None] - 1).astype(np.int32), positions < ends[:, None]


def counts(n: int, m: int) -> np.ndarray:
    """Return the number of positions in every bin."""
    return bins(n, m)[1].sum(1)


def bin_sum(size: tuple[int, ...], x: Array) -> Array:
    """Sum every bin: images ``(N, *spatial, C)`` to ``(N, *size, C)``. 16-bit floats are summed in float32.

    This is its own adjoint, with ``size`` and the spatial dims exchanged.
    """
    total = to_accumulator(x)
    for axis, m in enumerate(size, start=1):
        rows, inside = _rows(total, axis, m)
        total = jnp.where(inside, rows, 0).sum(axis + 1)
    return total.astype(x.dtype)


def max_and_index(size: tuple[int, ...], x: Array) -> tuple[Array, Array]:
    """Return the largest element of every bin, and its int32 index into the flattened spatial dims.

    Ties go to the first in row-major order, and NaN wins over numbers. Dims are reduced one after the other, the last
    first.
    """
    spatial = x.shape[1:-1]
    index = jnp.arange(math.prod(spatial), dtype=jnp.int32).reshape(1, *spatial, 1)
    y, index = x, jnp.broadcast_to(index, x.shape)
    for axis in reversed(range(1, x.ndim - 1)):
        rows, inside = _rows(y, axis, size[axis - 1])
        best = largest((axis + 1,), rows)  # positions outside the bin repeat its last element
        wins = expand_rank(inside, rows) & ((rows == best) | (rows != rows))
        y = jnp.squeeze(best, axis + 1)
        first = jnp.expand_dims(jnp.argmax(wins, axis + 1), axis + 1)
        index = jnp.squeeze(jnp.take_along_axis(_rows(index, axis, size[axis - 1])[0], first, axis + 1), axis + 1)
    return y, index


def _rows(x: Array, axis: int, m: int) -> tuple[Array, np.ndarray]:
    """Return the elements of every bin along an axis, ``(…, m, largest bin, …)``, and a mask of those inside it."""
    n = x.shape[axis]
    positions, inside = bins(n, m)
    if n % m == 0:
        rows = x.reshape(*x.shape[:axis], m, n // m, *x.shape[axis + 1 :])
    else:
        rows = jnp.take(x, positions, axis=axis, mode="clip")
    return rows, inside.reshape(*inside.shape, *(1,) * (x.ndim - axis - 1))
