"""Every lowering of every product equals its definition term by term, on geometries drawn by Hypothesis.

The definitions are the NumPy loops of `tests/oracles.py`.
"""

import collections
import dataclasses
import functools
import itertools
import re
from unittest import mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import (
    correlate,
    input_grad,
    kernel_grad,
    lowering,
    onednn,
    per_example,
    reductions,
    unrolled,
    windows,
    winograd,
)
from jaxcnn.native import library
from tests import compilation, oracles
from tests.cases import CASES, compiled, covering, normal, optimized, ties, with_cotangents
from tests.checks import drawn

PRODUCTS = {
    "correlate": (correlate.CORRELATE, correlate.choose_correlate, correlate.correlate, oracles.correlate),
    "input_grad": (input_grad.INPUT_GRAD, input_grad.choose_input_grad, input_grad.input_grad, oracles.input_grad),
    "kernel_grad": (
        kernel_grad.KERNEL_GRAD,
        kernel_grad.choose_kernel_grad,
        kernel_grad.kernel_grad,
        oracles.kernel_grad,
    ),
}
LOWERINGS = [(product, name) for product, (table, *_) in PRODUCTS.items() for name in table if name != "onednn"]

#: Geometries for which a lowering is intended; `lowering.applies` decides.
MADE_FOR = {
    "pointwise": {"sizes": (1,), "pads": (0,), "groups": (1,)},
    "rows": {"groups": (1,)},
    "patches": {"groups": (1,)},
    "products": {"groups": (1,)},
    "phases": {"groups": (1,)},
    "unrolled": {"inputs": (2, 1, 3)},
    "by_position": {"inputs": (1,)},
    "by_depth": {"dims": (3,), "groups": (1,)},
    "winograd": {"sizes": (3, 5), "strides": (1,), "groups": (1,)},
}

# ---------------------------------------------------------------------------------------------------------------------
# Strategies. Hypothesis starts and shrinks with the first choice, so the trivial choices come last.

BATCHES = (2, 1, 0)


@st.composite
def drawn_windows(draw, sizes=(2, 3, 1), strides=(2, 1, 3), pads=(1, 0, 2, 4), dims=(2, 1, 3)):
    """Draw windows over 1 to 3 dims, with remainders, gaps, dilation, and padding that can contain whole windows."""
    drawn = []
    for _ in range(draw(st.sampled_from(dims))):
        k, s, d = (draw(st.sampled_from(choices)) for choices in (sizes, strides, (2, 1)))
        lo, hi = draw(st.sampled_from(pads)), draw(st.sampled_from(pads))
        least = max((k - 1) * d + 1 - lo - hi, 1)
        drawn.append((draw(st.integers(least, least + 3)), k, s, (lo, hi), d))
    return Window(*zip(*drawn, strict=True))


@st.composite
def drawn_correlations(draw, groups=(2, 3, 1), inputs=(2, 1), outputs=(2, 3, 1), **of_window):
    """Draw the static arguments and the shapes of x, w and y; batches of 0 to 2."""
    win = draw(drawn_windows(**of_window))
    g, i, o, n = (draw(st.sampled_from(choices)) for choices in (groups, inputs, outputs, BATCHES))
    c = Correlation(win, g, np.dtype(np.float64))
    return c, (n, *win.shape, g * i), (*win.size, i, g * o), (n, *win.out, g * o)


def numbers(*shapes):
    rng = np.random.default_rng(0)
    return [normal(rng, shape) for shape in shapes]


#: Geometries that are drawn together and compiled as one program, because compilation takes most of the time.
TOGETHER = 5


def several(geometries, count=TOGETHER):
    return st.lists(geometries, min_size=count, max_size=count, unique_by=str)


def results(calls):
    """Return the results of calls ``(f, *arrays)``, compiled as one program."""
    functions, arrays = zip(*((f, of_f) for f, *of_f in calls), strict=True)
    return compiled(lambda arrays: [f(*of_f) for f, of_f in zip(functions, arrays, strict=True)])(list(arrays))


# The fixture's setting stays the same over all examples, as intended.
as_large = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def operands(product, x, w, y):
    return {"correlate": (x, w), "input_grad": (y, w), "kernel_grad": (x, y)}[product]


def close(actual, expected):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Every lowering against its definition


def assert_lowering(product, name, drawn):
    """Assert that a lowering equals the definition on drawn geometries."""
    table, _, _, definition = PRODUCTS[product]
    inputs = [(c, *numbers(*operands(product, *of_arrays))) for c, *of_arrays in drawn]
    calls = [(functools.partial(table[name], c), a, b) for c, a, b in inputs]
    for result, (c, a, b) in zip(results(calls), inputs, strict=True):
        close(result, definition(c, a, b))


@pytest.mark.parametrize(("product", "name"), LOWERINGS, ids=map("-".join, LOWERINGS))
def test_lowering(product, name):
    geometries = drawn_correlations(**MADE_FOR.get(name, {})).filter(lambda shapes: lowering.applies(name, shapes[0]))

    @settings(max_examples=25 // TOGETHER)
    @given(several(geometries))
    def equals_definition(drawn):
        assert_lowering(product, name, drawn)

    equals_definition()


needs_library = pytest.mark.skipif(library.load() is None, reason="needs `python -m jaxcnn.native build`")


@needs_library
@pytest.mark.parametrize("product", PRODUCTS)
def test_onednn(product):
    """oneDNN equals the definition in float32 wherever it has a kernel; batches of 1 to 5 leave pieces of two sizes."""
    table, _, _, definition = PRODUCTS[product]
    kernels = collections.Counter()
    like_layers = drawn_correlations((1, 2), (16, 3, 1), (16, 24), sizes=(3, 5, 1), pads=(1, 0), dims=(2,))

    @settings(max_examples=12)
    @given(several(drawn_correlations(), 4), several(like_layers, 8), st.sampled_from((3, 5, 2, 1)))
    def equals_definition(drawn, drawn_layers, batch):
        calls, expected = [], []
        for c, *shapes in drawn + drawn_layers:
            c = dataclasses.replace(c, dtype=np.dtype(np.float32))
            (_, *x), w, (_, *y) = shapes
            a, b = operands(product, *numbers((batch, *x), w, (batch, *y)))
            if kernel := onednn.implementation(product, c, (batch, *x), w[-1]):
                kernels[kernel] += 1
                calls.append((functools.partial(table["onednn"], c), a.astype(np.float32), b.astype(np.float32)))
                expected.append(definition(c, a, b))
        for y, of_definition in zip(results(calls) if calls else [], expected, strict=True):
            assert y.shape == of_definition.shape
            np.testing.assert_allclose(y, of_definition, rtol=1e-4, atol=1e-5)

    equals_definition()
    assert kernels.total() > 100
    assert sum(n for kernel, n in kernels.items() if "ref" not in kernel and "gemm:" not in kernel) > 4, kernels


def window(shape, size, stride, padding, dilation=None):
    return Window(shape, size, stride, padding, dilation or (1,) * len(shape))


#: Cases of code of the library's own: window, channels of the image and of the result, groups. Channels leave
#: remainders; padding is wider than the kernel, so that taps read padding only; rows are longer than a block.
OWN = {
    "depthwise": [
        (window((6, 7), (5, 3), (1, 1), ((2, 2), (1, 1))), 32, 32, 32),
        (window((37,), (7,), (1,), ((3, 3),)), 8, 8, 8),
        (window((9, 8), (5, 3), (2, 1), ((6, 0), (0, 7)), (1, 2)), 43, 43, 43),
        (window((4, 5, 6), (3, 2, 4), (1, 2, 3), ((1, 1), (0, 0), (2, 4)), (1, 1, 2)), 16, 16, 16),
    ],
    "dense": [
        (window((6, 7), (5, 3), (1, 1), ((2, 2), (1, 1))), 3, 24, 1),
        (window((9, 11), (3, 4), (2, 3), ((0, 0), (0, 0))), 5, 17, 1),
        (window((31, 29), (2, 2), (1, 1), ((0, 0), (0, 0))), 7, 40, 1),
        (window((5, 4), (3, 3), (1, 2), ((4, 0), (5, 6))), 2, 9, 1),
        (window((700,), (3,), (2,), ((1, 0),)), 6, 5, 1),
        (window((9, 600), (1, 5), (3, 1), ((0, 0), (2, 2))), 1, 33, 1),
        # The kernel is larger than the images and results, so threads compute some of the outputs each.
        (window((2, 2), (3, 3), (1, 1), ((1, 1), (1, 1))), 24, 70, 1),
        (window((4, 3), (4, 2), (1, 2), ((2, 1), (0, 1))), 20, 96, 1),
    ],
    # x and δ are swapped.
    "few outputs": [
        (window((6, 7), (5, 3), (1, 1), ((2, 1), (0, 2))), 24, 1, 1),
        (window((9, 8), (3, 3), (1, 1), ((0, 0), (2, 2)), (2, 1)), 33, 3, 1),
        (window((30,), (4,), (1,), ((3, 0),)), 16, 2, 1),
        (window((5, 6, 4), (2, 3, 2), (1, 1, 1), ((1, 0), (1, 1), (0, 0))), 17, 2, 1),
    ],
}


@needs_library
@pytest.mark.parametrize("kind", OWN)
def test_the_librarys_own_kernel_grads(kind):
    """They equal the definition."""
    calls, expected = [], []
    for win, inputs, outputs, groups in OWN[kind]:
        c = Correlation(win, groups, np.dtype(np.float32))
        x, y = numbers((5, *win.shape, inputs), (5, *win.out, outputs))
        kernel = onednn.implementation("kernel_grad", c, x.shape, outputs)
        pays = onednn.exchange_pays(c, x.shape, outputs)
        assert kind == "few outputs" or not pays
        if not (pays if kind == "few outputs" else kernel.startswith(kind)):
            pytest.skip(f"this CPU uses oneDNN's {kernel}")
        calls.append((functools.partial(onednn.kernel_grad, c), x.astype(np.float32), y.astype(np.float32)))
        expected.append(oracles.kernel_grad(c, x, y))
    for w, of_definition in zip(results(calls), expected, strict=True):
        assert w.shape == of_definition.shape
        largest = 1 if kind == "depthwise" else np.abs(of_definition).max()  # other sums have thousands of terms
        np.testing.assert_allclose(w, of_definition, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("changes", "inputs", "outputs", "pays"),
    [
        ({}, 32, 1, True),
        ({}, 32, 8, False),
        ({}, 16, 16, False),
        ({}, 2, 1, False),
        ({"stride": (2, 2)}, 32, 1, False),
        ({"padding": ((3, 0), (0, 0))}, 32, 1, False),
    ],
)
def test_when_x_and_delta_are_swapped(monkeypatch, changes, inputs, outputs, pays):
    win = dataclasses.replace(window((9, 9), (3, 3), (1, 1), ((1, 1), (1, 1))), **changes)
    monkeypatch.setattr(onednn, "implementation", lambda *_: "jit:avx512_core")
    c = Correlation(win, 1, np.dtype(np.float32))
    assert onednn.exchange_pays(c, (2, *win.shape, inputs), outputs) == pays
    monkeypatch.setattr(onednn, "implementation", lambda *_: "ref:any")
    assert not onednn.exchange_pays(c, (2, *win.shape, inputs), outputs)


#: Few and large images, which are divided into parts of their first dim. In the last one, parts read padding only.
DIVIDED = [
    (window((41, 37), (3, 3), (1, 1), ((1, 1), (1, 1))), 1),
    (window((40, 33), (5, 5), (3, 2), ((2, 1), (2, 2))), 2),
    (window((900,), (7,), (3,), ((3, 0),), (2,)), 1),
    (window((16, 15, 14), (3, 2, 3), (2, 1, 1), ((1, 1), (0, 0), (2, 0))), 1),
    (window((7, 64), (6, 3), (1, 1), ((40, 30), (0, 0))), 8),
]


@needs_library
@pytest.mark.parametrize("product", PRODUCTS)
def test_few_images_are_divided_in_onednn(product):
    """Parts of an image give the result of the whole."""
    table, *_ = PRODUCTS[product]
    for (win, groups), batch in itertools.product(DIVIDED, (1, 3)):
        c = Correlation(win, groups, np.dtype(np.float32))
        shapes = (batch, *win.shape, 32), (*win.size, 32 // groups, 48), (batch, *win.out, 48)
        pair = [a.astype(np.float32) for a in numbers(*operands(product, *shapes))]
        found, expected = (np.asarray(compiled(functools.partial(table[name], c))(*pair)) for name in ("onednn", "xla"))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=str(win))


@needs_library
@pytest.mark.parametrize(("groups", "outputs"), [(1, 32), (2, 32), (16, 32), (16, 16)])
@pytest.mark.parametrize("product", PRODUCTS)
def test_nan_reaches_no_further_in_onednn(product, groups, outputs):
    """NaN reaches no result that it does not reach in stock JAX, neither from the interior nor next to the padding."""
    table, *_ = PRODUCTS[product]
    c = Correlation(Window((9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)), groups, np.dtype(np.float32))
    for spoilt, place in itertools.product((0, 1), (0, 1 / 3)):
        pair = list(numbers(*operands(product, (3, 9, 8, 16), (3, 3, 16 // groups, outputs), (3, 9, 8, outputs))))
        pair[spoilt].flat[int(pair[spoilt].size * place)] = np.nan
        a, b = (a.astype(np.float32) for a in pair)
        result, stock = (np.asarray(compiled(functools.partial(table[name], c))(a, b)) for name in ("onednn", "xla"))
        independent = np.isfinite(stock)
        assert 0 < independent.sum() < independent.size
        assert not np.isfinite(result).all()
        np.testing.assert_allclose(result[independent], stock[independent], rtol=1e-4, atol=1e-4)


@needs_library
@compilation.none_is_small()
def test_onednn_in_programs(monkeypatch):
    """It runs in a program for one CPU device, under `vmap` and in both orders of derivatives, but is not exported."""
    monkeypatch.setenv(library.OPTION, "1")
    native_cost = onednn.native_cost
    monkeypatch.setattr(onednn, "native_cost", lambda *of: 0 if native_cost(*of) < np.inf else np.inf)
    x, w, v = map(jnp.float32, numbers((4, 9, 8, 6), (3, 3, 6, 8), (3, 3, 6, 8)))

    def loss(x, w):
        return (jaxcnn.conv(x, w, stride=2, padding=1) ** 3).mean()

    def reference(x, w):
        y = lax.conv_general_dilated(x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (y**3).mean()

    def functions(loss):
        grads = jax.grad(loss, (0, 1))
        return {
            "grad": lambda: grads(x, w),
            "grad of grad": lambda: jax.grad(lambda w: (grads(x, w)[1] * v).sum())(w),
            "vmap of w": lambda: jax.vmap(grads, (None, 0))(x, jnp.stack([w, v])),
            "vmap of x": lambda: jax.vmap(grads, (1, None))(jnp.stack([x, 2 * x], 1), w),
            "vmap twice": lambda: jax.vmap(jax.vmap(grads), (None, 0))(jnp.stack([x, -x]), jnp.stack([w, v])[None]),
        }

    ours, theirs = functions(loss), functions(reference)
    for name, f in ours.items():
        lowered = jax.jit(f).lower()
        assert library.TARGET in lowered.as_text(), name
        for result, expected in zip(*map(jax.tree.leaves, (lowered.compile()(), jax.jit(theirs[name])())), strict=True):
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    exported = jax.export.export(jax.jit(jax.grad(loss)))(x, w)
    assert library.TARGET not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x, w), ours["grad"]()[0], rtol=1e-4, atol=1e-5)


#: Kernels' gradients of each example: those in `OWN`, and some of oneDNN's.
OF_EACH = {
    **OWN,
    "jit": [
        (window((9, 8), (1, 1), (1, 1), ((0, 0), (0, 0))), 16, 32, 1),
        (window((9, 8), (3, 2), (2, 1), ((1, 0), (1, 1)), (1, 2)), 32, 48, 2),
        (window((5, 6, 4), (2, 1, 3), (1, 1, 1), ((0, 0), (0, 0), (1, 1))), 16, 16, 1),
    ],
}


@needs_library
@pytest.mark.parametrize("kind", OF_EACH)
def test_kernel_grads_of_each_example_in_onednn(kind, monkeypatch):
    """They equal the definition, and a program for one CPU device calls the library once, outside of any loop."""
    monkeypatch.setenv(library.OPTION, "1")
    monkeypatch.setattr(onednn, "native_cost", lambda p: 0.0)  # products of five small images
    for win, inputs, outputs, groups in OF_EACH[kind]:
        c = Correlation(win, groups, np.dtype(np.float32))
        x, y = (a.astype(np.float32) for a in numbers((5, *win.shape, inputs), (5, *win.out, outputs)))
        with compilation.none_is_small():
            lowered = jax.jit(functools.partial(per_example.kernel_grad_each, c)).lower(x, y)
        assert lowered.as_text().count(f"@{library.TARGET}(") == 1
        assert "while" not in lowered.as_text()
        found = lowered.compile()(x, y)
        for n, of_example in enumerate(found):
            expected = oracles.kernel_grad(c, x[n : n + 1].astype(np.float64), y[n : n + 1].astype(np.float64))
            np.testing.assert_allclose(of_example, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        with compilation.none_is_small():
            squares = jax.jit(functools.partial(per_example.kernel_grad_squares, c))(x, y)
        np.testing.assert_allclose(squares, np.sum(np.square(found).reshape(5, -1), 1), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Winograd's form, only on request

FASTEST = lax.Precision.DEFAULT


@pytest.mark.parametrize("size", winograd.POINTS)
def test_winograds_matrices_correlate(size):
    """y = Aᵀ[(G·w) ∘ (Bᵀ·x)] for random x and w; it is bilinear, so it holds for all."""
    a, g, b = winograd.matrices(size)
    x, w = numbers((size + winograd.OUTPUTS - 1,), (size,))
    np.testing.assert_allclose(a @ ((g @ w) * (b @ x)), np.correlate(x, w, "valid"), rtol=1e-12)


def second_layer(size, dtype=np.float32, precision=FASTEST, batch=None):
    """Return a second layer: the lecture's, 5 × 5 from 32 to 64 channels, or a padded 3 × 3 from 64 to 128."""
    side, inputs, outputs, pad, images = {5: (12, 32, 64, 0, 128), 3: (16, 64, 128, 1, 16)}[size]
    win = Window((side, side), (size, size), (1, 1), ((pad, pad), (pad, pad)), (1, 1))
    n = batch or images
    shapes = (n, side, side, inputs), (size, size, inputs, outputs), (n, *win.out, outputs)
    return Correlation(win, 1, np.dtype(dtype), precision), *(a.astype(dtype) for a in numbers(*shapes))


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_error_of_winograds_form_is_the_documented_one(product, size):
    """The errors are at most those in the docstring of `conv`; an error below 1e-6 would not be Winograd's form."""
    table, choose, run, _ = PRODUCTS[product]
    c, *of_layer = second_layer(size)
    a, b = operands(product, *of_layer)
    assert choose(c, a, b) == "winograd"
    exact = dataclasses.replace(c, dtype=np.dtype(np.float64))
    expected = optimized(lambda a, b: table["xla"](exact, a, b))(a.astype(np.float64), b.astype(np.float64))
    found = compiled(lambda a, b: run(c, a, b))(a, b)
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-6 < error < winograd.RELATIVE_ERROR[size], error


@pytest.mark.parametrize("size", winograd.POINTS)
def test_the_documented_errors_of_winograds_form_agree(size):
    error = f"{winograd.RELATIVE_ERROR[size]:.1e}".replace("e-0", "e-").replace(".0e", "e")
    for documented in (jaxcnn.conv, winograd):
        assert error in documented.__doc__, documented


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("product", PRODUCTS)
def test_winograds_form_runs_only_on_request(product, size):
    """It requires precision "fastest" for both operands, in the call or in the configuration."""
    _, choose, *_ = PRODUCTS[product]

    def chosen(dtype=np.float32, precision=None, batch=None):
        c, *of_layer = second_layer(size, dtype, precision, batch)
        return choose(c, *operands(product, *of_layer)) == "winograd"

    assert chosen(precision=FASTEST)
    assert chosen(precision=(FASTEST, FASTEST))
    assert chosen(jnp.bfloat16, FASTEST)
    assert not chosen()
    assert not chosen(jnp.bfloat16)
    assert not chosen(precision=lax.Precision.HIGHEST)
    assert not chosen(precision=(FASTEST, lax.Precision.HIGH))
    assert not chosen(precision=lax.DotAlgorithmPreset.F32_F32_F32)
    assert not chosen(np.float64, FASTEST)
    assert not chosen(precision=FASTEST, batch=1)  # too few tiles to pay for transforming the kernel
    for setting, expected in {"default": True, "highest": False, "F32_F32_F32": False}.items():
        with jax.default_matmul_precision(setting):
            assert chosen() is expected
            assert not chosen(precision=lax.Precision.HIGHEST)


def test_winograds_form_of_size_three_needs_one_block(monkeypatch):
    chosen = {}
    for block_bytes in (winograd.WINOGRAD_BLOCK_BYTES, 1):
        monkeypatch.setattr(winograd, "WINOGRAD_BLOCK_BYTES", block_bytes)
        c, *of_layer = second_layer(3)
        chosen[block_bytes] = [choose(c, *operands(p, *of_layer)) for p, (_, choose, *_) in PRODUCTS.items()]
    whole, cut = chosen.values()
    assert whole == ["winograd"] * 3
    assert [name == "winograd" for name in cut] == [False, False, True]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("images", [1, 4, 6])
def test_winograds_form_in_blocks_of_images(monkeypatch, product, images):
    table, _, _, definition = PRODUCTS[product]
    c = Correlation(Window((7, 6), (3, 5), (1, 1), ((0, 1), (2, 2)), (1, 1)), 1, np.dtype(np.float64))
    a, b = operands(product, *numbers((images, 7, 6, 2), (3, 5, 2, 3), (images, *c.window.out, 3)))
    for block_bytes in (1, 10_000, 1 << 20):  # one image, two, all
        monkeypatch.setattr(winograd, "WINOGRAD_BLOCK_BYTES", block_bytes)
        close(compiled(lambda a, b: table["winograd"](c, a, b))(a, b), definition(c, a, b))


# ---------------------------------------------------------------------------------------------------------------------
# Choice of lowering


@pytest.fixture
def none_is_small(monkeypatch):
    monkeypatch.setattr(lowering, "SMALL", 0)


@pytest.mark.parametrize("product", PRODUCTS)
@settings(as_large, max_examples=300)
@given(shapes=drawn_correlations())
def test_the_chosen_lowering_applies(none_is_small, product, shapes):
    table, choose, *_ = PRODUCTS[product]
    c, x, w, y = shapes
    a, b = numbers(*operands(product, x, w, y))
    name = choose(c, a, b)
    assert name in table
    assert lowering.applies(name, c), name


@pytest.mark.parametrize("product", PRODUCTS)
def test_small_products_are_left_to_xla(product):
    """Up to 2¹⁷ multiplications, where other forms do not repay their compilation, are left to XLA; groups never."""
    win = Window((4, 4), (2, 2), (1, 1), ((0, 1), (1, 0)), (1, 1))
    _, choose, *_ = PRODUCTS[product]

    def chosen(batch, groups):
        shapes = (batch, 4, 4, 4), (2, 2, 4 // groups, 2), (batch, 4, 4, 2)
        c = Correlation(win, groups, np.dtype("f"))
        return choose(c, *(jax.ShapeDtypeStruct(shape, c.dtype) for shape in operands(product, *shapes)))

    assert chosen(256, groups=1) == "xla"
    assert chosen(257, groups=1) != "xla"
    assert chosen(1, groups=2) != "xla"


@pytest.mark.slow("compiles many geometries")
@settings(as_large, max_examples=30 // TOGETHER)
@given(drawn=several(drawn_correlations()))
def test_products_are_adjoint(none_is_small, drawn):
    """⟨correlate(x, w), y⟩ = ⟨x, input_grad(y, w)⟩ = ⟨w, kernel_grad(x, y)⟩ for every choice of lowerings."""
    jax.clear_caches()  # JAX caches the choice for a geometry

    def products(c, x, w, y):
        return correlate.correlate(c, x, w), input_grad.input_grad(c, y, w), kernel_grad.kernel_grad(c, x, y)

    arrays = [numbers(*of_arrays) for _, *of_arrays in drawn]
    calls = [(functools.partial(products, c), *of_c) for (c, *_), of_c in zip(drawn, arrays, strict=True)]
    for result, (x, w, y) in zip(results(calls), arrays, strict=True):
        inner = [np.vdot(a, b) for a, b in zip(result, (y, x, w), strict=True)]
        np.testing.assert_allclose(inner, inner[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "target"), [("rows", "ROWS_BLOCK_BYTES"), ("patches", "PATCHES_BLOCK_BYTES")])
@pytest.mark.parametrize("images", [1, 2, 3, 4, 6, 7])
def test_weight_gradient_in_blocks_of_images(monkeypatch, name, target, images):
    """A batch is cut into blocks that fit the cache: single images for a small cache, else a few images."""
    c = Correlation(Window((5, 6), (3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1)), 1, np.dtype(np.float64))
    x, y = numbers((images, 5, 6, 2), (images, *c.window.out, 3))
    for block_bytes in (1, 3500, 7000):  # one image, some, more
        monkeypatch.setattr(kernel_grad, target, block_bytes)
        close(compiled(lambda x, y: kernel_grad.KERNEL_GRAD[name](c, x, y))(x, y), oracles.kernel_grad(c, x, y))


@pytest.mark.parametrize(("joined", "groups_left"), [(2, 6), (4, 3), (6, 2), (12, 1)])
def test_groups_are_joined_up_to_a_number_of_channels(monkeypatch, joined, groups_left):
    """Six groups of 2 channels become three of 4, two of 6 or one of 12."""
    monkeypatch.setattr(lowering, "JOINED_CHANNELS", joined)
    c = Correlation(Window((4, 5), (3, 2), (1, 2), ((1, 0), (0, 0)), (1, 1)), 6, np.dtype(np.float64))
    x, y = numbers((2, 4, 5, 12), (2, *c.window.out, 6))
    assert 6 // lowering.joined_groups(c, 12, 6) == groups_left
    close(compiled(lambda x, y: kernel_grad.KERNEL_GRAD["joined"](c, x, y))(x, y), oracles.kernel_grad(c, x, y))


@pytest.mark.parametrize("product", ["correlate", "input_grad"])
@pytest.mark.parametrize(("terms", "chains"), [(80, 4), (5, 2), (3, 1), (1, 4)])
def test_sums_in_loops_and_chains(monkeypatch, product, terms, chains):
    """Twelve terms of three inputs per group, or eight of two outputs, run as one loop, as several, and one by one."""
    monkeypatch.setattr(unrolled, "TERMS", terms)
    monkeypatch.setattr(unrolled, "CHAINS", chains)
    table, _, _, definition = PRODUCTS[product]
    c = Correlation(Window((5, 4), (2, 2), (1, 2), ((1, 0), (0, 1)), (2, 1)), 2, np.dtype(np.float64))
    a, b = numbers(*operands(product, (2, 5, 4, 6), (2, 2, 3, 4), (2, *c.window.out, 4)))
    close(compiled(lambda a, b: table["unrolled"](c, a, b))(a, b), definition(c, a, b))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("length", [1, 2, 4, 7])
@settings(as_large, max_examples=1)
@given(drawn=several(drawn_correlations(sizes=(5, 3, 2)), 6))
def test_taps_in_loops(monkeypatch, product, length, drawn):
    """Taps run in blocks of one, in blocks with a remainder, and in one block, as `LOOPED` does for large kernels."""
    looped = {"taps": 0, "terms": 0, "chunk": length, "sums": 0, "block": length}
    monkeypatch.setattr(unrolled, "LOOPED", unrolled.LOOPED | looped)
    assert_lowering(product, "unrolled", drawn)


@pytest.mark.parametrize("length", [1, 2, 4, 7])
@settings(as_large, max_examples=1)
@given(drawn=several(drawn_correlations(inputs=(1,)), 6))
def test_positions_in_loops(monkeypatch, length, drawn):
    """Positions run one by one, in parts of rows, and in several rows, as for large images."""
    monkeypatch.setitem(unrolled.LOOPED, "positions", length)
    assert_lowering("kernel_grad", "by_position", drawn)


@pytest.mark.parametrize(("name", "exchanged"), [("xla", True), ("transposed", False)])
def test_image_and_delta_are_not_exchanged(name, exchanged):
    """XLA:CPU takes long if δ has more positions than the image and the padding is left to the convolution."""
    win = window((9, 9), (3, 3), (1, 1), ((2, 2), (2, 2)))
    x, y = np.zeros((2, *win.shape, 4), "f"), np.zeros((2, *win.out, 5), "f")
    run = functools.partial(kernel_grad.KERNEL_GRAD[name], Correlation(win, 1, np.dtype("f")))
    program = jax.jit(run).lower(x, y).compile().as_text()
    assert ("rhs_reversal" in program) is exchanged, program


@pytest.mark.parametrize(
    ("stride", "dilation", "groups", "batch", "chosen"),
    [
        ((2, 2), 1, 1, 2, "xla_reverse"), ((1, 2), 2, 1, 2, "xla_reverse"), ((1, 1), 2, 1, 2, "xla"),
        ((2, 2), 1, 2, 2, "xla_reverse"), ((1, 1), 2, 1, 1, "xla_reverse"), ((1, 1), 2, 2, 2, "xla"),
    ],
)  # fmt: skip
def test_delta_on_gpu_and_tpu(stride, dilation, groups, batch, chosen):
    """On GPU, δ of strided convolutions is convolved with `reverse` of the kernel itself, which XLA recognizes.

    Without strides, it is as well if the image has at most 5 times the kernel's elements. On TPU, it always is.
    """
    c = Correlation(Window((12, 12), (3, 3), stride, ((1, 1),) * 2, (dilation,) * 2), groups, np.dtype("f"))
    y, w = np.zeros((batch, *c.window.out, 4), "f"), np.zeros((3, 3, 6 // groups, 4), "f")
    assert input_grad.choose_input_grad_on_gpu(c, y, w) == chosen
    for platform in ("cuda", "rocm", "tpu"):
        traced = jax.jit(functools.partial(input_grad.input_grad, c)).trace(y, w)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("x[0, 1, o, i]" in program) is (platform == "tpu" or chosen == "xla_reverse"), program


@pytest.mark.parametrize(
    ("side", "size", "stride", "chosen"),
    [
        (8, 1, 2, "larger_kernel"),
        (7, 1, 2, "xla"),
        (8, 1, 1, "xla"),
        (9, 2, 2, "larger_kernel"),
        (8, 1, 4, "pointwise"),
    ],
)
def test_kernel_gradient_of_a_remainder_on_gpu(side, size, stride, chosen):
    """On GPU, the gradient of a larger kernel, or the elements that a 1 × 1 kernel reads, need no copy of the image."""
    c = Correlation(Window((side,) * 2, (size,) * 2, (stride,) * 2, ((0, 0),) * 2, (1, 1)), 1, np.dtype("f"))
    assert kernel_grad.choose_kernel_grad_on_gpu(c) == chosen
    x, y = np.zeros((2, side, side, 3), "f"), np.zeros((2, *c.window.out, 4), "f")
    for platform in ("cuda", "tpu"):
        traced = jax.jit(functools.partial(kernel_grad.kernel_grad, c)).trace(x, y)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" not in program) is (platform == "cuda" and chosen == "pointwise"), program
        of_image = re.search(rf"stablehlo.slice .*\(tensor<2x{side}x{side}x3x", program)
        assert (of_image is None) is (chosen == "xla" or (platform, chosen) == ("cuda", "larger_kernel")), program


@pytest.mark.parametrize(
    ("size", "inputs", "outputs", "chosen"),
    [(5, 6, 6, "unrolled"), (6, 6, 6, "xla"), (3, 6, 12, "xla"), (3, 12, 12, "xla")],  # 12 channels in 6 groups
)
def test_depthwise_products_are_one_loop_on_gpu(size, inputs, outputs, chosen):
    """On GPU, depthwise products of up to 27 taps are sums that XLA fuses, in float32 for 16-bit arrays."""
    c = Correlation(Window((8, 8), (size,) * 2, (1, 1), ((1, 1),) * 2, (1, 1)), 6, np.dtype(jnp.bfloat16))
    x, y = (jnp.zeros((2, *shape, n), c.dtype) for shape, n in ((c.window.shape, inputs), (c.window.out, outputs)))
    w = jnp.zeros((size, size, inputs // 6, outputs), c.dtype)
    assert correlate.choose_correlate_on_gpu(c, x, w) == chosen
    assert (input_grad.choose_input_grad_on_gpu(c, y, w) == "unrolled") is (chosen == "unrolled")
    for product, a in ((correlate.correlate, x), (input_grad.input_grad, y)):
        traced = jax.jit(functools.partial(product, c)).trace(a, w)
        for platform in ("cuda", "rocm", "tpu"):
            program = traced.lower(lowering_platforms=(platform,)).as_text()
            one_loop = platform != "tpu" and chosen == "unrolled"
            assert ("stablehlo.convolution" not in program) is one_loop, program
            assert not one_loop or not re.search(r"(multiply|add) .*bf16", program), program


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("product", "name"), [pair for pair in LOWERINGS if pair[1] in ("joined", "by_group", "unrolled")]
)
def test_groups_are_independent(product, name, spoilt):
    """NaN and infinity in one group's channels affect only that group."""
    table, _, _, definition = PRODUCTS[product]
    c = Correlation(Window((4, 5), (3, 2), (1, 2), ((1, 0), (0, 0)), (1, 1)), 6, np.dtype(np.float64))
    a, b = numbers(*operands(product, (2, 4, 5, 12), (3, 2, 2, 6), (2, *c.window.out, 6)))
    a[..., 0] = spoilt
    found = compiled(lambda a, b: table[name](c, a, b))(a, b)
    with np.errstate(invalid="ignore"):  # inf − inf
        expected = definition(c, a, b)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    assert np.isfinite(expected).any()
    assert not np.isfinite(expected).all()


# ---------------------------------------------------------------------------------------------------------------------
# No negative padding in any program (openxla/xla#48713)

NEGATIVE = re.compile(r"(?:pad|low|high) = \[[^=]*-\d|pad(?:ding)?=[\d_x]*-\d")

#: Padding beyond the kernel's reach, where a full correlation would need negative padding; and rows of all ops.
PADDED = {case: None for case in CASES if case.op == "conv" and case.plain is None} | dict.fromkeys(covering(CASES))


def lowered(f, *args):
    """Yield the programs lowered for CPU, CUDA and TPU, and the CPU program after XLA's passes."""
    for platform in ("cpu", "cuda", "tpu"):
        yield jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    yield compiled(f).lower(*args).compile().as_text()


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_no_negative_padding(case):
    for program in lowered(with_cotangents(case.function), *drawn(case)):
        assert not NEGATIVE.search(program), program


def test_negative_padding_would_be_seen():
    """Stock JAX has negative padding in all four programs."""
    x, w = np.ones((1, 4, 6, 8)), np.ones((1, 2, 8, 8))

    def stock(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (1, 1), ((0, 0), (4, 0)), dimension_numbers=layout)

    def cut(x):
        return lax.pad(x, 0.0, ((0, 0, 0), (-1, 2, 0), (0, 0, 0), (0, 0, 0)))

    for program in lowered(with_cotangents(stock), (x, w), np.ones((1, 4, 9, 8))):
        assert NEGATIVE.search(program), program
    for program in list(lowered(cut, x))[:3]:  # XLA turns it into a slice
        assert NEGATIVE.search(program), program


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.fixture(params=["unrolled", "long"])
def form(request, monkeypatch):
    """Make all windows use the form for few taps, or the form for many, that each window function has."""
    monkeypatch.setattr(windows, "MAX_UNROLLED_TAPS", {"unrolled": 10**6, "long": 0}[request.param])


def some_is_real(win):
    """Return whether no window is entirely in padding; such windows have no winner, and the ops refuse them."""
    return all(win.inside(dim).any(1).all() for dim in range(win.ndim))


def spoiled(rng, shape):
    """Draw small integers with many ties, and NaN and infinities among them."""
    return np.where(rng.uniform(size=shape) < 0.5, rng.choice([np.nan, np.inf, -np.inf], shape), ties(rng, shape))


def lowest(rng, shape):
    """Draw mostly −∞, which is also the padding value."""
    return np.where(rng.uniform(size=shape) < 0.8, -np.inf, ties(rng, shape))


# `form` stays the same over all examples, as intended. Few of the drawn windows all hold an element of the input.
over_examples = settings(
    max_examples=40 // TOGETHER,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


def assert_winners(max_and_winner, drawn):
    """Assert that the maxima and winners of windows (win, batch, how to draw x, seed) are those of the definition."""
    xs = [draw(np.random.default_rng(seed), (batch, *win.shape, 3)) for win, batch, draw, seed in drawn]
    calls = [(functools.partial(max_and_winner, win), x) for (win, *_), x in zip(drawn, xs, strict=True)]
    for (win, *_), x, (y, winner) in zip(drawn, xs, results(calls), strict=True):
        expected, first = oracles.max_and_winner(win, x)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(winner, first)
        assert winner.dtype == windows.winner_dtype(win)


DRAWS = st.sampled_from((spoiled, ties, lowest))


@pytest.mark.slow("compiles large windows")
@pytest.mark.parametrize("name", sorted(windows.MAX.keys() - {"tiles"}))
@over_examples
@given(
    several(
        st.tuples(drawn_windows(pads=(1, 0, 2)).filter(some_is_real), st.sampled_from(BATCHES), DRAWS, st.integers(0))
    )
)
def test_largest(name, drawn):
    assert_winners(windows.MAX[name], drawn)


@pytest.mark.slow("compiles many geometries")
@over_examples
@given(
    several(
        st.tuples(drawn_windows(pads=(1, 0, 2)).filter(some_is_real), st.sampled_from(BATCHES), DRAWS, st.integers(0))
    )
)
def test_largest_without_its_number(drawn):
    xs = [draw(np.random.default_rng(seed), (batch, *win.shape, 3)) for win, batch, draw, seed in drawn]
    calls = [(functools.partial(windows.window_max, win), x) for (win, *_), x in zip(drawn, xs, strict=True)]
    for (win, *_), x, y in zip(drawn, xs, results(calls), strict=True):
        np.testing.assert_array_equal(y, oracles.max_and_winner(win, x)[0])


@st.composite
def side_by_side(draw):
    """Draw windows side by side with a remainder at the end."""
    dims = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=3)
    out, size, rest = zip(*draw(dims), strict=True)
    shape = tuple(o * k + min(r, k - 1) for o, k, r in zip(out, size, rest, strict=True))
    win = Window(shape, size, size, ((0, 0),) * len(size), (1,) * len(size))
    assert win.tiles
    assert win.out == out
    return win


@pytest.mark.slow("compiles large windows")
@pytest.mark.parametrize("name", windows.MAX)
@over_examples
@given(several(st.tuples(side_by_side(), st.sampled_from(BATCHES), DRAWS, st.integers(0))))
def test_largest_side_by_side(name, drawn):
    assert_winners(windows.MAX[name], drawn)


@pytest.mark.slow("compiles many geometries")
@over_examples
@given(
    several(
        st.tuples(
            drawn_windows(pads=(1, 0, 2)).filter(some_is_real), st.sampled_from(BATCHES),
            st.sampled_from((0.5, 1.0, 0.0)), st.integers(0),
        )
    )
)  # fmt: skip
def test_gather_and_scatter(form, drawn):
    """`gather_winners` and `scatter_to_winners` match their definitions and each other.

    A winner of `nothing` reads and writes nothing.
    """

    def both(win, x, y, winner):
        return windows.gather_winners(win, x, winner), windows.scatter_to_winners(win, y, winner)

    arrays = []
    for win, batch, passed, seed in drawn:
        rng = np.random.default_rng(seed)
        x, y = normal(rng, (batch, *win.shape, 2)), normal(rng, (batch, *win.out, 2))
        _, winner = oracles.max_and_winner(win, normal(rng, x.shape))
        winner = np.where(rng.uniform(size=winner.shape) < passed, winner, windows.nothing(win))
        arrays.append((x, y, winner.astype(windows.winner_dtype(win))))
    calls = [(functools.partial(both, win), *of_win) for (win, *_), of_win in zip(drawn, arrays, strict=True)]
    for (win, *_), (x, y, winner), (gathered, scattered) in zip(drawn, arrays, results(calls), strict=True):
        close(gathered, oracles.gather_winners(win, x, winner))
        close(scattered, oracles.scatter_to_winners(win, y, winner))
        np.testing.assert_allclose(np.vdot(gathered, y), np.vdot(x, scattered), rtol=1e-10, atol=1e-10)


def spoiled_delta(rng, shape):
    """Draw δ whose sums in bfloat16 differ from those in float32, and NaN and infinities among it."""
    return rng.choice([256, 1, -1, np.nan, np.inf, -np.inf], shape, p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.1])


def assert_scattered(name, drawn):
    """Assert that a lowering of `scatter_to_winners` equals the definition exactly, also for 16-bit δ."""
    arrays = []
    for win, batch, seed in drawn:
        rng = np.random.default_rng(seed)
        x, y = normal(rng, (batch, *win.shape, 2)), spoiled_delta(rng, (batch, *win.out, 2))
        winner = oracles.max_and_winner(win, x)[1].astype(windows.winner_dtype(win))
        arrays += [(y.astype(dtype), winner) for dtype in (np.float64, jnp.bfloat16)]
    wins = [win for win, *_ in drawn for _ in range(2)]
    calls = [(functools.partial(windows.SCATTER[name], win), *of_win) for win, of_win in zip(wins, arrays, strict=True)]
    with mock.patch.object(windows, "LEAST_IMAGES", 1):  # with fewer images, "in_place" is "slices"
        scattered = results(calls)
    for win, (y, winner), found in zip(wins, arrays, scattered, strict=True):
        assert found.dtype == y.dtype
        with np.errstate(invalid="ignore"):  # inf − inf
            expected = oracles.scatter_to_winners(win, y.astype(np.float64), winner)
        np.testing.assert_array_equal(found.astype(np.float64), expected.astype(y.dtype).astype(np.float64))


@pytest.mark.slow("compiles many geometries")
@pytest.mark.parametrize("name", sorted(windows.SCATTER.keys() - {"tiles"}))
@over_examples
@given(several(st.tuples(drawn_windows(pads=(1, 0, 2)).filter(some_is_real), st.sampled_from(BATCHES), st.integers(0))))
def test_scatter(name, drawn):
    assert_scattered(name, drawn)


@pytest.mark.parametrize("name", ["phases", "slices", "in_place"])
@pytest.mark.parametrize(("size", "stride"), [((9, 9), 2), ((5, 14), 1), ((3, 5, 6), 2), ((70,), 3)])
def test_scatter_in_parts(name, size, stride):
    """Windows of more than 64 taps, whose terms are added in parts."""
    shape, pads = tuple(k + 5 for k in size), ((1, 2),) * len(size)
    assert_scattered(name, [(Window(shape, size, (stride,) * len(size), pads, (1,) * len(size)), 2, 0)])


@pytest.mark.parametrize("size", [(9, 9), (15, 17), (16, 16), (2, 127), (127, 2), (255,), (5, 7, 7), (1, 255)])
def test_scatter_to_every_element(size):
    """Numbers divided by multiplication are those divided, up to the largest window for which they are used."""
    win = Window(size, size, (1,) * len(size), tuple((n - 1, n - 1) for n in size), (1,) * len(size))
    assert win.entries <= windows.MAX_WHOLE_TAPS
    y = np.arange(1, np.prod(win.out) + 1, dtype=np.float64).reshape(1, *win.out, 1)
    winner = (np.arange(y.size) % win.entries).reshape(y.shape).astype(windows.winner_dtype(win))
    found = compiled(functools.partial(windows.SCATTER["multiplied"], win))(y, winner)
    np.testing.assert_array_equal(found, compiled(functools.partial(windows.SCATTER["long"], win))(y, winner))


@pytest.mark.slow("compiles many geometries")
@pytest.mark.parametrize("name", windows.SCATTER)
@over_examples
@given(several(st.tuples(side_by_side(), st.sampled_from(BATCHES), st.integers(0))))
def test_scatter_side_by_side(name, drawn):
    assert_scattered(name, drawn)


# If the only element of an input is between the taps of a dilated window, XLA:CPU's reduce_window still adds it
# (jaxlib 0.10.2). Such windows are entirely in padding, and the ops refuse them.
@over_examples
@given(several(st.tuples(drawn_windows().filter(some_is_real), st.sampled_from(BATCHES))))
def test_window_sum_and_its_adjoint(form, drawn):
    def both(win, x, y):
        return windows.window_sum(win, x), windows.window_sum_adjoint(win, y)

    rng = np.random.default_rng(3)
    arrays = [[normal(rng, (batch, *shape, 2)) for shape in (win.shape, win.out)] for win, batch in drawn]
    calls = [(functools.partial(both, win), *of_win) for (win, _), of_win in zip(drawn, arrays, strict=True)]
    for (win, _), (x, y), (total, adjoint) in zip(drawn, arrays, results(calls), strict=True):
        close(total, oracles.window_sum(win, x))
        close(adjoint, oracles.window_sum_adjoint(win, y))
        np.testing.assert_allclose(np.vdot(total, y), np.vdot(x, adjoint), rtol=1e-10, atol=1e-10)


def assert_sums(name, drawn):
    """Assert that a lowering of `window_sum`, and that of its adjoint if there is one, equals the definition."""
    adjoint = windows.SUM_ADJOINT.get(name, windows.window_sum_adjoint)

    def both(win, x, y):
        return windows.SUM[name](win, x), adjoint(win, y)

    rng = np.random.default_rng(3)
    arrays = [[normal(rng, (batch, *shape, 2)) for shape in (win.shape, win.out)] for win, batch in drawn]
    calls = [(functools.partial(both, win), *of_win) for (win, _), of_win in zip(drawn, arrays, strict=True)]
    for (win, _), (x, y), (total, summed) in zip(drawn, arrays, results(calls), strict=True):
        close(total, oracles.window_sum(win, x))
        close(summed, oracles.window_sum_adjoint(win, y))


@pytest.mark.slow("compiles many geometries")
@pytest.mark.parametrize("name", ["by_dim", "by_row", "whole", "reduce_window"])
@over_examples
@given(several(st.tuples(drawn_windows().filter(some_is_real), st.sampled_from(BATCHES))))
def test_lowerings_of_window_sum(name, drawn):
    assert_sums(name, drawn)


@pytest.mark.slow("compiles many geometries")
@over_examples
@given(several(st.tuples(side_by_side(), st.sampled_from(BATCHES))))
def test_sums_side_by_side(drawn):
    assert_sums("tiles", drawn)


@pytest.mark.parametrize(
    ("size", "stride", "maximum", "scatter", "total", "adjoint"),
    [
        ((3, 3), 2, {"tpu": "spatial_first", "gpu": "fold", "cpu": "compare"}, {"tpu": "phases", "cpu": "taps"},
         {"cpu": "by_dim"}, {"tpu": "reduce_window", "cpu": "by_dim"}),
        ((2, 2), 2, {"cpu": "compare"}, {"tpu": "slices", "cpu": "tiles"}, {"tpu": "tiles", "cpu": "by_dim"},
         {"cpu": "tiles"}),
        ((2, 2, 2), 2, {"tpu": "spatial_first", "cpu": "compare"}, {"cpu": "tiles"}, {"tpu": "tiles", "cpu": "by_dim"},
         {"cpu": "tiles"}),
        ((4,), 4, {"tpu": "spatial_first", "cpu": "compare"}, {"tpu": "phases", "cpu": "tiles"},
         {"tpu": "reduce_window", "cpu": "by_dim"}, {"tpu": "reduce_window", "cpu": "tiles"}),
        ((5, 5), 5, {"tpu": "tiles", "gpu": "tiles", "cpu": "by_dim"}, {"cpu": "tiles"},
         {"tpu": "tiles", "cpu": "by_dim"}, {"cpu": "tiles"}),
        ((5, 5), 2, {"tpu": "spatial_first", "gpu": "fold", "cpu": "by_dim"},
         {"tpu": "phases", "gpu": "taps", "cpu": "long"},
         {"cpu": "by_dim"}, {"tpu": "reduce_window", "cpu": "by_dim"}),
        ((9, 9), 2, {"tpu": "by_dim", "gpu": "whole", "cpu": "by_dim"},
         {"tpu": "phases", "gpu": "multiplied", "cpu": "long"},
         {"gpu": "whole", "cpu": "by_dim"}, {"tpu": "reduce_window", "gpu": "whole", "cpu": "by_dim"}),
        ((17, 17), 1, {"tpu": "by_dim", "gpu": "long", "cpu": "by_dim"}, {"cpu": "long"},
         {"cpu": "by_dim"}, {"cpu": "by_dim"}),
    ],
)  # fmt: skip
def test_choice_for_windows(size, stride, maximum, scatter, total, adjoint):
    """A platform that a row does not list uses the lowering of CPU."""
    dims = len(size)
    win = Window((18,) * dims, size, (stride,) * dims, ((0, 0),) * dims, (1,) * dims)
    choices = (
        (windows.choose_max(win, 8, 1000), maximum),
        (windows.choose_scatter(win, 8, 1000), scatter),
        (windows.choose_sum(win, 3, 1000), total),
        (windows.choose_sum_adjoint(win, 3, 1000), adjoint),
    )
    for chosen, by_platform in choices:
        cpu = by_platform["cpu"]
        gpu = by_platform.get("gpu", cpu)
        assert chosen == {"cpu": cpu, "tpu": by_platform.get("tpu", cpu), "cuda": gpu, "rocm": gpu}


@pytest.mark.parametrize(
    ("dims", "stride", "padding", "channels", "cpu"),
    [
        (2, 3, 1, 3, "by_row"), (2, 4, 1, 1, "by_row"), (2, 3, 1, 4, "by_dim"), (2, 2, 1, 1, "by_dim"),
        (2, 3, 0, 1, "by_dim"), (3, 3, 1, 1, "by_dim"), (2, 3, 1, 64, "whole"), (2, 3, 1, 63, "by_dim"),
        (3, 3, 1, 64, "by_dim"), (2, 3, 0, 64, "by_dim"), (2, 2, 1, 64, "by_dim"), (1, 3, 1, 1, "by_dim"),
        (1, 3, 1, 4, "whole"), (1, 1, 1, 4, "whole"), (1, 1, 1, 3, "by_dim"), (1, 1, 0, 64, "by_dim"),
    ],
)  # fmt: skip
def test_how_padded_windows_are_summed_on_cpu(dims, stride, padding, channels, cpu):
    win = Window((18,) * dims, (3,) * dims, (stride,) * dims, ((padding, padding),) * dims, (1,) * dims)
    assert windows.choose_sum(win, channels, 1000)["cpu"] == cpu


@pytest.mark.parametrize(
    ("size", "stride", "padding", "elements", "tpu"),
    [
        (3, 1, 1, 1 << 22, ("by_dim", "slices", "by_dim", "by_dim")),
        (3, 1, 1, 1 << 23, ("by_dim", "slices", "by_dim", "by_dim")),
        (3, 1, 0, 1 << 23, ("spatial_first", "phases", "by_dim", "by_dim")),
        (3, 2, 1, 1 << 22, ("spatial_first", "slices", "by_dim", "reduce_window")),
        (3, 2, 1, 1 << 23, ("spatial_first", "in_place", "reduce_window", "reduce_window")),
        (3, 2, 0, 1 << 23, ("spatial_first", "in_place", "reduce_window", "reduce_window")),
        (2, 2, 0, 1 << 21, ("compare", "slices", "tiles", "tiles")),
        (2, 2, 0, 1 << 22, ("compare", "slices", "reduce_window", "tiles")),
        (2, 2, 0, 1 << 23, ("spatial_first", "in_place", "reduce_window", "reduce_window")),
        (9, 1, 4, 1 << 23, ("by_dim", "slices", "by_dim", "by_dim")),
        (18, 18, 0, 1 << 23, ("tiles", "tiles", "tiles", "tiles")),
    ],
)
def test_choice_for_images_in_and_out_of_the_memory_of_a_tpu(size, stride, padding, elements, tpu):
    """The maximum, its adjoint, the sum and its adjoint."""
    win = Window((18, 18), (size,) * 2, (stride,) * 2, ((padding,) * 2,) * 2, (1, 1))
    chosen = (
        windows.choose_max(win, 8, elements), windows.choose_scatter(win, 8, elements),
        windows.choose_sum(win, 3, elements), windows.choose_sum_adjoint(win, 3, elements),
    )  # fmt: skip
    assert tuple(by_platform["tpu"] for by_platform in chosen) == tpu
    few = [choose(win, 7, elements)["tpu"] for choose in (windows.choose_max, windows.choose_scatter)]
    small = [choose(win, 8, 1000)["tpu"] for choose in (windows.choose_max, windows.choose_scatter)]
    assert few == small
    assert "in_place" not in few


@pytest.fixture
def pool_program():
    """Return the function that lowers δ_x of a large `max_pool` for TPU, for some images on some devices."""

    def delta_x(x):
        return jax.grad(lambda x: jaxcnn.max_pool(x, 3, stride=2, padding=1).sum())(x)

    def lower(images, devices=1, manual=False):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
        split = NamedSharding(mesh, PartitionSpec("data"))
        f = delta_x
        if manual:
            f = jax.shard_map(delta_x, mesh=mesh, in_specs=split.spec, out_specs=split.spec)
        x = jax.ShapeDtypeStruct((images, 256, 256, 64), np.float32)
        return jax.jit(f, in_shardings=split).trace(x).lower(lowering_platforms=("tpu",)).as_text()

    return lower


@pytest.mark.parametrize(
    ("images", "devices", "manual", "allocated", "prescribed"),
    [
        (8, 1, False, 2, 1),
        (7, 1, False, 1, 0),
        (8, 8, False, 1, 0),
        (64, 8, False, 2, 0),
        (64, 8, True, 2, 1),
        (63 * 8, 8, True, 2, 1),
        (7 * 8, 8, True, 1, 0),
    ],
)
def test_large_pool_on_tpu_depends_on_images_per_device(images, devices, manual, allocated, prescribed, pool_program):
    """The padded image is allocated; the result only for eight images per device, with a layout if it is whole."""
    program = pool_program(images, devices, manual)
    assert (program.count("AllocateBuffer"), program.count("LayoutConstraint")) == (allocated, prescribed)


def test_large_pool_on_tpu_is_exported():
    """Exported programs must not prescribe layouts."""
    x = jax.ShapeDtypeStruct((8, 256, 256, 64), np.float32)
    f = jax.jit(jax.grad(lambda x: jaxcnn.max_pool(x, 3, stride=2, padding=1).sum()))
    for g, shape in ((f, x), (jax.jit(jax.vmap(f)), jax.ShapeDtypeStruct((2, *x.shape), x.dtype))):
        exported = jax.export.export(g, platforms=["tpu"])(shape)
        exported.serialize()
        program = exported.mlir_module()
        assert program.count("AllocateBuffer") == 2
        assert "LayoutConstraint" not in program


def test_programs_for_windows_by_platform():
    """XLA:TPU does not fuse padding between elements; on GPU a test for NaN of every element would be materialized."""
    x = np.zeros((2, 9, 9, 3), "f")

    def grad(x):
        return jax.vjp(lambda x: jaxcnn.max_pool(x, 3, stride=2), x)[1](jnp.ones((2, 4, 4, 3), "f"))

    def program(platform):
        return jax.jit(grad).trace(x).lower(lowering_platforms=(platform,)).as_text()

    between = re.compile(r"interior = \[0, 1, 1, 0\]")
    assert {p: bool(between.search(program(p))) for p in ("cpu", "tpu", "cuda")} == {
        "cpu": True, "tpu": False, "cuda": True,
    }  # fmt: skip
    compared = re.compile(r"compare +NE")
    assert {p: bool(compared.search(program(p))) for p in ("cpu", "tpu", "cuda")} == {
        "cpu": True, "tpu": True, "cuda": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "dtype"), [((15, 17), np.uint8), ((16, 16), np.uint16), ((255, 257), np.uint16), ((256, 256), np.uint32)]
)
def test_winner_is_numbered_in_the_smallest_integer(size, dtype):
    """One number is reserved for `nothing`."""
    win = Window(size, size, size, ((0, 0), (0, 0)), (1, 1))
    x = jnp.zeros((1, *size, 1), jnp.float32).at[0, -1, -1, 0].set(1)
    winner = jax.jit(lambda x: windows.max_and_winner(win, x)[1])(x)
    assert winner.dtype == dtype
    assert winner.item() == win.entries - 1
    assert windows.nothing(win) == np.iinfo(dtype).max > win.entries - 1


# ---------------------------------------------------------------------------------------------------------------------
# Sums by halves


@pytest.mark.parametrize("shape", [(8, 4, 6, 3), (5, 7, 3, 2), (12, 1, 10, 3), (0, 4, 2, 3), (3, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("dims", [(0, 1, 2), (1, 2), (0,), (0, 2)], ids=str)
def test_sums_by_halves(shape, dims):
    """Sums over dims of even and odd length, of length one, and empty."""
    (x,) = numbers(shape)
    for found in (reductions.sum_by_halves(dims, x), compiled(lambda x: reductions.sum_computed(dims, x))(x)):
        np.testing.assert_allclose(found, x.sum(dims), rtol=1e-12, atol=1e-13)


def test_sums_of_products():
    """xᵀ·y, its derivatives and its batches, for sizes at which the factors are exchanged, and next to them."""
    x, y, v = numbers((5, 1024), (5, 33), (1024, 33))
    pairs = [(x, y[:, :10]), (x, y[:, :32]), (x, y), (x[:, 1:], y[:, :10])]

    def everything(x, y):
        w, pull = jax.vjp(reductions.sum_of_products, x, y)
        stacked = jax.vmap(reductions.sum_of_products, (None, 1))(x, jnp.stack([y, 2 * y], 1))
        return w, pull(v[: w.shape[0], : w.shape[1]]), stacked

    for (x, y), (w, (of_x, of_y), stacked) in zip(
        pairs, compiled(lambda: [everything(*p) for p in pairs])(), strict=True
    ):
        u = v[: w.shape[0], : w.shape[1]]
        expected = x.T @ y, y @ u.T, x @ u, np.stack([x.T @ y, 2 * x.T @ y])
        for result, of_numpy in zip((w, of_x, of_y, stacked), expected, strict=True):
            close(result, of_numpy)


# ---------------------------------------------------------------------------------------------------------------------
# Elements at an index


def test_elements_at_an_index():
    """A gather and a masked sum agree, also next to infinities and NaN. Only the sum is lowered for TPU."""
    rng = np.random.default_rng(0)
    x, index = spoiled(rng, (5, 4, 6)), rng.integers(0, 6, (5, 4))
    expected = np.take_along_axis(x, index[..., None], -1)
    for form in (reductions.gathered, reductions.masked_sum):
        np.testing.assert_array_equal(compiled(form)(x, index[..., None]), expected)
    traced = jax.jit(reductions.element_at).trace(x, index)
    for platform in ("cpu", "cuda", "tpu"):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.gather" in program) is (platform != "tpu"), platform
