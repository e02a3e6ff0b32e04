"""Rules for max pooling: to which entries of a window its δ goes.

Sums below are over the windows o that hold entry i; windows may overlap and reach into padding.  All of these fit
`max_pool`, and `hidden_layer`, whose pooling takes them.
"""

import functools
import operator

import jax.numpy as jnp
from jax import Array

from jaxcnn.geometry import Window
from jaxcnn.kernels import windows
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.ops.pooling import window_spread, window_sum
from jaxcnn.ops.rule import Call
from jaxcnn.rules.fitting import InHiddenLayer, check_fits


def winner(call: Call, delta: Array) -> tuple[Array, ...]:
    """The exact rule: ``δ_x[i] = Σ_o δ[o]·[i won o]``; of equals the first, in row-major order.

    Fits `max_pool` and `hidden_layer`.  Raises: ValueError for another op.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> jax.vjp(lambda x: jaxcnn.max_pool(x, 4, rule=jaxcnn.rules.winner), x)[1](jnp.full((1, 1, 1), 6.0))[0].ravel()
    Array([0., 6., 0., 0.], dtype=float32)
    """
    check_fits(winner, call, "max_pool", "hidden_layer")
    return call.exact(delta)


def literal_up(call: Call, delta: Array) -> tuple[Array, ...]:
    """The lecture's formula at its word: ``δ_x[i] = Σ_o δ[o]``, every entry of a window gets all of its δ.

    With windows side by side this is up(δ) = δ ⊗ 1, the rule of sum pooling (lecture §8, erratum 3).  What reaches into
    padding is lost there.  Fits `max_pool` and `hidden_layer`.

    Raises: ValueError for another op.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> rule = jaxcnn.rules.literal_up
    >>> jax.vjp(lambda x: jaxcnn.max_pool(x, 4, rule=rule), x)[1](jnp.full((1, 1, 1), 6.0))[0].ravel()
    Array([6., 6., 6., 6.], dtype=float32)
    """
    if call.name == "hidden_layer":
        return InHiddenLayer(pool=literal_up)(call, delta)
    check_fits(literal_up, call, "max_pool", "hidden_layer")
    return (window_spread(call.geometry, delta),)


def proportional(call: Call, delta: Array) -> tuple[Array, ...]:
    """To each its share: ``δ_x[i] = Σ_o δ[o]·|x[i]| / Σ_{j in o} |x[j]|``.

    A window of zeros shares evenly among its entries in the picture.  Σ δ_x = Σ δ.  Fits `max_pool` and `hidden_layer`.

    Raises: ValueError for another op.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0, 0.0, 2.0]).reshape(1, 4, 1)
    >>> rule = jaxcnn.rules.proportional
    >>> jax.vjp(lambda x: jaxcnn.max_pool(x, 4, rule=rule), x)[1](jnp.full((1, 1, 1), 6.0))[0].ravel()
    Array([1., 3., 0., 2.], dtype=float32)
    """
    if call.name == "hidden_layer":
        return InHiddenLayer(pool=proportional)(call, delta)
    check_fits(proportional, call, "max_pool", "hidden_layer")
    win, (x,) = call.geometry, call.inputs
    size, wide = (a.astype(accumulator(a.dtype)) for a in (jnp.abs(x), delta))
    total, count = window_sum(win, size), window_sum(win, jnp.ones((1, *win.shape, 1), size.dtype))
    shares = jnp.where(total > 0, wide / jnp.where(total > 0, total, 1), 0)
    even = jnp.where(total > 0, 0, wide / count)
    return (size * window_spread(win, shares) + window_spread(win, even),)


def even_split(call: Call, delta: Array) -> tuple[Array, ...]:
    """Equals share: ``δ_x[i] = Σ_o δ[o]·[x[i] = y[o]] / (how many entries of o are y[o])``.

    The exact rule where no entries are alike; where some are, the mean of the rules that each of them would have.
    Padding is never among them.  Σ δ_x = Σ δ.  Fits `max_pool` and `hidden_layer`.

    Raises: ValueError for another op.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> rule = jaxcnn.rules.even_split
    >>> jax.vjp(lambda x: jaxcnn.max_pool(x, 4, rule=rule), x)[1](jnp.full((1, 1, 1), 6.0))[0].ravel()
    Array([0., 3., 3., 0.], dtype=float32)
    """
    if call.name == "hidden_layer":
        return InHiddenLayer(pool=even_split)(call, delta)
    check_fits(even_split, call, "max_pool", "hidden_layer")
    win, (x,), y = call.geometry, call.inputs, call.output
    won = [((entry == y) | jnp.isnan(entry)) & inside for entry, inside in _entries(win, x)]
    wide = accumulator(delta.dtype)
    share = delta.astype(wide) / functools.reduce(operator.add, (w.astype(wide) for w in won))
    sent = (windows.at_tap(win, tap, jnp.where(w, share, 0)) for tap, w in zip(win.taps(), won, strict=True))
    return (windows.unpad(win, functools.reduce(operator.add, sent)),)


def _entries(win: Window, x: Array) -> list[tuple[Array, Array]]:
    """For every tap the entries it meets, one a window, and whether they lie in the picture."""
    inside = windows.tap_slices(win, jnp.ones((1, *win.shape, 1), bool), False)
    return list(zip(windows.tap_slices(win, x, -jnp.inf), inside, strict=True))
