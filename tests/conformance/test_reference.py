"""`jax._src.lax_reference`, JAX's convolutions and windows in NumPy, over a grid of 1-D, 2-D and 3-D geometries.

Only the forward pass of the reference is needed. A convolution is linear in input and kernel, so its values at all unit
inputs (one batch) and all unit kernels (one output channel each) are its gradients. The same holds for a window sum. A
maximum is linear over steps smaller than the gap between any two elements.
"""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
from jax import lax

import jaxcnn
from tests.cases import apart, compiled, with_cotangents
from tests.compare_torch import CLOSE, random_delta
from tests.conformance.summary import agreed

SOURCE = "jax._src.lax_reference, a grid"
reference = pytest.importorskip(
    "jax._src.lax_reference", reason="this jax has no reference in its wheel", exc_type=ImportError
)

SHAPES = {1: (7,), 2: (6, 5), 3: (4, 5, 3)}
#: Geometries compiled as one program, in half the time of separate programs.
AT_ONCE = 12


def along(sizes, strides, pads, dilations):
    """Return all 1-D geometries: (size, stride, padding, dilation)."""
    return list(itertools.product(sizes, strides, pads, dilations))


def grid(ndim, of_one_dim, fits):
    """Combine 1-D geometries into ``ndim`` dims.

    Each geometry appears in the first dim. The other dims step through the list with strides coprime to its length.
    """
    paces = {1: (1,), 2: (1, 5), 3: (1, 5, 7)}[ndim]
    each = range(0, len(of_one_dim), 3 if ndim == 3 else 1)
    found = [tuple(of_one_dim[(i * pace + dim) % len(of_one_dim)] for dim, pace in enumerate(paces)) for i in each]
    return [g for g in found if all(fits(n, *of_dim) for n, of_dim in zip(SHAPES[ndim], g, strict=True))]


def chunks(rows):
    return [rows[i : i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)]


def patch_fits(n, size, stride, pads, dilation):
    return (size - 1) * dilation + 1 <= n + sum(pads)


def agree(record, op, functions, arguments, expected):
    """Compare values and cotangents of several calls, compiled together."""
    results = [jax.eval_shape(f, *args) for f, args in zip(functions, arguments, strict=True)]
    deltas = [random_delta(y, seed) for seed, y in enumerate(results)]

    @compiled
    def run(arguments, deltas):
        return [with_cotangents(f)(*given) for f, *given in zip(functions, arguments, deltas, strict=True)]

    for found, judge, args, delta in zip(run(arguments, deltas), expected, arguments, deltas, strict=True):
        y, cotangents = found
        for i, (a, b) in enumerate(zip((y, *cotangents), judge(*args, delta), strict=True)):
            np.testing.assert_allclose(a, b, err_msg=("y", "δ_x", "∂E/∂w")[i], **CLOSE)
    agreed(record, SOURCE, op, len(functions))


def units(shape):
    """Return ``(entries, *shape)``: for each element, one array that is 1 there and 0 elsewhere."""
    return np.eye(math.prod(shape)).reshape(-1, *shape)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions

LAYOUTS = {
    1: [("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("WNHC", "WOIH", "CHWN")],
    3: [("NDHWC", "DHWIO", "NDHWC"), ("NCDHW", "OIDHW", "NCDHW")],
}
CONVOLUTIONS = along((3, 1, 2, 4), (1, 2, 3), ((0, 0), (1, 1), (0, 2), (3, 0)), (1, 2))


def spatial_letters(of_w):
    return "".join(d for d in of_w if d not in "IO")


def arranged(a, letters, layout):
    return np.transpose(a, [letters.index(d) for d in layout])


def judged_by_unit_arrays(of_x, of_w, of_y, x, w, delta, forward):
    """Return the forward result and its gradients, from unit inputs (one per element of x) and unit kernels."""
    n, i, o = (a.shape[layout.index(d)] for a, layout, d in ((x, of_x, "N"), (x, of_x, "C"), (w, of_w, "O")))
    space = spatial_letters(of_w)
    delta = arranged(delta, of_y, f"N{space}C")
    spatial = [x.shape[of_x.index(d)] for d in space]
    images = units((*spatial, i))
    answers = arranged(forward(arranged(images, f"N{space}C", of_x), w), of_y, f"N{space}C")
    delta_x = (delta.reshape(n, -1) @ answers.reshape(len(answers), -1).T).reshape(n, *spatial, i)
    size = [w.shape[of_w.index(d)] for d in space]
    patches = np.moveaxis(units((*size, i)), 0, -1)  # one output channel per element
    answers = arranged(forward(x, arranged(patches, f"{space}IO", of_w)), of_y, f"N{space}C")
    grad_w = (answers.reshape(-1, answers.shape[-1]).T @ delta.reshape(-1, o)).reshape(*size, i, o)
    return forward(x, w), arranged(delta_x, f"N{space}C", of_x), arranged(grad_w, f"{space}IO", of_w)


def convolution(number, geometry):
    """Return our function, its arguments and the reference of one geometry, cycling through the layouts."""
    ndim = len(geometry)
    size, stride, pads, dilation = zip(*geometry, strict=True)
    layouts = LAYOUTS[ndim][number % len(LAYOUTS[ndim])]
    of_x, of_w, _ = layouts
    space = spatial_letters(of_w)
    rng = np.random.default_rng(number)
    x = arranged(rng.standard_normal((2, *SHAPES[ndim], 2)), f"N{space}C", of_x)
    w = arranged(rng.standard_normal((*size, 2, 3)), f"{space}IO", of_w)
    f = functools.partial(jaxcnn.conv, stride=stride, padding=pads, dilation=dilation, dimension_numbers=layouts)
    no = (1,) * ndim

    def forward(x, w):
        return reference.conv_general_dilated(x, w, stride, pads, no, dilation, layouts)

    return f, (x, w), lambda x, w, delta: judged_by_unit_arrays(*layouts, x, w, delta, forward)


def transposed(number, geometry):
    """Return the same for a transposed convolution: an input dilated by the stride, with the kernel flipped."""
    ndim = len(geometry)
    size, stride, cut, dilation = zip(*geometry, strict=True)
    of_x, of_w, of_y = layouts = LAYOUTS[ndim][number % len(LAYOUTS[ndim])]
    space = spatial_letters(of_w)
    rng = np.random.default_rng(number)
    more = tuple(number % s for s in stride)
    x = arranged(rng.standard_normal((2, *(n - 1 for n in SHAPES[ndim]), 2)), f"N{space}C", of_x)
    w = arranged(rng.standard_normal((*size, 3, 2)), f"{space}IO", of_w)
    options = {"stride": stride, "padding": cut, "dilation": dilation, "output_padding": more}
    f = functools.partial(jaxcnn.conv_transpose, dimension_numbers=layouts, **options)
    reach = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    pads = [(r - lo, r - hi + m) for r, (lo, hi), m in zip(reach, cut, more, strict=True)]
    swapped = of_w.translate(str.maketrans("IO", "OI"))
    turn = [axis for axis, d in enumerate(of_w) if d not in "IO"]
    no = (1,) * ndim

    def forward(x, w):
        w = np.flip(w, turn)
        return reference.conv_general_dilated(x, w, no, pads, stride, dilation, (of_x, swapped, of_y))

    return f, (x, w), lambda x, w, delta: judged_by_unit_arrays(of_x, swapped, of_y, x, w, delta, forward)


def cut_fits(n, size, stride, cut, dilation):
    """Return whether no more is cropped than the kernel reaches, and the result is not empty."""
    reach = (size - 1) * dilation
    return max(cut) <= reach and (n - 2) * stride + reach + 1 > sum(cut)


KINDS = {"conv": (convolution, patch_fits), "conv_transpose": (transposed, cut_fits)}
CONV_CHUNKS = [
    (op, ndim, number, chunk)
    for op, (_, fits) in KINDS.items()
    for ndim in SHAPES
    for number, chunk in enumerate(chunks(grid(ndim, CONVOLUTIONS, fits)))
]


@pytest.mark.parametrize(
    ("op", "ndim", "number", "geometries"), CONV_CHUNKS, ids=[f"{op}-{ndim}d-{n}" for op, ndim, n, _ in CONV_CHUNKS]
)
def test_convolutions(op, ndim, number, geometries, record_property):
    made = [KINDS[op][0](number * AT_ONCE + i, geometry) for i, geometry in enumerate(geometries)]
    agree(record_property, op, *zip(*made, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Windows; the reference has no dilated ones

WINDOWS = along((2, 3, 1, 4), (1, 2, 3), ((0, 0), (1, 1), (0, 2), (3, 0)), (1,))


def window_meets(n, size, stride, pads, dilation):
    """Return whether the window fits, and every window position holds an element of the input."""
    starts = range(-pads[0], n + pads[1] - size + 1, stride)
    return len(starts) > 0 and all(start + size > 0 and start < n for start in starts)


def windows(op, number, geometry):
    size, stride, pads, _ = zip(*geometry, strict=True)
    shape = (1, *SHAPES[len(geometry)], 2)
    entries = math.prod(size)
    draw = np.random.default_rng(number)
    x = apart(draw, shape) if op == "max_pool" else draw.standard_normal(shape)
    init, computation = (-np.inf, lax.max) if op == "max_pool" else (0.0, lax.add)

    def f(x):
        y = getattr(jaxcnn, op)(x, size, stride=stride, padding=pads)
        return y if op == "max_pool" else y * entries

    def forward(x):
        sizes, strides = (1, *size, 1), (1, *stride, 1)
        return reference.reduce_window(x, np.float64(init), computation, sizes, strides, ((0, 0), *pads, (0, 0)), None)

    step = 1.0 if op == "avg_pool" else 6 / math.prod(shape) / 4  # a quarter of the gap; `apart` is from −3 to 3

    def judge(x, delta):
        y = forward(x)
        moved = np.concatenate([x + step * unit for unit in units(shape)])
        change = forward(moved).reshape(-1, *y.shape) - y
        return y, (np.tensordot(change, delta, y.ndim) / step).reshape(shape)

    return f, (x,), judge


POOL_CHUNKS = [
    (op, ndim, number, chunk)
    for op in ("max_pool", "avg_pool")
    for ndim in SHAPES
    for number, chunk in enumerate(chunks(grid(ndim, WINDOWS, window_meets)))
]


@pytest.mark.parametrize(
    ("op", "ndim", "number", "geometries"), POOL_CHUNKS, ids=[f"{op}-{ndim}d-{n}" for op, ndim, n, _ in POOL_CHUNKS]
)
def test_windows(op, ndim, number, geometries, record_property):
    made = [windows(op, number * AT_ONCE + i, geometry) for i, geometry in enumerate(geometries)]
    agree(record_property, op, *zip(*made, strict=True))
