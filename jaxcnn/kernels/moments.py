"""Means and squared deviations without the cancellation of Σ x² − (Σ x)²/n: of whole dims, and of every window.

For windows, the moments of two disjoint sets of elements are merged (Chan et al. 1979):

    m = m₁ + d·n₂/(n₁ + n₂)        s = s₁ + s₂ + d²·n₁n₂/(n₁ + n₂)        d = m₂ − m₁

with m = Σ x / n and s = Σ (x − m)². Every term of s is ≥ 0, so the s of a window of equal elements is exactly 0. The
moments of 1, 2, 4, … adjacent elements are computed first, then those of the windows: log₂(size) merges per dim.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcnn.geometry import Window
from jaxcnn.kernels.dtypes import to_accumulator
from jaxcnn.kernels.shapes import known_at_most
from jaxcnn.platforms import Fixed, platform_dependent

#: `in_one_pass` reads at least one of this many elements twice, and `in_one_pass_if_precise` reads all elements twice
#: if their squared mean is at least this many times their variance.
SAMPLED = 16

#: On TPU, arrays of up to this many elements are read twice, which takes as long as deciding whether to.
MOST_READ_TWICE = 1 << 22


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def mean_and_variance(over: tuple[int, ...], dim: int | None, x: Array) -> tuple[Array, Array]:
    """Return mean and variance over dims, which stay with size 1, in the dtype of sums.

    On GPU and TPU, large arrays are read once, if ``dim`` is one of these dims and not None.
    """
    if dim is None or 0 in x.shape:
        return in_two_passes(over, x)
    twice, once = Fixed(in_two_passes, (over,)), Fixed(in_one_pass, (over, dim))
    tpu = twice if known_at_most(x.size, MOST_READ_TWICE) else Fixed(in_one_pass_if_precise, (over,))
    return platform_dependent(x, default=twice, tpu=tpu, cuda=once, rocm=once)


def in_two_passes(over: tuple[int, ...], x: Array) -> tuple[Array, Array]:
    """Return m = Σ x / n and Σ (x − m)² / n."""
    m = _mean(over, x)
    return m, _variance(over, x, m)


def in_one_pass(over: tuple[int, ...], dim: int, x: Array) -> tuple[Array, Array]:
    """Return m = c + Σ (x − c) / n and v = Σ (x − c)² / n − (m − c)², where c is the mean of a sample.

    The sample is every `SAMPLED`-th slice along ``dim``, or the first one of fewer: a share p ≥ 1/16 of the elements.
    The variance between the sample and the rest is at most v, and therefore (m − c)² ≤ v·(1 − p)/p: the difference
    loses at most log₂(1/p) ≤ 4 of the 24 bits, whatever x is. c has no rounding error, because it is one number in
    both sums.
    """
    sample = lax.slice_in_dim(x, 0, None, min(SAMPLED, x.shape[dim]), axis=dim)
    c = _mean(over, sample)
    d = _mean(over, to_accumulator(x) - c)
    return c + d, jnp.maximum(_variance(over, x, c) - jnp.square(d), 0)


def in_one_pass_if_precise(over: tuple[int, ...], x: Array) -> tuple[Array, Array]:
    """Return m = Σ x / n and v = Σ x² / n − m², or `in_two_passes` if m² ≥ 16·v for one of the means.

    Otherwise Σ x² / n < 17·v: the difference loses hardly more than 4 of the 24 bits. XLA:TPU computes both sums in the
    kernel that computes x, for example in a convolution. A sample's mean, as in `in_one_pass`, would be known too late.
    The branch takes x in its own dtype, because XLA writes its operands to memory.
    """
    m = _mean(over, x)
    v = _mean(over, jnp.square(to_accumulator(x))) - jnp.square(m)
    precise = ((jnp.square(m) < SAMPLED * v) | (m == 0)) & (v < jnp.inf)
    return m, lax.cond(precise.all(), lambda: v, lambda: _variance(over, x, m))


def _variance(over: tuple[int, ...], x: Array, m: Array) -> Array:
    """Return Σ (x − m)² / n."""
    return _mean(over, jnp.square(to_accumulator(x) - m))


def _mean(over: tuple[int, ...], x: Array) -> Array:
    return to_accumulator(x).sum(over, keepdims=True) / max(math.prod(x.shape[dim] for dim in over), 1)


class Moments(NamedTuple):
    """Mean, sum of squared deviations and number of elements, one set per array element."""

    m: Array
    s: Array
    n: int


@functools.partial(jax.jit, static_argnums=0, inline=True)
def window_moments(win: Window, x: Array) -> tuple[Array, Array]:
    """Return ``(m, s)``, each of shape ``win.out``, in the accumulation dtype.

    ``x`` has shape ``win.shape``. Stride and dilation must be 1, without padding. 16-bit floats accumulate in float32.
    """
    x = to_accumulator(x)
    moments = Moments(x, jnp.zeros_like(x), 1)
    for dim in range(win.ndim):
        moments = _merge_adjacent(dim, win.size[dim], moments)
    return moments.m, moments.s


def _merge_adjacent(dim: int, k: int, moments: Moments) -> Moments:
    """Merge each ``k`` adjacent sets along a dim, with ``k`` as a sum of powers of 2."""
    out = moments.m.shape[dim] - k + 1
    result, at, power = None, 0, 1
    while power <= k:
        if k & power:
            part = _slice(dim, at, out, moments)
            result = part if result is None else merge(result, part)
            at += power
        power *= 2
        if power <= k:
            half, rest = power // 2, moments.m.shape[dim] - power // 2
            moments = merge(_slice(dim, 0, rest, moments), _slice(dim, half, rest, moments))
    return moments if result is None else result


def _slice(dim: int, at: int, length: int, moments: Moments) -> Moments:
    m, s = (lax.slice_in_dim(a, at, at + length, axis=dim) for a in (moments.m, moments.s))
    return Moments(m, s, moments.n)


def merge(first: Moments, second: Moments) -> Moments:
    """Return the moments of the union of two disjoint sets; 0 if both are empty and have moments 0."""
    (m1, s1, n1), (m2, s2, n2) = first, second
    d, n = m2 - m1, max(n1 + n2, 1)
    return Moments(m1 + d * (n2 / n), s1 + s2 + d * d * (n1 * n2 / n), n1 + n2)
