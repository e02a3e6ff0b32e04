"""Signals: correlation and convolution as in signal processing (lecture §11–14).

Arrays have one, two or three dims without batch and channels. *Correlation* slides v as it is, *convolution* slides it
flipped by 180°; the lecture's §11 swaps the two names (erratum 4). A result covers a range of shifts, a `Lags`. The
family of two is closed under differentiation:

    _convolve    y[o] = Σ_k a[o + first − k]·v[k]      δ_a = correlate(δ, v)      δ_v = correlate(δ, a)
    _correlate   y[o] = Σ_k a[o + first + k]·v[k]      δ_a = convolve(δ, v)       δ_v = correlate(a, δ)

`autocorrelate` and `match_template` are built from them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxcnn.arguments import arrays, bad_value, expect_numbers
from jaxcnn.geometry import Window
from jaxcnn.kernels import fourier, moments
from jaxcnn.kernels.dtypes import to_accumulator
from jaxcnn.kernels.split import run_whole
from jaxcnn.ops import pooling
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp

MODES = ("full", "same", "valid")


def convolve(
    a: ArrayLike, v: ArrayLike, mode: str = "full", *, method: str = "auto", rule: Rule | None = None
) -> Array:
    """Convolution of two signals: ``y[o] = Σ_k a[o + first − k]·v[k]``, with a and v zero outside their bounds.

    Equal to `scipy.signal.convolve`, and in one dim to `numpy.convolve`. ``convolve(a, v)`` is the correlation of a
    with v flipped by 180°. Modes:

    - "full": every shift at which a and v overlap, ``a.shape + v.shape − 1``.
    - "valid": the shifts at which the smaller is inside the larger, ``|a.shape − v.shape| + 1``.
    - "same": the middle of "full", with the shape of a. In one dim it has the shape of the longer one, as in NumPy (if
      v is longer, `scipy.signal` keeps the shape of a).

    Backward: ``δ_a = δ ⋆ v`` and ``δ_v = δ ⋆ a``, two correlations: flipping the kernel twice restores it.

    Args:
        a: array of one to three dims, any float dtype, at least one element.
        v: array of the same rank and dtype.
        mode: "full", "same" or "valid".
        method: "direct", "fft", or "auto", which uses the Fourier transform if both have more than 128 elements. The
            transform's rounding error is relative to the whole result (integers come out only near integers, and one
            NaN spreads everywhere). With "direct" each element is rounded independently.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array of the mode's shape, in the dtype of a.

    Raises:
        ValueError: if ranks, sizes or options do not fit.
        TypeError: if a or v is not an array of a float dtype, or the dtypes differ.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.convolve(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 0.5]))
    Array([0. , 1. , 2.5, 4. , 1.5], dtype=float32)
    """
    a, v = _signals("convolve", a=a, v=v)
    lags = _lags("convolve", a.shape, v.shape, mode, method)
    return apply_rule(_convolve, rule, _convolve_reference)(lags, a, v)


def correlate(
    a: ArrayLike, v: ArrayLike, mode: str = "full", *, method: str = "auto", rule: Rule | None = None
) -> Array:
    """Cross-correlation of two signals: ``y[o] = Σ_k a[o + first + k]·v[k]``, with a and v zero outside their bounds.

    Equal to `scipy.signal.correlate`, and in one dim to `numpy.correlate` (whose default mode is "valid"). Modes are
    those of `convolve`. In "full" and "valid", swapping a and v reverses the result.

    Backward: ``δ_a = δ ∗ v``, a convolution, since the kernel is flipped in the backward pass (lecture §15);
    ``δ_v = a ⋆ δ``.

    Args:
        a: array of one to three dims, any float dtype, at least one element.
        v: array of the same rank and dtype.
        mode: "full", "same" or "valid".
        method: "auto", "direct" or "fft", as in `convolve`.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array of the mode's shape, in the dtype of a.

    Raises:
        ValueError: if ranks, sizes or options do not fit.
        TypeError: if a or v is not an array of a float dtype, or the dtypes differ.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.correlate(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 0.5]))
    Array([0.5, 2. , 3.5, 3. , 0. ], dtype=float32)
    """
    a, v = _signals("correlate", a=a, v=v)
    lags = _lags("correlate", a.shape, v.shape, mode, method)
    return apply_rule(_correlate, rule, _correlate_reference)(lags, a, v)


def autocorrelate(a: ArrayLike, mode: str = "full", *, method: str = "auto", rule: Rule | None = None) -> Array:
    """Correlation of a signal with itself: ``y[o] = Σ_k a[o + first + k]·a[k]`` (lecture §12, §14).

    The result is symmetric about its middle element, shift 0. That element is the energy ``Σ a²`` and the largest:
    variance × n if the mean is zero. White noise has only that peak; a periodic signal has one at every period.

    Backward: ``δ_a = δ ∗ a + a ⋆ δ``, one term for each of the two operands.

    Args:
        a: array of one to three dims, any float dtype, at least one element.
        mode: "full", "same" or "valid" (only the energy).
        method: "auto", "direct" or "fft", as in `convolve`.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array of the mode's shape, in the dtype of a.

    Raises:
        ValueError: if the rank, size or an option does not fit.
        TypeError: if a is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.autocorrelate(jnp.array([1.0, 2.0, 3.0]))
    Array([ 3.,  8., 14.,  8.,  3.], dtype=float32)
    """
    (a,) = _signals("autocorrelate", a=a)
    lags = _lags("autocorrelate", a.shape, a.shape, mode, method)
    return apply_rule(_autocorrelate, rule, _autocorrelate_reference)(lags, a)


@dataclasses.dataclass(frozen=True)
class Lags:
    """The shifts that a result covers, ``first … first + size − 1`` in every dim, and the method that computes them."""

    first: tuple[int, ...]
    size: tuple[int, ...]
    method: str = "auto"

    def resized(self, x: Array) -> "Lags":
        """Return the same first shift, for a result with the shape of ``x``."""
        return dataclasses.replace(self, size=x.shape)

    def negated(self, x: Array) -> "Lags":
        """Return the negated first shift, for a result with the shape of ``x``."""
        return Lags(tuple(-f for f in self.first), x.shape, self.method)


# ---------------------------------------------------------------------------------------------------------------------


@custom_vjp
def _convolve(lags: Lags, a: Array, v: Array) -> Array:
    flipped, first = _flipped(lags, v)
    return fourier.correlate(first, lags.size, lags.method, a, flipped)


def _convolve_fwd(lags: Lags, a: Array, v: Array) -> Any:
    return _convolve(lags, a, v), (a, v)


def _convolve_bwd(lags: Lags, saved: Any, delta: Array) -> Any:
    """δ_a[i] = Σ_k δ[i − first + k]·v[k]; δ_v[k] = Σ_i δ[k − first + i]·a[i]."""
    a, v = saved
    return _correlate(lags.negated(a), delta, v), _correlate(lags.negated(v), delta, a)


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _convolve_reference(lags: Lags, a: Array, v: Array) -> Array:
    flipped, first = _flipped(lags, v)
    return _correlate_reference(dataclasses.replace(lags, first=first), a, flipped)


def _flipped(lags: Lags, v: Array) -> tuple[Array, tuple[int, ...]]:
    """Return ``v`` flipped by 180°, and the first shift of the equivalent correlation: k becomes K − 1 − k."""
    return lax.rev(v, range(v.ndim)), tuple(f - (k - 1) for f, k in zip(lags.first, v.shape, strict=True))


@custom_vjp
def _correlate(lags: Lags, a: Array, v: Array) -> Array:
    return fourier.correlate(lags.first, lags.size, lags.method, a, v)


def _correlate_fwd(lags: Lags, a: Array, v: Array) -> Any:
    return _correlate(lags, a, v), (a, v)


def _correlate_bwd(lags: Lags, saved: Any, delta: Array) -> Any:
    """δ_a[i] = Σ_k δ[i − first − k]·v[k]; δ_v[k] = Σ_o a[k + first + o]·δ[o]."""
    a, v = saved
    return _convolve(lags.negated(a), delta, v), _correlate(lags.resized(v), a, delta)


_correlate.defvjp(_correlate_fwd, _correlate_bwd)


def _correlate_reference(lags: Lags, a: Array, v: Array) -> Array:
    pads = [(-f, f + s - 1 + k - n) for f, s, k, n in zip(lags.first, lags.size, v.shape, a.shape, strict=True)]
    ones, everywhere = (1,) * a.ndim, slice(None)
    product = functools.partial(lax.conv_general_dilated, window_strides=ones, padding=pads)
    return run_whole(product, (a[None, None], v[None, None]), (everywhere,) * 2, everywhere)[0, 0]


@custom_vjp
def _autocorrelate(lags: Lags, a: Array) -> Array:
    return _correlate(lags, a, a)


def _autocorrelate_fwd(lags: Lags, a: Array) -> Any:
    return _autocorrelate(lags, a), a


def _autocorrelate_bwd(lags: Lags, a: Array, delta: Array) -> Any:
    """δ_a[i] = Σ_k δ[i − first − k]·a[k] + Σ_o a[i + first + o]·δ[o]."""
    return (_convolve(lags.negated(a), delta, a) + _correlate(lags.resized(a), a, delta),)


_autocorrelate.defvjp(_autocorrelate_fwd, _autocorrelate_bwd)


def _autocorrelate_reference(lags: Lags, a: Array) -> Array:
    return _correlate_reference(lags, a, a)


# ---------------------------------------------------------------------------------------------------------------------


def match_template(image: ArrayLike, template: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Zero-mean normalized cross-correlation: similarity of each part of an image to a template (lecture §14).

        y[o] = Σ_k (x[o + k] − m[o])·t[k] / √(s[o]·T)      s[o] = Σ_k (x[o + k] − m[o])²      T = Σ_k t[k]²

    m[o] is the mean of the window at o, and t is the template minus its mean. Values are between −1 and 1, and 1 where
    the window equals the template up to brightness and contrast. Equal to `skimage.feature.match_template`
    (``pad_input=False``). The result is 0 where the window or the template is flat, which means that its elements
    differ only by a few rounding errors of the largest one.

    Backward, with D = √(s·T): ``δ_x = (δ/D) ∗ t − Σ over windows of (δ·y/s)(x − m)``;
    ``δ_t = Σ_o (δ/D)(x − m) − t·Σ_o δ·y / T``. At a flat window δ is 0.

    Args:
        image: array of one to three dims, any float dtype.
        template: array of the same rank and dtype, not larger than the image in any dim.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array of shape ``image.shape − template.shape + 1``, with one value per position of the template.

    Raises:
        ValueError: if ranks or sizes do not fit.
        TypeError: if image or template is not an array of a float dtype, or the dtypes differ.

    Source: J. P. Lewis, Fast Normalized Cross-Correlation, 1995.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> image = jnp.zeros((6, 6)).at[1, 1].set(1.0).at[4, 4].set(-1.0)
    >>> jaxcnn.match_template(image, jnp.zeros((3, 3)).at[1, 1].set(1.0)).round(3)
    Array([[ 1.   , -0.125,  0.   ,  0.   ],
           [-0.125, -0.125,  0.   ,  0.   ],
           [ 0.   ,  0.   ,  0.125,  0.125],
           [ 0.   ,  0.   ,  0.125, -1.   ]], dtype=float32)
    """
    image, template = _signals("match_template", image=image, template=template)
    if any(k > n for n, k in zip(image.shape, template.shape, strict=True)):
        expected = f"no larger than image {image.shape} in any dim"
        raise bad_value("match_template", "template", expected, template.shape)
    ones, zeros = (1,) * image.ndim, ((0, 0),) * image.ndim
    win = Window(image.shape, template.shape, ones, zeros, ones)
    return apply_rule(_match_template, rule, _match_template_reference)(win, image, template)


@custom_vjp
def _match_template(win: Window, image: Array, template: Array) -> Array:
    x, t, _, inv_s, inv_t = _standardize(win, image, template, _window_moments)
    return (_correlate(_valid_lags(win), x, t) * inv_s * inv_t).astype(image.dtype)


def _match_template_fwd(win: Window, image: Array, template: Array) -> Any:
    y = _match_template(win, image, template)
    return y, (image, template, y)


def _match_template_bwd(win: Window, saved: Any, delta: Array) -> Any:
    """δ_x = (δ/D) ∗ t − Σ(δ·y/s)∘x + Σ(δ·y·m/s), sums over the windows that contain an element, with D = √(s·T).

    δ_t = x ⋆ (δ/D) − Σ (δ/D)m − t·Σ δ·y / T.
    """
    image, template, y = saved
    lags = _valid_lags(win)
    x, t, m, inv_s, inv_t = _standardize(win, image, template, _window_moments)
    delta, delta_y = delta.astype(x.dtype), (delta * y).astype(x.dtype)
    delta_d = delta * inv_s * inv_t
    weight = delta_y * inv_s**2
    delta_x = _convolve(lags.negated(x), delta_d, t) - _sum_windows(win, weight) * x + _sum_windows(win, weight * m)
    delta_t = _correlate(lags.resized(t), x, delta_d) - jnp.sum(delta_d * m) - t * inv_t**2 * delta_y.sum()
    return delta_x.astype(image.dtype), delta_t.astype(template.dtype)


_match_template.defvjp(_match_template_fwd, _match_template_bwd)


def _match_template_reference(win: Window, image: Array, template: Array) -> Array:
    x, t, _, inv_s, inv_t = _standardize(win, image, template, moments.window_moments)
    return (_correlate_reference(_valid_lags(win), x, t) * inv_s * inv_t).astype(image.dtype)


def _standardize(
    win: Window, image: Array, template: Array, window_moments: Callable[[Window, Array], Any]
) -> tuple[Array, ...]:
    """Return ``x, t, m, 1/√s, 1/√T``; the inverses are 0 where flat.

    x is the image minus its mean, which leaves y unchanged but improves precision. 16-bit floats become float32.
    """
    image, template = (to_accumulator(a) for a in (image, template))
    # The mean of finite elements: a NaN elsewhere in the image must not affect a window.
    finite = jnp.isfinite(image)
    x, t = image - image.mean(where=finite), template - template.mean()
    m, s = window_moments(win, x)
    return x, t, m, _inverse_root(s, image, win.entries), _inverse_root(jnp.sum(t * t), template, win.entries)


def _inverse_root(s: Array, values: Array, entries: int) -> Array:
    """Return ``1/√s``, or 0 where s is no larger than the rounding error of a sum over ``entries`` of the values."""
    rounding = 8 * jnp.finfo(values.dtype).eps * jnp.max(jnp.where(jnp.isfinite(values), jnp.abs(values), 0))
    flat = s <= entries * rounding**2
    return jnp.where(flat, 0, 1 / jnp.sqrt(jnp.where(flat, 1, s)))  # the inner where keeps NaN out of the gradient


def _valid_lags(win: Window) -> Lags:
    return Lags((0,) * win.ndim, win.out)


@custom_vjp
def _window_moments(win: Window, x: Array) -> tuple[Array, Array]:
    """Return the mean m of every window, and s = Σ (x − m)²."""
    return moments.window_moments(win, x)


def _window_moments_fwd(win: Window, x: Array) -> Any:
    m, s = _window_moments(win, x)
    return (m, s), (x, m)


def _window_moments_bwd(win: Window, saved: Any, deltas: Any) -> Any:
    """Summed over the windows that contain an element: δ_x = Σ δ_m/n + 2·Σ δ_s·(x − m)."""
    x, m = saved
    delta_m, delta_s = deltas
    return (_sum_windows(win, delta_m / win.entries - 2 * delta_s * m) + 2 * _sum_windows(win, delta_s) * x,)


_window_moments.defvjp(_window_moments_fwd, _window_moments_bwd)


def _sum_windows(win: Window, y: Array) -> Array:
    """Return for every element the sum of y over the windows that contain it."""
    return pooling.window_sum_adjoint(win, y[None, ..., None])[0, ..., 0]


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _signals(op: str, **named: ArrayLike) -> tuple[Array, ...]:
    """Return the arguments as non-empty floating arrays of one dtype and one rank, 1 to 3."""
    signals = arrays(op, **named)
    for name, array in zip(named, signals, strict=True):
        expect_numbers(op, name, array.shape, array.shape)
    names = " and ".join(named)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(named, signals, strict=True))
    if len({array.ndim for array in signals}) > 1:
        raise bad_value(op, names, "of one rank", shapes)
    if not 1 <= signals[0].ndim <= 3:
        raise bad_value(op, names, "of rank 1, 2 or 3", shapes)
    if any(array.size == 0 for array in signals):
        raise bad_value(op, names, "non-empty", shapes)
    return signals


def _lags(op: str, a: tuple[int, ...], v: tuple[int, ...], mode: str, method: str) -> Lags:
    """Return the shifts of a mode."""
    if method not in fourier.METHODS:
        raise bad_value(op, "method", f"one of {', '.join(fourier.METHODS)}", repr(method))
    if mode not in MODES:
        raise bad_value(op, "mode", f"one of {', '.join(MODES)}", repr(mode))
    dims = list(zip(a, v, strict=True))
    if mode == "valid" and not (all(n >= k for n, k in dims) or all(n <= k for n, k in dims)):
        expected = "at least as large as the other in every dim for mode 'valid'"
        raise bad_value(op, "one of a and v", expected, f"a {a}, v {v}")
    start, size = zip(*(_start_and_size(op, n, k, mode, len(dims)) for n, k in dims), strict=True)
    # "full" starts at shift 0 in a convolution, and where v's last element overlaps a's first one in a correlation.
    first = start if op == "convolve" else tuple(s - (k - 1) for s, k in zip(start, v, strict=True))
    return Lags(first, size, method)


def _start_and_size(op: str, n: int, k: int, mode: str, ndim: int) -> tuple[int, int]:
    """Return the start of the mode in "full" and its number of shifts, for a dim with n elements of a and k of v."""
    if mode == "full":
        return 0, n + k - 1
    if mode == "valid":
        return min(n, k) - 1, abs(n - k) + 1
    if ndim == 1 and k > n:  # NumPy swaps them, and reverses the result of a correlation
        return n // 2 if op == "correlate" else (n - 1) // 2, k
    return (k - 1) // 2, n
