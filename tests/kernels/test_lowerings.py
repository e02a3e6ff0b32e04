"""Every lowering of every product equals its definition term by term, on geometries drawn by Hypothesis.

The definitions are the NumPy loops of `tests/oracles.py`.
"""

import dataclasses
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from jax import lax

import jaxcnn
from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import correlation, reductions, unrolled, windows, winograd
from tests import oracles
from tests.cases import CASES, compiled, covering, normal, optimised, ties, with_cotangents
from tests.checks import drawn

PRODUCTS = {
    "correlate": (correlation.CORRELATE, correlation.choose_correlate, correlation.correlate, oracles.correlate),
    "input_grad": (correlation.INPUT_GRAD, correlation.choose_input_grad, correlation.input_grad, oracles.input_grad),
    "kernel_grad": (
        correlation.KERNEL_GRAD,
        correlation.choose_kernel_grad,
        correlation.kernel_grad,
        oracles.kernel_grad,
    ),
}
LOWERINGS = [(product, name) for product, (table, *_) in PRODUCTS.items() for name in table]

#: Geometries for which a lowering is intended; `correlation.applies` decides.
MADE_FOR = {
    "pointwise": {"sizes": (1,), "pads": (0,), "groups": (1,)},
    "rows": {"groups": (1,)},
    "patches": {"groups": (1,)},
    "products": {"groups": (1,)},
    "phases": {"groups": (1,)},
    "unrolled": {"inputs": (2, 1, 3)},
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
def drawn_correlations(draw, groups=(2, 3, 1), inputs=(2, 1), **of_window):
    """Draw the static arguments and the shapes of x, w and y; batches of 0 to 2."""
    win = draw(drawn_windows(**of_window))
    g, i, o, n = (draw(st.sampled_from(choices)) for choices in (groups, inputs, (2, 3, 1), BATCHES))
    c = Correlation(win, g, np.dtype(np.float64))
    return c, (n, *win.shape, g * i), (*win.size, i, g * o), (n, *win.out, g * o)


def numbers(*shapes):
    rng = np.random.default_rng(0)
    return [normal(rng, shape) for shape in shapes]


# The fixture's setting stays the same over all examples, as intended.
as_large = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def operands(product, x, w, y):
    return {"correlate": (x, w), "input_grad": (y, w), "kernel_grad": (x, y)}[product]


def close(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and kernels


@pytest.mark.parametrize(("product", "name"), LOWERINGS, ids=map("-".join, LOWERINGS))
def test_lowering(product, name):
    table, _, _, definition = PRODUCTS[product]

    @settings(max_examples=25)
    @given(drawn_correlations(**MADE_FOR.get(name, {})))
    def equals_definition(shapes):
        c, x, w, y = shapes
        assume(correlation.applies(name, c, x[-1]))
        a, b = numbers(*operands(product, x, w, y))
        close(compiled(lambda a, b: table[name](c, a, b))(a, b), definition(c, a, b))

    equals_definition()


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
    side, inputs, outputs, pad, pictures = {5: (12, 32, 64, 0, 128), 3: (16, 64, 128, 1, 16)}[size]
    win = Window((side, side), (size, size), (1, 1), ((pad, pad), (pad, pad)), (1, 1))
    n = batch or pictures
    shapes = (n, side, side, inputs), (size, size, inputs, outputs), (n, *win.out, outputs)
    return Correlation(win, 1, np.dtype(dtype), precision), *(a.astype(dtype) for a in numbers(*shapes))


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("product", PRODUCTS)
def test_winograds_digits(product, size):
    """The errors are those stated in the docstring of `conv`; an error below 1e-6 would not be Winograd's form."""
    table, choose, run, _ = PRODUCTS[product]
    c, *of_layer = second_layer(size)
    a, b = operands(product, *of_layer)
    assert choose(c, a, b) == "winograd"
    exact = dataclasses.replace(c, dtype=np.dtype(np.float64))
    expected = optimised(lambda a, b: table["xla"](exact, a, b))(a.astype(np.float64), b.astype(np.float64))
    found = compiled(lambda a, b: run(c, a, b))(a, b)
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-6 < error < winograd.RELATIVE_ERROR[size], error


@pytest.mark.parametrize("size", winograd.POINTS)
def test_winograds_error_is_stated_once_and_for_all(size):
    stated = f"{winograd.RELATIVE_ERROR[size]:.1e}".replace("e-0", "e-").replace(".0e", "e")
    for documented in (jaxcnn.conv, winograd):
        assert stated in documented.__doc__, documented


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("product", PRODUCTS)
def test_winograds_form_runs_on_request_alone(product, size):
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


def test_patches_of_three_go_against_direct_convolution_in_one_block_alone(monkeypatch):
    chosen = {}
    for block_bytes in (winograd.BLOCK_BYTES, 1):
        monkeypatch.setattr(winograd, "BLOCK_BYTES", block_bytes)
        c, *of_layer = second_layer(3)
        chosen[block_bytes] = [choose(c, *operands(p, *of_layer)) for p, (_, choose, *_) in PRODUCTS.items()]
    whole, cut = chosen.values()
    assert whole == ["winograd"] * 3
    assert [name == "winograd" for name in cut] == [False, False, True]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("pictures", [1, 4, 6])
def test_winograds_form_in_blocks_of_pictures(monkeypatch, product, pictures):
    table, _, _, definition = PRODUCTS[product]
    c = Correlation(Window((7, 6), (3, 5), (1, 1), ((0, 1), (2, 2)), (1, 1)), 1, np.dtype(np.float64))
    a, b = operands(product, *numbers((pictures, 7, 6, 2), (3, 5, 2, 3), (pictures, *c.window.out, 3)))
    for block_bytes in (1, 10_000, 1 << 20):  # one image, two, all
        monkeypatch.setattr(winograd, "BLOCK_BYTES", block_bytes)
        close(compiled(lambda a, b: table["winograd"](c, a, b))(a, b), definition(c, a, b))


# ---------------------------------------------------------------------------------------------------------------------
# Choice of lowering


@pytest.fixture
def none_is_small(monkeypatch):
    monkeypatch.setattr(correlation, "SMALL", 0)


@pytest.mark.parametrize("product", PRODUCTS)
@settings(as_large, max_examples=300)
@given(shapes=drawn_correlations())
def test_what_is_chosen_applies(none_is_small, product, shapes):
    table, choose, *_ = PRODUCTS[product]
    c, x, w, y = shapes
    a, b = numbers(*operands(product, x, w, y))
    name = choose(c, a, b)
    assert name in table
    assert correlation.applies(name, c, x[-1]), name


@pytest.mark.parametrize("product", PRODUCTS)
def test_small_products_are_left_to_xla(product):
    """Up to 2¹⁴ multiplications, as many as XLA does in the time of a call, are left to XLA; groups never are."""
    win = Window((4, 4), (2, 2), (1, 1), ((0, 1), (1, 0)), (1, 1))
    _, choose, *_ = PRODUCTS[product]

    def chosen(batch, groups):
        shapes = (batch, 4, 4, 4), (2, 2, 4 // groups, 2), (batch, 4, 4, 2)
        c = Correlation(win, groups, np.dtype("f"))
        return choose(c, *(jax.ShapeDtypeStruct(shape, c.dtype) for shape in operands(product, *shapes)))

    assert chosen(32, groups=1) == "xla"
    assert chosen(33, groups=1) != "xla"
    assert chosen(1, groups=2) != "xla"


@settings(as_large, max_examples=30)
@given(shapes=drawn_correlations())
def test_products_are_adjoint(none_is_small, shapes):
    """⟨correlate(x, w), y⟩ = ⟨x, input_grad(y, w)⟩ = ⟨w, kernel_grad(x, y)⟩, whichever lowering each of them uses."""
    c, *of_arrays = shapes
    jax.clear_caches()  # JAX caches the choice for a geometry
    x, w, y = numbers(*of_arrays)
    found = compiled(
        lambda x, w, y: (
            correlation.correlate(c, x, w),
            correlation.input_grad(c, y, w),
            correlation.kernel_grad(c, x, y),
        )
    )
    inner = [np.vdot(a, b) for a, b in zip(found(x, w, y), (y, x, w), strict=True)]
    np.testing.assert_allclose(inner, inner[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "target"), [("rows", "BLOCK_BYTES"), ("patches", "PATCHES_BYTES")])
@pytest.mark.parametrize("pictures", [1, 2, 3, 4, 6, 7])
def test_weight_gradient_in_blocks_of_pictures(monkeypatch, name, target, pictures):
    """A batch is cut into blocks that fit the cache: single images for a small cache, else a few images."""
    c = Correlation(Window((5, 6), (3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1)), 1, np.dtype(np.float64))
    x, y = numbers((pictures, 5, 6, 2), (pictures, *c.window.out, 3))
    for block_bytes in (1, 3500, 7000):  # one image, some, more
        monkeypatch.setattr(correlation, target, block_bytes)
        close(compiled(lambda x, y: correlation.KERNEL_GRAD[name](c, x, y))(x, y), oracles.kernel_grad(c, x, y))


@pytest.mark.parametrize(("joined", "groups_left"), [(2, 6), (4, 3), (6, 2), (12, 1)])
def test_groups_are_joined_up_to_so_many_channels(monkeypatch, joined, groups_left):
    """Six groups of 2 channels become three of 4, two of 6 or one of 12; joining is chosen if it leaves one group."""
    monkeypatch.setattr(correlation, "JOINED", joined)
    monkeypatch.setattr(correlation, "SMALL", 0)
    c = Correlation(Window((4, 5), (3, 2), (1, 2), ((1, 0), (0, 0)), (1, 1)), 6, np.dtype(np.float64))
    x, y = numbers((2, 4, 5, 12), (2, *c.window.out, 6))
    assert 6 // correlation._neighbours(c, 12, 6) == groups_left
    assert correlation.choose_kernel_grad(c, x, y) == ("joined" if groups_left == 1 else "by_group")
    close(compiled(lambda x, y: correlation.KERNEL_GRAD["joined"](c, x, y))(x, y), oracles.kernel_grad(c, x, y))


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
@settings(as_large, max_examples=6)
@given(shapes=drawn_correlations(sizes=(5, 3, 2)))
def test_taps_in_loops(monkeypatch, product, length, shapes):
    """Taps run in blocks of one, in blocks with a remainder, and in one block, as `LOOPED` does for large kernels."""
    monkeypatch.setattr(unrolled, "LOOPED", {"terms": 0, "chunk": length, "sums": 0, "block": length})
    table, _, _, definition = PRODUCTS[product]
    c, *of_layer = shapes
    a, b = numbers(*operands(product, *of_layer))
    close(compiled(lambda a, b: table["unrolled"](c, a, b))(a, b), definition(c, a, b))


@pytest.mark.parametrize(
    ("product", "side", "inputs", "outputs", "groups", "dims", "chosen"),
    [
        ("correlate", 28, 1, 6, 1, 2, "unrolled"),  # a first layer
        ("correlate", 28, 3, 64, 1, 2, "xla"),
        ("correlate", 28, 16, 3, 1, 2, "xla"),  # more terms than a loop takes
        ("input_grad", 28, 16, 3, 1, 2, "unrolled"),
        ("input_grad", 28, 3, 16, 1, 2, "products"),
        ("kernel_grad", 28, 1, 6, 1, 2, "unrolled"),
        ("kernel_grad", 28, 3, 6, 1, 2, "turned"),
        *(("correlate", 8, 64, 64, groups, 2, "unrolled") for groups in (64, 32, 8)),
        *(("correlate", 8, 64, 64, groups, 2, "by_group") for groups in (4, 2)),
        ("input_grad", 8, 64, 64, 8, 2, "unrolled"),
        ("input_grad", 8, 64, 64, 4, 2, "by_group"),
        ("kernel_grad", 8, 64, 64, 64, 2, "unrolled"),
        ("kernel_grad", 8, 64, 64, 32, 2, "joined"),
        ("kernel_grad", 8, 64, 64, 8, 2, "by_group"),
        *((product, 8, 64, 64, 1, 3, "by_depth") for product in PRODUCTS),
    ],
)
def test_few_channels_are_unrolled_and_depth_is_summed(product, side, inputs, outputs, groups, dims, chosen):
    c = Correlation(Window((side,) * dims, (3,) * dims, *((n,) * dims for n in (1, (1, 1), 1))), groups, np.dtype("f"))
    shapes = (2, *c.window.shape, inputs), (*c.window.size, inputs // groups, outputs), (2, *c.window.out, outputs)
    _, choose, *_ = PRODUCTS[product]
    assert choose(c, *(jax.ShapeDtypeStruct(shape, c.dtype) for shape in operands(product, *shapes))) == chosen


@pytest.mark.parametrize(
    ("stride", "chosen"), [((1, 1), "rows"), ((2, 1), "patches"), ((1, 2), "patches"), ((2,), "turned")]
)
def test_patches_a_stride_apart_are_copied_whole(stride, chosen):
    dims = len(stride)
    win = Window((9,) * dims, (3,) * dims, stride, ((0, 0),) * dims, (1,) * dims)
    x, y = ((2, *size, 32) for size in (win.shape, win.out))
    c = Correlation(win, 1, np.dtype("f"))
    assert correlation.choose_kernel_grad(c, *(jax.ShapeDtypeStruct(shape, c.dtype) for shape in (x, y))) == chosen


@pytest.mark.parametrize(
    ("stride", "dilation", "inputs", "chosen"),
    [(2, 1, 64, "phases"), (2, 1, 128, "xla"), (2, 2, 128, "phases"), (1, 2, 64, "xla"), (2, 1, 4, "products")],
)
def test_delta_is_not_spread_with_zeros_between(monkeypatch, stride, dilation, inputs, chosen):
    monkeypatch.setattr(correlation, "ONE_THREAD", True)
    win = Window((32, 32), (3, 3), (stride,) * 2, ((1, 1),) * 2, (dilation,) * 2)
    y, w = (2, *win.out, 128), (3, 3, inputs, 128)
    c = Correlation(win, 1, np.dtype("f"))
    assert correlation.choose_input_grad(c, *(jax.ShapeDtypeStruct(shape, c.dtype) for shape in (y, w))) == chosen


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("product", "name"), [pair for pair in LOWERINGS if pair[1] in ("joined", "by_group", "unrolled")]
)
def test_groups_keep_to_themselves(product, name, spoilt):
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
    monkeypatch.setattr(windows, "UNROLLED", {"unrolled": 10**6, "long": 0}[request.param])


def some_is_real(win):
    """Return whether no window is entirely in padding; such windows have no winner, and the ops refuse them."""
    return all(win.inside(dim).any(1).all() for dim in range(win.ndim))


def spoiled(rng, shape):
    """Draw small integers with many ties, and NaN and infinities among them."""
    return np.where(rng.uniform(size=shape) < 0.5, rng.choice([np.nan, np.inf, -np.inf], shape), ties(rng, shape))


def lowest(rng, shape):
    """Draw mostly −∞, which is also the padding value."""
    return np.where(rng.uniform(size=shape) < 0.8, -np.inf, ties(rng, shape))


# `form` stays the same over all examples, as intended.
over_examples = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@over_examples
@given(
    drawn_windows(pads=(1, 0, 2)), st.sampled_from(BATCHES), st.sampled_from((spoiled, ties, lowest)), st.integers(0)
)
def test_largest(form, win, batch, draw, seed):
    assume(some_is_real(win))
    x = draw(np.random.default_rng(seed), (batch, *win.shape, 3))
    y, winner = compiled(lambda x: windows.max_and_winner(win, x))(x)
    expected, first = oracles.max_and_winner(win, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(winner, first)
    assert winner.dtype == windows.winner_dtype(win)


@pytest.mark.parametrize("reduced", [0, 10**6])
@over_examples
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=3),
    st.sampled_from(BATCHES),
    st.sampled_from((spoiled, ties, lowest)),
    st.integers(0),
)
def test_largest_side_by_side(monkeypatch, reduced, dims, batch, draw, seed):
    """Windows side by side with a remainder at the end, both with reductions and tap by tap."""
    monkeypatch.setattr(windows, "REDUCED", reduced)
    out, size, rest = zip(*dims, strict=True)
    shape = tuple(o * k + min(r, k - 1) for o, k, r in zip(out, size, rest, strict=True))
    win = Window(shape, size, size, ((0, 0),) * len(size), (1,) * len(size))
    assert win.tiles
    assert win.out == out
    x = draw(np.random.default_rng(seed), (batch, *shape, 3))
    y, winner = compiled(lambda x: windows.max_and_winner(win, x))(x)
    expected, first = oracles.max_and_winner(win, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(winner, first)
    assert winner.dtype == windows.winner_dtype(win)


@over_examples
@given(drawn_windows(pads=(1, 0, 2)), st.sampled_from(BATCHES), st.sampled_from((0.5, 1.0, 0.0)), st.integers(0))
def test_take_and_place(form, win, batch, passed, seed):
    """`gather_winners` and `scatter_to_winners` match their definitions and each other.

    A winner of `nothing` reads and writes nothing.
    """
    assume(some_is_real(win))
    rng = np.random.default_rng(seed)
    x, y = normal(rng, (batch, *win.shape, 2)), normal(rng, (batch, *win.out, 2))
    _, winner = oracles.max_and_winner(win, normal(rng, x.shape))
    winner = np.where(rng.uniform(size=winner.shape) < passed, winner, windows.nothing(win)).astype(
        windows.winner_dtype(win)
    )
    taken, placed = compiled(
        lambda x, y: (windows.gather_winners(win, x, winner), windows.scatter_to_winners(win, y, winner))
    )(x, y)
    close(taken, oracles.gather_winners(win, x, winner))
    close(placed, oracles.scatter_to_winners(win, y, winner))
    np.testing.assert_allclose(np.vdot(taken, y), np.vdot(x, placed), rtol=1e-10, atol=1e-10)


@over_examples
@given(drawn_windows(), st.sampled_from(BATCHES))
def test_window_sum_and_spread(form, win, batch):
    # If the only element of an input is between the taps of a dilated window, XLA:CPU's reduce_window still adds it
    # (jaxlib 0.10.2). Such windows are entirely in padding, and the ops refuse them.
    assume(some_is_real(win))
    rng = np.random.default_rng(3)
    x, y = normal(rng, (batch, *win.shape, 2)), normal(rng, (batch, *win.out, 2))
    total, spread = compiled(lambda x, y: (windows.window_sum(win, x), windows.window_sum_adjoint(win, y)))(x, y)
    close(total, oracles.window_sum(win, x))
    close(spread, oracles.window_sum_adjoint(win, y))
    np.testing.assert_allclose(np.vdot(total, y), np.vdot(x, spread), rtol=1e-10, atol=1e-10)


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
    for found in (reductions.halved(dims, x), compiled(lambda x: reductions.sum_computed(dims, x))(x)):
        np.testing.assert_allclose(found, x.sum(dims), rtol=1e-12, atol=1e-13)
