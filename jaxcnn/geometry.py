"""Windows that slide over a picture: their sizes, and the checks made before anything is computed.

A *picture* is an array ``(N, *spatial, C)``, channels last; its spatial dims may be one, two or three.  A
`Window` says where a patch of ``size`` entries stands while it slides over them.  It is static and hashable,
so that equal geometry compiles once.

Every check here names the op, the argument, what it got and what it expected.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeGuard

import jax
import numpy as np

#: What `padding=` accepts: "VALID", "SAME", "SAME_LOWER", "CAUSAL", an int, or for every dimension an int or a pair.
Padding = str | int | Sequence[int | tuple[int, int]]
#: One int for all dimensions, or one for each.
PerDim = int | Sequence[int]

PADDINGS = ("VALID", "SAME", "SAME_LOWER", "CAUSAL")
#: Paddings that repeat the picture instead of adding zeros; same-size, for `conv` only.
PADDING_MODES = ("REFLECT", "REPLICATE", "CIRCULAR")

#: Most entries of the spatial dims of a picture, padded: beyond, sizes overflow in XLA, which ends the process.
MOST_ENTRIES = 2**31 - 1

#: What a static argument must not be.
TRACED = "a value traced by jax; it must be static"


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of ``size`` entries that slides over spatial dims ``shape``.  All tuples have one entry a dimension.

    Output ``o`` and tap ``k`` of a dimension meet the input at ``o·stride + k·dilation − padding[0]``; what lies
    outside ``0 … shape − 1`` is padding.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """How many spatial dims."""
        return len(self.shape)

    @property
    def entries(self) -> int:
        """How many entries one window has, over all dims."""
        return math.prod(self.size)

    @functools.cached_property
    def extent(self) -> tuple[int, ...]:
        """How far one window reaches: ``(size − 1)·dilation + 1``."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True))

    @functools.cached_property
    def out(self) -> tuple[int, ...]:
        """How many windows fit: ``⌊(lo + shape + hi − extent) / stride⌋ + 1``."""
        return tuple(
            (lo + n + hi - e) // s + 1
            for n, e, s, (lo, hi) in zip(self.shape, self.extent, self.stride, self.padding, strict=True)
        )

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """The stride as slices take it: 1 along dims of one window, where no step is made.

        XLA's partitioner gets a slice of one entry with a larger step wrong along a dim that is split over devices.
        """
        return tuple(s if o > 1 else 1 for s, o in zip(self.stride, self.out, strict=True))

    @functools.cached_property
    def span(self) -> tuple[int, ...]:
        """From the start of the first window to the end of the last: ``(out − 1)·stride + extent``."""
        return tuple((o - 1) * s + e for o, s, e in zip(self.out, self.stride, self.extent, strict=True))

    @property
    def padded(self) -> bool:
        """Whether any window may reach outside the picture."""
        return any(pair != (0, 0) for pair in self.padding)

    @property
    def tiles(self) -> bool:
        """Whether the windows lie side by side: no overlap, no gaps, no padding (a remainder may be left over)."""
        return self.stride == self.size and not self.padded and all(d == 1 for d in self.dilation)

    def taps(self) -> Iterator[tuple[int, ...]]:
        """The entries of a window in row-major order, as index tuples."""
        return itertools.product(*map(range, self.size))

    def offset(self, tap: tuple[int, ...]) -> tuple[int, ...]:
        """Where a tap of the first window stands in the padded picture."""
        return tuple(k * d for k, d in zip(tap, self.dilation, strict=True))

    def inside(self, dim: int, margin: tuple[int, int] = (0, 0)) -> np.ndarray:
        """``(out, size)`` of one dimension: which entries of which windows lie in the picture, or in its margin."""
        at = (
            np.arange(self.out[dim])[:, None] * self.stride[dim]
            + np.arange(self.size[dim]) * self.dilation[dim]
            - self.padding[dim][0]
        )
        return (at >= -margin[0]) & (at < self.shape[dim] + margin[1])


@dataclasses.dataclass(frozen=True)
class Correlation:
    """How pictures meet patches: the static half of a convolution layer.

    Pictures ``(N, *window.shape, I)``, patches ``(*window.size, I/groups, O)``, results ``(N, *window.out, O)``; output
    channels ``g·O/groups …`` see input channels ``g·I/groups …`` alone.
    """

    window: Window
    groups: int
    #: What the result is in.
    dtype: np.dtype
    #: As in `jax.lax`; XLA:CPU always computes in full precision.
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
    """The window of an op over spatial dims ``shape``, from what its caller wrote.

    For messages, ``noun`` is what the window is called, ``prefix`` stands before the names of stride and padding, and
    ``accepts`` are the paddings with a name.

    Raises: ValueError or TypeError for sizes, strides or dilations below 1, unknown or negative padding, and windows
    larger than the padded picture.
    """
    ndim = len(shape)
    k = positive(op, noun, size, ndim)
    s = positive(op, f"{prefix}stride", stride, ndim)
    d = positive(op, "dilation", dilation, ndim)
    unsized = Window(shape, k, s, ((0, 0),) * ndim, d)
    pads = pad_widths(op, padding, unsized, argument=f"{prefix}padding", accepts=accepts)
    if static_bool(op, "ceil_mode", ceil_mode):
        pads = tuple(
            (lo, hi + _ceil_excess(n, e, i, lo, hi))
            for n, e, i, (lo, hi) in zip(shape, unsized.extent, s, pads, strict=True)
        )
    for n, e, (lo, hi) in zip(shape, unsized.extent, pads, strict=True):
        if e > lo + n + hi:
            reach = f"{noun} {k}" if all(i == 1 for i in d) else f"{noun} {k} with dilation {d}"
            fail(op, f"{reach} is larger than the padded picture; spatial dims {shape}, padding {pads}")
    not_too_many(op, "the padded picture", [lo + n + hi for n, (lo, hi) in zip(shape, pads, strict=True)])
    return dataclasses.replace(unsized, padding=pads)


def not_too_many(op: str, what: str, spatial: Sequence[int]) -> None:
    """ValueError if a picture of these spatial dims would have more than `MOST_ENTRIES`."""
    if math.prod(spatial) > MOST_ENTRIES:
        fail(op, f"{what} would have spatial dims {tuple(spatial)}, more than 2**31 - 1 entries")


def _ceil_excess(n: int, extent: int, stride: int, lo: int, hi: int) -> int:
    """What must be padded at the end so that a last, partial window counts; it must start inside the picture or its
    leading padding (PyTorch's convention).
    """
    out = -(-(lo + n + hi - extent) // stride) + 1
    if (out - 1) * stride >= n + lo:
        out -= 1
    return max((out - 1) * stride + extent - (lo + n + hi), 0) if out > 0 else 0


def pad_widths(
    op: str, padding: Padding, win: Window, *, argument: str = "padding", accepts: tuple[str, ...] = PADDINGS
) -> tuple[tuple[int, int], ...]:
    """``(before, after)`` for every dimension.  ``win`` supplies sizes; its own padding is not read."""
    if isinstance(padding, str):
        if padding.upper() not in accepts:
            names = ", ".join(accepts)
            fail(op, f"{argument} expected one of {names}, an int, or an int or pair per dim; got {padding!r}")
        return _named_pad_widths(op, argument, padding, win)
    each = tuple(padding) if _is_sequence(padding) else (padding,) * win.ndim
    if len(each) != win.ndim:
        fail(op, f"{argument} expected one int or pair for each of {win.ndim} dims, got {padding!r}")
    return tuple(_pad_pair(op, argument, p, padding) for p in each)


def _pad_pair(op: str, argument: str, entry: Any, whole: Any) -> tuple[int, int]:
    pair = tuple(entry) if _is_sequence(entry) else (entry, entry)
    if len(pair) != 2:
        fail(op, f"{argument} expected pairs (before, after), got {whole!r}")
    lo, hi = (static_int(op, argument, p, whole) for p in pair)
    if lo < 0 or hi < 0:
        fail(op, f"{argument} expected ints >= 0, got {whole!r}")
    if max(lo, hi) > MOST_ENTRIES:
        fail(op, f"{argument} expected ints < 2**31, got {whole!r}")
    return lo, hi


def _named_pad_widths(op: str, argument: str, padding: str, win: Window) -> tuple[tuple[int, int], ...]:
    name = padding.upper()
    if name == "VALID":
        return ((0, 0),) * win.ndim
    if name == "CAUSAL":
        if win.ndim != 1:
            fail(op, f"{argument} 'CAUSAL' expected 1 spatial dim, got {win.ndim}")
        return ((win.extent[0] - 1, 0),)
    total = (max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in zip(win.shape, win.stride, win.extent, strict=True))
    if name == "SAME_LOWER":
        return tuple((t - t // 2, t // 2) for t in total)
    return tuple((t // 2, t - t // 2) for t in total)


def static_ints(op: str, argument: str, value: PerDim, ndim: int) -> tuple[int, ...]:
    """One int for every dimension, from an int or a sequence of them."""
    each = tuple(value) if _is_sequence(value) else (value,) * ndim
    if len(each) != ndim:
        fail(op, f"{argument} expected one int or {ndim} of them, got {value!r}")
    ints = tuple(static_int(op, argument, v, value) for v in each)
    if max(ints, default=0) > MOST_ENTRIES:
        fail(op, f"{argument} expected ints < 2**31, got {value!r}")
    return ints


def positive(op: str, argument: str, value: PerDim, ndim: int) -> tuple[int, ...]:
    """One int >= 1 for every dimension, from an int or a sequence of them."""
    ints = static_ints(op, argument, value, ndim)
    if min(ints, default=1) < 1:
        fail(op, f"{argument} expected ints >= 1, got {value!r}")
    return ints


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def static_int(op: str, argument: str, value: Any, whole: Any) -> int:
    """``value`` as an int; bools, floats and traced values are refused with a TypeError."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {argument} expected ints, got {whole!r}")
    try:
        return operator.index(value)
    except TypeError:  # a tracer raises a subclass of it
        got = TRACED if isinstance(value, jax.core.Tracer) else repr(whole)
        raise TypeError(f"{op}: {argument} expected ints, got {got}") from None


def static_bool(op: str, argument: str, value: Any) -> bool:
    """``value`` as a bool; anything else is refused with a TypeError."""
    if not isinstance(value, bool | np.bool_):
        got = TRACED if isinstance(value, jax.core.Tracer) else repr(value)
        raise TypeError(f"{op}: {argument} expected a bool, got {got}")
    return bool(value)


def static_float(op: str, argument: str, value: Any) -> float:
    """``value`` as a float; bools, arrays and traced values are refused with a TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = TRACED if isinstance(value, jax.core.Tracer) else type(value).__name__
        raise TypeError(f"{op}: {argument} expected a Python float, got {got}")
    try:
        return float(value)
    except OverflowError:
        fail(op, f"{argument} expected a number that a float can hold, got an int of {int(value).bit_length()} bits")


def expect_numbers(op: str, argument: str, sizes: Sequence[Any], shape: Sequence[Any]) -> None:
    """ValueError if a size is a symbol of `jax.export`; only the batch may be one.

    Args:
        op: the name that the message begins with.
        argument: the name of the array.
        sizes: the sizes that must be numbers.
        shape: the whole shape, for the message.
    """
    if not all(isinstance(n, int) for n in sizes):
        symbols = ", ".join(map(str, shape))
        fail(op, f"{argument} must have sizes that are numbers, except for the batch; got shape ({symbols})")


def fail(op: str, message: str) -> NoReturn:
    """Raise the ValueError of an op."""
    raise ValueError(f"{op}: {message}")
