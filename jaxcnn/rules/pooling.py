"""Rules for max pooling: which elements of a window receive its δ.

Sums below are over the windows o that contain element i; windows may overlap and extend into padding. All rules fit
`max_pool`, and `hidden_layer`, where they apply to its pooling.
"""

import functools
import operator

import jax.numpy as jnp
from jax import Array

from jaxcnn.geometry import Window
from jaxcnn.kernels import windows
from jaxcnn.kernels.dtypes import accumulator, to_accumulator
from jaxcnn.ops.pooling import window_sum, window_sum_adjoint
from jaxcnn.ops.rule import Call
from jaxcnn.rules.compose import fits


@fits("max_pool", "hidden_layer")
def winner(call: Call, delta: Array) -> tuple[Array, ...]:
    """The exact rule: ``δ_x[i] = Σ_o δ[o]·[i won o]``; in a tie, the first in row-major order wins.

    Fits `max_pool` and `hidden_layer`.

    Args:
        call: the call of the op.
        delta: δ of the op's output.

    Returns:
        One cotangent per input of the op.

    Raises:
        ValueError: if applied to another op.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> jax.vjp(lambda x: jaxcnn.max_pool(x, 4, rule=jaxcnn.rules.winner), x)[1](jnp.full((1, 1, 1), 6.0))[0].ravel()
    Array([0., 6., 0., 0.], dtype=float32)
    """
    return call.exact(delta)


@fits("max_pool", part="pool")
def literal_up(call: Call, delta: Array) -> tuple[Array, ...]:
    """The lecture's formula taken literally: ``δ_x[i] = Σ_o δ[o]``, every element of a window gets all of its δ.

    For adjacent windows this is up(δ) = δ ⊗ 1, the rule of sum pooling (lecture §8, erratum 3). The part that falls
    into padding is lost. Fits `max_pool` and `hidden_layer`.

    Args:
        call: the call of the op.
        delta: δ of the op's output.

    Returns:
        One cotangent per input of the op.

    Raises:
        ValueError: if applied to another op.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> rule = jaxcnn.rules.literal_up
    >>> jax.vjp(lambda x: jaxcnn.max_pool(x, 4, rule=rule), x)[1](jnp.full((1, 1, 1), 6.0))[0].ravel()
    Array([6., 6., 6., 6.], dtype=float32)
    """
    return (window_sum_adjoint(call.static, delta),)


@fits("max_pool", part="pool")
def proportional(call: Call, delta: Array) -> tuple[Array, ...]:
    """Proportional shares: ``δ_x[i] = Σ_o δ[o]·|x[i]| / Σ_{j in o} |x[j]|``.

    A window of zeros is divided evenly among its elements inside the input. Σ δ_x = Σ δ. Fits `max_pool` and
    `hidden_layer`.

    Args:
        call: the call of the op.
        delta: δ of the op's output.

    Returns:
        One cotangent per input of the op.

    Raises:
        ValueError: if applied to another op.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0, 0.0, 2.0]).reshape(1, 4, 1)
    >>> rule = jaxcnn.rules.proportional
    >>> jax.vjp(lambda x: jaxcnn.max_pool(x, 4, rule=rule), x)[1](jnp.full((1, 1, 1), 6.0))[0].ravel()
    Array([1., 3., 0., 2.], dtype=float32)
    """
    win, (x,) = call.static, call.inputs
    size, wide = (to_accumulator(a) for a in (jnp.abs(x), delta))
    total, count = window_sum(win, size), window_sum(win, jnp.ones((1, *win.shape, 1), size.dtype))
    shares = jnp.where(total > 0, wide / jnp.where(total > 0, total, 1), 0)
    even = jnp.where(total > 0, 0, wide / count)
    return (size * window_sum_adjoint(win, shares) + window_sum_adjoint(win, even),)


@fits("max_pool", part="pool")
def even_split(call: Call, delta: Array) -> tuple[Array, ...]:
    """Equal shares in a tie: ``δ_x[i] = Σ_o δ[o]·[x[i] = y[o]] / (number of elements of o equal to y[o])``.

    Without ties this is the exact rule. With ties it is the mean of the rules in which each of the equal elements wins.
    Padding is never among them. Σ δ_x = Σ δ. Fits `max_pool` and `hidden_layer`.

    Args:
        call: the call of the op.
        delta: δ of the op's output.

    Returns:
        One cotangent per input of the op.

    Raises:
        ValueError: if applied to another op.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> rule = jaxcnn.rules.even_split
    >>> jax.vjp(lambda x: jaxcnn.max_pool(x, 4, rule=rule), x)[1](jnp.full((1, 1, 1), 6.0))[0].ravel()
    Array([0., 3., 3., 0.], dtype=float32)
    """
    win, (x,), y = call.static, call.inputs, call.output
    won = [((entry == y) | jnp.isnan(entry)) & inside for entry, inside in _entries(win, x)]
    wide = accumulator(delta.dtype)
    share = delta.astype(wide) / functools.reduce(operator.add, (w.astype(wide) for w in won))
    placed = (windows.at_tap(win, tap, jnp.where(w, share, 0)) for tap, w in zip(win.taps(), won, strict=True))
    return (windows.unpad(win, functools.reduce(operator.add, placed)),)


def _entries(win: Window, x: Array) -> list[tuple[Array, Array]]:
    """Return, for every tap, its element in each window and whether that element is inside the input."""
    inside = windows.tap_slices(win, jnp.ones((1, *win.shape, 1), bool), False)
    return list(zip(windows.tap_slices(win, x, -jnp.inf), inside, strict=True))
