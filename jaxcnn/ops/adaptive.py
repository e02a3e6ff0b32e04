"""Adaptive pooling: the output size is given, and the windows, called bins, have nearly equal sizes.

The family is closed under differentiation: δ goes to the winners by ``scatter_to_indices``, or to all elements by

    bin_sum(x) ↔ bin_sum_adjoint(δ)   a bin sum with input and output sizes exchanged
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.arguments import arrays, positive
from jaxcnn.geometry import PerDim, Window, not_too_many
from jaxcnn.kernels import adaptive as kernels
from jaxcnn.kernels.dtypes import to_accumulator
from jaxcnn.kernels.shapes import expand_rank
from jaxcnn.ops.adjoint import adjoint_pair
from jaxcnn.ops.pooling import (
    Average,
    adjacent_windows,
    avg_pool_core,
    avg_pool_reference,
    max_pool_core,
    max_pool_reference,
    nonempty_dims,
    scatter_to_indices,
)
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp


def adaptive_max_pool(x: ArrayLike, output_size: PerDim, *, rule: Rule | None = None) -> Array:
    """Max pooling to m elements per dim: window o runs from ⌊o·n/m⌋ to ⌈(o + 1)·n/m⌉, as in PyTorch.

    Backward: δ goes to the winner of each window. In a tie, the first in row-major order wins. NaN wins over numbers.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        output_size: m, the spatial dims of the result, an int or one per dim. They may be larger than those of x.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *output_size, C)``.

    Raises:
        ValueError: if output_size is invalid, x is not ``(N, *spatial, C)`` or a spatial dim is 0.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.adaptive_max_pool(jnp.array([1.0, 2.0, 9.0, 4.0, 5.0])[None, :, None], 2).ravel()
    Array([9., 9.], dtype=float32)
    """
    op = "adaptive_max_pool"
    (x,) = arrays(op, x=x)
    bins = _bins(op, x, output_size)
    if bins.equal:  # the windows of `max_pool`, whose residual is smaller
        return apply_rule(max_pool_core, rule, max_pool_reference, op)(bins.windows(), x)
    return apply_rule(_adaptive_max_pool, rule, _adaptive_max_pool_reference, op)(bins, x)


def adaptive_avg_pool(x: ArrayLike, output_size: PerDim, *, rule: Rule | None = None) -> Array:
    """Average pooling to m elements per dim: window o runs from ⌊o·n/m⌋ to ⌈(o + 1)·n/m⌉, as in PyTorch.

    Backward: ``δ_x = up(δ / count)``; every element of a window gets an equal share. 16-bit inputs are summed in
    float32.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        output_size: m, the spatial dims of the result, an int or one per dim. They may be larger than those of x.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *output_size, C)``.

    Raises:
        ValueError: if output_size is invalid, x is not ``(N, *spatial, C)`` or a spatial dim is 0.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.adaptive_avg_pool(jnp.array([1.0, 2.0, 9.0, 4.0, 5.0])[None, :, None], 2).ravel()
    Array([4., 6.], dtype=float32)
    """
    op = "adaptive_avg_pool"
    (x,) = arrays(op, x=x)
    bins = _bins(op, x, output_size)
    if bins.equal:
        win = bins.windows()
        return apply_rule(avg_pool_core, rule, avg_pool_reference, op)(Average(win, win.padding), x)
    return apply_rule(_adaptive_avg_pool, rule, _adaptive_avg_pool_reference, op)(bins, x)


@dataclasses.dataclass(frozen=True)
class Bins:
    """The spatial dims of the input and of the output."""

    shape: tuple[int, ...]
    output_size: tuple[int, ...]

    @property
    def equal(self) -> bool:
        """Whether all bins have the same size and do not overlap."""
        return all(n % m == 0 for n, m in zip(self.shape, self.output_size, strict=True))

    @property
    def entries(self) -> int:
        """Number of elements of all bins together."""
        return int(self.count().sum())

    def windows(self) -> Window:
        """Return the bins as windows, if they are equal."""
        return adjacent_windows(self.shape, tuple(n // m for n, m in zip(self.shape, self.output_size, strict=True)))

    def count(self) -> np.ndarray:
        """Return the number of elements of every bin, ``(*output_size, 1)``."""
        counts = (kernels.counts(n, m) for n, m in zip(self.shape, self.output_size, strict=True))
        return functools.reduce(np.multiply.outer, counts)[..., None]

    def divide_by_count(self, y: Array) -> Array:
        """Return ``y / count``."""
        return y / expand_rank(self.count().astype(y.dtype), y)


def _bins(op: str, x: Array, output_size: PerDim) -> Bins:
    spatial = nonempty_dims(op, x)
    sizes = positive(op, "output_size", output_size, len(spatial))
    not_too_many(op, "the result", sizes)
    return Bins(spatial, sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Maxima


@custom_vjp
def _adaptive_max_pool(bins: Bins, x: Array) -> Array:
    return kernels.max_and_index(bins.output_size, x)[0]


def _adaptive_max_pool_fwd(bins: Bins, x: Array) -> Any:
    return max_and_index(bins, x)


def _adaptive_max_pool_bwd(bins: Bins, index: Array, delta: Array) -> Any:
    """δ_x = scatter_to_indices(δ, index): δ goes to the winners."""
    return (scatter_to_indices(bins.shape, delta, index),)


_adaptive_max_pool.defvjp(_adaptive_max_pool_fwd, _adaptive_max_pool_bwd)


@custom_vjp
def max_and_index(bins: Bins, x: Array) -> tuple[Array, Array]:
    """Return the largest element of every bin, and its index in the flattened spatial dims."""
    return kernels.max_and_index(bins.output_size, x)


def _max_and_index_fwd(bins: Bins, x: Array) -> Any:
    y, index = max_and_index(bins, x)
    return (y, index), index


def _max_and_index_bwd(bins: Bins, index: Array, deltas: Any) -> Any:
    """δ_x = scatter_to_indices(δ, index); the index is an integer and has no δ."""
    return (scatter_to_indices(bins.shape, deltas[0], index),)


max_and_index.defvjp(_max_and_index_fwd, _max_and_index_bwd)


def _adaptive_max_pool_reference(bins: Bins, x: Array) -> Array:
    """In stock JAX, dim by dim, the last first, so that the first of equal elements in row-major order is chosen."""
    for axis, n, m in reversed(_dims(bins)):
        best = [
            jnp.take_along_axis(part, jnp.argmax(part, axis, keepdims=True), axis) for part in _parts(x, axis, n, m)
        ]
        x = jnp.concatenate(best, axis)
    return x


def _dims(bins: Bins) -> list[tuple[int, int, int]]:
    """Return each spatial axis with its sizes before and after pooling."""
    return [(dim + 1, n, m) for dim, (n, m) in enumerate(zip(bins.shape, bins.output_size, strict=True))]


def _parts(x: Array, axis: int, n: int, m: int) -> list[Array]:
    """Return the elements of each bin along an axis."""
    return [jnp.take(x, positions[inside], axis) for positions, inside in zip(*kernels.bins(n, m), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Means


def _bin_sum(bins: Bins, x: Array) -> Array:
    """Sum every bin."""
    return kernels.bin_sum(bins.output_size, x)


def _bin_sum_adjoint(bins: Bins, delta: Array) -> Array:
    """Add the δ of every bin to all of its elements.

    The bins that contain element i are bin i with the two sizes exchanged, so this is a bin sum as well.
    """
    return kernels.bin_sum(bins.shape, delta)


bin_sum, bin_sum_adjoint = adjoint_pair(_bin_sum, _bin_sum_adjoint)


@custom_vjp
def _adaptive_avg_pool(bins: Bins, x: Array) -> Array:
    return bins.divide_by_count(bin_sum(bins, to_accumulator(x))).astype(x.dtype)


def _adaptive_avg_pool_fwd(bins: Bins, x: Array) -> Any:
    return _adaptive_avg_pool(bins, x), None


def _adaptive_avg_pool_bwd(bins: Bins, saved: None, delta: Array) -> Any:
    """δ_x = up(δ / count)."""
    shares = bins.divide_by_count(to_accumulator(delta))
    return (bin_sum_adjoint(bins, shares).astype(delta.dtype),)


_adaptive_avg_pool.defvjp(_adaptive_avg_pool_fwd, _adaptive_avg_pool_bwd)


def _adaptive_avg_pool_reference(bins: Bins, x: Array) -> Array:
    """In stock JAX, dim by dim."""
    y = to_accumulator(x)
    for axis, n, m in _dims(bins):
        y = jnp.stack([part.mean(axis) for part in _parts(y, axis, n, m)], axis)
    return y.astype(x.dtype)
