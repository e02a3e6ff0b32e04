"""One signal against another: correlations of arrays without batch and channels, directly or by Fourier transform.

    correlate   y[o] = Σ_k a[o + first + k] · v[k]       o = 0 … size − 1 in every dim; outside of them a and v are 0

The direct lowerings are those of `correlation` for one picture and one channel.  Of a, v and y the smallest takes the
part of the patch, because the sum is the same for all three: they meet where i = o + first + k.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels.correlation import CORRELATE, MATCH
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.kernels.split import run_whole

METHODS = ("auto", "direct", "fft")

#: Up to this many entries a patch is written out tap by tap; above, the Fourier transform is faster.  Measured on a CPU
#: with 2 cores, float32 and float64, 4,000 to 1,000,000 entries in 1, 2 and 3 dims: even between 60 and 250 taps.
MOST_TAPS = 128
#: The same where y is the smallest: a dot product for each of its entries costs ten times as much as a tap does.
MOST_DOTS = 8


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def correlate(first: tuple[int, ...], size: tuple[int, ...], method: str, a: Array, v: Array) -> Array:
    """``y``, of shape ``size``, in the dtype of ``a`` and ``v``; 16-bit floats accumulate in float32."""
    wide = accumulator(a.dtype)
    fourier = choose_fourier(first, size, method, a, v)
    lowering = correlate_fourier if fourier else correlate_direct
    run = functools.partial(lowering, first, size)
    everywhere = slice(None)
    return run_whole(run, (a.astype(wide), v.astype(wide)), (everywhere,) * 2, everywhere).astype(a.dtype)


def choose_fourier(first: tuple[int, ...], size: tuple[int, ...], method: str, a: Array, v: Array) -> bool:
    """Whether the Fourier transform runs; ``method`` is one of METHODS, "auto" leaves the choice to the sizes."""
    if method != "auto":
        return method == "fft"
    return min(a.size, v.size) > MOST_TAPS and math.prod(size) > MOST_DOTS


def correlate_direct(first: tuple[int, ...], size: tuple[int, ...], a: Array, v: Array) -> Array:
    """Shift, multiply, add on CPU; one convolution of XLA elsewhere, and where that would be too long a program."""
    out = math.prod(size)
    if out < min(a.size, v.size):  # Σ_o a[o + first + k]·v[k] is a patch y that a and v leave behind
        c = _geometry(first, a, size, v.shape)
        return _run(MATCH, out <= MOST_DOTS, c, _picture(a), _picture(v)).reshape(size)
    if a.size < v.size:  # read backwards, v is the picture: k = i + (size − 1 − o) − (first + size − 1)
        back = tuple(1 - f - s for f, s in zip(first, size, strict=True))
        return lax.rev(correlate_direct(back, size, v, a), range(a.ndim))
    c = _geometry(first, a, v.shape, size)
    return _run(CORRELATE, v.size <= MOST_TAPS, c, _picture(a), v[..., None, None]).reshape(size)


def correlate_fourier(first: tuple[int, ...], size: tuple[int, ...], a: Array, v: Array) -> Array:
    """The inverse transform of F(a)·conj F(v), read at the shifts first … first + size − 1.

    Entries that are not finite take no part in the transform, which would send them everywhere. The results at shifts
    where they meet an entry are NaN.
    """
    # Long enough that no other shift is folded onto one of these.
    length = [
        fast_length(max(n, k, n - f, f + s + k - 1)) for n, k, f, s in zip(a.shape, v.shape, first, size, strict=True)
    ]
    finite_a, finite_v = jnp.where(jnp.isfinite(a), a, 0), jnp.where(jnp.isfinite(v), v, 0)
    y = jnp.fft.irfftn(jnp.fft.rfftn(finite_a, length) * jnp.fft.rfftn(finite_v, length).conj(), length)
    y = jnp.roll(y, [-f for f in first], range(a.ndim))
    y = lax.slice(y, (0,) * a.ndim, size)
    some = ~(jnp.isfinite(a).all() & jnp.isfinite(v).all())
    # A loop of one turn or none. Not `lax.cond`: JAX 0.10 confuses its residuals in second derivatives of a scan.
    turn = functools.partial(_nan_where_met, first, size, a=a, v=v)
    return lax.while_loop(lambda to_do: to_do[1], lambda to_do: (turn(to_do[0]), to_do[1] & False), (y, some))[0]


def _nan_where_met(first: tuple[int, ...], size: tuple[int, ...], y: Array, a: Array, v: Array) -> Array:
    """``y``, and NaN at the shifts at which an entry of a or v that is not finite meets one of the other.

    At shift o entry i of a does so if o + first <= i < o + first + K, and entry k of v if
    −o − first <= k < n − o − first.
    """
    shifts = [np.arange(s) + f for s, f in zip(size, first, strict=True)]
    meets_a = _any_between(~jnp.isfinite(a), [(at, at + k) for at, k in zip(shifts, v.shape, strict=True)])
    meets_v = _any_between(~jnp.isfinite(v), [(-at, n - at) for at, n in zip(shifts, a.shape, strict=True)])
    return jnp.where(meets_a | meets_v, np.asarray(np.nan, y.dtype), y)


def _any_between(found: Array, bounds: Sequence[tuple[np.ndarray, np.ndarray]]) -> Array:
    """Whether ``found`` is true anywhere from the first bound up to, not including, the second, in every dim."""
    for axis, pair in enumerate(bounds):
        n = found.shape[axis]
        count = jnp.cumsum(found, axis, dtype=np.int32)
        count = jnp.pad(count, [(int(dim == axis), 0) for dim in range(found.ndim)])
        start, end = (np.clip(bound, 0, n).astype(np.int32) for bound in pair)
        found = jnp.take(count, end, axis, mode="clip") > jnp.take(count, start, axis, mode="clip")
    return found


@functools.cache
def fast_length(n: int) -> int:
    """The smallest 2ⁱ·3ʲ·5ᵏ that is at least ``n``: lengths for which the transform is fast."""
    best = 1 << (n - 1).bit_length()
    fives = 1
    while fives < best:
        odd = fives
        while odd < best:
            best = min(best, odd << max(-(-n // odd) - 1, 0).bit_length())
            odd *= 3
        fives *= 5
    return best


def _geometry(first: tuple[int, ...], a: Array, patch: tuple[int, ...], out: tuple[int, ...]) -> Correlation:
    """``a`` padded so that the patch stands at ``first … first + out − 1``.

    Never negative: the shifts begin at 0 or before, and end at the last that fits or behind it.  That holds for "full",
    "same" and "valid", and the rules, which negate and exchange shapes, keep it so.
    """
    padding = tuple((-f, f + o - 1 + k - n) for f, o, k, n in zip(first, out, patch, a.shape, strict=True))
    ones = (1,) * a.ndim
    return Correlation(Window(a.shape, patch, ones, padding, ones), 1, np.dtype(a.dtype))


def _picture(a: Array) -> Array:
    return a[None, ..., None]


def _run(table: dict, by_tap: bool, c: Correlation, a: Array, b: Array) -> Array:
    """With one channel "unrolled" is the plain loop over taps."""
    everywhere = functools.partial(table["xla"], c)
    if not by_tap:
        return everywhere(a, b)
    return lax.platform_dependent(a, b, cpu=functools.partial(table["unrolled"], c), default=everywhere)
