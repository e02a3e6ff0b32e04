"""Mean and sum of squared deviations of every window, without the cancellation of Σ x² − (Σ x)²/n.

The moments of two adjacent stretches are merged (Chan et al. 1979):

    m = m₁ + d·n₂/(n₁ + n₂)        s = s₁ + s₂ + d²·n₁n₂/(n₁ + n₂)        d = m₂ − m₁

with m = Σ x / n and s = Σ (x − m)². Every term of s is ≥ 0, so the s of a window of equal elements is exactly 0.
Stretches of 1, 2, 4, … elements are computed first, then the windows are composed of them: log₂(size) merges per dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcnn.geometry import Window
from jaxcnn.kernels.dtypes import accumulator

Stretch = tuple[Array, Array, int]


@functools.partial(jax.jit, static_argnums=0, inline=True)
def window_moments(win: Window, x: Array) -> tuple[Array, Array]:
    """Return ``(m, s)``, each of shape ``win.out``, in the accumulation dtype.

    ``x`` has shape ``win.shape``. Stride and dilation must be 1, without padding. 16-bit floats accumulate in float32.
    """
    x = x.astype(accumulator(x.dtype))
    stretch: Stretch = (x, jnp.zeros_like(x), 1)
    for dim in range(win.ndim):
        stretch = _along(dim, win.size[dim], stretch)
    return stretch[:2]


def _along(dim: int, k: int, stretch: Stretch) -> Stretch:
    """Merge ``k`` adjacent stretches along a dim, with ``k`` as a sum of powers of 2."""
    out = stretch[0].shape[dim] - k + 1
    found, at, power = None, 0, 1
    while power <= k:
        if k & power:
            part = _cut(dim, at, out, stretch)
            found = part if found is None else _merge(found, part)
            at += power
        power *= 2
        if power <= k:
            half, rest = power // 2, stretch[0].shape[dim] - power // 2
            stretch = _merge(_cut(dim, 0, rest, stretch), _cut(dim, half, rest, stretch))
    return found if found is not None else stretch


def _cut(dim: int, at: int, length: int, stretch: Stretch) -> Stretch:
    m, s, n = stretch
    return lax.slice_in_dim(m, at, at + length, axis=dim), lax.slice_in_dim(s, at, at + length, axis=dim), n


def _merge(one: Stretch, two: Stretch) -> Stretch:
    (m1, s1, n1), (m2, s2, n2) = one, two
    d = m2 - m1
    return m1 + d * (n2 / (n1 + n2)), s1 + s2 + d * d * (n1 * n2 / (n1 + n2)), n1 + n2
