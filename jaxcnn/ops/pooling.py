"""Pooling: each window is reduced to one value, and δ is routed back to it.

The rules are written in terms of pairs of adjoint functions, so the family is closed under differentiation:

    gather_winners(x, winner) ↔ scatter_to_winners(δ, winner)   max pooling reads the winner of each window
    gather_indices(x, index)  ↔ scatter_to_indices(δ, index)    the winner as a flat index into the input
    window_sum(x)             ↔ window_sum_adjoint(δ)           average pooling is a window sum divided by its count

The residual of max pooling is the number of the element that won, one byte per window of up to 255 elements
(lecture §7–9, with erratum 3).
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxcnn.arguments import (
    arrays,
    bad_value,
    check_range,
    fail,
    integers,
    positive,
    spatial_dims,
    static_bool,
    static_float,
)
from jaxcnn.geometry import Padding, PerDim, Window, not_too_many, pad_widths, window
from jaxcnn.kernels import windows as kernels
from jaxcnn.kernels.dtypes import to_accumulator
from jaxcnn.kernels.elementwise import divided_and_multiplied
from jaxcnn.kernels.materialize import materialize_next_bits, materialize_winner
from jaxcnn.kernels.shapes import expand_rank
from jaxcnn.ops.adjoint import adjoint_pair
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp

# Pairs of adjoint functions; the rule of each is the other.
gather_winners, scatter_to_winners = adjoint_pair(kernels.gather_winners, kernels.scatter_to_winners)
gather_indices, scatter_to_indices = adjoint_pair(kernels.gather_indices, kernels.scatter_to_indices)
window_sum, window_sum_adjoint = adjoint_pair(kernels.window_sum, kernels.window_sum_adjoint)


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling


def max_pool(
    x: ArrayLike,
    window: PerDim,
    *,
    stride: PerDim | None = None,
    padding: Padding = "VALID",
    dilation: PerDim = 1,
    ceil_mode: bool = False,
    rule: Rule | None = None,
) -> Array:
    """Max pooling: ``y[o] = max_k x[o·stride + k·dilation − lo]``, for each channel separately.

    Backward: δ goes to the winner of each window, ``δ_x = up(δ) ∘ [x is the winner]`` (lecture §8, erratum 3). In a
    tie, the first in row-major order wins. NaN wins over numbers. Padding never wins, so no δ is lost in it.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        window: size of a window, an int or one per dim.
        stride: step of the window; default ``window``.
        padding: as in `conv`, without the modes that repeat the input.
        dilation: distance between a window's taps.
        ceil_mode: whether a last, partial window counts (as in PyTorch).
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *out, C)``.

    Raises:
        ValueError: if options do not fit or a window is entirely in the padding.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    (x,) = arrays("max_pool", x=x)
    win = pool_window("max_pool", spatial_dims("max_pool", x), window, stride, padding, dilation, ceil_mode)
    return apply_rule(max_pool_core, rule, max_pool_reference, "max_pool")(win, x)


@custom_vjp
def max_pool_core(win: Window, x: Array) -> Array:
    """`max_pool` over given windows, with its rule."""
    return kernels.window_max(win, x)


def _max_pool_fwd(win: Window, x: Array) -> Any:
    y, winner = max_and_winner(win, x)
    return y, materialize_winner(winner)


def _max_pool_bwd(win: Window, winner: Array, delta: Array) -> Any:
    """δ_x = scatter_to_winners(δ, winner): up(δ), masked to the winner of each window."""
    return (scatter_to_winners(win, delta, winner),)


max_pool_core.defvjp(_max_pool_fwd, _max_pool_bwd)


def max_pool_reference(win: Window, x: Array) -> Array:
    """`max_pool` in stock JAX."""
    return kernels.reduce_windows(win, x, -np.inf, lax.max)


@custom_vjp
def max_and_winner(win: Window, x: Array) -> tuple[Array, Array]:
    """Return the largest element of every window, and its tap number (the winner)."""
    return kernels.max_and_winner(win, x)


def _max_and_winner_fwd(win: Window, x: Array) -> Any:
    y, winner = max_and_winner(win, x)
    return (y, winner), winner


def _max_and_winner_bwd(win: Window, winner: Array, deltas: Any) -> Any:
    """δ_x = scatter_to_winners(δ, winner); the winner is an integer and has no δ."""
    return (scatter_to_winners(win, deltas[0], winner),)


max_and_winner.defvjp(_max_and_winner_fwd, _max_and_winner_bwd)


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling with indices, and unpooling


def max_pool_with_indices(
    x: ArrayLike,
    window: PerDim,
    *,
    stride: PerDim | None = None,
    padding: Padding = "VALID",
    dilation: PerDim = 1,
    ceil_mode: bool = False,
    rule: Rule | None = None,
) -> tuple[Array, Array]:
    """`max_pool`, and the index of each winner in the input, which `max_unpool` needs.

    Backward: δ_x = up(δ) ∘ [x is the winner], as in `max_pool`; the indices are integers and have no δ.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        window: size of a window, an int or one per dim.
        stride: step of the window; default ``window``.
        padding: as in `max_pool`.
        dilation: distance between a window's taps.
        ceil_mode: whether a last, partial window counts (as in PyTorch).
        rule: replacement for the backward rule; see `jaxcnn.rules`. Its δ is a pair whose second element is unused.

    Returns:
        y ``(N, *out, C)``, and the indices, int32 of the same shape. They are row-major indices into each channel's
        flattened spatial dims (as in PyTorch).

    Raises:
        ValueError: if options do not fit or a window is entirely in the padding.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> y, indices = jaxcnn.max_pool_with_indices(jnp.array([1.0, 5.0, 7.0, 2.0])[None, :, None], 2)
    >>> y.ravel().tolist(), indices.ravel().tolist()
    ([5.0, 7.0], [1, 2])
    """
    op = "max_pool_with_indices"
    (x,) = arrays(op, x=x)
    win = pool_window(op, spatial_dims(op, x), window, stride, padding, dilation, ceil_mode)
    return apply_rule(_max_pool_with_indices, rule, _max_pool_with_indices_reference)(win, x)


@custom_vjp
def _max_pool_with_indices(win: Window, x: Array) -> tuple[Array, Array]:
    y, winner = kernels.max_and_winner(win, x)
    return y, kernels.flat_index(win, winner)


def _max_pool_with_indices_fwd(win: Window, x: Array) -> Any:
    y, winner = max_and_winner(win, x)
    winner = materialize_winner(winner)
    return (y, kernels.flat_index(win, winner)), winner


def _max_pool_with_indices_bwd(win: Window, winner: Array, deltas: Any) -> Any:
    """δ_x = scatter_to_winners(δ, winner); the indices are integers and have no δ."""
    return (scatter_to_winners(win, deltas[0], winner),)


_max_pool_with_indices.defvjp(_max_pool_with_indices_fwd, _max_pool_with_indices_bwd)


def _max_pool_with_indices_reference(win: Window, x: Array) -> tuple[Array, Array]:
    _, winner = kernels.max_and_winner(win, lax.stop_gradient(x))
    return max_pool_reference(win, x), kernels.flat_index(win, winner)


def max_unpool(
    y: ArrayLike, indices: ArrayLike, spatial_shape: int | tuple[int, ...], *, rule: Rule | None = None
) -> Array:
    """Inverse of max pooling: every element returns to its index, and all others are zero.

    ``x[i] = Σ_{indices[o] = i} y[o]``: the adjoint of reading x at the indices. If overlapping windows have the same
    winner, their elements are added (in PyTorch all but one are lost).

    Under jit the values of the indices cannot be checked. An index that is out of range is dropped, and its δ is zero.

    Backward: ``δ_y[o] = δ[indices[o]]``.

    Args:
        y: pooled values ``(N, *out, C)``, any float dtype.
        indices: integers of the same shape, as returned by `max_pool_with_indices`.
        spatial_shape: the spatial dims of the result.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *spatial_shape, C)``.

    Raises:
        ValueError: if shapes do not fit or a concrete index is out of range.
        TypeError: if an argument has the wrong type or dtype.

    Source: Zeiler & Fergus 2014.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> y, indices = jaxcnn.max_pool_with_indices(jnp.array([1.0, 5.0, 7.0, 2.0])[None, :, None], 2)
    >>> jaxcnn.max_unpool(y, indices, (4,)).ravel().tolist()
    [0.0, 5.0, 7.0, 0.0]
    """
    op = "max_unpool"
    (y,) = arrays(op, y=y)
    index = integers(op, "indices", indices)
    if not 3 <= y.ndim <= 5:
        raise bad_value(op, "y", "(N, *out, C) with 1, 2 or 3 spatial dims", f"shape {y.shape}")
    if index.shape != y.shape:
        raise bad_value(op, "y and indices", "of one shape", f"y {y.shape}, indices {index.shape}")
    spatial = positive(op, "spatial_shape", spatial_shape, y.ndim - 2)
    not_too_many(op, "the result", spatial)
    check_range(op, "indices", indices, math.prod(spatial), f" for spatial_shape {spatial}")
    return apply_rule(scatter_to_indices, rule, kernels.scatter_to_indices, op)(spatial, y, index)


# ---------------------------------------------------------------------------------------------------------------------
# Average pooling


def avg_pool(
    x: ArrayLike,
    window: PerDim,
    *,
    stride: PerDim | None = None,
    padding: Padding = "VALID",
    dilation: PerDim = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: float | None = None,
    rule: Rule | None = None,
) -> Array:
    """Average pooling: ``y[o] = Σ_k x[o·stride + k·dilation − lo] / count[o]``, for each channel separately.

    Backward: ``δ_x = up(δ / count)``; every element of a window gets an equal share (lecture §8, erratum 3). 16-bit
    inputs are summed in float32.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        window: size of a window, an int or one per dim.
        stride: step of the window; default ``window``.
        padding: as in `conv`, without the modes that repeat the input.
        dilation: distance between a window's taps.
        ceil_mode: whether a last, partial window counts (as in PyTorch). Positions beyond the padding never count.
        count_include_pad: whether padding counts as elements that are zero.
        divisor: a finite number other than 0 that replaces every window's count, as PyTorch's ``divisor_override``;
            static.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *out, C)``.

    Raises:
        ValueError: if options do not fit or a window is entirely in the padding.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, :, :, 0]
    Array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    (x,) = arrays("avg_pool", x=x)
    win = pool_window("avg_pool", spatial_dims("avg_pool", x), window, stride, padding, dilation, ceil_mode)
    counted = padding if static_bool("avg_pool", "count_include_pad", count_include_pad) else 0
    fixed = None if divisor is None else static_float("avg_pool", "divisor", divisor)
    if fixed is not None and not 0 < abs(fixed) < float("inf"):
        raise bad_value("avg_pool", "divisor", "a finite number other than 0", divisor)
    average = Average(win, pad_widths("avg_pool", counted, win), fixed)
    return apply_rule(avg_pool_core, rule, avg_pool_reference, "avg_pool")(average, x)


@dataclasses.dataclass(frozen=True)
class Average:
    """Windows, and what their sums are divided by."""

    window: Window
    #: Width of the padding that counts as elements, ``(before, after)`` per dim.
    counted: tuple[tuple[int, int], ...]
    #: Divisor that replaces the count, if given.
    divisor: float | None = None

    def count(self) -> np.ndarray:
        """Return the divisors of all windows, broadcastable to ``(*out, 1)``."""
        if self.divisor is not None:
            return np.full((1,) * (self.window.ndim + 1), self.divisor)
        per_dim = (self.window.inside(dim, margin).sum(1) for dim, margin in enumerate(self.counted))
        return functools.reduce(np.multiply.outer, per_dim)[..., None]

    def divide_by_count(self, y: Array) -> Array:
        """Return ``y / count``; the count is a scalar if all counts are equal."""
        count = self.count()
        first = count.flat[0]
        return y / (np.asarray(first, y.dtype) if (count == first).all() else expand_rank(count.astype(y.dtype), y))


@custom_vjp
def avg_pool_core(average: Average, x: Array) -> Array:
    """`avg_pool` over given windows, with its rule."""
    return average.divide_by_count(window_sum(average.window, to_accumulator(x))).astype(x.dtype)


def _avg_pool_fwd(average: Average, x: Array) -> Any:
    return avg_pool_core(average, x), None


def _avg_pool_bwd(average: Average, saved: None, delta: Array) -> Any:
    """δ_x = up(δ / count)."""
    shares = average.divide_by_count(to_accumulator(delta))
    return (window_sum_adjoint(average.window, shares).astype(delta.dtype),)


avg_pool_core.defvjp(_avg_pool_fwd, _avg_pool_bwd)


def avg_pool_reference(average: Average, x: Array) -> Array:
    """`avg_pool` in stock JAX."""
    total = kernels.reduce_windows(average.window, to_accumulator(x), 0, lax.add)
    return average.divide_by_count(total).astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The p-norm over a window


def lp_pool(
    x: ArrayLike,
    window: PerDim,
    *,
    p: float = 2,
    stride: PerDim | None = None,
    padding: Padding = "VALID",
    dilation: PerDim = 1,
    ceil_mode: bool = False,
    rule: Rule | None = None,
) -> Array:
    """Power-average pooling: ``y[o] = (Σ_k x[o·stride + k·dilation − lo]^p)^(1/p)``, for each channel separately.

    As in PyTorch, the power is ``x^p`` and not ``|x|^p``. With an odd p, negative elements cancel positive ones, and
    the root of a negative sum is NaN (for p = 1, the sum itself). x^p of a negative x is NaN if p is not an integer.

    Backward: ``δ_x = x^(p−1) ∘ up(δ·y^(1−p))``. Where y = 0 there is no derivative, and δ is 0 (as in PyTorch). 16-bit
    inputs are summed in float32.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        window: size of a window, an int or one per dim.
        p: the power, at least 1; 1 is the sum, 2 the Euclidean norm.
        stride: step of the window; default ``window``.
        padding: as in `avg_pool`; it adds zeros.
        dilation: distance between a window's taps.
        ceil_mode: whether a last, partial window counts. As in PyTorch, its sum is scaled up to that of a full window.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *out, C)``.

    Raises:
        ValueError: if options do not fit or a window is entirely in the padding.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.lp_pool(jnp.array([3.0, 4.0, 0.0, 5.0])[None, :, None], 2).ravel()
    Array([5., 5.], dtype=float32)
    """
    (x,) = arrays("lp_pool", x=x)
    win = pool_window("lp_pool", spatial_dims("lp_pool", x), window, stride, padding, dilation, ceil_mode)
    power = static_float("lp_pool", "p", p)
    if not 1 <= power < float("inf"):
        raise bad_value("lp_pool", "p", "a finite number >= 1", p)
    norm = Norm(Average(win, pad_widths("lp_pool", padding, win)), power)
    return apply_rule(_lp_pool, rule, _lp_pool_reference)(norm, x)


@dataclasses.dataclass(frozen=True)
class Norm:
    """Windows, and the power p."""

    average: Average
    p: float

    def rescale_partial(self, total: Array) -> Array:
        """Scale the sums over windows that `ceil_mode` cut off to those of full windows."""
        return self.average.divide_by_count(total) * self.average.window.entries

    def rescale_shares(self, shares: Array, dtype: np.dtype) -> Array:
        """Scale shares of δ in the same way, for inputs of a dtype."""
        entries = self.average.window.entries
        if self.keeps_next_bits(dtype) and (self.average.count() == entries).all():
            return divided_and_multiplied(entries, shares)
        return self.rescale_partial(shares)

    def keeps_next_bits(self, dtype: np.dtype) -> bool:
        """Whether y is kept in three bytes on GPU. Without overlap, XLA computes y again instead of keeping it."""
        return dtype == jnp.bfloat16 and not self.average.window.tiles

    def root(self, total: Array) -> Array:
        """Return ``total^(1/p)``."""
        return total if self.p == 1 else jnp.sqrt(total) if self.p == 2 else total ** (1 / self.p)


def _power(x: Array, exponent: float) -> Array:
    """Return ``x^exponent``, by multiplication if the exponent is an integer."""
    return x ** (int(exponent) if exponent.is_integer() else exponent)


@custom_vjp
def _lp_pool(norm: Norm, x: Array) -> Array:
    total = kernels.window_sum_of(_power, norm.p, norm.average.window, to_accumulator(x))
    return norm.root(norm.rescale_partial(total)).astype(x.dtype)


def _lp_pool_fwd(norm: Norm, x: Array) -> Any:
    # Save y unrounded: y^(1−p) of a 16-bit y would have p − 1 times its rounding error.
    y = _lp_pool(norm, to_accumulator(x))
    return y.astype(x.dtype), (x, _with_next_bits(y) if norm.keeps_next_bits(x.dtype) else y)


def _lp_pool_bwd(norm: Norm, saved: Any, delta: Array) -> Any:
    """δ_x = x^(p−1) ∘ up(δ·y^(1−p)), and 0 where y = 0."""
    dtype, (x, y, delta) = delta.dtype, (to_accumulator(a) for a in (*saved, delta))
    shares = jnp.where(y == 0, 0, delta / _power(jnp.where(y == 0, 1, y), norm.p - 1))
    delta_x = _power(x, norm.p - 1) * window_sum_adjoint(norm.average.window, norm.rescale_shares(shares, dtype))
    return (delta_x.astype(dtype),)


_lp_pool.defvjp(_lp_pool_fwd, _lp_pool_bwd)


# y in fewer bits has the derivative of y.
_with_next_bits, _ = adjoint_pair(materialize_next_bits, lambda delta: delta, static=0)


def _lp_pool_reference(norm: Norm, x: Array) -> Array:
    """`lp_pool` in stock JAX."""
    wide = to_accumulator(x)
    mean = avg_pool_reference(norm.average, _power(wide, norm.p))
    return norm.root(mean * norm.average.window.entries).astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Global pooling: one window over the whole input


def global_max_pool(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """The maximum of each channel: `max_pool` with one window over the whole input, and its rule.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, C)``.

    Raises:
        ValueError: if x is not ``(N, *spatial, C)`` or a spatial dim is 0.
        TypeError: if x is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.global_max_pool(jnp.arange(12.0).reshape(2, 3, 2))
    Array([[ 4.,  5.],
           [10., 11.]], dtype=float32)
    """
    (x,) = arrays("global_max_pool", x=x)
    y = apply_rule(max_pool_core, rule, max_pool_reference, "global_max_pool")(_whole_input("global_max_pool", x), x)
    return y.reshape(x.shape[0], x.shape[-1])


def global_avg_pool(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """The mean of each channel: `avg_pool` with one window over the whole input, and its rule.

    16-bit inputs are summed in float32.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, C)``.

    Raises:
        ValueError: if x is not ``(N, *spatial, C)`` or a spatial dim is 0.
        TypeError: if x is not an array of a float dtype.

    Source: Lin et al. 2013.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.global_avg_pool(jnp.arange(12.0).reshape(2, 3, 2))
    Array([[2., 3.],
           [8., 9.]], dtype=float32)
    """
    (x,) = arrays("global_avg_pool", x=x)
    win = _whole_input("global_avg_pool", x)
    y = apply_rule(avg_pool_core, rule, avg_pool_reference, "global_avg_pool")(Average(win, win.padding), x)
    return y.reshape(x.shape[0], x.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def nonempty_dims(op: str, x: Array) -> tuple[int, ...]:
    """Return the spatial dims of x; raise ValueError if one of them is 0."""
    spatial = spatial_dims(op, x)
    if not all(spatial):
        raise bad_value(op, "x", "(N, *spatial, C) with spatial dims >= 1", f"shape {x.shape}")
    return spatial


def _whole_input(op: str, x: Array) -> Window:
    """Return the window that covers all spatial dims of x."""
    spatial = nonempty_dims(op, x)
    return adjacent_windows(spatial, spatial)


def adjacent_windows(spatial: tuple[int, ...], size: tuple[int, ...]) -> Window:
    """Return windows without padding that are as far apart as they are large."""
    return Window(spatial, size, size, ((0, 0),) * len(spatial), (1,) * len(spatial))


def pool_window(
    op: str,
    spatial: tuple[int, ...],
    size: PerDim,
    stride: PerDim | None,
    padding: Padding,
    dilation: PerDim,
    ceil_mode: bool,
    prefix: str = "",
) -> Window:
    """Return the window of a pooling op; raise ValueError if a window is entirely in the padding."""
    win = window(
        op, spatial, size, stride=size if stride is None else stride, padding=padding, dilation=dilation,
        ceil_mode=ceil_mode, prefix=prefix,
    )  # fmt: skip
    if not all(win.inside(dim).any(1).all() for dim in range(win.ndim)):
        got = f"window {win.size}, padding {win.padding}, spatial dims {spatial}"
        fail(op, f"a window is entirely in the padding: {got}")
    return win
