"""Correlations of two signals, arrays without batch and channels, directly or by Fourier transform.

    correlate   y[o] = Σ_k a[o + first + k] · v[k]       o = 0 … size − 1 in every dim; outside of them a and v are 0

The direct lowerings are those of a convolution layer for one image and one channel. The smallest of a, v and y takes
the role of the kernel, because the sum is the same for all three: it runs over i = o + first + k.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels.correlate import CORRELATE
from jaxcnn.kernels.dtypes import to_accumulator
from jaxcnn.kernels.kernel_grad import KERNEL_GRAD
from jaxcnn.kernels.lowering import Lowering
from jaxcnn.kernels.split import run_whole
from jaxcnn.platforms import Fixed, platform_dependent

METHODS = ("auto", "direct", "fft")

#: Up to this many taps, the kernel is written out tap by tap; for more, the Fourier transform is faster. Measured on a
#: CPU with 2 cores, in float32 and float64, for 4,000 to 1,000,000 elements in 1, 2 and 3 dims: break-even is between
#: 60 and 250 taps.
MAX_TAPS = 128
#: The same limit if y is the smallest: each of its elements is a dot product, which costs ten times as much as a tap.
MAX_DOTS = 8


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def correlate(first: tuple[int, ...], size: tuple[int, ...], method: str, a: Array, v: Array) -> Array:
    """Compute ``y`` of shape ``size``, in the dtype of ``a`` and ``v``; 16-bit floats accumulate in float32."""
    fourier = choose_fourier(first, size, method, a, v)
    lowering = correlate_fourier if fourier else correlate_direct
    run = functools.partial(lowering, first, size)
    all_dims = slice(None)
    return run_whole(run, (to_accumulator(a), to_accumulator(v)), (all_dims,) * 2, all_dims).astype(a.dtype)


def choose_fourier(first: tuple[int, ...], size: tuple[int, ...], method: str, a: Array, v: Array) -> bool:
    """Whether to use the Fourier transform; ``method`` is one of METHODS, and "auto" decides by size."""
    if method != "auto":
        return method == "fft"
    return min(a.size, v.size) > MAX_TAPS and math.prod(size) > MAX_DOTS


def correlate_direct(first: tuple[int, ...], size: tuple[int, ...], a: Array, v: Array) -> Array:
    """Shift, multiply and add on CPU; elsewhere, or if that program would be too long, run one XLA convolution."""
    out = math.prod(size)
    if out < min(a.size, v.size):  # Σ_o a[o + first + k]·v[k]: y is the kernel
        c = _correlation_at(first, a, size, v.shape)
        return _run_direct(KERNEL_GRAD, out <= MAX_DOTS, c, _as_image(a), _as_image(v)).reshape(size)
    if a.size < v.size:  # v, flipped, is the image: k = i + (size − 1 − o) − (first + size − 1)
        first_of_v = tuple(1 - f - s for f, s in zip(first, size, strict=True))
        return lax.rev(correlate_direct(first_of_v, size, v, a), range(a.ndim))
    c = _correlation_at(first, a, v.shape, size)
    return _run_direct(CORRELATE, v.size <= MAX_TAPS, c, _as_image(a), v[..., None, None]).reshape(size)


def correlate_fourier(first: tuple[int, ...], size: tuple[int, ...], a: Array, v: Array) -> Array:
    """Return the inverse transform of F(a)·conj F(v) at the shifts first … first + size − 1.

    Non-finite elements are left out of the transform, which would make every result NaN. Only the results at shifts
    where they meet an element are NaN.
    """
    # Long enough that no other shift aliases one of these.
    length = [
        fast_length(max(n, k, n - f, f + s + k - 1)) for n, k, f, s in zip(a.shape, v.shape, first, size, strict=True)
    ]
    finite_a, finite_v = jnp.where(jnp.isfinite(a), a, 0), jnp.where(jnp.isfinite(v), v, 0)
    y = jnp.fft.irfftn(jnp.fft.rfftn(finite_a, length) * jnp.fft.rfftn(finite_v, length).conj(), length)
    y = jnp.roll(y, [-f for f in first], range(a.ndim))
    y = lax.slice(y, (0,) * a.ndim, size)
    spoiled = ~(jnp.isfinite(a).all() & jnp.isfinite(v).all())
    # A loop with one or no iteration. Not `lax.cond`: JAX 0.10 confuses its residuals in second derivatives of a scan.
    mark = functools.partial(_nan_at_nonfinite, first, size, a=a, v=v)
    return lax.while_loop(lambda state: state[1], lambda state: (mark(state[0]), state[1] & False), (y, spoiled))[0]


def _nan_at_nonfinite(first: tuple[int, ...], size: tuple[int, ...], y: Array, a: Array, v: Array) -> Array:
    """Return ``y`` with NaN at the shifts where a non-finite element of a or v meets an element of the other.

    At shift o, element i of a meets v if o + first <= i < o + first + K, and element k of v meets a if −o − first <= k
    < n − o − first.
    """
    shifts = [np.arange(s) + f for s, f in zip(size, first, strict=True)]
    meets_a = _any_between(~jnp.isfinite(a), [(at, at + k) for at, k in zip(shifts, v.shape, strict=True)])
    meets_v = _any_between(~jnp.isfinite(v), [(-at, n - at) for at, n in zip(shifts, a.shape, strict=True)])
    return jnp.where(meets_a | meets_v, np.asarray(np.nan, y.dtype), y)


def _any_between(mask: Array, bounds: Sequence[tuple[np.ndarray, np.ndarray]]) -> Array:
    """Whether ``mask`` is true anywhere from the first bound up to, not including, the second, in every dim."""
    for axis, pair in enumerate(bounds):
        n = mask.shape[axis]
        count = jnp.cumsum(mask, axis, dtype=np.int32)
        count = jnp.pad(count, [(int(dim == axis), 0) for dim in range(mask.ndim)])
        start, end = (np.clip(bound, 0, n).astype(np.int32) for bound in pair)
        mask = jnp.take(count, end, axis, mode="clip") > jnp.take(count, start, axis, mode="clip")
    return mask


@functools.cache
def fast_length(n: int) -> int:
    """Return the smallest 2ⁱ·3ʲ·5ᵏ >= ``n``: lengths for which the transform is fast."""
    best = 1 << (n - 1).bit_length()
    fives = 1
    while fives < best:
        odd = fives
        while odd < best:
            best = min(best, odd << max(-(-n // odd) - 1, 0).bit_length())
            odd *= 3
        fives *= 5
    return best


def _correlation_at(first: tuple[int, ...], a: Array, kernel: tuple[int, ...], out: tuple[int, ...]) -> Correlation:
    """Return the geometry in which ``a`` is padded so that a kernel of this shape is at ``first … first + out − 1``.

    The padding is never negative: the shifts begin at 0 or before, and end at or after the last that fits. This holds
    for "full", "same" and "valid", and for the rules, which negate and exchange shapes.
    """
    padding = tuple((-f, f + o - 1 + k - n) for f, o, k, n in zip(first, out, kernel, a.shape, strict=True))
    ones = (1,) * a.ndim
    return Correlation(Window(a.shape, kernel, ones, padding, ones), 1, np.dtype(a.dtype))


def _as_image(a: Array) -> Array:
    return a[None, ..., None]


def _run_direct(table: dict[str, Lowering], by_tap: bool, c: Correlation, a: Array, b: Array) -> Array:
    """Run "unrolled", the loop over taps, on CPU if ``by_tap``; otherwise run "xla"."""
    xla = Fixed(table["xla"], (c,))
    return platform_dependent(a, b, default=xla, cpu=Fixed(table["unrolled"], (c,))) if by_tap else xla(a, b)
