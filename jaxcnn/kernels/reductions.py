"""Reductions whose terms are computed on the fly, and sums of products over the batch.

XLA:CPU calls a library for a reduction. The library is fast if the terms are an array or a product of two arrays, and
slow if they are computed from more. Adding halves or eighths of an array is an ordinary loop instead, which runs on all
threads and computes the terms as it reads them. An array that may be split over devices is summed by XLA, because
devices would exchange its halves.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.kernels.dtypes import to_accumulator
from jaxcnn.kernels.shapes import is_symbolic, known_at_most
from jaxcnn.kernels.split import mesh_of
from jaxcnn.platforms import Fixed, platform_dependent

#: `sum_of_products` exchanges its factors up to this many outputs, and from this many inputs on.
FEW_OUTPUTS, MANY_INPUTS = 32, 1024


@functools.partial(jax.jit, inline=True)
def sum_of_products(x: Array, y: Array) -> Array:
    """Return Σ_n x[n]ᵀ·y[n], the product xᵀ·y of ``(N, I)`` and ``(N, O)``."""
    exchanged = known_at_most(y.shape[1], FEW_OUTPUTS) and not known_at_most(x.shape[1], MANY_INPUTS - 1)
    if not exchanged or mesh_of((x, y)) is not None:
        return _product(x, y)
    return platform_dependent(x, y, default=Fixed(_product, ()), cpu=Fixed(_exchanged_product, ()))


def _product(x: Array, y: Array) -> Array:
    return x.T @ y


def _exchanged_product(x: Array, y: Array) -> Array:
    """Return (yᵀ·x)ᵀ; the barrier keeps XLA from computing xᵀ·y, for which jaxlib 0.10 copies x.

    For 64 rows of 16384 and 10 elements that takes 0.7 ms instead of 4.2 on one core.
    """
    return lax.optimization_barrier(y.T @ x).T


@functools.partial(jax.jit, static_argnums=0, inline=True)
def sum_computed(dims: tuple[int, ...], x: Array) -> Array:
    """Return Σ x over ``dims``, where x is computed from a product of more than two arrays."""
    if mesh_of((x,)) is not None:
        return x.sum(dims)
    return platform_dependent(x, default=Fixed(_sum, (dims,)), cpu=Fixed(sum_by_halves, (dims,)))


def _sum(dims: tuple[int, ...], x: Array) -> Array:
    return x.sum(dims)


def sum_by_halves(dims: tuple[int, ...], x: Array) -> Array:
    """Return Σ x over ``dims``: add halves while a size is even, then sum the rest. The batch, dim 0, comes last."""
    for dim in sorted(dims, key=lambda dim: dim == 0):
        while x.shape[dim] and x.shape[dim] % 2 == 0:
            first, second = lax.split(x, (x.shape[dim] // 2,) * 2, axis=dim)
            x = first + second
    return x.sum(dims)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def largest(dims: tuple[int, ...], x: Array) -> Array:
    """Return the largest element over ``dims``, which stay with size 1; it is NaN if any element is.

    XLA:CPU calls a library for the maximum of a large array, which drops NaN (jaxlib 0.10.2 and 0.12.0).
    """
    whole = mesh_of((x,)) is not None or any(is_symbolic(x.shape[dim]) for dim in dims)
    return platform_dependent(
        x, default=Fixed(_max, (dims,)), cpu=Fixed(_max_or_nan if whole else max_by_halves, (dims,))
    )


def _max(dims: tuple[int, ...], x: Array) -> Array:
    return x.max(dims, keepdims=True)


def _max_or_nan(dims: tuple[int, ...], x: Array) -> Array:
    return jnp.where((x != x).any(dims, keepdims=True), jnp.asarray(np.nan, x.dtype), _max(dims, x))


def max_by_halves(dims: tuple[int, ...], x: Array) -> Array:
    """Return the largest element over ``dims``, by elementwise maxima of the halves of each dim."""
    for dim in dims:
        rest = []
        while x.shape[dim] > 1:
            half, odd = divmod(x.shape[dim], 2)
            first, second, *last = lax.split(x, (half, half, *(1,) * odd), axis=dim)
            x = lax.max(first, second)
            rest += last
        x = functools.reduce(lax.max, rest, x)
    return x


@functools.partial(jax.jit, inline=True)
def element_at(x: Array, index: Array) -> Array:
    """Return the element of the last dim at ``index (…)``, with size 1 there; any number if it is out of range.

    XLA:TPU reads the elements one after the other. It fuses a masked sum with the other sums over that dim.
    """
    return platform_dependent(x, index[..., None], default=Fixed(gathered, ()), tpu=Fixed(masked_sum, ()))


def gathered(x: Array, index: Array) -> Array:
    """Return the element of the last dim at ``index``, by a gather."""
    return jnp.take_along_axis(x, index, -1, mode="clip")


def masked_sum(x: Array, index: Array) -> Array:
    """Return the element of the last dim at ``index``, as the sum of all elements with the others replaced by 0."""
    is_element = lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1) == index
    return jnp.where(is_element, x, 0).sum(-1, keepdims=True)


@functools.partial(jax.jit, inline=True)
def softmax(logits: Array, log_p: Array) -> Array:
    """Return p, the softmax over the last dim, given log p, which has the dtype of sums.

    For 16-bit logits, p is computed from log p on GPU. XLA:GPU otherwise computes the sum of exponentials, which three
    results need, in a kernel of its own.
    """
    wide = to_accumulator(logits)
    if wide.dtype == logits.dtype:
        return jax.nn.softmax(wide)
    other = Fixed(_exponential, ())
    return platform_dependent(wide, log_p, default=Fixed(_softmax, ()), cuda=other, rocm=other)


def _softmax(logits: Array, log_p: Array) -> Array:
    return jax.nn.softmax(logits)


def _exponential(logits: Array, log_p: Array) -> Array:
    return jnp.exp(log_p)


def sum_of_eights(x: Array, axis: int) -> Array:
    """Reduce an axis to about an eighth by adding eight equal slices, and append the remainder.

    An axis of symbolic size, or that may be split over devices, is summed to size 1.
    """
    n = x.shape[axis]
    if is_symbolic(n) or mesh_of((x,)) is not None:
        return x.sum(axis, keepdims=True)
    parts = max(min(n, 8), 1)
    ends = [n // parts * i for i in range(parts + 1)]
    slices = (lax.slice_in_dim(x, start, end, axis=axis) for start, end in itertools.pairwise(ends))
    total = functools.reduce(lax.add, slices)
    return total if ends[-1] == n else jnp.concatenate([total, lax.slice_in_dim(x, ends[-1], n, axis=axis)], axis)
