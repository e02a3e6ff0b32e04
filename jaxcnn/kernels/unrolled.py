"""Shift, multiply, add: `correlate`, `input_grad` and `kernel_grad` as sums with one term per tap and channel.

    correlate     y[o, g, j] = Σ_k Σ_i x[o·s + k·d − lo, g, i] · w[k, i, g, j]
    input_grad    x[i, g, i'] = Σ_k Σ_j y[(i + lo − k·d) / s, g, j] · w[k, i', g, j]     for integer quotients
    kernel_grad   w[k, i, g, j] = Σ_o x[o·s + k·d − lo, g, i] · y[o, g, j]

XLA:CPU compiles such a sum to one loop over vectors of the result and stores no intermediates. With few channels, a
GEMM cannot fill its vectors.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels.materialize import materialize
from jaxcnn.kernels.reductions import sum_of_eights
from jaxcnn.kernels.shapes import expand_rank, is_symbolic, known_at_most, largest_divisor
from jaxcnn.kernels.windows import at_tap, interleaved, padded, phase_padding, phase_shape, phase_taps, unpad

#: Start of a tap's slice of the padded input; traced inside a loop.
Start = np.ndarray | Array

#: Number of partial sums that a sum is split into: each one waits only for its own previous term.
CHAINS = 4

#: Maximum number of terms of one loop. From about 110, XLA stores intermediates and takes ten times as long.
TERMS = 80

#: Numbers of taps and of terms above which taps are processed in a loop, and of terms per iteration ("chunk"): compile
#: time grows with the number of terms that are written out. For `kernel_grad`, whose terms are reductions and compile
#: more slowly, these are "sums" and "block"; for its form with one term per position, "positions".
LOOPED = {"taps": 32, "terms": 64, "chunk": 16, "sums": 16, "block": 8, "positions": 32}


def correlate(c: Correlation, x: Array, w: Array) -> Array:
    """Correlate; the result ``(N, *out, O)`` is materialized, as is x, so that consumers do not recompute them."""
    win, groups = c.window, c.groups
    inputs, outputs = w.shape[-2], w.shape[-1] // groups
    depthwise = inputs == 1  # vectors then run over all groups
    if depthwise and outputs > 1:
        x = jnp.repeat(x, outputs, -1)
    canvas = padded(win, x if depthwise and _written_out(win.entries, inputs) else materialize(x))
    ones = (1,) * (win.ndim + 1)
    w = w.reshape(win.entries, *((*ones, groups * outputs) if depthwise else (inputs, groups, outputs)))

    def terms(start: Start, w: Array) -> Iterator[Array]:
        entries = _tap_elements(canvas, start, win.out, win.stride)
        if depthwise:
            yield lax.mul(entries, w)
            return
        entries = entries.reshape(*entries.shape[:-1], groups, inputs)
        for i in range(inputs):
            yield lax.mul(entries[..., i : i + 1], expand_rank(w[i], entries))

    starts = np.array([win.offset(tap) for tap in win.taps()], np.int32)
    y = materialize(_sum_over_taps(terms, starts, w, np.arange(win.entries), inputs))
    return y if depthwise else lax.collapse(y, win.ndim + 1)


def input_grad(c: Correlation, y: Array, w: Array) -> Array:
    """Apply the adjoint in x, ``(N, *shape, I)``, as one sum per remainder by the stride: its positions share taps."""
    win, batch, groups = c.window, y.shape[0], c.groups
    inputs, outputs = w.shape[-2], w.shape[-1] // groups
    # (*size, O, groups, I)
    swapped = materialize(jnp.moveaxis(w.reshape(*w.shape[:-1], groups, outputs), (-1, -3), (-3, -1)))
    if all(e <= s for e, s in zip(win.extent, win.stride, strict=True)):
        return _input_grad_disjoint(c, y, swapped)
    if math.prod(win.stride) > 2 * win.entries:  # most remainders have no tap
        y = y.reshape(*y.shape[:-1], groups, outputs)

        def term(tap: tuple[int, ...]) -> Array:
            products = _sum(y[..., j : j + 1] * expand_rank(swapped[(*tap, j)], y) for j in range(outputs))
            return at_tap(win, tap, lax.collapse(products, win.ndim + 1))

        return unpad(win, _sum(map(term, win.taps())))
    taps_of_phases = [phase_taps(win, dim) for dim in range(win.ndim)]
    length, padding = phase_shape(win), phase_padding(win)
    pads = [(0, 0, 0), *((lo, hi, 0) for lo, hi in padding), (0, 0, 0)]
    y = lax.pad(materialize(y), np.zeros((), y.dtype), pads)
    y = y.reshape(*y.shape[:-1], groups, outputs)
    ones = (1,) * win.ndim

    def terms(start: Start, swapped: Array) -> Iterator[Array]:
        entries = _tap_elements(y, start, length, ones)
        for j in range(outputs):
            yield lax.mul(entries[..., j : j + 1], expand_rank(swapped[j], entries))

    weights = swapped.reshape(win.entries, *swapped.shape[win.ndim :])
    phases = []
    for pairs_per_dim in itertools.product(*taps_of_phases):
        taps = list(itertools.product(*pairs_per_dim))  # per tap, one pair (k, shift) for each dim
        if taps:
            starts = np.array(
                [[shift + before for (_, shift), (before, _) in zip(tap, padding, strict=True)] for tap in taps]
            )
            numbers = np.ravel_multi_index(tuple(np.array([[k for k, _ in tap] for tap in taps]).T), win.size)
            phase = _sum_over_taps(terms, starts.astype(np.int32), weights, numbers, outputs)
            phase = lax.collapse(phase, win.ndim + 1)
        else:
            phase = jnp.zeros((batch, *length, groups * inputs), y.dtype)
        phases.append(materialize(phase) if outputs > 1 else phase)
    return interleaved(win, phases)


def _input_grad_disjoint(c: Correlation, y: Array, swapped: Array) -> Array:
    """Run `input_grad` for windows that do not overlap: every δ times the whole kernel, each in its own place."""
    win, groups = c.window, c.groups
    outputs = swapped.shape[win.ndim]
    y = y.reshape(y.shape[0], *(n for out in win.out for n in (out, 1)), groups, outputs)
    terms = []
    for j in range(outputs):
        w = swapped[(*(slice(None),) * win.ndim, j)]  # (*size, groups, I)
        w = w.reshape(*(n for k in win.size for n in (1, k)), *w.shape[win.ndim :])
        terms.append(y[..., j : j + 1] * expand_rank(w, y))
    x = lax.collapse(_sum(terms), 2 * win.ndim + 1)
    zero, none = np.zeros((), y.dtype), (0, 0, 0)
    dims = zip(win.extent, win.stride, win.dilation, strict=True)
    x = lax.pad(x, zero, [none, *(pad for e, s, d in dims for pad in (none, (0, s - e, d - 1))), none])
    x = x.reshape(y.shape[0], *(o * s for o, s in zip(win.out, win.stride, strict=True)), x.shape[-1])
    starts = [lo for lo, _ in win.padding]
    limits = [lo + n for lo, n in zip(starts, win.shape, strict=True)]
    more = [(0, max(limit - n, 0), 0) for limit, n in zip(limits, x.shape[1:-1], strict=True)]
    x = lax.pad(x, zero, [none, *more, none])
    return lax.slice(x, (0, *starts, 0), (x.shape[0], *limits, x.shape[-1]))


def kernel_grad(c: Correlation, x: Array, y: Array) -> Array:
    """Apply the adjoint in w, ``(*size, I/groups, O)``: products of every tap and channel, summed in eighths.

    Parts of a dim are summed first, before anything is materialized: XLA:CPU reduces leading dims on one thread, and
    storing costs more here than computing.
    """
    win, groups, inputs = c.window, c.groups, x.shape[-1] // c.groups
    y = y.reshape(*y.shape[:-1], groups, y.shape[-1] // groups)
    axis = next((axis for axis, n in enumerate(y.shape[:-2]) if not is_symbolic(n) and n >= 8), 0)

    def grad_of_taps(x: Array, taps: Iterable[tuple[int, ...]]) -> Array:
        sums = []
        for tap in taps:
            entries = _tap_elements(x, np.multiply(tap, win.dilation), win.out, win.stride)
            entries = entries.reshape(*entries.shape[:-1], groups, inputs)
            sums += [sum_of_eights(entries[..., i : i + 1] * y, axis) for i in range(inputs)]
        w = jnp.stack(sums)
        w = w.reshape(w.shape[0], math.prod(w.shape[1:-2]), math.prod(w.shape[-2:]))
        while not known_at_most(w.shape[1], 1):
            w = sum_of_eights(w, 1)
        return w.sum(1)

    if win.entries * inputs <= LOOPED["sums"]:
        return grad_of_taps(padded(win, x), win.taps()).reshape(*win.size, inputs, -1)
    # Each iteration takes a block of taps, and materializes the part of x that they read. Taps of the last blocks
    # that are outside the kernel are sliced off.
    block, blocks = _blocks(win.size, max(LOOPED["block"] // inputs, 1))
    more = [(q * b - k) * d for q, b, k, d in zip(blocks, block, win.size, win.dilation, strict=True)]
    canvas = lax.pad(padded(win, x), np.zeros((), x.dtype), [(0, 0, 0), *((0, m, 0) for m in more), (0, 0, 0)])
    reach = [(o - 1) * s + 1 + (b - 1) * d for o, s, b, d in zip(win.out, win.stride, block, win.dilation, strict=True)]
    taps = list(np.ndindex(*block))

    def grad_of_block(start: Array) -> Array:
        return grad_of_taps(materialize(_tap_elements(canvas, start, reach, (1,) * win.ndim)), taps)

    starts = np.array(list(np.ndindex(*blocks))) * block * np.array(win.dilation)
    w = lax.map(grad_of_block, starts.astype(np.int32)).reshape(*blocks, *block, inputs, -1)
    pairs = [axis for dim in range(win.ndim) for axis in (dim, win.ndim + dim)]
    w = w.transpose(*pairs, 2 * win.ndim, 2 * win.ndim + 1)
    w = w.reshape(*(q * b for q, b in zip(blocks, block, strict=True)), *w.shape[-2:])
    return lax.slice(w, (0,) * w.ndim, (*win.size, *w.shape[-2:]))


def kernel_grad_by_position(c: Correlation, x: Array, y: Array) -> Array:
    """Apply the adjoint in w of a depthwise correlation with one term per position: δ[o] times all that its taps read.

    The positions of a block are written out, the blocks are processed in a loop. The sum over the batch comes last, so
    that devices communicate once.
    """
    win, block = c.window, position_block(c.window)
    if y.shape[-1] > x.shape[-1]:
        x = jnp.repeat(x, y.shape[-1] // x.shape[-1], -1)
    canvas, y = materialize(padded(win, x)), materialize(y)
    reach = [e + (b - 1) * s for e, b, s in zip(win.extent, block, win.steps, strict=True)]
    ones = (1,) * win.ndim

    def sum_of_block(start: Start) -> Array:
        entries = _tap_elements(canvas, start * np.array(win.stride, np.int32), reach, ones)
        deltas = _tap_elements(y, start, block, ones)
        terms = []
        for position in np.ndindex(*block):
            of_taps = _tap_elements(entries, np.multiply(position, win.steps), win.size, win.dilation)
            terms.append(lax.mul(of_taps, _tap_elements(deltas, np.array(position), ones, ones)))
        return _sum_in_chains(terms)

    blocks = [n // b for n, b in zip(win.out, block, strict=True)]
    starts = np.array(list(np.ndindex(*blocks)), np.int32) * np.array(block, np.int32)
    if len(starts) == 1:
        w = sum_of_block(starts[0])
    else:
        first = _tap_elements(y, starts[0], ones, ones)
        zero = jnp.broadcast_to(jnp.zeros_like(first), (y.shape[0], *win.size, y.shape[-1]))  # sharded as δ
        w = lax.scan(lambda total, start: (total + sum_of_block(start), None), zero, starts)[0]
    return materialize(w).sum(0).reshape(*win.size, 1, -1)


def position_block(win: Window) -> tuple[int, ...]:
    """Return the size of the blocks of `kernel_grad_by_position`: a part of a row, or whole rows."""
    block: list[int] = []
    most = LOOPED["positions"]
    for n in reversed(win.out):
        block.insert(0, largest_divisor(n, most))
        most = most // n if block[0] == n else 1
    return tuple(block)


def _blocks(size: Sequence[int], most: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the size of a block of at most ``most`` taps, the last dim filled first, and the blocks per dim."""
    block: list[int] = []
    for n in reversed(size):
        blocks = -(-n // max(most // math.prod(block), 1))
        block.insert(0, -(-n // blocks))
    return tuple(block), tuple(-(-n // b) for n, b in zip(size, block, strict=True))


def _tap_elements(canvas: Array, start: Start, out: Sequence[int], stride: Sequence[int]) -> Array:
    """Return the elements that a tap reads, ``(N, *out, …)``: a strided slice of the spatial dims from ``start`` on."""
    spans = [(n - 1) * s + 1 for n, s in zip(out, stride, strict=True)]
    rest = canvas.shape[1 + len(spans) :]
    if isinstance(start, np.ndarray):
        limits = (canvas.shape[0], *(at + span for at, span in zip(start, spans, strict=True)), *rest)
        return lax.slice(canvas, (0, *start, *(0,) * len(rest)), limits, (1, *stride, *(1,) * len(rest)))
    zero = np.int32(0)
    begin = (zero, *start, *(zero,) * len(rest))
    span = lax.dynamic_slice(canvas, begin, (canvas.shape[0], *spans, *rest), allow_negative_indices=False)
    return lax.slice(span, (0,) * span.ndim, span.shape, (1, *stride, *(1,) * len(rest)))


def _sum_over_taps(
    terms: Callable[[Start, Array], Iterable[Array]], starts: np.ndarray, weights: Array, taps: np.ndarray, each: int
) -> Array:
    """Sum ``terms(start, weights[tap])`` over taps, with ``each`` terms per tap.

    A few terms are written out. If there are more, the first ones are written out and the others are added in a loop
    over chunks of equal length, so the program does not grow with the kernel.
    """

    def terms_of(starts: Iterable[Start], weights: Iterable[Array]) -> list[Array]:
        return [term for start, w in zip(starts, weights, strict=True) for term in terms(start, w)]

    length = max(LOOPED["chunk"] // each, 1)
    few = _written_out(len(starts), each) or len(starts) <= length
    # At least one is written out: the loop's carry then has the right sharding.
    first = len(starts) if few else (len(starts) - 1) % length + 1
    of_first = (lax.index_in_dim(weights, tap, keepdims=False) for tap in taps[:first].tolist())
    total = _sum(terms_of(starts[:first], of_first))
    if few:
        return total

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _sum_in_chains(terms_of(*chunk)), None

    rest = jnp.take(weights, taps[first:], axis=0, mode="clip")
    chunks: Any = starts[first:].reshape(-1, length, starts.shape[1]), rest.reshape(-1, length, *rest.shape[1:])
    return lax.scan(add, total, chunks)[0]


def _written_out(taps: int, each: int) -> bool:
    """Whether the terms of all taps, ``each`` per tap, are written out."""
    return taps <= LOOPED["taps"] and taps * each <= LOOPED["terms"]


def _sum(terms: Iterable[Array]) -> Array:
    """Sum the terms in loops of at most `TERMS`, each in `CHAINS` partial sums."""
    terms = list(terms)
    loops = -(-len(terms) // TERMS)
    size = -(-len(terms) // loops)
    sums = [_sum_in_chains(terms[at : at + size]) for at in range(0, len(terms), size)]
    return sums[0] if loops == 1 else functools.reduce(lax.add, map(materialize, sums))


def _sum_in_chains(terms: Sequence[Array]) -> Array:
    chains = [functools.reduce(lax.add, terms[i::CHAINS]) for i in range(min(CHAINS, len(terms)))]
    return functools.reduce(lax.add, chains)
