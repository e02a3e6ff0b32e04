"""Hypothesis strategies for geometries, as rows of `tests/cases.py`, and their comparison with PyTorch.

`STRATEGIES` has one for each op with a geometry. `agree` compares rows with PyTorch, forward and gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import torch

import jaxcnn
from jaxcnn.geometry import PADDING_MODES
from tests import oracles
from tests.cases import OPS, Case, compiled, positive, row, ties, with_cotangents
from tests.checks import assert_close, within
from tests.compare_torch import CLOSE, in_torch, pulled_in_torch, random_delta

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Unfit(Exception):
    """The drawn values do not form a valid geometry."""


def must(fit: bool) -> None:
    """Reject a geometry like Hypothesis's `assume`, but without rejecting the others drawn together with it."""
    if not fit:
        raise Unfit


def fitting(body: Callable[..., Case]) -> Callable[..., st.SearchStrategy[Case | None]]:
    """Make a strategy like `st.composite`, which gives None for rejected geometries."""

    @st.composite
    def one(draw: Draw, *args: Any) -> Case | None:
        try:
            return body(draw, *args)
        except Unfit:
            return None

    return one


# ---------------------------------------------------------------------------------------------------------------------
# Parts. Hypothesis starts and shrinks with the first choice, so the trivial choices come last.

RANKS = st.sampled_from((2, 1, 3))
BATCHES = st.sampled_from((2, 1, 3))
CHANNELS = st.sampled_from((2, 3, 1, 5))
#: Elements of a dim beyond the extent of a kernel; 3-D inputs are small.
MORE = {1: st.integers(0, 9), 2: st.integers(0, 5), 3: st.integers(0, 3)}
PATCHES = {1: (3, 2, 4, 5, 7, 1), 2: (3, 2, 4, 5, 1), 3: (2, 3, 1)}


def each(draw: Draw, ndim: int, choices: tuple[int, ...]) -> Any:
    """Draw one int for all dims, or one per dim."""
    of_dim = st.sampled_from(choices)
    return draw(st.one_of(st.tuples(*[of_dim] * ndim), of_dim))


def paddings(draw: Draw, ndim: int, most: int, *names: str) -> Any:
    """Draw a name, an int, or an int or a pair per dim."""
    width = st.integers(0, most)
    pairs = st.tuples(*[st.tuples(width, width)] * ndim)
    named = ("VALID", "SAME", "SAME_LOWER", *(("CAUSAL",) if ndim == 1 else ()), *names)
    return draw(st.one_of(pairs, st.sampled_from(named), width, st.tuples(*[width] * ndim)))


def reaches(size: tuple[int, ...], dilation: Any) -> list[int]:
    """Return the extent of a window in each dim."""
    return [(k - 1) * d + 1 for k, d in zip(size, oracles.per_dim(dilation, len(size)), strict=True)]


def images(draw: Draw, extent: list[int], most_padding: int) -> tuple[int, ...]:
    """Draw spatial dims, some of which need all the padding."""
    more = MORE[len(extent)]
    return tuple(max(e + draw(more) - draw(st.integers(0, 2 * most_padding)), 1) for e in extent)


def without(default: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    return {name: value for name, value in options.items() if value != default.get(name)}


DEFAULTS = {"stride": 1, "padding": "VALID", "dilation": 1, "groups": 1, "output_padding": 0, "ceil_mode": False}
LAYOUTS = {
    1: (None, ("NCW", "OIW", "NCW")),
    2: (None, ("NCHW", "OIHW", "NCHW"), ("WNHC", "IOWH", "CHWN")),
    3: (None, ("NCDHW", "OIDHW", "NCDHW")),
}


def arranged(shape: tuple[int, ...], letters: str, layout: str) -> tuple[int, ...]:
    return tuple(shape[letters.index(d)] for d in layout)


def with_layouts(
    draw: Draw, x: tuple[int, ...], w: tuple[int, ...], options: dict[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Return the same shapes and options in one of the layouts."""
    layouts = draw(st.sampled_from(LAYOUTS[len(x) - 2]))
    if layouts is None:
        return x, w, options
    of_x, of_w, _ = layouts
    space = "".join(d for d in of_w if d not in "IO")
    return arranged(x, f"N{space}C", of_x), arranged(w, f"{space}IO", of_w), {**options, "dimension_numbers": layouts}


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions


def padded_patch(draw: Draw) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Draw spatial dims, a kernel that fits, and the options of its window."""
    ndim = draw(RANKS)
    size = tuple(draw(st.tuples(*[st.sampled_from(PATCHES[ndim])] * ndim)))
    dilation, most = each(draw, ndim, (1, 2, 3)), draw(st.sampled_from((2, 5)))
    padding = paddings(draw, ndim, most, "REFLECT", "REPLICATE", "CIRCULAR")
    spatial = images(draw, extent := reaches(size, dilation), 0 if padding == "VALID" else most)
    stride = each(draw, ndim, (2, 1, 3))
    steps, distances = (oracles.per_dim(value, ndim) for value in (stride, dilation))
    pads = oracles.pad_widths(padding, spatial, size, steps, distances)
    must(all(e <= lo + n + hi for n, e, (lo, hi) in zip(spatial, extent, pads, strict=True)))
    if padding in ("REFLECT", "CIRCULAR"):  # these cannot repeat more than there is
        must(all(max(pair) <= n - (padding == "REFLECT") for n, pair in zip(spatial, pads, strict=True)))
    return spatial, size, without(DEFAULTS, stride=stride, padding=padding, dilation=dilation)


@fitting
def convs(draw: Draw) -> Case:
    spatial, size, options = padded_patch(draw)
    groups, i, o = draw(st.sampled_from((1, 1, 2, 3))), draw(CHANNELS), draw(CHANNELS)
    x, w = (draw(BATCHES), *spatial, groups * i), (*size, i, groups * o)
    bias = [(groups * o,)] if draw(st.booleans()) else []
    x, w, options = with_layouts(draw, x, w, options | without(DEFAULTS, groups=groups))
    return row("conv", x, w, *bias, stock=False, **options)


@fitting
def depthwise_convs(draw: Draw) -> Case:
    spatial, size, options = padded_patch(draw)
    channels, outputs = draw(CHANNELS), draw(st.sampled_from((1, 2, 3)))
    x, w = (draw(BATCHES), *spatial, channels), (*size, 1, channels * outputs)
    bias = [(channels * outputs,)] if draw(st.booleans()) else []
    x, w, options = with_layouts(draw, x, w, options)
    return row("depthwise_conv", x, w, *bias, stock=False, **options)


@fitting
def conv_transposes(draw: Draw) -> Case:
    ndim = draw(RANKS)
    size = tuple(draw(st.tuples(*[st.sampled_from(PATCHES[ndim])] * ndim)))
    stride, dilation = each(draw, ndim, (2, 1, 3)), each(draw, ndim, (1, 2, 3))
    padding = paddings(draw, ndim, 3)
    spatial = tuple(draw(st.integers(1, 3 if ndim == 3 else 5)) for _ in range(ndim))
    steps = oracles.per_dim(stride, ndim)
    more = 0
    if padding not in ("SAME", "SAME_LOWER"):
        distances = oracles.per_dim(dilation, ndim)
        more = tuple(draw(st.integers(0, max(pair) - 1)) for pair in zip(steps, distances, strict=True))
        sizes = [n * s for n, s in zip(spatial, steps, strict=True)]
        pads = oracles.pad_widths(padding, sizes, size, steps, distances)
        full = [(n - 1) * s + e for n, s, e in zip(spatial, steps, reaches(size, dilation), strict=True)]
        # Without output_padding: the PyTorch oracle crops before it pads the output.
        must(all(n > lo + hi for n, (lo, hi) in zip(full, pads, strict=True)))
    groups, i, o = draw(st.sampled_from((1, 1, 2, 3))), draw(CHANNELS), draw(CHANNELS)
    x, w = (draw(BATCHES), *spatial, groups * i), (*size, o, groups * i)
    bias = [(groups * o,)] if draw(st.booleans()) else []
    options = without(DEFAULTS, stride=stride, padding=padding, dilation=dilation, groups=groups)
    options |= {"output_padding": more} if more and any(more) else {}
    x, w, options = with_layouts(draw, x, w, options)
    return row("conv_transpose", x, w, *bias, stock=False, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def pool(draw: Draw) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Draw an input shape, and options of windows that each hold an element of the input."""
    ndim = draw(RANKS)
    window = each(draw, ndim, (2, 3, 1, 4, *((9,) if ndim < 3 else ())))
    dilation = each(draw, ndim, (1, 2, 3)) if draw(st.booleans()) else 1
    stride = draw(st.one_of(st.none(), st.just(each(draw, ndim, (2, 1, 3, 4)))))
    size = oracles.per_dim(window, ndim)
    ceil_mode = draw(st.booleans())
    # PyTorch pads at most half a window, equally on both sides; its ceil_mode differs from ours otherwise.
    half = st.integers(0, min(size) // 2)
    padding = draw(half) if ceil_mode else paddings(draw, ndim, 3)
    spatial = images(draw, extent := reaches(size, dilation), 2)
    steps, distances = oracles.per_dim(window if stride is None else stride, ndim), oracles.per_dim(dilation, ndim)
    pads = oracles.pad_widths(padding, spatial, size, steps, distances)
    dims = zip(spatial, extent, steps, distances, pads, strict=True)
    must(all(meets(*dim, ceil_mode=ceil_mode) for dim in dims))
    options = without(DEFAULTS, padding=padding, dilation=dilation, ceil_mode=ceil_mode)
    options |= {} if stride is None else {"stride": stride}
    return (draw(BATCHES), *spatial, draw(CHANNELS)), {"window": window, **options}


def meets(n: int, extent: int, stride: int, dilation: int, pads: tuple[int, int], *, ceil_mode: bool) -> bool:
    """Return whether a window fits, and every window position holds an element of the input."""
    lo, hi = pads
    spare = lo + n + hi - extent
    if spare < 0:
        return False
    starts = list(range(0, spare + 1, stride))
    if ceil_mode and spare % stride and starts[-1] + stride < n + lo:
        starts.append(starts[-1] + stride)
    return all(any(0 <= start + k - lo < n for k in range(0, extent, dilation)) for start in starts)


@fitting
def max_pools(draw: Draw, op: str) -> Case:
    x, options = pool(draw)
    return row(op, x, stock=False, draw=ties if draw(st.booleans()) else None, **options)


def for_averages(draw: Draw) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Draw as `pool` does, without combinations of ceil_mode that PyTorch's average pooling does not have.

    These are ceil_mode with dilation, and with 3-D windows larger than the input.
    """
    x, options = pool(draw)
    size = oracles.per_dim(options["window"], len(x) - 2)
    larger = len(size) == 3 and any(k > n for k, n in zip(size, x[1:], strict=False))
    must(not (options.get("ceil_mode") and (larger or "dilation" in options)))
    return x, options


@fitting
def avg_pools(draw: Draw) -> Case:
    x, options = for_averages(draw)
    return row("avg_pool", x, stock=False, **options, **({"count_include_pad": False} if draw(st.booleans()) else {}))


@fitting
def lp_pools(draw: Draw) -> Case:
    x, options = for_averages(draw)
    p = draw(st.sampled_from((2, 3, 1.5, 4, 1)))
    return row("lp_pool", x, stock=False, draw=positive if p in (3, 1.5) else None, p=p, **options)


@fitting
def max_unpools(draw: Draw) -> Case:
    ndim = draw(RANKS)
    small = st.integers(1, 6 - ndim)
    y, spatial = (draw(st.tuples(*[small] * ndim)) for _ in range(2))
    return row("max_unpool", (draw(BATCHES), *y, draw(CHANNELS)), stock=False, spatial_shape=spatial)


@fitting
def adaptive_pools(draw: Draw, op: str) -> Case:
    ndim = draw(RANKS)
    spatial = tuple(draw(st.integers(1, (13, 9, 6)[ndim - 1])) for _ in range(ndim))
    size = each(draw, ndim, (2, 3, 1, 4, 5, 7))
    drawn = ties if op == "adaptive_max_pool" and draw(st.booleans()) else None
    return row(op, (draw(BATCHES), *spatial, draw(CHANNELS)), stock=False, draw=drawn, output_size=size)


# ---------------------------------------------------------------------------------------------------------------------
# Normalization


def features(draw: Draw, least: int = 0) -> tuple[int, ...]:
    """Draw the dims between batch and channels."""
    return tuple(draw(st.lists(st.integers(1, 4), min_size=least, max_size=3)))


def scaled(draw: Draw, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Draw neither scale nor bias, scale only, or both."""
    return [shape] * draw(st.integers(0, 2))


EPS = st.sampled_from(({}, {"eps": 0.1}))


@fitting
def batch_norms(draw: Draw) -> Case:
    x = (draw(st.integers(2, 4)), *features(draw), draw(CHANNELS))
    given = [x[-1:]] * 4 if draw(st.booleans()) else scaled(draw, x[-1:])
    return row("batch_norm", x, *given, stock=False, **draw(EPS))


@fitting
def layer_norms(draw: Draw) -> Case:
    x = (draw(BATCHES), *features(draw), draw(st.integers(2, 6)))
    axes = draw(st.sets(st.integers(1, len(x) - 1), min_size=1).map(sorted).map(tuple))
    must(math.prod(x[a] for a in axes) > 1)
    options = {} if axes == (len(x) - 1,) else {"axes": axes}
    return row("layer_norm", x, *scaled(draw, tuple(x[a] for a in axes)), stock=False, **options, **draw(EPS))


@fitting
def group_norms(draw: Draw) -> Case:
    groups, channels = draw(st.sampled_from((2, 1, 3))), draw(st.integers(1, 4))
    x = (draw(BATCHES), *features(draw), groups * channels)
    must(math.prod(x[1:-1]) * channels > 1)
    return row("group_norm", x, *scaled(draw, x[-1:]), stock=False, groups=groups, **draw(EPS))


STRATEGIES: dict[str, st.SearchStrategy[Case | None]] = {
    "conv": convs(),
    "conv_transpose": conv_transposes(),
    "depthwise_conv": depthwise_convs(),
    "max_pool": max_pools("max_pool"),
    "max_pool_with_indices": max_pools("max_pool_with_indices"),
    "max_unpool": max_unpools(),
    "avg_pool": avg_pools(),
    "lp_pool": lp_pools(),
    "adaptive_max_pool": adaptive_pools("adaptive_max_pool"),
    "adaptive_avg_pool": adaptive_pools("adaptive_avg_pool"),
    "batch_norm": batch_norms(),
    "layer_norm": layer_norms(),
    "group_norm": group_norms(),
}
#: Percentage of geometries per op.
SHARES = {
    "conv": 24, "conv_transpose": 14, "depthwise_conv": 10, "max_pool": 12, "max_pool_with_indices": 8,
    "max_unpool": 2, "avg_pool": 10, "lp_pool": 6, "adaptive_max_pool": 4, "adaptive_avg_pool": 4, "batch_norm": 2,
    "layer_norm": 2, "group_norm": 2,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The comparison


#: Mostly float64, where the comparison is strictest. Normalization cancels too much for narrow dtypes.
DTYPES = {
    op: st.sampled_from((np.float64,) if op.endswith("norm") else (np.float64, np.float64, np.float32, jnp.bfloat16))
    for op in STRATEGIES
}


Geometry = tuple[Case, Any]


def agree(geometries: Sequence[Geometry]) -> None:
    """Assert that values and cotangents of rows agree with PyTorch, each row in its own dtype.

    All rows are compiled as one program, because compilation dominates. In float64 the comparison is elementwise; in
    other dtypes it allows for rounding.
    """
    arrays = [case.arrays(dtype) for case, dtype in geometries]
    wides = [tuple(a.astype(np.float64) for a in args) for args in arrays]
    theirs = [in_torch(case.oracle, wide) for (case, _), wide in zip(geometries, wides, strict=True)]
    deltas = [random_delta(y.astype(dtype)) for (_, dtype), (y, _) in zip(geometries, theirs, strict=True)]

    @compiled
    def run(arrays: Any, deltas: Any) -> Any:
        rows = zip(geometries, arrays, deltas, strict=True)
        return [with_cotangents(case.function)(args, delta) for (case, _), args, delta in rows]

    found = run(arrays, deltas)
    for (case, dtype), wide, delta, (y, cotangents), (expected_y, pull) in zip(
        geometries, wides, deltas, found, theirs, strict=True
    ):
        expected = pull(delta.astype(np.float64))
        assert [a.dtype for a in (y, *cotangents)] == [dtype] * (1 + len(wide)), str(case)
        try:
            if dtype is not np.float64:
                assert_close([y, *cotangents], [expected_y, *expected], tolerances(case, dtype, wide, delta, expected))
                continue
            for i, (a, b) in enumerate(zip((y, *cotangents), (expected_y, *expected), strict=True)):
                np.testing.assert_allclose(a, b, err_msg=f"cotangent {i - 1}" if i else "value", **CLOSE)
        except AssertionError as error:
            raise AssertionError(f"{case}\n{error}") from None
    indices_agree(geometries)


def tolerances(
    case: Case, dtype: Any, args: Sequence[np.ndarray], delta: np.ndarray, expected: Sequence[np.ndarray]
) -> np.ndarray:
    """Return the tolerances of y and the cotangents.

    Sums may cancel, so the tolerance of a linear op also includes the rounding of all terms of its sums. The terms are
    rounded in float32, except for δ of repeated padding, which is rounded in ``dtype``.
    """
    found = np.full(1 + len(args), within(case, dtype))
    if case.linear:
        rounded = np.full(len(args), np.finfo(np.float32).eps)
        if case.options.get("padding") in PADDING_MODES:
            rounded[0] = jnp.finfo(dtype).eps
        _, added = pulled_in_torch(case.oracle, tuple(map(np.abs, args)), np.abs(delta).astype(np.float64))
        sizes = zip(added, expected, strict=True)
        found[1:] += rounded * [np.linalg.norm(a) / max(np.linalg.norm(b), 1e-3) for a, b in sizes]
    return found


def indices_agree(geometries: Sequence[Geometry]) -> None:
    """Assert that indices agree with PyTorch's `return_indices`; inputs are finite, so −∞ in padding never wins."""
    pools = [(case.options, case.arrays(dtype)[0]) for case, dtype in geometries if "indices" in case.op]
    if not pools:
        return
    run = compiled(
        lambda images: [jaxcnn.max_pool_with_indices(x, **of)[1] for (of, _), x in zip(pools, images, strict=True)]
    )
    for (options, x), found in zip(pools, run([x for _, x in pools]), strict=True):
        np.testing.assert_array_equal(found, indices_in_torch(x.astype(np.float64), **options), err_msg=f"{options}")


def indices_in_torch(x: np.ndarray, window, stride=None, padding="VALID", dilation=1, ceil_mode=False) -> np.ndarray:
    size, stride, pads, dilation = oracles.pool_options(torch.tensor(x), window, stride, padding, dilation)
    own, padded = oracles.native(pads, size), torch.tensor(x).movedim(-1, 1)
    if own is None:
        padded = torch.nn.functional.pad(padded, oracles.flat(pads), value=-math.inf)
    pool = oracles.MAX_POOL[len(size)]
    _, at = pool(padded, size, stride, own or 0, dilation, ceil_mode, return_indices=True)
    found = at.movedim(1, -1).numpy()
    if own is not None:
        return found
    places = np.unravel_index(found, padded.shape[2:])  # indices into the padded input
    return np.ravel_multi_index([at - lo for at, (lo, _) in zip(places, pads, strict=True)], x.shape[1:-1])


def pasteable(case: Case) -> str:
    """Return the line of `tests/cases.py` for this case."""
    options = [f"{option}={value!r}" for option, value in case.options.items()]
    drawn = [] if case.draw == OPS[case.op].draw else [f"draw={case.draw[0].__name__}"]
    return f"row({', '.join([repr(case.op), *map(repr, case.shapes), *options, *drawn])}),".replace("'", '"')
