"""Pooling: each window is reduced to one value, and δ is routed back to it.

The family is closed under differentiation. It consists of pairs of adjoint functions:

    gather_winners(x, winner) ↔ scatter_to_winners(δ, winner)   max pooling reads the winner of each window
    gather_indices(x, index)  ↔ scatter_to_indices(δ, index)    the winner as a flat index into the input
    window_sum(x)             ↔ window_sum_adjoint(δ)           average pooling is a window sum divided by its count
    bin_sum(x)                ↔ bin_sum(δ)                      adaptive windows: input and output sizes swapped

The residual of max pooling is the number of the element that won, one byte per window of up to 255 elements
(lecture §7–9, with erratum 3).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxcnn.arguments import array, arrays, bad_type, bad_value, fail, positive, spatial_dims, static_bool, static_float
from jaxcnn.geometry import Padding, PerDim, Window, not_too_many, pad_widths, window
from jaxcnn.kernels import adaptive
from jaxcnn.kernels import windows as kernels
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.kernels.materialize import materialize
from jaxcnn.kernels.shapes import beside
from jaxcnn.kernels.split import run_whole
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp


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
    return apply_rule(_max_pool, rule, max_pool_reference)(win, x)


@custom_vjp
def _max_pool(win: Window, x: Array) -> Array:
    return kernels.max_and_winner(win, x)[0]


def _max_pool_fwd(win: Window, x: Array) -> Any:
    y, winner = max_and_winner(win, x)
    return y, materialize(winner)


def _max_pool_bwd(win: Window, winner: Array, delta: Array) -> Any:
    """δ_x = scatter_to_winners(δ, winner): up(δ), masked to the winner of each window."""
    return (scatter_to_winners(win, delta, winner),)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def max_pool_reference(win: Window, x: Array) -> Array:
    """`max_pool` in stock JAX."""

    def around(inner: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *inner, 1)

    def reduced(x: Array) -> Array:
        lowest = np.asarray(-np.inf, x.dtype)
        pads = ((0, 0), *win.padding, (0, 0))
        return lax.reduce_window(
            x, lowest, lax.max, around(win.size), around(win.stride), pads, window_dilation=around(win.dilation)
        )

    return run_whole(reduced, (x,), (slice(1, -1),), slice(1, -1))


@custom_vjp
def max_and_winner(win: Window, x: Array) -> tuple[Array, Array]:
    """The largest element of every window, and its tap number (the winner)."""
    return kernels.max_and_winner(win, x)


def _max_and_winner_fwd(win: Window, x: Array) -> Any:
    y, winner = max_and_winner(win, x)
    return (y, winner), winner


def _max_and_winner_bwd(win: Window, winner: Array, deltas: Any) -> Any:
    """δ_x = scatter_to_winners(δ, winner); the winner is an integer and has no δ."""
    return (scatter_to_winners(win, deltas[0], winner),)


max_and_winner.defvjp(_max_and_winner_fwd, _max_and_winner_bwd)


@custom_vjp
def gather_winners(win: Window, x: Array, winner: Array) -> Array:
    """The element of x at the winner of every window."""
    return kernels.gather_winners(win, x, winner)


def _gather_winners_fwd(win: Window, x: Array, winner: Array) -> Any:
    return gather_winners(win, x, winner), winner


def _gather_winners_bwd(win: Window, winner: Array, delta: Array) -> Any:
    """⟨gather_winners(x), δ⟩ = ⟨x, scatter_to_winners(δ)⟩."""
    return scatter_to_winners(win, delta, winner), None


gather_winners.defvjp(_gather_winners_fwd, _gather_winners_bwd)


@custom_vjp
def scatter_to_winners(win: Window, delta: Array, winner: Array) -> Array:
    """Send the δ of every window to its winner, and zero to the other elements."""
    return kernels.scatter_to_winners(win, delta, winner)


def _scatter_to_winners_fwd(win: Window, delta: Array, winner: Array) -> Any:
    return scatter_to_winners(win, delta, winner), winner


def _scatter_to_winners_bwd(win: Window, winner: Array, xi: Array) -> Any:
    """⟨scatter_to_winners(δ), ξ⟩ = ⟨δ, gather_winners(ξ)⟩."""
    return gather_winners(win, xi, winner), None


scatter_to_winners.defvjp(_scatter_to_winners_fwd, _scatter_to_winners_bwd)


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
    winner = materialize(winner)
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
    at = array(op, "indices", indices)
    if not isinstance(indices, jax.Array):
        indices = np.asarray(indices)  # a NumPy array stays concrete under jit, so its values can be checked
    if not jnp.issubdtype(at.dtype, jnp.integer):
        raise bad_type(op, "indices", "of an integer dtype", at.dtype)
    if not 3 <= y.ndim <= 5 or at.shape != y.shape:
        expected = "expected y and indices (N, *out, C) with 1, 2 or 3 spatial dims"
        fail(op, f"{expected}, got y {y.shape}, indices {at.shape}")
    spatial = positive(op, "spatial_shape", spatial_shape, y.ndim - 2)
    not_too_many(op, "the result", spatial)
    entries = math.prod(spatial)
    if not isinstance(indices, jax.core.Tracer) and indices.size:
        seen = np.asarray(indices)  # not jnp, which would be traced inside another trace
        lowest, highest = int(seen.min()), int(seen.max())
        if lowest < 0 or highest >= entries:
            raise bad_value(op, "indices", f"0 … {entries - 1} for spatial_shape {spatial}", f"{lowest} … {highest}")
    at = at if at.dtype.itemsize > 2 else at.astype(jnp.int32)
    return apply_rule(scatter_to_indices, rule, kernels.scatter, op)(spatial, y, at)


@custom_vjp
def scatter_to_indices(spatial: tuple[int, ...], y: Array, index: Array) -> Array:
    """Add every element of y at its index in the flattened spatial dims."""
    return kernels.scatter(spatial, y, index)


def _scatter_to_indices_fwd(spatial: tuple[int, ...], y: Array, index: Array) -> Any:
    return scatter_to_indices(spatial, y, index), index


def _scatter_to_indices_bwd(spatial: tuple[int, ...], index: Array, delta: Array) -> Any:
    """⟨scatter_to_indices(y), δ⟩ = ⟨y, gather_indices(δ)⟩."""
    return gather_indices(spatial, delta, index), None


scatter_to_indices.defvjp(_scatter_to_indices_fwd, _scatter_to_indices_bwd)


@custom_vjp
def gather_indices(spatial: tuple[int, ...], x: Array, index: Array) -> Array:
    """The elements of x at the indices in the flattened spatial dims."""
    return kernels.gather(x, index)


def _gather_indices_fwd(spatial: tuple[int, ...], x: Array, index: Array) -> Any:
    return gather_indices(spatial, x, index), index


def _gather_indices_bwd(spatial: tuple[int, ...], index: Array, delta: Array) -> Any:
    """⟨gather_indices(x), δ⟩ = ⟨x, scatter_to_indices(δ)⟩."""
    return scatter_to_indices(spatial, delta, index), None


gather_indices.defvjp(_gather_indices_fwd, _gather_indices_bwd)


# ---------------------------------------------------------------------------------------------------------------------


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
    counts = static_bool("avg_pool", "count_include_pad", count_include_pad)
    by = None if divisor is None else static_float("avg_pool", "divisor", divisor)
    if by is not None and not 0 < abs(by) < float("inf"):
        raise bad_value("avg_pool", "divisor", "a finite number other than 0", divisor)
    average = Average(win, pad_widths("avg_pool", padding if counts else 0, win), by)
    return apply_rule(_avg_pool, rule, _avg_pool_reference)(average, x)


@dataclasses.dataclass(frozen=True)
class Average:
    """Windows, and how much of the padding around the input counts as elements."""

    window: Window
    counted: tuple[tuple[int, int], ...]
    #: Divisor that replaces the count, if given.
    divisor: float | None = None

    def count(self) -> np.ndarray:
        """Return the divisors of all windows, broadcastable to ``(*out, 1)``."""
        if self.divisor is not None:
            return np.full((1,) * (self.window.ndim + 1), self.divisor)
        per_dim = (self.window.inside(dim, margin).sum(1) for dim, margin in enumerate(self.counted))
        return functools.reduce(np.multiply.outer, per_dim)[..., None]

    def divided(self, y: Array) -> Array:
        """Return ``y / count``; the count is a scalar if all counts are equal."""
        count = self.count()
        first = count.flat[0]
        return y / (np.asarray(first, y.dtype) if (count == first).all() else beside(count.astype(y.dtype), y))


@custom_vjp
def _avg_pool(average: Average, x: Array) -> Array:
    return average.divided(window_sum(average.window, x.astype(accumulator(x.dtype)))).astype(x.dtype)


def _avg_pool_fwd(average: Average, x: Array) -> Any:
    return _avg_pool(average, x), None


def _avg_pool_bwd(average: Average, saved: None, delta: Array) -> Any:
    """δ_x = up(δ / count)."""
    shares = average.divided(delta.astype(accumulator(delta.dtype)))
    return (window_sum_adjoint(average.window, shares).astype(delta.dtype),)


_avg_pool.defvjp(_avg_pool_fwd, _avg_pool_bwd)


def _avg_pool_reference(average: Average, x: Array) -> Array:
    win, wide = average.window, x.astype(accumulator(x.dtype))

    def around(inner: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *inner, 1)

    def reduced(x: Array) -> Array:
        pads = ((0, 0), *win.padding, (0, 0))
        return lax.reduce_window(
            x, np.zeros((), x.dtype), lax.add, around(win.size), around(win.stride), pads,
            window_dilation=around(win.dilation),
        )  # fmt: skip

    return average.divided(run_whole(reduced, (wide,), (slice(1, -1),), slice(1, -1))).astype(x.dtype)


@custom_vjp
def window_sum(win: Window, x: Array) -> Array:
    """The sum over every window."""
    return kernels.window_sum(win, x)


def _window_sum_fwd(win: Window, x: Array) -> Any:
    return window_sum(win, x), None


def _window_sum_bwd(win: Window, saved: None, delta: Array) -> Any:
    """⟨window_sum(x), δ⟩ = ⟨x, window_sum_adjoint(δ)⟩."""
    return (window_sum_adjoint(win, delta),)


window_sum.defvjp(_window_sum_fwd, _window_sum_bwd)


@custom_vjp
def window_sum_adjoint(win: Window, delta: Array) -> Array:
    """Add the δ of every window to all of the window's elements."""
    return kernels.window_sum_adjoint(win, delta)


def _window_sum_adjoint_fwd(win: Window, delta: Array) -> Any:
    return window_sum_adjoint(win, delta), None


def _window_sum_adjoint_bwd(win: Window, saved: None, xi: Array) -> Any:
    """⟨window_sum_adjoint(δ), ξ⟩ = ⟨δ, window_sum(ξ)⟩."""
    return (window_sum(win, xi),)


window_sum_adjoint.defvjp(_window_sum_adjoint_fwd, _window_sum_adjoint_bwd)


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
    """Windows, how much of the padding counts as their elements, and the power."""

    average: Average
    p: float

    def whole(self, total: Array) -> Array:
        """Scale the sums over windows that `ceil_mode` cut off to those of full windows."""
        return self.average.divided(total) * self.average.window.entries

    def power(self, x: Array, less: int = 0) -> Array:
        """Return ``x^(p − less)``, by multiplication if the exponent is an integer."""
        exponent = self.p - less
        return x ** (int(exponent) if exponent.is_integer() else exponent)

    def root(self, total: Array) -> Array:
        """``total^(1/p)``."""
        return total if self.p == 1 else jnp.sqrt(total) if self.p == 2 else total ** (1 / self.p)


@custom_vjp
def _lp_pool(norm: Norm, x: Array) -> Array:
    wide = x.astype(accumulator(x.dtype))
    return norm.root(norm.whole(window_sum(norm.average.window, norm.power(wide)))).astype(x.dtype)


def _lp_pool_fwd(norm: Norm, x: Array) -> Any:
    # Save y unrounded: y^(1−p) of a 16-bit y would have p − 1 times its rounding error.
    y = _lp_pool(norm, x.astype(accumulator(x.dtype)))
    return y.astype(x.dtype), (x, y)


def _lp_pool_bwd(norm: Norm, saved: Any, delta: Array) -> Any:
    """δ_x = x^(p−1) ∘ up(δ·y^(1−p)), and 0 where y = 0."""
    x, y, delta = (a.astype(accumulator(a.dtype)) for a in (*saved, delta))
    shares = jnp.where(y == 0, 0, delta / norm.power(jnp.where(y == 0, 1, y), less=1))
    delta_x = norm.power(x, less=1) * window_sum_adjoint(norm.average.window, norm.whole(shares))
    return (delta_x.astype(saved[0].dtype),)


_lp_pool.defvjp(_lp_pool_fwd, _lp_pool_bwd)


def _lp_pool_reference(norm: Norm, x: Array) -> Array:
    """`lp_pool` in stock JAX."""
    wide = x.astype(accumulator(x.dtype))
    mean = _avg_pool_reference(norm.average, norm.power(wide))
    return norm.root(mean * norm.average.window.entries).astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Global and adaptive pooling: fixed output size


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
    win = _equal_windows(_bins("global_max_pool", x, 1))
    return apply_rule(_max_pool, rule, max_pool_reference, "global_max_pool")(win, x).reshape(x.shape[0], x.shape[-1])


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
    win = _equal_windows(_bins("global_avg_pool", x, 1))
    average = Average(win, win.padding)
    return apply_rule(_avg_pool, rule, _avg_pool_reference, "global_avg_pool")(average, x).reshape(
        x.shape[0], x.shape[-1]
    )


def adaptive_max_pool(x: ArrayLike, size: PerDim, *, rule: Rule | None = None) -> Array:
    """Max pooling to spatial dims ``size``: window o runs from ⌊o·n/size⌋ to ⌈(o + 1)·n/size⌉, as in PyTorch.

    Backward: δ goes to the winner of each window. In a tie, the first in row-major order wins. NaN wins over numbers.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        size: the spatial dims of the result, an int or one per dim; they may be larger than those of x.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *size, C)``.

    Raises:
        ValueError: if size is invalid, x is not ``(N, *spatial, C)`` or a spatial dim is 0.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.adaptive_max_pool(jnp.array([1.0, 2.0, 9.0, 4.0, 5.0])[None, :, None], 2).ravel()
    Array([9., 9.], dtype=float32)
    """
    op = "adaptive_max_pool"
    (x,) = arrays(op, x=x)
    sizes = _bins(op, x, size)
    if sizes.equal:  # the windows of `max_pool`, whose residual is smaller
        return apply_rule(_max_pool, rule, max_pool_reference, op)(_equal_windows(sizes), x)
    return apply_rule(_adaptive_max_pool, rule, _adaptive_max_pool_reference)(sizes, x)


def adaptive_avg_pool(x: ArrayLike, size: PerDim, *, rule: Rule | None = None) -> Array:
    """Average pooling to spatial dims ``size``: window o runs from ⌊o·n/size⌋ to ⌈(o + 1)·n/size⌉, as in PyTorch.

    Backward: ``δ_x = up(δ / count)``; every element of a window gets an equal share. 16-bit inputs are summed in
    float32.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        size: the spatial dims of the result, an int or one per dim; they may be larger than those of x.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *size, C)``.

    Raises:
        ValueError: if size is invalid, x is not ``(N, *spatial, C)`` or a spatial dim is 0.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.adaptive_avg_pool(jnp.array([1.0, 2.0, 9.0, 4.0, 5.0])[None, :, None], 2).ravel()
    Array([4., 6.], dtype=float32)
    """
    op = "adaptive_avg_pool"
    (x,) = arrays(op, x=x)
    sizes = _bins(op, x, size)
    if sizes.equal:
        win = _equal_windows(sizes)
        return apply_rule(_avg_pool, rule, _avg_pool_reference, op)(Average(win, win.padding), x)
    return apply_rule(_adaptive_avg_pool, rule, _adaptive_avg_pool_reference)(sizes, x)


@dataclasses.dataclass(frozen=True)
class Bins:
    """The spatial dims before and after adaptive pooling."""

    shape: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def equal(self) -> bool:
        """Whether all windows have the same size and are adjacent."""
        return all(n % m == 0 for n, m in zip(self.shape, self.size, strict=True))

    @property
    def entries(self) -> int:
        """Number of elements of all windows together."""
        return int(self.count().sum())

    def count(self) -> np.ndarray:
        """Return the number of elements of every window, ``(*size, 1)``."""
        counts = (adaptive.counts(n, m) for n, m in zip(self.shape, self.size, strict=True))
        return functools.reduce(np.multiply.outer, counts)[..., None]

    def divided(self, y: Array) -> Array:
        """Return ``y / count``."""
        return y / beside(self.count().astype(y.dtype), y)


@custom_vjp
def _adaptive_max_pool(sizes: Bins, x: Array) -> Array:
    return adaptive.bin_largest(sizes.size, x)[0]


def _adaptive_max_pool_fwd(sizes: Bins, x: Array) -> Any:
    return largest_of_bins(sizes, x)


def _adaptive_max_pool_bwd(sizes: Bins, index: Array, delta: Array) -> Any:
    """δ_x = scatter_to_indices(δ, index): δ goes to the winners."""
    return (scatter_to_indices(sizes.shape, delta, index),)


_adaptive_max_pool.defvjp(_adaptive_max_pool_fwd, _adaptive_max_pool_bwd)


@custom_vjp
def largest_of_bins(sizes: Bins, x: Array) -> tuple[Array, Array]:
    """The largest element of every bin, and its index in the flattened spatial dims."""
    return adaptive.bin_largest(sizes.size, x)


def _largest_of_bins_fwd(sizes: Bins, x: Array) -> Any:
    y, index = largest_of_bins(sizes, x)
    return (y, index), index


def _largest_of_bins_bwd(sizes: Bins, index: Array, deltas: Any) -> Any:
    """δ_x = scatter_to_indices(δ, index); the index is an integer and has no δ."""
    return (scatter_to_indices(sizes.shape, deltas[0], index),)


largest_of_bins.defvjp(_largest_of_bins_fwd, _largest_of_bins_bwd)


def _adaptive_max_pool_reference(sizes: Bins, x: Array) -> Array:
    """In stock JAX, dim by dim, the last first, so that the first of equal elements in row-major order is chosen."""
    for axis, (n, m) in reversed([*enumerate(zip(sizes.shape, sizes.size, strict=True), start=1)]):
        parts = [jnp.take(x, at[own], axis) for at, own in zip(*adaptive.bins(n, m), strict=True)]
        best = [jnp.take_along_axis(part, jnp.argmax(part, axis, keepdims=True), axis) for part in parts]
        x = jnp.concatenate(best, axis)
    return x


@custom_vjp
def _adaptive_avg_pool(sizes: Bins, x: Array) -> Array:
    wide = x.astype(accumulator(x.dtype))
    return sizes.divided(bin_sum(sizes.shape, sizes.size, wide)).astype(x.dtype)


def _adaptive_avg_pool_fwd(sizes: Bins, x: Array) -> Any:
    return _adaptive_avg_pool(sizes, x), None


def _adaptive_avg_pool_bwd(sizes: Bins, saved: None, delta: Array) -> Any:
    """δ_x = up(δ / count)."""
    shares = sizes.divided(delta.astype(accumulator(delta.dtype)))
    return (bin_sum(sizes.size, sizes.shape, shares).astype(delta.dtype),)


_adaptive_avg_pool.defvjp(_adaptive_avg_pool_fwd, _adaptive_avg_pool_bwd)


def _adaptive_avg_pool_reference(sizes: Bins, x: Array) -> Array:
    """In stock JAX, dim by dim."""
    y = x.astype(accumulator(x.dtype))
    for axis, (n, m) in enumerate(zip(sizes.shape, sizes.size, strict=True), start=1):
        parts = [jnp.take(y, at[own], axis).mean(axis) for at, own in zip(*adaptive.bins(n, m), strict=True)]
        y = jnp.stack(parts, axis)
    return y.astype(x.dtype)


@functools.partial(custom_vjp, static=2)
def bin_sum(shape: tuple[int, ...], size: tuple[int, ...], x: Array) -> Array:
    """The sum over each of ``size`` bins of an input with spatial dims ``shape``."""
    return adaptive.bin_sum(size, x)


def _bin_sum_fwd(shape: tuple[int, ...], size: tuple[int, ...], x: Array) -> Any:
    return bin_sum(shape, size, x), None


def _bin_sum_bwd(shape: tuple[int, ...], size: tuple[int, ...], saved: None, delta: Array) -> Any:
    """The bins that contain element i are bin i with ``shape`` and ``size`` swapped."""
    return (bin_sum(size, shape, delta),)


bin_sum.defvjp(_bin_sum_fwd, _bin_sum_bwd)


def _bins(op: str, x: Array, size: PerDim) -> Bins:
    spatial = spatial_dims(op, x)
    if not all(spatial):
        raise bad_value(op, "x", "spatial dims >= 1", f"shape {x.shape}")
    wanted = positive(op, "size", size, len(spatial))
    not_too_many(op, "the result", wanted)
    return Bins(spatial, wanted)


def _equal_windows(sizes: Bins) -> Window:
    """Return the adjacent windows, ``size`` of them."""
    spatial, wanted = sizes.shape, sizes.size
    each = tuple(n // m for n, m in zip(spatial, wanted, strict=True))
    return Window(spatial, each, each, ((0, 0),) * len(spatial), (1,) * len(spatial))


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
        fail(op, f"a window lies wholly in padding; window {win.size}, padding {win.padding}, spatial dims {spatial}")
    return win
