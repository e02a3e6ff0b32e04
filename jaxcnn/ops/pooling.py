"""Pooling: a window becomes one entry, and its δ finds the way back.

Closed under differentiation, in two adjoint pairs:

    take(x, winner) ↔ place(δ, winner)         max pooling reads the winner of each window, δ goes to the winner
    window_sum(x)   ↔ window_spread(δ)         average pooling is a window sum over its count

The residual of max pooling is one byte a window: which entry won (lecture §7–9, with erratum 3).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxcnn.geometry import Padding, PerDim, Window, fail, pad_widths, static_bool, window
from jaxcnn.kernels import windows as kernels
from jaxcnn.ops.rule import Rule, arrays, picture, with_rule


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
    """Max pooling: ``y[o] = max_k x[o·stride + k·dilation − lo]``, each channel for itself.

    Backward: δ goes to the winner of each window, ``δ_x = up(δ) ∘ [x is the winner]`` (lecture §8, erratum 3).
    Ties: the first in row-major order wins.  NaN wins over numbers.  Padding never wins, so no δ is lost into it.

    Args:
        x: pictures ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        window: entries of a window, an int or one for each dim.
        stride: how far it moves; default ``window``.
        padding: as in `conv`, without the modes that repeat the picture.
        dilation: the distance between a window's entries.
        ceil_mode: whether a last, partial window counts (as in PyTorch).
        rule: another backward half; see `jaxcnn.rules`.

    Returns: ``(N, *out, C)``.

    Raises: ValueError for options that do not fit and for windows that lie wholly in padding; TypeError for dtypes.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    (x,) = arrays("max_pool", x=x)
    win = pool_window("max_pool", picture("max_pool", x), window, stride, padding, dilation, ceil_mode)
    return with_rule(_max_pool, rule, max_pool_plain)(win, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(win: Window, x: Array) -> Array:
    return kernels.largest(win, x)[0]


def _max_pool_fwd(win: Window, x: Array) -> Any:
    return largest(win, x)


def _max_pool_bwd(win: Window, winner: Array, delta: Array) -> Any:
    """δ_x = place(δ, winner): up(δ), masked to the winning entry of each window."""
    return (place(win, delta, winner),)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def max_pool_plain(win: Window, x: Array) -> Array:
    """`max_pool` in stock JAX."""

    def around(inner: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *inner, 1)

    lowest = np.asarray(-np.inf, x.dtype)
    pads = ((0, 0), *win.padding, (0, 0))
    return lax.reduce_window(
        x, lowest, lax.max, around(win.size), around(win.stride), pads, window_dilation=around(win.dilation)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def largest(win: Window, x: Array) -> tuple[Array, Array]:
    """The largest entry of every window, and which one it is."""
    return kernels.largest(win, x)


def _largest_fwd(win: Window, x: Array) -> Any:
    y, winner = largest(win, x)
    return (y, winner), winner


def _largest_bwd(win: Window, winner: Array, deltas: Any) -> Any:
    """δ_x = place(δ, winner); the winner is a number, and has no δ."""
    return (place(win, deltas[0], winner),)


largest.defvjp(_largest_fwd, _largest_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def take(win: Window, x: Array, winner: Array) -> Array:
    """What stands at the winner of every window."""
    return kernels.take(win, x, winner)


def _take_fwd(win: Window, x: Array, winner: Array) -> Any:
    return take(win, x, winner), winner


def _take_bwd(win: Window, winner: Array, delta: Array) -> Any:
    """⟨take(x), δ⟩ = ⟨x, place(δ)⟩."""
    return place(win, delta, winner), None


take.defvjp(_take_fwd, _take_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def place(win: Window, delta: Array, winner: Array) -> Array:
    """Every δ to the winner of its window, zero to the others."""
    return kernels.place(win, delta, winner)


def _place_fwd(win: Window, delta: Array, winner: Array) -> Any:
    return place(win, delta, winner), winner


def _place_bwd(win: Window, winner: Array, xi: Array) -> Any:
    """⟨place(δ), ξ⟩ = ⟨δ, take(ξ)⟩."""
    return take(win, xi, winner), None


place.defvjp(_place_fwd, _place_bwd)


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
    rule: Rule | None = None,
) -> Array:
    """Average pooling: ``y[o] = Σ_k x[o·stride + k·dilation − lo] / count[o]``, each channel for itself.

    Backward: ``δ_x = up(δ / count)``, every entry of a window gets its share (lecture §8, erratum 3).
    16-bit inputs are summed in float32.

    Args:
        x: pictures ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        window: entries of a window, an int or one for each dim.
        stride: how far it moves; default ``window``.
        padding: as in `conv`, without the modes that repeat the picture.
        dilation: the distance between a window's entries.
        ceil_mode: whether a last, partial window counts (as in PyTorch); what it reaches past padding never counts.
        count_include_pad: whether padding counts as entries that are zero.
        rule: another backward half; see `jaxcnn.rules`.

    Returns: ``(N, *out, C)``.

    Raises: ValueError for options that do not fit and for windows that lie wholly in padding; TypeError for dtypes.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, :, :, 0]
    Array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    (x,) = arrays("avg_pool", x=x)
    win = pool_window("avg_pool", picture("avg_pool", x), window, stride, padding, dilation, ceil_mode)
    counts = static_bool("avg_pool", "count_include_pad", count_include_pad)
    average = Average(win, pad_widths("avg_pool", padding if counts else 0, win))
    return with_rule(_avg_pool, rule, _avg_pool_plain)(average, x)


@dataclasses.dataclass(frozen=True)
class Average:
    """Windows, and how much of the padding around the picture counts as entries."""

    window: Window
    counted: tuple[tuple[int, int], ...]

    def count(self) -> np.ndarray:
        """``(*out, 1)``: the entries of every window."""
        per_dim = (self.window.inside(dim, margin).sum(1) for dim, margin in enumerate(self.counted))
        return functools.reduce(np.multiply.outer, per_dim)[..., None]

    def divided(self, y: Array) -> Array:
        """``y / count``; the count is one number wherever it can be."""
        count = self.count()
        first = count.flat[0]
        return y / (np.asarray(first, y.dtype) if (count == first).all() else count.astype(y.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _avg_pool(average: Average, x: Array) -> Array:
    return average.divided(window_sum(average.window, x.astype(kernels.accumulator(x.dtype)))).astype(x.dtype)


def _avg_pool_fwd(average: Average, x: Array) -> Any:
    return _avg_pool(average, x), None


def _avg_pool_bwd(average: Average, saved: None, delta: Array) -> Any:
    """δ_x = up(δ / count)."""
    shares = average.divided(delta.astype(kernels.accumulator(delta.dtype)))
    return (window_spread(average.window, shares).astype(delta.dtype),)


_avg_pool.defvjp(_avg_pool_fwd, _avg_pool_bwd)


def _avg_pool_plain(average: Average, x: Array) -> Array:
    win, wide = average.window, x.astype(kernels.accumulator(x.dtype))

    def around(inner: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *inner, 1)

    pads = ((0, 0), *win.padding, (0, 0))
    total = lax.reduce_window(
        wide, np.zeros((), wide.dtype), lax.add, around(win.size), around(win.stride), pads,
        window_dilation=around(win.dilation),
    )  # fmt: skip
    return average.divided(total).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def window_sum(win: Window, x: Array) -> Array:
    """The sum of every window."""
    return kernels.window_sum(win, x)


def _window_sum_fwd(win: Window, x: Array) -> Any:
    return window_sum(win, x), None


def _window_sum_bwd(win: Window, saved: None, delta: Array) -> Any:
    """⟨window_sum(x), δ⟩ = ⟨x, window_spread(δ)⟩."""
    return (window_spread(win, delta),)


window_sum.defvjp(_window_sum_fwd, _window_sum_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def window_spread(win: Window, delta: Array) -> Array:
    """Every δ to all entries of its window."""
    return kernels.window_spread(win, delta)


def _window_spread_fwd(win: Window, delta: Array) -> Any:
    return window_spread(win, delta), None


def _window_spread_bwd(win: Window, saved: None, xi: Array) -> Any:
    """⟨window_spread(δ), ξ⟩ = ⟨δ, window_sum(ξ)⟩."""
    return (window_sum(win, xi),)


window_spread.defvjp(_window_spread_fwd, _window_spread_bwd)


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
    """The window of a pooling op, whose every place meets the picture."""
    win = window(
        op, spatial, size, stride=size if stride is None else stride, padding=padding, dilation=dilation,
        ceil_mode=ceil_mode, prefix=prefix,
    )  # fmt: skip
    if not all(win.inside(dim).any(1).all() for dim in range(win.ndim)):
        fail(op, f"a window lies wholly in padding; window {win.size}, padding {win.padding}, spatial dims {spatial}")
    if math.prod(win.size) >= 2**32:
        fail(op, f"window expected fewer than 2**32 entries, got {win.size}")
    return win
