"""Window geometry, and the checks of static arguments that run before any computation.

An *input* is an array ``(N, *spatial, C)``, channels last, with one, two or three spatial dims. A `Window` describes
how a window of ``size`` taps slides over the spatial dims. It is static and hashable, so equal geometry compiles once.

Every error names the op, the argument, what was expected and what was given.
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

#: Values of `padding=`: "VALID", "SAME", "SAME_LOWER", "CAUSAL", an int, or an int or a pair for every dim.
Padding = str | int | Sequence[int | tuple[int, int]]
#: One int for all dims, or one per dim.
PerDim = int | Sequence[int]

PADDINGS = ("VALID", "SAME", "SAME_LOWER", "CAUSAL")
#: Paddings that repeat the input instead of adding zeros. They keep the size; for `conv` only.
PADDING_MODES = ("REFLECT", "REPLICATE", "CIRCULAR")

#: Largest number of spatial elements of a padded input. Beyond it, sizes overflow in XLA and crash the process.
MOST_ENTRIES = 2**31 - 1

#: Error text for a traced value in place of a static argument.
TRACED = "a value traced by jax; it must be static"


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
    def tiles(self) -> bool:
        """Whether windows are adjacent: no overlap, no gaps, no padding. A remainder may be left over."""
        return self.stride == self.size and not self.padded and all(d == 1 for d in self.dilation)

    def taps(self) -> Iterator[tuple[int, ...]]:
        """Iterate over the taps of a window in row-major order, as index tuples."""
        return itertools.product(*map(range, self.size))

    def offset(self, tap: tuple[int, ...]) -> tuple[int, ...]:
        """Return the position of a tap of the first window in the padded input."""
        return tuple(k * d for k, d in zip(tap, self.dilation, strict=True))

    def inside(self, dim: int, margin: tuple[int, int] = (0, 0)) -> np.ndarray:
        """Return a mask ``(out, size)`` along ``dim`` of the taps that fall inside the input or its margin."""
        at = (
            np.arange(self.out[dim])[:, None] * self.stride[dim]
            + np.arange(self.size[dim]) * self.dilation[dim]
            - self.padding[dim][0]
        )
        return (at >= -margin[0]) & (at < self.shape[dim] + margin[1])


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
    """Raise ValueError if an array with these spatial dims would have more than `MOST_ENTRIES` elements."""
    if math.prod(spatial) > MOST_ENTRIES:
        fail(op, f"{what} would have spatial dims {tuple(spatial)}, more than 2**31 - 1 entries")


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
    """Return one int per dim, from an int or a sequence of ints."""
    each = tuple(value) if _is_sequence(value) else (value,) * ndim
    if len(each) != ndim:
        fail(op, f"{argument} expected one int or {ndim} of them, got {value!r}")
    ints = tuple(static_int(op, argument, v, value) for v in each)
    if max(ints, default=0) > MOST_ENTRIES:
        fail(op, f"{argument} expected ints < 2**31, got {value!r}")
    return ints


def positive(op: str, argument: str, value: PerDim, ndim: int) -> tuple[int, ...]:
    """Return one int >= 1 per dim, from an int or a sequence of ints."""
    ints = static_ints(op, argument, value, ndim)
    if min(ints, default=1) < 1:
        fail(op, f"{argument} expected ints >= 1, got {value!r}")
    return ints


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def static_int(op: str, argument: str, value: Any, whole: Any) -> int:
    """Return ``value`` as an int; raise TypeError for bools, floats and traced values."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {argument} expected ints, got {whole!r}")
    try:
        return operator.index(value)
    except TypeError:  # tracers raise a subclass
        got = TRACED if isinstance(value, jax.core.Tracer) else repr(whole)
        raise TypeError(f"{op}: {argument} expected ints, got {got}") from None


def static_bool(op: str, argument: str, value: Any) -> bool:
    """Return ``value`` as a bool; raise TypeError for anything else."""
    if not isinstance(value, bool | np.bool_):
        got = TRACED if isinstance(value, jax.core.Tracer) else repr(value)
        raise TypeError(f"{op}: {argument} expected a bool, got {got}")
    return bool(value)


def static_float(op: str, argument: str, value: Any) -> float:
    """Return ``value`` as a float; raise TypeError for bools, arrays and traced values."""
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
    """Raise ValueError with the op's name in front of the message."""
    raise ValueError(f"{op}: {message}")
