"""Window geometry, and the checks of its arguments, which run before any computation.

An *input* is an array ``(N, *spatial, C)``, channels last, with one, two or three spatial dims. A `Window` describes
how a window of ``size`` taps slides over the spatial dims. It is static and hashable, so equal geometry compiles once.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxcnn.arguments import MAX_ELEMENTS, bad_value, ints, is_sequence, positive, static_bool, static_int

#: Values of `padding=`: "VALID", "SAME", "SAME_LOWER", "CAUSAL", an int, or an int or a pair for every dim.
Padding = str | int | Sequence[int | tuple[int, int]]
#: One int for all dims, or one per dim.
PerDim = int | Sequence[int]

PADDINGS = ("VALID", "SAME", "SAME_LOWER", "CAUSAL")
#: Paddings that repeat the input instead of adding zeros. They keep the size; for `conv` only.
PADDING_MODES = ("REFLECT", "REPLICATE", "CIRCULAR")


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of ``size`` taps that slides over spatial dims ``shape``. Every tuple has one element per dim.

    Tap ``k`` of output ``o`` reads the input at ``o·stride + k·dilation − padding[0]`` along each dim. Positions
    outside ``0 … shape − 1`` are padding.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of spatial dims."""
        return len(self.shape)

    @property
    def entries(self) -> int:
        """Number of taps of one window, over all dims."""
        return math.prod(self.size)

    @functools.cached_property
    def extent(self) -> tuple[int, ...]:
        """Extent of one window: ``(size − 1)·dilation + 1``."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True))

    @functools.cached_property
    def out(self) -> tuple[int, ...]:
        """Number of windows per dim: ``⌊(lo + shape + hi − extent) / stride⌋ + 1``."""
        return tuple(
            (lo + n + hi - e) // s + 1
            for n, e, s, (lo, hi) in zip(self.shape, self.extent, self.stride, self.padding, strict=True)
        )

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """The stride for slicing, with 1 along dims that hold a single window.

        XLA's partitioner miscompiles a one-element slice with a larger step along a dim that is sharded.
        """
        return tuple(s if o > 1 else 1 for s, o in zip(self.stride, self.out, strict=True))

    @functools.cached_property
    def span(self) -> tuple[int, ...]:
        """Distance from the start of the first window to the end of the last: ``(out − 1)·stride + extent``."""
        return tuple((o - 1) * s + e for o, s, e in zip(self.out, self.stride, self.extent, strict=True))

    @property
    def padded(self) -> bool:
        """Whether any window may extend beyond the input."""
        return any(pair != (0, 0) for pair in self.padding)

    @property
    def strided(self) -> bool:
        """Whether the stride is more than 1 along any dim."""
        return any(s > 1 for s in self.stride)

    @property
    def tiles(self) -> bool:
        """Whether windows are adjacent: no overlap, no gaps, no padding. A remainder may be left over."""
        return self.stride == self.size and not self.padded and all(d == 1 for d in self.dilation)

    @property
    def without_overlap(self) -> bool:
        """Whether the stride is at least the size along all dims: windows without dilation then share no elements."""
        return all(k <= s for k, s in zip(self.size, self.stride, strict=True))

    def taps(self) -> Iterator[tuple[int, ...]]:
        """Iterate over the taps of a window in row-major order, as index tuples."""
        return itertools.product(*map(range, self.size))

    def offset(self, tap: tuple[int, ...]) -> tuple[int, ...]:
        """Return the position of a tap of the first window in the padded input."""
        return tuple(k * d for k, d in zip(tap, self.dilation, strict=True))

    def inside(self, dim: int, margin: tuple[int, int] = (0, 0)) -> np.ndarray:
        """Return a mask ``(out, size)`` along ``dim`` of the taps that fall inside the input or its margin."""
        positions = (
            np.arange(self.out[dim])[:, None] * self.stride[dim]
            + np.arange(self.size[dim]) * self.dilation[dim]
            - self.padding[dim][0]
        )
        return (positions >= -margin[0]) & (positions < self.shape[dim] + margin[1])


@dataclasses.dataclass(frozen=True)
class Correlation:
    """The static part of a convolution layer's call.

    Inputs are ``(N, *window.shape, I)``, kernels ``(*window.size, I/groups, O)`` and results ``(N, *window.out, O)``.
    Output channels ``g·O/groups …`` depend only on input channels ``g·I/groups …``.
    """

    window: Window
    groups: int
    #: Dtype of the result.
    dtype: np.dtype
    #: As in `jax.lax`. XLA:CPU always computes in full precision.
    precision: Any = None


def window(
    op: str,
    shape: tuple[int, ...],
    size: PerDim,
    *,
    stride: PerDim = 1,
    padding: Padding = "VALID",
    dilation: PerDim = 1,
    ceil_mode: bool = False,
    noun: str = "window",
    prefix: str = "",
    accepts: tuple[str, ...] = PADDINGS,
) -> Window:
    """Build an op's `Window` over spatial dims ``shape`` from the arguments of its caller.

    Args:
        op: name of the op, for error messages.
        shape: spatial dims of the input.
        size: number of taps, an int or one per dim.
        stride: distance between windows.
        padding: padding of the input; see `Padding`.
        dilation: distance between taps.
        ceil_mode: whether a last, partial window counts.
        noun: name of the window in error messages.
        prefix: prefix of the argument names ``stride`` and ``padding`` in error messages.
        accepts: the named paddings that the op accepts.

    Returns:
        The window, with padding in elements.

    Raises:
        ValueError: if a size, stride or dilation is below 1, the padding is unknown or negative, or the window is
            larger than the padded input.
        TypeError: if an argument is not static or has the wrong type.
    """
    ndim = len(shape)
    k = positive(op, noun, size, ndim)
    s = positive(op, f"{prefix}stride", stride, ndim)
    d = positive(op, "dilation", dilation, ndim)
    unpadded = Window(shape, k, s, ((0, 0),) * ndim, d)
    pads = pad_widths(op, padding, unpadded, argument=f"{prefix}padding", accepts=accepts)
    if static_bool(op, "ceil_mode", ceil_mode):
        pads = tuple(
            (lo, hi + _ceil_excess(n, e, i, lo, hi))
            for n, e, i, (lo, hi) in zip(shape, unpadded.extent, s, pads, strict=True)
        )
    padded = tuple(lo + n + hi for n, (lo, hi) in zip(shape, pads, strict=True))
    if any(e > n for e, n in zip(unpadded.extent, padded, strict=True)):
        got = f"{k}" if all(i == 1 for i in d) else f"{k} with dilation {d}"
        raise bad_value(op, noun, f"at most the padded spatial dims {padded}", got)
    not_too_many(op, "the padded input", padded)
    return dataclasses.replace(unpadded, padding=pads)


def not_too_many(op: str, what: str, spatial: Sequence[int]) -> None:
    """Raise ValueError if an array with these spatial dims would have more than `MAX_ELEMENTS` elements."""
    if math.prod(spatial) > MAX_ELEMENTS:
        raise bad_value(op, what, "of at most 2**31 - 1 spatial elements", f"spatial dims {tuple(spatial)}")


def _ceil_excess(n: int, extent: int, stride: int, lo: int, hi: int) -> int:
    """Return the padding needed at the end so that a last, partial window counts.

    Such a window must start inside the input or its leading padding (PyTorch's convention).
    """
    out = -(-(lo + n + hi - extent) // stride) + 1
    if (out - 1) * stride >= n + lo:
        out -= 1
    return max((out - 1) * stride + extent - (lo + n + hi), 0) if out > 0 else 0


def pad_widths(
    op: str, padding: Padding, win: Window, *, argument: str = "padding", accepts: tuple[str, ...] = PADDINGS
) -> tuple[tuple[int, int], ...]:
    """Return ``(before, after)`` for every dim. ``win`` supplies the sizes; its own padding is ignored."""
    if isinstance(padding, str):
        if padding.upper() not in accepts:
            names = ", ".join(accepts)
            raise bad_value(op, argument, f"one of {names}, an int, or an int or pair per dim", repr(padding))
        return _named_pad_widths(op, argument, padding, win)
    each = tuple(padding) if is_sequence(padding) else (padding,) * win.ndim
    if len(each) != win.ndim:
        raise bad_value(op, argument, f"one int or pair for each of {win.ndim} dims", repr(padding))
    return tuple(_pad_pair(op, argument, p, padding) for p in each)


def _pad_pair(op: str, argument: str, entry: Any, whole: Any) -> tuple[int, int]:
    """Return one dim's padding ``(before, after)`` from an element of the argument ``whole``."""
    pair = tuple(entry) if is_sequence(entry) else (entry, entry)
    if len(pair) != 2:
        raise bad_value(op, argument, "pairs (before, after)", repr(whole))
    lo, hi = (static_int(op, argument, p, whole) for p in pair)
    if lo < 0 or hi < 0:
        raise bad_value(op, argument, ints(whole, ">= 0"), repr(whole))
    if max(lo, hi) > MAX_ELEMENTS:
        raise bad_value(op, argument, ints(whole, "< 2**31"), repr(whole))
    return lo, hi


def _named_pad_widths(op: str, argument: str, padding: str, win: Window) -> tuple[tuple[int, int], ...]:
    """Return the widths of "VALID", "SAME", "SAME_LOWER" or "CAUSAL"."""
    name = padding.upper()
    if name == "VALID":
        return ((0, 0),) * win.ndim
    if name == "CAUSAL":
        if win.ndim != 1:
            raise bad_value(op, f"the number of spatial dims with {argument} 'CAUSAL'", "1", win.ndim)
        return ((win.extent[0] - 1, 0),)
    total = (max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in zip(win.shape, win.stride, win.extent, strict=True))
    if name == "SAME_LOWER":
        return tuple((t - t // 2, t // 2) for t in total)
    return tuple((t // 2, t - t // 2) for t in total)
