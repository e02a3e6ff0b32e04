"""Windows over images: maxima and their indices, sums, and the adjoints of both.

Images have shape ``(N, *win.shape, C)``, and values per window have shape ``(N, *win.out, C)``. The *winner* of a
window is the row-major number of its largest element within the window. It takes one byte if the window has at most 255
elements.

Every function is a few strided slices (or their adjoint, interior-padded adds), which XLA fuses into one loop.
``reduce_window`` and ``select_and_scatter`` are tens of times slower on CPU. For windows of more than
`MAX_UNROLLED_TAPS` taps the program would become long, so they use the functions named ``_long``.

`max_and_winner` and `scatter_to_winners` have several lowerings. `choose_max` and `choose_scatter` pick one per
platform.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxcnn.geometry import Window
from jaxcnn.kernels.dtypes import accumulator, to_accumulator
from jaxcnn.kernels.materialize import materialize
from jaxcnn.kernels.reductions import largest
from jaxcnn.kernels.shapes import expand_rank, known_at_most
from jaxcnn.kernels.split import run_whole
from jaxcnn.platforms import Fixed, platform_dependent, program

#: Windows of up to this many taps are written out tap by tap.
MAX_UNROLLED_TAPS = 64

#: Windows of up to this many taps are reduced by one `lax.reduce_window` on GPU, whose work grows with the taps.
MAX_WHOLE_TAPS = 256

#: As `MAX_UNROLLED_TAPS`, for the maximum over adjacent windows on GPU and TPU. With more taps XLA recomputes the
#: winner per element.
MAX_UNROLLED_TILE = 16

#: On CPU, windows of up to this many taps are compared at once, larger ones along one dim after the other.
MAX_COMPARED_TAPS = 9

#: On CPU, δ of overlapping windows of up to this many taps is added tap by tap. A scatter takes as long for any number,
#: as long as for 15 to 25 taps on 2 cores.
MAX_ADDED_TAPS = 24

#: Number of terms that are added at once for windows of more than `MAX_UNROLLED_TAPS` taps, if padded of more than
#: `MAX_UNROLLED_TILE`. XLA:TPU would otherwise write the shifted images of all taps to memory, and take 2.4 times as
#: long for 11 × 11.
ADDED_AT_ONCE = 8

#: On CPU, padded images of up to this many channels are summed row by row.
MAX_ROW_CHANNELS = 3

#: On CPU, `lax.reduce_window` sums padded images of at least this many channels, if windows do not overlap.
LEAST_WHOLE_CHANNELS = 64

#: On CPU, `lax.reduce_window` adds δ of overlapping 2 × 2 windows of up to this many channels: 0.17 ms for 16 images of
#: 110 × 37 × 16, and 0.32 along one dim after the other. With 64 channels it takes longer, with 3 × 3 windows 3 times.
MAX_WHOLE_ADJOINT_CHANNELS = 16

#: On TPU, images of up to this many elements fit in the chip's vector memory with what is computed from them. For
#: larger ones, a lowering that reads and writes the image several times takes up to 24 times as long as XLA's own
#: reduction, for example `avg_pool` with 3 × 3 windows and stride 2 for 16 images of 112 × 112 × 64.
MAX_ON_CHIP = 1 << 22

#: The same for sums of windows that do not overlap, by a reshape to tiles.
MAX_TILES_ON_CHIP = 1 << 21

#: On TPU, "in_place" needs at least this many images per device, one per row of a vector register. With 4 images of
#: 112 × 112 × 64, both passes of a convolution, batch norm, ReLU, pool and convolution take 2.4 times as long.
LEAST_IMAGES = 8


def winner_dtype(win: Window) -> np.dtype:
    """Return the smallest dtype that numbers a window's elements, with its largest value reserved (see `nothing`)."""
    return np.dtype(np.uint8 if win.entries <= 255 else np.uint16 if win.entries <= 65535 else np.uint32)


def nothing(win: Window) -> np.generic:
    """Return the code for "no element": `scatter_to_winners` drops its value, and `gather_winners` reads zero."""
    dtype = winner_dtype(win)
    return dtype.type(np.iinfo(dtype).max)


# ---------------------------------------------------------------------------------------------------------------------
# Choice of lowering


def choose_max(win: Window, batch: int, elements: int) -> dict[str, str]:
    """Choose the lowering of `max_and_winner` per platform, a key of `MAX`.

    ``elements`` is the number of elements of the batch of images.
    """
    if win.tiles and win.entries > MAX_UNROLLED_TILE:
        return _everywhere("tiles") | {"cpu": _max_on_cpu(win)}
    if win.entries > MAX_UNROLLED_TAPS:
        # On GPU, "long" writes the maxima along each dim to memory, with their indices.
        gpu = "whole" if win.entries <= MAX_WHOLE_TAPS else "long"
        # On TPU, "long" takes 5 to 30 times as long.
        tpu = "by_dim" if max(win.size) <= MAX_UNROLLED_TAPS else "long"
        return {"cpu": _max_on_cpu(win), "tpu": tpu, "cuda": gpu, "rocm": gpu}
    tpu = _max_on_tpu(win, batch, elements)
    # On GPU, XLA writes the test for NaN of every element of x to memory, which it would do for "compare" only if
    # windows overlap. On TPU, "fold" takes 1.5 times as long as "compare".
    gpu = "compare" if win.tiles else "fold"
    return {"cpu": _max_on_cpu(win), "tpu": tpu, "cuda": gpu, "rocm": gpu}


def _max_on_tpu(win: Window, batch: int, elements: int) -> str:
    """Choose for windows of up to `MAX_UNROLLED_TAPS` taps."""
    if win.padded and not win.strided:
        return "by_dim"  # with "spatial_first", both passes take up to 1.4 times as long
    # XLA:TPU takes two to five times as long for strided slices, except for 2-D windows that do not overlap. The step
    # of a VGG net takes 9 % longer if its pools, of 64 images of 32 × 32 × 64, are computed "spatial_first".
    adjacent = win.tiles and win.ndim == 2 and not _in_place_pays_on_tpu(win, batch, elements)
    return "compare" if adjacent else "spatial_first"


def _max_on_cpu(win: Window) -> str:
    if win.entries <= MAX_COMPARED_TAPS:
        return "compare"
    if max(win.size) <= MAX_UNROLLED_TAPS:
        return "by_dim"
    return "tiles" if win.tiles else "long"


def choose_scatter(win: Window, batch: int, elements: int) -> dict[str, str]:
    """Choose the lowering of `scatter_to_winners` per platform, a key of `SCATTER`; arguments as for `choose_max`."""
    in_place = _in_place_pays_on_tpu(win, batch, elements)
    if win.tiles:
        # With a reshape to tiles, the step of a ResNeXt net takes 13 % longer, and 1-D windows take longer, too.
        small = {1: "phases", 2: "slices"}.get(win.ndim, "tiles")
        tpu = "tiles" if win.entries > MAX_UNROLLED_TILE else "in_place" if in_place else small
        return _everywhere("tiles") | {"tpu": tpu}
    # XLA:TPU does not fuse padding between elements, which "taps" uses.
    tpu = "in_place" if in_place else "slices" if win.padded else "phases"
    if win.entries > MAX_UNROLLED_TAPS:
        # XLA:GPU computes divisions in a kernel of their own, and writes the quotients to memory.
        gpu, tpu = ("multiplied", tpu) if win.entries <= MAX_WHOLE_TAPS else ("long", "long")
        return {"cpu": "long", "tpu": tpu, "cuda": gpu, "rocm": gpu}
    return {"cpu": "taps" if win.entries <= MAX_ADDED_TAPS else "long", "tpu": tpu, "cuda": "taps", "rocm": "taps"}


def _in_place_pays_on_tpu(win: Window, batch: int, elements: int) -> bool:
    """Whether max pooling is to write both its padded input and δ_x in place."""
    few = known_at_most(batch, LEAST_IMAGES - 1) or known_at_most(elements, MAX_ON_CHIP)
    return win.ndim > 1 and win.strided and not few


def choose_sum(win: Window, channels: int, elements: int) -> dict[str, str]:
    """Choose the lowering of `window_sum` per platform, a key of `SUM`; ``elements`` as for `choose_max`."""
    if win.tiles:
        tpu = "tiles" if _tiles_pay_on_tpu(win, elements, MAX_TILES_ON_CHIP) else "reduce_window"
    else:
        # With strides, "by_dim" copies the image.
        tpu = "by_dim" if not win.strided or known_at_most(elements, MAX_ON_CHIP) else "reduce_window"
    return {"cpu": _sum_on_cpu(win, channels), "tpu": tpu} | _sum_on_gpu(win)


def _sum_on_cpu(win: Window, channels: int) -> str:
    if win.padded and win.ndim == 1:  # 16 images of 128 × 128, windows of 3: 65 µs along the dim, 32 in one reduction
        return "by_dim" if known_at_most(channels, MAX_ROW_CHANNELS) else "whole"
    if not win.padded or not win.without_overlap:
        return "by_dim"
    # With more channels, "by_row" takes up to 1.8 times as long for images that do not fit in cache.
    if win.ndim == 2 and known_at_most(channels, MAX_ROW_CHANNELS):
        return "by_row"
    # The padded image is a copy. With fewer channels, the copy takes less time than windows in loops over elements.
    return "by_dim" if win.ndim == 3 or known_at_most(channels, LEAST_WHOLE_CHANNELS - 1) else "whole"


def choose_sum_adjoint(win: Window, channels: int, elements: int) -> dict[str, str]:
    """Choose the lowering of `window_sum_adjoint` per platform, a key of `SUM_ADJOINT`; ``elements`` as for the sum."""
    if win.tiles:
        tpu = "tiles" if _tiles_pay_on_tpu(win, elements, MAX_ON_CHIP) else "reduce_window"
        return _everywhere("tiles") | {"tpu": tpu}
    few = win.size == (2, 2) and win.stride == (1, 1) and known_at_most(channels, MAX_WHOLE_ADJOINT_CHANNELS)
    # XLA:TPU does not fuse padding between elements.
    tpu = "reduce_window" if win.strided else "by_dim"
    return {"cpu": "whole" if few else "by_dim", "tpu": tpu} | _sum_on_gpu(win)


def _tiles_pay_on_tpu(win: Window, elements: int, most: int) -> bool:
    """Whether a reshape to tiles pays on TPU: for whole images, and for images of up to ``most`` elements.

    It is slow in 1-D.
    """
    if math.prod(win.out) == 1:
        return True
    short_1d = win.ndim == 1 and win.entries <= MAX_UNROLLED_TAPS
    return not short_1d and known_at_most(elements, most)


def _sum_on_gpu(win: Window) -> dict[str, str]:
    # On GPU, "by_dim" writes the sums along one dim to memory, in float32 even for 16-bit images.
    gpu = "whole" if win.ndim > 1 and MAX_UNROLLED_TAPS < win.entries <= MAX_WHOLE_TAPS else "by_dim"
    return {"cuda": gpu, "rocm": gpu}


def _everywhere(name: str) -> dict[str, str]:
    return dict.fromkeys(("cpu", "tpu", "cuda", "rocm"), name)


def _run_chosen(table: dict[str, Callable[..., Any]], chosen: dict[str, str], win: Window, *arrays: Array) -> Any:
    """Run on each platform the lowering chosen for it; a platform without a column runs that of CPU."""
    lowerings = {platform: Fixed(table[name], (win,)) for platform, name in chosen.items()}
    cpu = lowerings["cpu"]
    others = {platform: lowering for platform, lowering in lowerings.items() if lowering != cpu}
    return platform_dependent(*arrays, default=cpu, **others)


# ---------------------------------------------------------------------------------------------------------------------
# Maxima


def window_max(win: Window, x: Array) -> Array:
    """Return the largest element of every window, if its number is not needed."""
    if win.ndim == 1 or (win.without_overlap and (win.padded or win.entries > MAX_COMPARED_TAPS)):
        # On CPU, `lax.reduce_window` is slow only where it reads elements often.
        return platform_dependent(x, default=Fixed(_max_of_winner, (win,)), cpu=Fixed(_reduce_max, (win,)))
    return _max_of_winner(win, x)


def _max_of_winner(win: Window, x: Array) -> Array:
    return max_and_winner(win, x)[0]


def _reduce_max(win: Window, x: Array) -> Array:
    return reduce_windows(win, x, -np.inf, lax.max)


def _with_whole_images(x: Array) -> Array:
    """Return ``x``, not sharded along its spatial dims."""
    return run_whole(lambda x: x, (x,), (slice(1, -1),), slice(1, -1))


def reduce_windows(win: Window, x: Array, initial: float, operation: Callable[[Any, Any], Any]) -> Array:
    """Reduce every window by one `lax.reduce_window`, as stock JAX does."""

    def reduced(x: Array) -> Array:
        return lax.reduce_window(
            x,
            np.asarray(initial, x.dtype),
            operation,
            (1, *win.size, 1),
            (1, *win.stride, 1),
            ((0, 0), *win.padding, (0, 0)),
            window_dilation=(1, *win.dilation, 1),
        )

    return run_whole(reduced, (x,), (slice(1, -1),), slice(1, -1))


def max_and_winner(win: Window, x: Array) -> tuple[Array, Array]:
    """Return the largest element of every window, and its winner.

    Ties go to the first in row-major order, NaN wins over numbers, and padding never wins.
    """
    return _run_chosen(MAX, choose_max(win, x.shape[0], x.size), win, x)


def _max_by_comparison(win: Window, x: Array) -> tuple[Array, Array]:
    return _compared(win, list(tap_slices(win, x, -np.inf)))


def _max_spatial_first(win: Window, x: Array) -> tuple[Array, Array]:
    """Compare slices of one image ``(*spatial, N, C)``, in which remainders by the stride are dims of their own.

    XLA:TPU computes both results in one loop over this image. From strided slices, or from one image per remainder, it
    would write copies to memory.
    """
    # Without strides, every tap would convert the image for its comparison; with strides, conversion takes longer.
    image = x if win.strided else lax.optimization_barrier(to_accumulator(x))
    y, winner = _compared(win, _spatial_first_slices(win, image, -np.inf), trailing=2)
    return _batch_first(win, y).astype(x.dtype), _batch_first(win, winner)


def _compared(win: Window, entries: Sequence[Array], trailing: int = 1) -> tuple[Array, Array]:
    """Return the largest of the entries, one per tap, and the number of the first entry that equals it.

    ``trailing`` is the number of dims after the spatial ones.
    """
    numbers = [np.asarray(number, winner_dtype(win)) for number in range(win.entries)]
    inside = [_inside(win, tap).reshape(*win.out, *(1,) * trailing) for tap in win.taps()]
    return _first_of_largest(entries, numbers, inside)


def _first_of_largest(
    entries: Sequence[Array], numbers: Sequence[Any], inside: Sequence[np.ndarray]
) -> tuple[Array, Array]:
    """Return the largest of the entries, and the number of the first entry that equals it or is NaN.

    Args:
        entries: Arrays of one shape.
        numbers: The number of each entry, or an array of numbers.
        inside: For each entry a mask of the elements that are not padding, which does not win.
    """
    y = functools.reduce(jnp.maximum, entries)
    # From the last entry to the first, so that the first of equals remains. The last needs no test: some element won.
    winner = jnp.broadcast_to(numbers[-1], y.shape)
    for entry, number, real in reversed(list(zip(entries[:-1], numbers[:-1], inside[:-1], strict=True))):
        wins = (entry == y) | (entry != entry)
        if not real.all():
            wins &= expand_rank(real, wins)
        winner = jnp.where(wins, number, winner)
    return y, winner


def _max_by_fold(win: Window, x: Array) -> tuple[Array, Array]:
    """Pass over the taps once, with the largest element so far and its number."""
    (first, y), *rest = zip(win.taps(), tap_slices(win, x, -np.inf), strict=True)
    dtype = winner_dtype(win)
    winner = jnp.zeros(y.shape, dtype)
    seen = _inside(win, first)  # windows with an element so far; those without one take any element, even −∞
    for number, (tap, entry) in enumerate(rest, 1):
        wins = ~(entry <= y) & (y == y)
        if not seen.all():
            wins |= expand_rank(~seen[..., None], wins)
        if not (real := _inside(win, tap)).all():
            wins &= expand_rank(real[..., None], wins)
        seen = seen | real
        y = jnp.where(wins, entry, y)
        winner = jnp.where(wins, dtype.type(number), winner)
    return y, winner


def _max_of_tiles(win: Window, x: Array) -> tuple[Array, Array]:
    """Reduce non-overlapping windows twice: to the largest element, then to the smallest number among its equals."""
    tiles = as_tiles(win, x)
    within = tuple(range(2, 2 * win.ndim + 1, 2))
    y = largest(within, tiles)
    dtype = winner_dtype(win)
    number = np.arange(win.entries, dtype=dtype).reshape(*_pairs((1,) * win.ndim, win.size), 1)
    winner = jnp.where((tiles == y) | (tiles != tiles), number, jnp.asarray(nothing(win))).min(within)
    return y.reshape(winner.shape), winner


def _max_by_dim(win: Window, x: Array) -> tuple[Array, Array]:
    """Compare along one dim after the other, the last first: the best of each row, then the best row."""
    y, number = _pad(win, x, -np.inf), 1  # number of elements in the dims after this one
    winner = jnp.zeros(y.shape, winner_dtype(win))
    for dim in reversed(range(win.ndim)):
        y, winner = materialize(y), materialize(winner)  # not recomputed for each tap
        numbers = [code + code.dtype.type(number * k) for k, code in enumerate(_dim_slices(win, dim, winner))]
        inside = win.inside(dim).T.reshape(win.size[dim], -1, *(1,) * (y.ndim - dim - 2))
        y, winner = _first_of_largest(list(_dim_slices(win, dim, y)), numbers, list(inside))
        number *= win.size[dim]
    return y, winner


def _max_long(win: Window, x: Array) -> tuple[Array, Array]:
    """Reduce one dim after the other, the last first: the best of each row, then the best row, is row-major order."""
    y = _pad(win, x, -np.inf)
    winner = jnp.zeros(y.shape, jnp.int32)
    number = 1  # number of elements in the dims after this one
    for dim in reversed(range(win.ndim)):
        axis = dim + 1
        at = np.arange(win.out[dim])[:, None] * win.stride[dim] + np.arange(win.size[dim]) * win.dilation[dim]
        rows = jnp.take(y, at, axis=axis)  # (…, out, size, …)
        best = largest((axis + 1,), rows)
        wins = (rows == best) | (rows != rows)
        y = jnp.squeeze(best, axis + 1)
        inside = win.inside(dim).reshape(win.out[dim], win.size[dim], *(1,) * (rows.ndim - axis - 2))
        first = jnp.expand_dims(lax.argmax(wins & expand_rank(inside, wins), axis + 1, np.int32), axis + 1)
        behind = jnp.take_along_axis(jnp.take(winner, at, axis=axis), first, axis + 1)
        winner = jnp.squeeze(first * number + behind, axis + 1)
        number *= win.size[dim]
    return y, winner.astype(winner_dtype(win))


def _max_whole(win: Window, x: Array) -> tuple[Array, Array]:
    """Reduce pairs of an element and its position by one `lax.reduce_window`."""
    x = _with_whole_images(x)
    position = jnp.zeros(x.shape, np.int32)
    for dim, n in enumerate(win.shape):
        position = position * n + lax.broadcasted_iota(np.int32, x.shape, dim + 1)
    # XLA:GPU writes the positions of all windows to memory.
    dtype: Any = np.uint16 if math.prod(win.shape) < 2**16 else np.int32
    padding = ((0, 0), *win.padding, (0, 0))
    initial = np.asarray(-np.inf, x.dtype), np.asarray(np.iinfo(dtype).max, dtype)

    def largest(one: Sequence[Array], other: Sequence[Array]) -> tuple[Array, Array]:
        (a, at), (b, bt) = one, other
        before = bt < at
        wins = jnp.where(a != a, (b != b) & before, (b != b) | (b > a) | ((b == a) & before))
        return jnp.where(wins, b, a), jnp.where(wins, bt, at)

    y, position = lax.reduce_window(
        (x, position.astype(dtype)), initial, largest, (1, *win.size, 1), (1, *win.stride, 1), padding,
        window_dilation=(1, *win.dilation, 1),
    )  # fmt: skip
    position = position.astype(np.int32)
    winner = jnp.zeros(y.shape, np.int32)
    for dim in range(win.ndim):
        at = position // math.prod(win.shape[dim + 1 :]) % win.shape[dim]
        start = lax.broadcasted_iota(np.int32, at.shape, dim + 1) * win.stride[dim] - win.padding[dim][0]
        winner = winner * win.size[dim] + (at - start) // win.dilation[dim]
    return y, winner.astype(winner_dtype(win))


MAX: dict[str, Callable[[Window, Array], tuple[Array, Array]]] = {
    "compare": _max_by_comparison,
    "spatial_first": _max_spatial_first,
    "fold": _max_by_fold,
    "tiles": _max_of_tiles,
    "by_dim": _max_by_dim,
    "long": _max_long,
    "whole": _max_whole,
}


def gather_winners(win: Window, x: Array, winner: Array) -> Array:
    """Return the element at the winner of every window: ``y[o] = x[o·stride + winner[o]]``."""
    if win.entries > MAX_UNROLLED_TAPS:
        return _gather_winners_long(win, x, winner)
    selected = (
        jnp.where(winner == winner.dtype.type(number), entry, 0) for number, entry in enumerate(tap_slices(win, x, 0))
    )
    return functools.reduce(operator.add, selected)


def scatter_to_winners(win: Window, y: Array, winner: Array) -> Array:
    """Apply the adjoint of `gather_winners`: every ``y[o]`` is added at the winner; all other elements are zero.

    16-bit floats are summed in float32.
    """
    batch, channels = y.shape[0], y.shape[-1]
    elements = batch * math.prod(win.shape) * channels
    return _run_chosen(SCATTER, choose_scatter(win, batch, elements), win, y, winner)


def _scatter_by_taps(win: Window, y: Array, winner: Array) -> Array:
    """Sum one padded image per tap."""
    wide = to_accumulator(y)
    masked = (jnp.where(winner == winner.dtype.type(number), wide, 0) for number in range(win.entries))
    placed = (at_tap(win, tap, part) for tap, part in zip(win.taps(), masked, strict=True))
    return unpad(win, functools.reduce(operator.add, placed)).astype(y.dtype)


def _scatter_by_phases(win: Window, y: Array, winner: Array) -> Array:
    """Compute one image per remainder by the stride: positions that share it receive the same taps."""
    # XLA:TPU would otherwise convert both once per tap.
    values, codes = lax.optimization_barrier((to_accumulator(y), winner.astype(np.int32)))
    shape = (y.shape[0], *phase_shape(win), y.shape[-1])
    shifted = functools.partial(_shifted, win)
    phases = _sums_of_phases(win, shape, values, codes, shifted, win.entries > MAX_UNROLLED_TAPS)
    return interleaved(win, list(phases)).astype(y.dtype)


def _scatter_by_slices(win: Window, y: Array, winner: Array) -> Array:
    """Run `_scatter_by_phases` with the values and the winners padded once, not every term.

    Each term reads a slice of both. For padded windows, XLA:TPU would otherwise write every term to memory.
    """
    phases = [_batch_first(win, phase) for phase in _phases_of_slices(win, y, winner)]
    return interleaved(win, phases).astype(y.dtype)


def _scatter_in_place(win: Window, y: Array, winner: Array) -> Array:
    """Run `_scatter_by_slices`, with every remainder's image written to its place in the result.

    Remainders by the stride are dims of their own, before batch and channels, so that XLA:TPU writes whole vector
    registers, and writes the result once. To interleave the images afterwards, it writes and reads them twice.
    """
    images, channels = y.shape[0], y.shape[-1]
    if known_at_most(images, LEAST_IMAGES * program().devices - 1):
        return _scatter_by_slices(win, y, winner)
    length = phase_shape(win)
    x = lax.empty((*_pairs(length, win.stride), images, channels), y.dtype)
    remainders = itertools.product(*map(range, win.stride))
    for remainder, phase in zip(remainders, _phases_of_slices(win, y, winner), strict=True):
        phase = phase.astype(y.dtype).reshape(*_pairs(length, (1,) * win.ndim), images, channels)
        x = lax.dynamic_update_slice(x, phase, (*_pairs((0,) * win.ndim, remainder), 0, 0))
    x = x.reshape(*map(operator.mul, length, win.stride), images, channels)
    x = lax.slice(x, (0,) * x.ndim, (*win.shape, images, channels))
    if program().accepts_layouts:
        # XLA:TPU would otherwise change the layout before the last write, which then takes up to ten times as long.
        x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return _batch_first(win, x)


def _phases_of_slices(win: Window, y: Array, winner: Array) -> Iterator[Array]:
    """Yield one image ``(*spatial, N, C)`` per remainder by the stride, from slices of padded values and winners."""
    padding, length = phase_padding(win), phase_shape(win)
    pads = [*((before, after, 0) for before, after in padding), (0, 0, 0), (0, 0, 0)]

    def padded(a: Array) -> Array:
        return lax.pad(_spatial_first(win, a), np.zeros((), a.dtype), pads)

    # XLA:TPU would otherwise convert winners once per tap.
    values, codes = padded(to_accumulator(y)), padded(winner.astype(np.int32))
    in_parts = win.entries > MAX_UNROLLED_TILE
    if in_parts or win.strided:
        values, codes = lax.optimization_barrier((values, codes))

    def part(a: Array, shifts: Sequence[int]) -> Array:
        starts = [before + shift for (before, _), shift in zip(padding, shifts, strict=True)]
        return lax.slice(a, (*starts, 0, 0), (*map(operator.add, starts, length), *a.shape[-2:]))

    return _sums_of_phases(win, (*length, *values.shape[-2:]), values, codes, part, in_parts)


def _sums_of_phases(
    win: Window,
    shape: tuple[int, ...],
    values: Array,
    codes: Array,
    shifted: Callable[[Array, Sequence[int]], Array | None],
    in_parts: bool,
) -> Iterator[Array]:
    """Yield for each remainder by the stride the sum, of ``shape``, of the values at the winners' positions.

    ``shifted(a, shifts)`` returns for each position i of a phase the entry of ``a`` for window i + shift, or None if
    these windows are all outside. With ``in_parts``, `ADDED_AT_ONCE` terms are added at a time.
    """
    for pairs in itertools.product(*(phase_taps(win, dim) for dim in range(win.ndim))):
        x = jnp.zeros(shape, values.dtype)
        for term, taps in enumerate(itertools.product(*pairs), 1):
            numbers, shifts = zip(*taps, strict=True)
            value, code = (shifted(a, shifts) for a in (values, codes))
            if value is None or code is None:
                continue
            number = np.ravel_multi_index(numbers, win.size)
            x += jnp.where(code == code.dtype.type(number), value, 0)
            if in_parts and term % ADDED_AT_ONCE == 0:
                x, values, codes = lax.optimization_barrier((x, values, codes))
        yield x


def _scatter_to_tiles(win: Window, y: Array, winner: Array) -> Array:
    """Scatter to windows that do not overlap: up(y), masked to the elements whose number is the winner."""
    number = np.arange(win.entries, dtype=winner.dtype).reshape(*_pairs((1,) * win.ndim, win.size), 1)
    winner = _tile(win, winner)
    return untile(win, jnp.where(winner == expand_rank(number, winner), _tile(win, y), 0))


def _gather_winners_long(win: Window, x: Array, winner: Array) -> Array:
    return gather_indices(win.shape, x, jnp.where(winner == nothing(win), -1, flat_index(win, winner)))


def _scatter_to_winners_long(win: Window, y: Array, winner: Array) -> Array:
    return _scatter_to_index(win, y, winner, flat_index(win, winner))


def _scatter_by_multiplied(win: Window, y: Array, winner: Array) -> Array:
    return _scatter_to_index(win, y, winner, _flat_index_multiplied(win, winner))


def _scatter_to_index(win: Window, y: Array, winner: Array, index: Array) -> Array:
    return scatter_to_indices(win.shape, y, jnp.where(winner == nothing(win), -1, index))


SCATTER: dict[str, Callable[[Window, Array, Array], Array]] = {
    "taps": _scatter_by_taps,
    "phases": _scatter_by_phases,
    "slices": _scatter_by_slices,
    "in_place": _scatter_in_place,
    "tiles": _scatter_to_tiles,
    "long": _scatter_to_winners_long,
    "multiplied": _scatter_by_multiplied,
}


def flat_index(win: Window, winner: Array) -> Array:
    """Return every winner's int32 index into the flattened spatial dims of the image."""
    number = winner.astype(jnp.int32)
    return _index_of_taps(win, (number // math.prod(win.size[dim + 1 :]) % k for dim, k in enumerate(win.size)))


def _flat_index_multiplied(win: Window, winner: Array) -> Array:
    """Return `flat_index` of windows of up to `MAX_WHOLE_TAPS` elements.

    With m = ⌈2¹⁶/k⌉, n·m/2¹⁶ exceeds n/k by less than n/2¹⁶. This is less than 1/k if n·k < 2¹⁶, so that both have the
    same integer part.
    """
    number, taps = winner.astype(jnp.int32), []
    for k in reversed(win.size[1:]):
        quotient = (number * -(-(2**16) // k)) >> 16
        taps.append(number - quotient * k)
        number = quotient
    return _index_of_taps(win, (number, *reversed(taps)))


def _index_of_taps(win: Window, taps: Iterable[Array]) -> Array:
    """Return every window's index into the flattened spatial dims of the image, given its tap along each dim."""
    index = jnp.zeros((), jnp.int32)
    for dim, tap in enumerate(taps):
        start = np.arange(win.out[dim], dtype=np.int32) * win.stride[dim] - win.padding[dim][0]
        at = expand_rank(start.reshape(-1, *(1,) * (win.ndim - dim)), tap) + tap * win.dilation[dim]
        index = index * win.shape[dim] + at
    return index


# ---------------------------------------------------------------------------------------------------------------------
# Indices into each channel's flattened spatial dims; an index out of range reads zero and is dropped


def gather_indices(spatial: tuple[int, ...], x: Array, index: Array) -> Array:
    """Return ``y[o] = x[index[o]]`` from images ``(N, *spatial, C)`` at ``index (N, *out, C)``."""
    entries = math.prod(spatial)
    flat = x.reshape(x.shape[0], entries, x.shape[-1])
    at = index.reshape(x.shape[0], math.prod(index.shape[1:-1]), x.shape[-1])
    y = jnp.take_along_axis(flat, at, axis=1, mode="clip").reshape(index.shape)
    return jnp.where((index >= 0) & (index < entries), y, 0)


def scatter_to_indices(spatial: tuple[int, ...], y: Array, index: Array) -> Array:
    """Apply the adjoint of `gather_indices`: every ``y[o]`` is added to the element ``index[o]`` of an image of zeros.

    16-bit floats are summed in float32.
    """
    batch, channels, entries = y.shape[0], y.shape[-1], math.prod(spatial)
    valid = jnp.where((index >= 0) & (index < entries), y, 0).astype(accumulator(y.dtype))
    at = index.reshape(batch, math.prod(index.shape[1:-1]), channels)

    # `jax.vmap` makes the batch a batching dim of the scatter. With an index array over the batch, XLA's partitioner
    # cannot tell that every image stays on its device, and sums the result over all devices.
    @jax.vmap
    def one_image(at: Array, valid: Array) -> Array:
        channel = lax.broadcasted_iota(at.dtype, at.shape, 1)
        return jnp.zeros((entries, channels), valid.dtype).at[at, channel].add(valid, mode="clip")

    flat = one_image(at, valid.reshape(at.shape))
    return flat.reshape(batch, *spatial, channels).astype(y.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Sums


def window_sum(win: Window, x: Array) -> Array:
    """Sum every window, ``y[o] = Σ_k x[o·stride + k·dilation]``; 16-bit floats are summed in float32."""
    if 0 in win.out:  # no window fits, if the image is empty
        return jnp.zeros((x.shape[0], *win.out, x.shape[-1]), x.dtype)
    return _run_chosen(SUM, choose_sum(win, x.shape[-1], x.size), win, to_accumulator(x)).astype(x.dtype)


def window_sum_of(function: Callable[[Array, Any], Array], argument: Any, win: Window, x: Array) -> Array:
    """Sum ``function(x, argument)``, which is elementwise, over every window, in the dtype of x."""
    if win.padded or 0 in win.out:
        return window_sum(win, function(x, argument))
    at_once = Fixed(_sum_of_all, (function, argument, win))
    if max(win.size) > MAX_UNROLLED_TAPS or not win.without_overlap:
        return at_once(x)
    return platform_dependent(x, default=at_once, cpu=Fixed(_sum_of_by_dim, (function, argument, win)))


def _sum_of_all(function: Callable[[Array, Any], Array], argument: Any, win: Window, x: Array) -> Array:
    """Apply the function to the whole image, except for elements that no window reads."""
    read = lax.slice(x, (0,) * x.ndim, (x.shape[0], *win.span, x.shape[-1]))
    return window_sum(dataclasses.replace(win, shape=win.span), function(read, argument))


def _sum_of_by_dim(function: Callable[[Array, Any], Array], argument: Any, win: Window, x: Array) -> Array:
    """Apply the function to slices: XLA:CPU would store it, once more than three slices read it."""
    last = win.ndim - 1
    x = functools.reduce(operator.add, (function(entries, argument) for entries in _dim_slices(win, last, x)))
    for dim in range(last):
        x = _sum_dim(win, dim, x)
    return x


def window_sum_adjoint(win: Window, y: Array) -> Array:
    """Apply the adjoint of `window_sum`: every element is the sum of ``y[o]`` over the windows that contain it.

    With stride = size this is ⊗ 1, the lecture's *up*.
    """
    wide = y if win.tiles else to_accumulator(y)  # windows that do not overlap add nothing
    elements = y.shape[0] * math.prod(win.shape) * y.shape[-1]
    return _run_chosen(SUM_ADJOINT, choose_sum_adjoint(win, y.shape[-1], elements), win, wide).astype(y.dtype)


def _sum_by_dim(win: Window, x: Array) -> Array:
    """Sum along one dim after the other."""
    x = _pad(win, x, 0)
    for dim in range(win.ndim):
        x = _sum_dim(win, dim, x)
    return x


def _sum_by_row(win: Window, x: Array) -> Array:
    """Sum along the first dim with the other dims and the channels as one, then along the other dims.

    For padded 2-D images of few channels, XLA:CPU takes 1.1 to 1.7 times as long for "by_dim".
    """
    x = _pad(win, x, 0)
    rows = _sum_dim(win, 0, lax.collapse(x, 2))
    x = rows.reshape(*rows.shape[:2], *x.shape[2:])
    for dim in range(1, win.ndim):
        x = _sum_dim(win, dim, x)
    return x


def _sum_adjoint_by_dim(win: Window, y: Array) -> Array:
    for dim in range(win.ndim):
        # XLA:CPU would compute the sums along the earlier dims again for each tap.
        y = _sum_adjoint_dim(win, dim, materialize(y) if dim else y)
    return unpad(win, y)


def _sum_by_reduce_window(win: Window, x: Array) -> Array:
    """Sum as stock JAX does."""
    return reduce_windows(win, x, 0, lax.add)


def _sum_adjoint_by_reduce_window(win: Window, y: Array) -> Array:
    """Sum windows of stride 1 over δ with zeros between and around its elements, as stock JAX does."""

    def adjoint(y: Array) -> Array:
        pads = [(0, 0, 0)]
        for n, out, e, s, (lo, _) in zip(win.shape, win.out, win.extent, win.stride, win.padding, strict=True):
            pads.append((e - 1 - lo, n + lo - 1 - (out - 1) * s, s - 1))
        spaced = lax.pad(y, np.zeros((), y.dtype), [*pads, (0, 0, 0)])
        return _reduce_whole(win, spaced, (1,) * win.ndim)

    return run_whole(adjoint, (y,), (slice(1, -1),), slice(1, -1))


def _sum_whole(win: Window, x: Array) -> Array:
    """Sum windows of the image, padded before, by one `lax.reduce_window`."""
    return run_whole(lambda x: _reduce_whole(win, _pad(win, x, 0), win.stride), (x,), (slice(1, -1),), slice(1, -1))


def _sum_adjoint_whole(win: Window, y: Array) -> Array:
    """Sum zeros between and around the ``y[o]`` by one `lax.reduce_window`, and cut off the padding afterwards.

    On CPU, 16 padded images of 110 × 37 × 16 and 2 × 2 windows take 0.21 ms, and 0.30 as "reduce_window".
    """

    def adjoint(y: Array) -> Array:
        zero, none = np.zeros((), y.dtype), (0, 0, 0)
        around = [(reach - 1, reach - 1, s - 1) for reach, s in zip(win.extent, win.stride, strict=True)]
        full = _reduce_whole(win, lax.pad(y, zero, [none, *around, none]), (1,) * win.ndim)
        lengths = (n + sum(pads) for n, pads in zip(win.shape, win.padding, strict=True))
        rest = [(0, length - n, 0) for length, n in zip(lengths, full.shape[1:-1], strict=True)]
        return unpad(win, lax.pad(full, zero, [none, *rest, none]))

    return run_whole(adjoint, (y,), (slice(1, -1),), slice(1, -1))


def _sum_adjoint_to_tiles(win: Window, y: Array) -> Array:
    """Repeat every ``y[o]`` over its own window."""
    return untile(win, _tile(win, y))


def _sum_of_tiles(win: Window, x: Array) -> Array:
    """Sum windows that do not overlap."""
    return as_tiles(win, x).sum(tuple(range(2, 2 * win.ndim + 1, 2)))


SUM: dict[str, Callable[[Window, Array], Array]] = {
    "by_dim": _sum_by_dim,
    "by_row": _sum_by_row,
    "whole": _sum_whole,
    "reduce_window": _sum_by_reduce_window,
    "tiles": _sum_of_tiles,
}
SUM_ADJOINT: dict[str, Callable[[Window, Array], Array]] = {
    "by_dim": _sum_adjoint_by_dim,
    "whole": _sum_adjoint_whole,
    "reduce_window": _sum_adjoint_by_reduce_window,
    "tiles": _sum_adjoint_to_tiles,
}


def _sum_dim(win: Window, dim: int, x: Array) -> Array:
    k, s, d, out, axis = win.size[dim], win.stride[dim], win.dilation[dim], win.out[dim], dim + 1
    if k <= MAX_UNROLLED_TAPS:
        return functools.reduce(operator.add, _dim_slices(win, dim, x))
    if out == 1 and d == 1:
        return lax.slice_in_dim(x, 0, k, axis=axis).sum(axis, keepdims=True)
    along = slice(axis, axis + 1)
    return run_whole(lambda x: _reduce_dim(x, axis, k, s, d), (x,), (along,), along)


def _sum_adjoint_dim(win: Window, dim: int, y: Array) -> Array:
    k, s, d, out, axis = win.size[dim], win.stride[dim], win.dilation[dim], win.out[dim], dim + 1
    length, along = sum(win.padding[dim]) + win.shape[dim], slice(axis, axis + 1)
    if out == 1 and d == 1:
        return pad_axis(jnp.repeat(y, k, axis), axis, 0, length - k)
    if k <= MAX_UNROLLED_TAPS:
        return functools.reduce(operator.add, (_at_dim(win, dim, i, y) for i in range(k)))

    def adjoint(y: Array) -> Array:
        reach = (k - 1) * d
        spaced = pad_axis(y, axis, reach, reach, s - 1)
        full = _reduce_dim(spaced, axis, k, 1, d)
        return pad_axis(full, axis, 0, length - full.shape[axis])

    return run_whole(adjoint, (y,), (along,), along)


def _reduce_dim(x: Array, axis: int, k: int, stride: int, dilation: int) -> Array:
    def along(n: int) -> tuple[int, ...]:
        return (1,) * axis + (n,) + (1,) * (x.ndim - axis - 1)

    zero = np.zeros((), x.dtype)
    return lax.reduce_window(x, zero, lax.add, along(k), along(stride), "VALID", window_dilation=along(dilation))


def _reduce_whole(win: Window, x: Array, stride: Sequence[int]) -> Array:
    zero, dilation = np.zeros((), x.dtype), (1, *win.dilation, 1)
    return lax.reduce_window(x, zero, lax.add, (1, *win.size, 1), (1, *stride, 1), "VALID", window_dilation=dilation)


# ---------------------------------------------------------------------------------------------------------------------
# Slices and their adjoints


def padded(win: Window, x: Array) -> Array:
    """Return ``x`` with the zero padding that the windows use."""
    return _pad(win, x, 0)


def _pad(win: Window, x: Array, fill: float) -> Array:
    if not win.padded:
        return x
    return lax.pad(x, np.asarray(fill, x.dtype), [(0, 0, 0), *((lo, hi, 0) for lo, hi in win.padding), (0, 0, 0)])


def unpad(win: Window, canvas: Array) -> Array:
    """Return the image without its padding."""
    starts = [0, *(lo for lo, _ in win.padding), 0]
    ends = [canvas.shape[0], *(lo + n for n, (lo, _) in zip(win.shape, win.padding, strict=True)), canvas.shape[-1]]
    return lax.slice(canvas, starts, ends)


def tap_slices(win: Window, x: Array, fill: float) -> Iterator[Array]:
    """Yield for every tap the elements that it reads, one per window: strided slices ``(N, *out, C)``."""
    canvas = _pad(win, x, fill)
    steps = (1, *win.steps, 1)
    for tap in win.taps():
        start = (0, *win.offset(tap), 0)
        ends = (o + (n - 1) * s + 1 for o, n, s in zip(win.offset(tap), win.out, win.steps, strict=True))
        yield lax.slice(canvas, start, (x.shape[0], *ends, x.shape[-1]), steps)


def _spatial_first_slices(win: Window, x: Array, fill: float) -> list[Array]:
    """Return the elements of `tap_slices` as ``(*out, N, C)``, slices of one padded image without strides."""
    x = _with_whole_images(x)
    taps = [[divmod(k * d, s) for k in range(n)] for n, s, d in zip(win.size, win.steps, win.dilation, strict=True)]
    length = [of_dim[-1][0] + out for of_dim, out in zip(taps, win.out, strict=True)]
    image = _pad_in_place(_spatial_first(win, x), tuple(map(operator.mul, length, win.steps)), win.padding, fill)
    others = image.shape[-2:]
    image = image.reshape(*_pairs(length, win.steps), *others)
    slices = []
    for tap in itertools.product(*taps):
        starts, remainders = zip(*tap, strict=True)
        stops = (*map(operator.add, starts, win.out),)
        ends = (*_pairs(stops, [r + 1 for r in remainders]), *others)
        entries = lax.slice(image, (*_pairs(starts, remainders), 0, 0), ends)
        slices.append(entries.reshape(*win.out, *others))
    return slices


def _pad_in_place(x: Array, lengths: tuple[int, ...], padding: Sequence[tuple[int, int]], fill: float) -> Array:
    """Pad, or cut, the leading dims of ``x`` to ``lengths``, each first by the first number of its ``padding``.

    XLA:TPU computes ``x`` in its place between the padding. With `lax.pad` it would copy it.
    """
    before = [lo for lo, _ in padding]
    inner = [min(n, length - lo) for n, length, lo in zip(x.shape, lengths, before, strict=False)]
    others = x.shape[len(lengths) :]
    x = lax.slice(x, (0,) * x.ndim, (*inner, *others))
    if x.shape[: len(lengths)] == lengths:
        return x
    padded = lax.empty((*lengths, *others), x.dtype)
    padded = lax.dynamic_update_slice(padded, x, (*before, *(0 for _ in others)))
    for dim, (length, lo, n) in enumerate(zip(lengths, before, inner, strict=True)):
        for start, end in ((0, lo), (lo + n, length)):
            if start < end:
                border = jnp.full((*padded.shape[:dim], end - start, *padded.shape[dim + 1 :]), fill, x.dtype)
                padded = lax.dynamic_update_slice_in_dim(padded, border, start, dim)
    return padded


def _spatial_first(win: Window, x: Array) -> Array:
    """Return ``(*spatial, N, C)`` from ``(N, *spatial, C)``."""
    return jnp.moveaxis(x, 0, win.ndim)


def _batch_first(win: Window, x: Array) -> Array:
    """Return ``(N, *spatial, C)`` from ``(*spatial, N, C)``."""
    return jnp.moveaxis(x, win.ndim, 0)


def _pairs(first: Iterable[int], second: Iterable[int]) -> list[int]:
    """Return the elements of two sequences in turn."""
    return [n for pair in zip(first, second, strict=True) for n in pair]


def at_tap(win: Window, tap: tuple[int, ...], y: Array) -> Array:
    """Apply the adjoint of one tap's slice: ``y``, with the stride between its elements, in a padded image of zeros."""
    widths = (
        (start, lo + n + hi - start - ((out - 1) * s + 1), s - 1)
        for start, n, s, out, (lo, hi) in zip(win.offset(tap), win.shape, win.stride, win.out, win.padding, strict=True)
    )
    return lax.pad(y, np.zeros((), y.dtype), [(0, 0, 0), *widths, (0, 0, 0)])


def _dim_slices(win: Window, dim: int, x: Array) -> Iterator[Array]:
    """Yield for every tap along one dim the elements that it reads, one per window."""
    step, reach = win.steps[dim], (win.out[dim] - 1) * win.steps[dim] + 1
    for start in range(0, win.size[dim] * win.dilation[dim], win.dilation[dim]):
        yield lax.slice_in_dim(x, start, start + reach, step, dim + 1)


def _at_dim(win: Window, dim: int, k: int, y: Array) -> Array:
    """Apply the adjoint of the slice of tap ``k`` in `_dim_slices`."""
    start, stride, length = k * win.dilation[dim], win.stride[dim], sum(win.padding[dim]) + win.shape[dim]
    return pad_axis(y, dim + 1, start, length - start - ((win.out[dim] - 1) * stride + 1), stride - 1)


def phase_taps(win: Window, dim: int) -> list[list[tuple[int, int]]]:
    """Return for each r < s the taps that read position ``i·s + r``, each with its window relative to i."""
    s, d, lo = win.stride[dim], win.dilation[dim], win.padding[dim][0]
    return [[(k, (r + lo - k * d) // s) for k in range(win.size[dim]) if (r + lo - k * d) % s == 0] for r in range(s)]


def phase_shape(win: Window) -> tuple[int, ...]:
    """Return the spatial shape ``⌈shape/s⌉`` of the image of one remainder by the stride."""
    return tuple(-(-n // s) for n, s in zip(win.shape, win.stride, strict=True))


def phase_padding(win: Window) -> list[tuple[int, int]]:
    """Return how many windows before the first and after the last the taps of `phase_taps` reach, per dim."""
    padding = []
    for dim, (n, out) in enumerate(zip(phase_shape(win), win.out, strict=True)):
        shifts = [shift for taps in phase_taps(win, dim) for _, shift in taps]
        padding.append((max(-min(shifts), 0), max(max(shifts) + n - out, 0)))
    return padding


def phase_window(win: Window, taps: Sequence[Sequence[tuple[int, int]]]) -> tuple[tuple[int, ...], Window] | None:
    """Return how positions with one remainder by the stride read δ: windows over a part of δ, and where it starts.

    Args:
        win: Windows that read the image.
        taps: For each dim, the taps that read these positions, as in `phase_taps`.

    Returns:
        None if no δ reaches these positions.
    """
    # The shift of δ decreases with the tap, so the kernel is flipped.
    bounds = [
        (pairs[-1][1], pairs[0][1] + n) if pairs else (0, 0) for pairs, n in zip(taps, phase_shape(win), strict=True)
    ]
    starts = tuple(max(low, 0) for low, _ in bounds)
    shape = tuple(min(high, out) - start for (_, high), out, start in zip(bounds, win.out, starts, strict=True))
    if min(shape) <= 0:
        return None
    pads = tuple((max(-low, 0), max(high - out, 0)) for (low, high), out in zip(bounds, win.out, strict=True))
    dilation = tuple(pairs[0][1] - pairs[1][1] if len(pairs) > 1 else 1 for pairs in taps)
    return starts, Window(shape, tuple(map(len, taps)), (1,) * win.ndim, pads, dilation)


def _shifted(win: Window, a: Array, shifts: Sequence[int]) -> Array | None:
    """Return for each position i of a phase the value of window ``i + shift``, 0 outside; None if all are outside."""
    length = phase_shape(win)
    begins = [max(-shift, 0) for shift in shifts]
    ends = [min(n, out - shift) for n, out, shift in zip(length, win.out, shifts, strict=True)]
    if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
        return None
    starts, stops = (tuple(map(operator.add, bounds, shifts)) for bounds in (begins, ends))
    a = lax.slice(a, (0, *starts, 0), (a.shape[0], *stops, a.shape[-1]))
    pads = [(begin, n - end, 0) for begin, end, n in zip(begins, ends, length, strict=True)]
    return lax.pad(a, np.zeros((), a.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def interleaved(win: Window, phases: Sequence[Array]) -> Array:
    """Interleave one image per remainder by the stride, each ``(N, *⌈shape/s⌉, C)``, into one image."""
    if len(phases) == 1:
        return phases[0]
    batch, *length, channels = phases[0].shape
    x = jnp.stack(phases).reshape(*win.stride, batch, *length, channels)
    pairs = [axis for dim in range(win.ndim) for axis in (win.ndim + 1 + dim, dim)]
    x = x.transpose(win.ndim, *pairs, x.ndim - 1)
    x = x.reshape(batch, *(n * s for n, s in zip(length, win.stride, strict=True)), channels)
    return lax.slice(x, (0,) * x.ndim, (batch, *win.shape, channels))


def pad_axis(x: Array, axis: int, lo: int, hi: int, interior: int = 0) -> Array:
    """Pad with zeros before, after and between the elements along one dim."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (lo, hi, interior)
    return lax.pad(x, np.zeros((), x.dtype), config)


def _tile(win: Window, y: Array) -> Array:
    """Repeat every value over its own window, ``(N, out₁, size₁, out₂, size₂, …, C)`` (a broadcast, not a copy)."""
    pairs = _pairs(win.out, win.size)
    dims_of_y = [0, *range(1, 2 * win.ndim + 1, 2), 2 * win.ndim + 1]
    return lax.broadcast_in_dim(y, (y.shape[0], *pairs, y.shape[-1]), dims_of_y)


def as_tiles(win: Window, x: Array) -> Array:
    """Reshape an image to ``(N, out₁, size₁, out₂, size₂, …, C)``, without elements beyond the last windows."""
    covered = [o * k for o, k in zip(win.out, win.size, strict=True)]
    x = lax.slice(x, (0,) * x.ndim, (x.shape[0], *covered, x.shape[-1]))
    return x.reshape(x.shape[0], *_pairs(win.out, win.size), x.shape[-1])


def untile(win: Window, tiles: Array) -> Array:
    """Reshape tiles to an image; elements beyond the last windows are zero."""
    covered = [o * k for o, k in zip(win.out, win.size, strict=True)]
    x = tiles.reshape(tiles.shape[0], *covered, tiles.shape[-1])
    rest = [(0, n - c, 0) for n, c in zip(win.shape, covered, strict=True)]
    return lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *rest, (0, 0, 0)]) if any(h for _, h, _ in rest) else x


def _inside(win: Window, tap: tuple[int, ...]) -> np.ndarray:
    """Return a mask of shape ``out``: the windows in which this tap reads the image, not padding."""
    per_dim = (win.inside(dim)[:, k] for dim, k in enumerate(tap))
    return functools.reduce(np.multiply.outer, per_dim)
