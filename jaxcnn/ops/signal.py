"""Signals: correlation and convolution as signal processing has them (lecture §11–14).

Arrays of one, two or three dims without batch and channels.  *Correlation* slides v as it is, *convolution* slides it
turned by 180°; the lecture's §11 has the two names exchanged (erratum 4).  A result is a stretch of shifts, a `Lags`;
the family of two is closed under differentiation:

    _convolve    y[o] = Σ_k a[o + first − k]·v[k]      δ_a = correlate(δ, v)      δ_v = correlate(δ, a)
    _correlate   y[o] = Σ_k a[o + first + k]·v[k]      δ_a = convolve(δ, v)       δ_v = correlate(a, δ)

`autocorrelate` and `match_template` are made of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxcnn.geometry import Window, fail
from jaxcnn.kernels import fourier, moments
from jaxcnn.ops import pooling
from jaxcnn.ops.rule import Rule, arrays, with_rule

MODES = ("full", "same", "valid")


def convolve(a: ArrayLike, v: ArrayLike, mode: str = "full", *, method: str = "auto", rule: Rule | None = None) -> Array:
    """Convolution of two signals: ``y[o] = Σ_k a[o + first − k]·v[k]``, with a and v zero outside of their entries.

    Equal to `scipy.signal.convolve`, and in one dim to `numpy.convolve`; ``convolve(a, v)`` is ``correlate(a, v turned
    by 180°)``.  Modes:

    - "full": every shift at which they meet, ``a.shape + v.shape − 1``.
    - "valid": the shifts at which the smaller lies inside the larger, ``|a.shape − v.shape| + 1``.
    - "same": the middle of "full", with the shape of a.  In one dim, as in NumPy, with that of the longer one: where v is
      longer `scipy.signal` differs.

    Backward: ``δ_a = δ ⋆ v`` and ``δ_v = δ ⋆ a``, two correlations (lecture §15: turned once more, the patch stands as it
    was).

    Args:
        a: one to three dims, any float dtype, at least one entry.
        v: of the same rank and dtype.
        mode: "full", "same" or "valid".
        method: "direct", "fft", or "auto": by Fourier transform where both have more than 128 entries.  The transform
            rounds to the scale of the whole result (whole numbers come out near whole, and one NaN is everywhere);
            "direct" rounds each entry by itself.
        rule: another backward half; see `jaxcnn.rules`.

    Returns: the mode's shape, in the dtype of a.

    Raises: ValueError for ranks, sizes or options that do not fit, TypeError for dtypes.

    >>> convolve(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 0.5]))
    Array([0. , 1. , 2.5, 4. , 1.5], dtype=float32)
    """
    a, v = _signals("convolve", a, v)
    lags = _lags("convolve", a.shape, v.shape, mode, method)
    return with_rule(_convolve, rule, _convolve_plain)(lags, a, v)


def correlate(a: ArrayLike, v: ArrayLike, mode: str = "full", *, method: str = "auto", rule: Rule | None = None) -> Array:
    """Cross-correlation of two signals: ``y[o] = Σ_k a[o + first + k]·v[k]``, zero outside of their entries.

    Equal to `scipy.signal.correlate`, and in one dim to `numpy.correlate`, whose "full" this is not by default.
    Modes are those of `convolve`.  Exchanging a and v reverses "full" and "valid".

    Backward: ``δ_a = δ ∗ v``, a convolution: the patch is turned on the way back (lecture §15); ``δ_v = a ⋆ δ``.

    Args:
        a: one to three dims, any float dtype, at least one entry.
        v: of the same rank and dtype.
        mode: "full", "same" or "valid".
        method: "auto", "direct" or "fft", as in `convolve`.
        rule: another backward half; see `jaxcnn.rules`.

    Returns: the mode's shape, in the dtype of a.

    Raises: ValueError for ranks, sizes or options that do not fit, TypeError for dtypes.

    >>> correlate(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 0.5]))
    Array([0.5, 2. , 3.5, 3. , 0. ], dtype=float32)
    """
    a, v = _signals("correlate", a, v)
    lags = _lags("correlate", a.shape, v.shape, mode, method)
    return with_rule(_correlate, rule, _correlate_plain)(lags, a, v)


def autocorrelate(a: ArrayLike, mode: str = "full", *, method: str = "auto", rule: Rule | None = None) -> Array:
    """Correlation of a signal with itself: ``y[o] = Σ_k a[o + first + k]·a[k]`` (lecture §12, §14).

    Even about its middle entry, the shift 0, which holds the energy ``Σ a²`` and is the largest: variance × n if the
    mean is zero.  White noise has nothing but that entry, a periodic signal a peak at every period.

    Backward: ``δ_a = δ ∗ a + a ⋆ δ``, a as the one operand and as the other.

    Args:
        a: one to three dims, any float dtype, at least one entry.
        mode: "full", "same" or "valid" (the energy alone).
        method: "auto", "direct" or "fft", as in `convolve`.
        rule: another backward half; see `jaxcnn.rules`.

    Returns: the mode's shape, in the dtype of a.

    Raises: ValueError for a rank, size or option that does not fit, TypeError for dtypes.

    >>> autocorrelate(jnp.array([1.0, 2.0, 3.0]))
    Array([ 3.,  8., 14.,  8.,  3.], dtype=float32)
    """
    (a,) = _signals("autocorrelate", a)
    lags = _lags("autocorrelate", a.shape, a.shape, mode, method)
    return with_rule(_autocorrelate, rule, _autocorrelate_plain)(lags, a)


@dataclasses.dataclass(frozen=True)
class Lags:
    """The shifts that a result holds, ``first … first + size − 1`` in every dim, and how they are computed."""

    first: tuple[int, ...]
    size: tuple[int, ...]
    method: str = "auto"

    def over(self, x: Array) -> "Lags":
        """The same first shift, for a result of the shape of ``x``."""
        return dataclasses.replace(self, size=x.shape)

    def back(self, x: Array) -> "Lags":
        """From the other side: the first shift negated, for a result of the shape of ``x``."""
        return Lags(tuple(-f for f in self.first), x.shape, self.method)


# ---------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(lags: Lags, a: Array, v: Array) -> Array:
    turned, first = _turned(lags, v)
    return fourier.correlate(first, lags.size, lags.method, a, turned)


def _convolve_fwd(lags: Lags, a: Array, v: Array) -> Any:
    return _convolve(lags, a, v), (a, v)


def _convolve_bwd(lags: Lags, saved: Any, delta: Array) -> Any:
    """δ_a[i] = Σ_k δ[i − first + k]·v[k];  δ_v[k] = Σ_i δ[k − first + i]·a[i]."""
    a, v = saved
    return _correlate(lags.back(a), delta, v), _correlate(lags.back(v), delta, a)


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _convolve_plain(lags: Lags, a: Array, v: Array) -> Array:
    turned, first = _turned(lags, v)
    return _correlate_plain(dataclasses.replace(lags, first=first), a, turned)


def _turned(lags: Lags, v: Array) -> tuple[Array, tuple[int, ...]]:
    """``v`` turned by 180°, and the first shift that makes a correlation of the convolution: k becomes K − 1 − k."""
    return lax.rev(v, range(v.ndim)), tuple(f - (k - 1) for f, k in zip(lags.first, v.shape, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _correlate(lags: Lags, a: Array, v: Array) -> Array:
    return fourier.correlate(lags.first, lags.size, lags.method, a, v)


def _correlate_fwd(lags: Lags, a: Array, v: Array) -> Any:
    return _correlate(lags, a, v), (a, v)


def _correlate_bwd(lags: Lags, saved: Any, delta: Array) -> Any:
    """δ_a[i] = Σ_k δ[i − first − k]·v[k];  δ_v[k] = Σ_o a[k + first + o]·δ[o]."""
    a, v = saved
    return _convolve(lags.back(a), delta, v), _correlate(lags.over(v), a, delta)


_correlate.defvjp(_correlate_fwd, _correlate_bwd)


def _correlate_plain(lags: Lags, a: Array, v: Array) -> Array:
    pads = [(-f, f + s - 1 + k - n) for f, s, k, n in zip(lags.first, lags.size, v.shape, a.shape, strict=True)]
    return lax.conv_general_dilated(a[None, None], v[None, None], (1,) * a.ndim, pads)[0, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _autocorrelate(lags: Lags, a: Array) -> Array:
    return _correlate(lags, a, a)


def _autocorrelate_fwd(lags: Lags, a: Array) -> Any:
    return _autocorrelate(lags, a), a


def _autocorrelate_bwd(lags: Lags, a: Array, delta: Array) -> Any:
    """δ_a[i] = Σ_k δ[i − first − k]·a[k] + Σ_o a[i + first + o]·δ[o]."""
    return (_convolve(lags.back(a), delta, a) + _correlate(lags.over(a), a, delta),)


_autocorrelate.defvjp(_autocorrelate_fwd, _autocorrelate_bwd)


def _autocorrelate_plain(lags: Lags, a: Array) -> Array:
    return _correlate_plain(lags, a, a)


# ---------------------------------------------------------------------------------------------------------------------


def match_template(image: ArrayLike, template: ArrayLike, *, rule: Rule | None = None) -> Array:
    """How much each part of a picture looks like a template: zero-mean normalised cross-correlation (lecture §14).

        y[o] = Σ_k (x[o + k] − m[o])·t[k] / √(s[o]·T)      s[o] = Σ_k (x[o + k] − m[o])²      T = Σ_k t[k]²

    with m[o] the mean of the window at o, and t the template less its mean.  Between −1 and 1; 1 where the window is
    the template up to brightness and contrast.  Equal to `skimage.feature.match_template` (``pad_input=False``).  0 where
    the window or the template is flat: where its entries differ by no more than a few roundings of the largest one.

    Backward, with D = √(s·T): ``δ_x = (δ/D) ∗ t − Σ over windows of (δ·y/s)(x − m)``;
    ``δ_t = Σ_o (δ/D)(x − m) − t·Σ_o δ·y / T``.  At a flat window δ is 0.

    Args:
        image: one to three dims, any float dtype.
        template: of the same rank and dtype, in no dim larger than the image.
        rule: another backward half; see `jaxcnn.rules`.

    Returns: ``image.shape − template.shape + 1``: one value for each place of the template's first entry.

    Raises: ValueError for ranks or sizes that do not fit, TypeError for dtypes.

    Source: J. P. Lewis, Fast Normalized Cross-Correlation, 1995.

    >>> image = jnp.zeros((6, 6)).at[1, 1].set(1.0).at[4, 4].set(-1.0)
    >>> match_template(image, jnp.zeros((3, 3)).at[1, 1].set(1.0)).round(3)
    Array([[ 1.   , -0.125,  0.   ,  0.   ],
           [-0.125, -0.125,  0.   ,  0.   ],
           [ 0.   ,  0.   ,  0.125,  0.125],
           [ 0.   ,  0.   ,  0.125, -1.   ]], dtype=float32)
    """
    image, template = _signals("match_template", image=image, template=template)
    if any(k > n for n, k in zip(image.shape, template.shape, strict=True)):
        fail("match_template", f"template {template.shape} is larger than image {image.shape}")
    ones, zeros = (1,) * image.ndim, ((0, 0),) * image.ndim
    win = Window(image.shape, template.shape, ones, zeros, ones)
    return with_rule(_match_template, rule, _match_template_plain)(win, image, template)
