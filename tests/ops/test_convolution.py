"""Properties of conv beyond the case table: the cases where stock JAX is wrong, and the flip."""

import itertools
import re

import jax
import numpy as np
import pytest
from jax import lax

import jaxcnn
from tests import oracles
from tests.compare_torch import assert_agrees, random_delta

# In 18 of these 90 cases `jax.vjp` of stock conv is wrong on XLA:CPU, with unbounded error (openxla/xla#48713): its
# input gradient uses negative padding and reads out of bounds. So PyTorch is the oracle.
STOCK_IS_WRONG_IN_SOME = list(itertools.product([1, 2, 3], [0, 2, 3, 4, 5], [0, 1, 3], [6, 7]))


@pytest.mark.parametrize(("k", "lo", "hi", "width"), STOCK_IS_WRONG_IN_SOME)
def test_gradients_where_stock_jax_reads_out_of_bounds(k, lo, hi, width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, width, 8)).astype(np.float32)
    w = rng.standard_normal((1, k, 8, 8)).astype(np.float32)
    assert_agrees(
        jaxcnn.conv, oracles.conv, x, w, options={"padding": ((0, 0), (lo, hi))}, rtol=1e-4, atol=1e-5
    )  # fmt: skip


CORNERS = {
    # name: (x shape, w shape, options)
    "kernel as large as the input": ((2, 4, 5, 3), (4, 5, 3, 2), {}),
    "kernel larger than the input": ((2, 2, 3, 3), (4, 5, 3, 2), {"padding": ((1, 1), (2, 0))}),
    "outputs entirely in the padding": ((2, 3, 4, 2), (2, 2, 2, 3), {"padding": ((5, 0), (0, 4))}),
    "no output depends on the input": ((2, 1, 2), (2, 2, 3), {"stride": 5, "padding": ((3, 3),)}),
    "stride larger than the kernel": ((2, 11, 10, 2), (2, 1, 2, 3), {"stride": (4, 3)}),
    "1 × 1": ((2, 5, 4, 3), (1, 1, 3, 4), {}),
    "1 × 1 with stride and padding": ((2, 5, 6, 3), (1, 1, 3, 4), {"stride": 2, "padding": 1}),
    "a dilated kernel that skips the middle": ((2, 3, 3, 1), (2, 2, 1, 2), {"dilation": 2}),
    "groups of one channel": ((2, 6, 7, 3), (3, 2, 1, 6), {"groups": 3, "stride": 2, "padding": 1}),
    "one output channel per group": ((2, 6, 7, 4), (3, 2, 2, 2), {"groups": 2, "padding": 1}),
    "a border repeated more often than the input is long": ((2, 2, 3), (7, 3, 2), {"padding": "REPLICATE"}),
    "one image, one channel": ((1, 3, 3, 1), (2, 2, 1, 1), {}),
}


@pytest.mark.parametrize("name", CORNERS)
def test_corners(name):
    x_shape, w_shape, options = CORNERS[name]
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal(x_shape), rng.standard_normal(w_shape), rng.standard_normal(w_shape[-1])
    assert_agrees(jaxcnn.conv, oracles.conv, x, w, b, options=options)


def test_the_remainder_of_the_stride_has_no_gradient():
    """Windows of 3 start at 0, 2 and 4 of 8 elements, so none contains the last."""
    x, w = np.random.default_rng(0).standard_normal((1, 8, 2)), np.random.default_rng(1).standard_normal((3, 2, 4))
    y, (delta_x, _) = assert_agrees(jaxcnn.conv, oracles.conv, x, w, options={"stride": 2})
    assert y.shape == (1, 3, 4)
    assert np.all(delta_x[0, :7] != 0)
    assert np.all(delta_x[0, 7] == 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_non_finite_elements_stay_in_reach_of_the_kernel(groups):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 7, 7, 4)), rng.standard_normal((3, 3, 4 // groups, 4))
    x[0, 3, 3, 1], x[0, 6, 0, 2] = np.nan, np.inf
    y, (delta_x, _) = assert_agrees(
        jaxcnn.conv, oracles.conv, x, w, options={"padding": 1, "groups": groups}
    )  # fmt: skip
    assert np.isfinite(y).sum() > np.size(y) // 2
    assert np.isfinite(delta_x).all()


TRANSPOSED = {
    # name: (y shape, w shape, options): a `conv` from y
    "a remainder of the stride": ((2, 8, 9, 3), (3, 2, 3, 4), {"stride": 2}),
    "every remainder": ((2, 10, 11, 12, 2), (2, 2, 2, 2, 3), {"stride": 4, "padding": 1}),
    "SAME": ((2, 8, 6, 3), (3, 5, 3, 4), {"stride": 2, "padding": "SAME"}),
    "SAME_LOWER": ((2, 6, 9, 3), (4, 3, 3, 4), {"stride": 3, "padding": "SAME_LOWER"}),
    "CAUSAL": ((2, 9, 3), (4, 3, 4), {"stride": 2, "padding": "CAUSAL"}),
    "groups and dilation": ((2, 9, 8, 4), (3, 2, 2, 6), {"groups": 2, "dilation": 2, "padding": ((1, 0), (0, 2))}),
    "padding larger than the kernel": ((2, 3, 4, 2), (2, 2, 2, 3), {"padding": ((5, 0), (0, 4)), "stride": 2}),
    "outputs entirely in the padding": ((2, 1, 2), (2, 2, 3), {"stride": 5, "padding": ((3, 3),)}),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_conv_transpose_is_the_adjoint_of_conv(name):
    """⟨conv(y, w), x⟩ = ⟨y, conv_transpose(x, w)⟩, and the shape of y is restored: conv_transpose is conv's δ rule."""
    y_shape, w_shape, options = TRANSPOSED[name]
    rng = np.random.default_rng(0)
    y, w = rng.standard_normal(y_shape), rng.standard_normal(w_shape)
    there, pull = jax.vjp(lambda y: jaxcnn.conv(y, w, **options), y)
    x = random_delta(there)
    back = jaxcnn.conv_transpose(x, w, output_padding=remainder(y_shape, w_shape, **options), **options)
    assert back.shape == y.shape
    np.testing.assert_allclose(np.vdot(there, x), np.vdot(y, back), rtol=1e-10)
    np.testing.assert_allclose(back, pull(x)[0], rtol=1e-10, atol=1e-12)


def remainder(y_shape, w_shape, *, stride=1, padding="VALID", dilation=1, groups=1):
    """Return the ``output_padding`` for the elements of y after conv's last window."""
    if padding in ("SAME", "SAME_LOWER"):
        return 0
    ndim = len(y_shape) - 2
    s, d = (oracles.per_dim(value, ndim) for value in (stride, dilation))
    pads = oracles.pad_widths(padding, y_shape[1:-1], w_shape[:-2], s, d)
    ends = zip(y_shape[1:-1], pads, w_shape[:-2], d, s, strict=True)
    return tuple((n + lo + hi - (k - 1) * di - 1) % st for n, (lo, hi), k, di, st in ends)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_output_padding_gets_only_the_bias(more):
    x, w, b = np.ones((1, 2, 1)), np.ones((1, 1, 1)), np.array([7.0])
    y = jaxcnn.conv_transpose(x, w, b, stride=3, output_padding=more)
    assert y.ravel().tolist() == [8, 7, 7, 8, *([7] * more)]


def test_depthwise_conv_is_conv_with_as_many_groups_as_channels():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((2, 6, 7, 3)), rng.standard_normal((3, 2, 1, 6)), rng.standard_normal(6)
    np.testing.assert_array_equal(jaxcnn.depthwise_conv(x, w, b), jaxcnn.conv(x, w, b, groups=3))
    # Output c·M + m is channel c with its kernel m.
    channel = jaxcnn.conv(x[..., 1:2], w[..., 3:4])
    np.testing.assert_allclose(jaxcnn.depthwise_conv(x, w)[..., 3:4], channel, rtol=1e-12)


def test_the_backward_pass_flips_the_kernel():
    """Lecture §15: δ_x is the full correlation of δ with the kernel flipped by 180°; without the flip it is wrong."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 6, 6, 1))
    w = np.array([[1.0, 0.0, 0.0], [2.0, 3.0, 0.0], [4.0, 5.0, 6.0]])[:, :, None, None]  # a right triangle
    y, pull = jax.vjp(lambda x: jaxcnn.conv(x, w), x)
    delta = random_delta(y)

    def error(x):
        return np.sum(np.asarray(jaxcnn.conv(x, w)) * delta)

    step = 1e-4
    differences = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[at] = step
        differences[at] = (error(x + e) - error(x - e)) / (2 * step)

    def full(kernel):
        return np.asarray(jaxcnn.conv(delta, np.swapaxes(kernel, 2, 3), padding=2))

    np.testing.assert_allclose(pull(delta)[0], differences, atol=1e-8)
    np.testing.assert_allclose(full(w[::-1, ::-1]), differences, atol=1e-8)
    assert np.linalg.norm(full(w) - differences) > 0.5 * np.linalg.norm(differences)


@pytest.mark.parametrize("padding", ["REFLECT", "REPLICATE", "CIRCULAR"])
def test_a_differentiated_gradient_keeps_its_value(padding):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, 6, 3)), rng.standard_normal((3, 4, 3, 2))
    delta = rng.standard_normal((2, 5, 6, 2))

    def delta_x(w):
        return jax.vjp(lambda x: jaxcnn.conv(x, w, padding=padding), x)[1](delta)[0]

    np.testing.assert_allclose(jax.vjp(delta_x, w)[0], delta_x(w), rtol=1e-12)


#: How MLIR writes it for a matrix product and for a convolution.
PRECISION = r"precision(?:_config)? = \[(?:#stablehlo<precision )?(\w+)>?, (?:#stablehlo<precision )?(\w+)>?\]"


def precisions(run, *args):
    """Yield the precision of every product of a program, on every platform."""
    text = jax.jit(run).trace(*args).lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()
    for product in re.findall(r"stablehlo\.(?:convolution|dot_general)\b.*", text):
        found = re.search(PRECISION, product)
        yield found.groups() if found else ("DEFAULT", "DEFAULT")


SPELLINGS = {
    "a name": ("highest", ("HIGHEST",) * 2),
    "a value": (lax.Precision.HIGH, ("HIGH",) * 2),
    "one for each": (("high", "highest"), ("HIGH", "HIGHEST")),
}
LAYERS = {
    # name: (op of x and w, x shape, w shape)
    "conv": (jaxcnn.conv, (2, 6, 6, 4), (3, 3, 4, 8)),
    "conv_transpose": (jaxcnn.conv_transpose, (2, 6, 6, 4), (3, 3, 8, 4)),
    "depthwise_conv": (jaxcnn.depthwise_conv, (2, 6, 6, 4), (3, 3, 1, 8)),
    "hidden_layer": (
        lambda x, w, **options: jaxcnn.hidden_layer(x, w, np.zeros(8, np.float32), **options),
        (2, 6, 6, 4),
        (3, 3, 4, 8),
    ),
}


@pytest.mark.parametrize("rule", [None, jaxcnn.rules.autodiff])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_product_has_the_requested_precision(layer, spelling, rule):
    """This checks programs of the forward pass and of both cotangents, because results on CPU would not show it."""
    op, *shapes = LAYERS[layer]
    precision, expected = SPELLINGS[spelling]

    def both_passes(x, w):
        y, pull = jax.vjp(lambda x, w: op(x, w, precision=precision, rule=rule), x, w)
        return pull(y)

    found = [*precisions(both_passes, *(np.ones(shape, np.float32) for shape in shapes))]
    assert len(found) >= 3
    assert {frozenset(pair) for pair in found} == {frozenset(expected)}


@pytest.mark.parametrize("padding", ["REFLECT", "REPLICATE", "CIRCULAR"])
def test_forward_mode_with_a_repeated_input(padding):
    """The code that extends the input is plain JAX in this case."""
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 1, 5, 6, 2))
    w, narrow = rng.standard_normal((3, 3, 2, 2)), rng.standard_normal((3, 3, 1, 2))
    for f in (
        lambda x: jaxcnn.conv(x, w, padding=padding, rule=jaxcnn.rules.autodiff),
        lambda x: jaxcnn.depthwise_conv(x, narrow, padding=padding, rule=jaxcnn.rules.autodiff),
        lambda x: jaxcnn.hidden_layer(x, w, np.zeros(2), padding=padding, rule=jaxcnn.rules.autodiff),
    ):
        y, tangent = jax.jvp(f, (x,), (v,))
        np.testing.assert_allclose(y + 1e-6 * tangent, f(x + 1e-6 * v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (4, 0), (0, 0)])
def test_no_channels(inputs, outputs, groups):
    """Empty sums and empty gradients are supported."""
    x, w = np.ones((2, 6, 5, inputs), np.float32), np.ones((3, 3, inputs // groups, outputs), np.float32)
    y, pull = jax.vjp(lambda x, w: jaxcnn.conv(x, w, groups=groups), x, w)
    delta_x, grad_w = pull(np.ones((2, 4, 3, outputs), np.float32))
    assert (y.shape, delta_x.shape, grad_w.shape) == ((2, 4, 3, outputs), x.shape, w.shape)
    back = jaxcnn.conv_transpose(y, w, groups=groups)
    assert back.shape == x.shape
    assert not any(map(np.any, (y, delta_x, grad_w, back)))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_programs_do_not_grow_with_the_stride(groups):
    """With a large stride, most phases have no tap."""
    x, w = np.ones((1, 33, 33, 4), np.float32), np.ones((3, 3, 4 // groups, 8), np.float32)

    def program(stride):
        _, pull = jax.vjp(lambda x: jaxcnn.conv(x, w, stride=stride, groups=groups), x)
        return len(jax.jit(pull).lower(np.ones((1, *2 * ((33 - 3) // stride + 1,), 8), "f")).as_text().splitlines())

    assert program(15) <= 1.5 * program(5)
