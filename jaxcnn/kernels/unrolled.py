"""Shift, multiply, add: the products of `kernels.correlation` as sums with a term for each tap and channel.

    correlate    y[o, g, j] = Σ_k Σ_i x[o·s + k·d − lo, g, i] · w[k, i, g, j]
    spread       x[i, g, i'] = Σ_k Σ_j y[(i + lo − k·d) / s, g, j] · w[k, i', g, j]      where the quotient is whole
    match        w[k, i, g, j] = Σ_o x[o·s + k·d − lo, g, i] · y[o, g, j]

XLA:CPU makes one loop of such a sum, over vectors of what comes out, and stores nothing on the way.  Where few channels
meet, a GEMM has no vectors to fill.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation
from jaxcnn.kernels.shapes import beside
from jaxcnn.kernels.storage import stored
from jaxcnn.kernels.sums import sum_of_eights
from jaxcnn.kernels.windows import at_tap, interleaved, meeting, tap_slices, unpad

#: Sums that a sum is made of: each waits for its own last term alone.
CHAINS = 4

#: Terms of one loop.  From about 110 XLA stores parts of them, and takes ten times as long.
TERMS = 80

#: Terms up to which it pays to pad each by itself; for each, XLA asks of every entry whether it is padding.
AT_TAPS = 9


def correlate(c: Correlation, x: Array, w: Array) -> Array:
    """``(N, *out, O)``, stored: the sum would be computed again for all that read it, and x for every term."""
    win, groups = c.window, c.groups
    inputs, outputs = w.shape[-2], w.shape[-1] // groups
    if inputs == 1:  # vectors reach over groups
        x = jnp.repeat(x, outputs, -1) if outputs > 1 else x
        taps = zip(win.taps(), tap_slices(win, x, 0), strict=True)
        return stored(_sum(entries * beside(w[(*tap, 0)], entries) for tap, entries in taps))

    def terms() -> Iterator[Array]:
        for tap, entries in zip(win.taps(), tap_slices(win, stored(x), 0), strict=True):
            entries = entries.reshape(*entries.shape[:-1], groups, inputs)
            for i in range(inputs):
                yield entries[..., i : i + 1] * beside(w[(*tap, i)].reshape(groups, outputs), entries)

    return lax.collapse(stored(_sum(terms())), win.ndim + 1)


def spread(c: Correlation, y: Array, w: Array) -> Array:
    """``(N, *shape, I)``: entries that are a multiple of the stride apart meet the same taps, and are one sum."""
    win, batch, groups = c.window, y.shape[0], c.groups
    inputs, outputs = w.shape[-2], w.shape[-1] // groups
    turned = stored(jnp.moveaxis(w.reshape(*w.shape[:-1], groups, outputs), (-1, -3), (-3, -1)))  # (…, O, groups, I)
    alone = inputs == outputs == 1 and win.stride == (1,) * win.ndim and win.entries <= AT_TAPS
    if alone or math.prod(win.stride) > 2 * win.entries:  # no padded copy of δ; or most remainders meet no tap
        y = y.reshape(*y.shape[:-1], groups, outputs)

        def of_tap(tap: tuple[int, ...]) -> Array:
            found = _sum(y[..., j : j + 1] * beside(turned[(*tap, j)], y) for j in range(outputs))
            return at_tap(win, tap, lax.collapse(found, win.ndim + 1))

        return unpad(win, _sum(map(of_tap, win.taps())))
    met = [meeting(win, dim) for dim in range(win.ndim)]
    length = [-(-n // s) for n, s in zip(win.shape, win.stride, strict=True)]
    shifts = [[shift for phase in phases for _, shift in phase] for phases in met]
    before = [max(-min(of, default=0), 0) for of in shifts]
    after = [max(max(of, default=0) + n - out, 0) for of, n, out in zip(shifts, length, win.out, strict=True)]
    pads = [(0, 0, 0), *((lo, hi, 0) for lo, hi in zip(before, after, strict=True)), (0, 0, 0)]
    y = lax.pad(stored(y), np.zeros((), y.dtype), pads)
    y = y.reshape(*y.shape[:-1], groups, outputs)

    def terms(taps: Sequence[tuple[int, ...]], starts: Sequence[tuple[int, ...]]) -> Iterator[Array]:
        for tap, start in zip(taps, starts, strict=True):
            ends = [at + n for at, n in zip(start, length, strict=True)]
            entries = lax.slice(y, (0, *start, 0, 0), (batch, *ends, groups, outputs))
            for j in range(outputs):
                yield entries[..., j : j + 1] * beside(turned[(*tap, j)], entries)

    phases = []
    for pairs in itertools.product(*met):
        which = list(itertools.product(*pairs))
        taps = [tuple(k for k, _ in one) for one in which]
        starts = [tuple(shift + lo for (_, shift), lo in zip(one, before, strict=True)) for one in which]
        zero = jnp.zeros((batch, *length, groups, inputs), y.dtype)
        phase = _sum(terms(taps, starts)) if taps else zero
        phase = lax.collapse(phase, win.ndim + 1)
        phases.append(stored(phase) if outputs > 1 else phase)
    return interleaved(win, phases)


def match(c: Correlation, x: Array, y: Array) -> Array:
    """``(*size, I/groups, O)``: the products of every tap and channel, summed eight at a time.

    First over parts of a dim, before anything is stored: XLA:CPU reduces leading dims on one thread, and what is stored
    costs more here than what is computed.
    """
    win, groups, inputs = c.window, c.groups, x.shape[-1] // c.groups
    y = y.reshape(*y.shape[:-1], groups, y.shape[-1] // groups)
    axis = next((axis for axis, n in enumerate(y.shape[:-2]) if n >= 8), 0)

    def sums() -> Iterator[Array]:
        for entries in tap_slices(win, x, 0):
            entries = entries.reshape(*entries.shape[:-1], groups, inputs)
            for i in range(inputs):
                yield sum_of_eights(entries[..., i : i + 1] * y, axis)

    w = jnp.stack(list(sums()))
    w = w.reshape(w.shape[0], math.prod(w.shape[1:-2]), math.prod(w.shape[-2:]))
    while w.shape[1] > 1:
        w = sum_of_eights(w, 1)
    return w.sum(1).reshape(*win.size, inputs, -1)


def _sum(terms: Iterable[Array]) -> Array:
    """In loops of at most `TERMS`, each in `CHAINS`."""
    terms = list(terms)
    loops = -(-len(terms) // TERMS)
    size = -(-len(terms) // loops)
    sums = [_chained(terms[at : at + size]) for at in range(0, len(terms), size)]
    return sums[0] if loops == 1 else functools.reduce(operator.add, map(stored, sums))


def _chained(terms: Sequence[Array]) -> Array:
    chains = [functools.reduce(operator.add, terms[i::CHAINS]) for i in range(min(CHAINS, len(terms)))]
    return functools.reduce(operator.add, chains)
