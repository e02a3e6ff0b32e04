"""Values and δ at corners of functions and at extreme numbers, compared with PyTorch.

Where we differ from PyTorch, the expected results are written out with the reason.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jaxcnn
from tests import oracles
from tests.cases import compiled
from tests.compare_torch import assert_agrees, pulled, random_delta

NAN, INF = np.nan, np.inf


def delta_x(f, x, delta=None):
    """Return δ_x of ``f`` at ``x``; δ is random, except where a hand-written expectation uses ones."""
    y = jax.eval_shape(f, x)
    return np.asarray(pulled(f, (x,), np.ones(y.shape, y.dtype) if delta is None else delta)[1][0])


def row(*entries):
    """Return a 1-D input with one channel."""
    return as_image(entries)


def as_image(entries):
    """Return a batch of one input with one channel."""
    return np.array(entries, np.float64)[None, ..., None]


# ---------------------------------------------------------------------------------------------------------------------
# Activations

ACTIVATIONS = (
    "relu", "leaky_relu", "elu", "selu", "celu", "relu6", "hard_tanh", "hard_sigmoid", "hard_swish", "gelu", "mish",
    "softsign", "squareplus", "log_sigmoid", "silu", "softplus", "sigmoid", "tanh",
)  # fmt: skip


#: At ±∞ PyTorch returns NaN in more positions than necessary.
NAN_IN_PYTORCH = {
    # name: (y, slope) at ∞ and −∞
    "softplus": ([INF, 0], [1, 0]),
    "softsign": ([NAN, NAN], [0, 0]),
    "squareplus": ([INF, 0], [NAN, 0]),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_zero_at_infinity_and_where_they_saturate(name):
    x = np.array([0.0, -0.0, INF, -INF, 1e4, -1e4, 40.0, -40.0, 1.0, -1.0, 3.0, -3.0, 6.0, -6.0])
    if name in NAN_IN_PYTORCH:
        x = x[np.isfinite(x)]
    assert_agrees(getattr(jaxcnn, name), getattr(oracles, name), x)


def test_hard_sigmoid_at_its_corners():
    """The value and slope agree with PyTorch's hardsigmoid, which has no second derivative."""
    assert_agrees(jaxcnn.hard_sigmoid, F.hardsigmoid, np.array([-INF, -4.0, -3.0, 0.0, 3.0, 4.0, INF]), rtol=1e-7)


def test_squareplus_is_precise_for_negative_x():
    """For a large negative x, (x + √(x² + b))/2 loses all precision in float32."""
    x = np.array([-1e3, -1e2], np.float32)
    np.testing.assert_allclose(jaxcnn.squareplus(x), jaxcnn.squareplus(x.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("rule", [None, jaxcnn.rules.autodiff])
def test_celu_bends_sharply_without_overflow(rule):
    """With a small alpha, e^(x / alpha) overflows in the branch that is not selected."""
    celu = functools.partial(jaxcnn.celu, alpha=1e-4, rule=rule)
    assert [float(f(0.5)) for f in (celu, jax.grad(celu), jax.grad(jax.grad(celu)))] == [0.5, 1, 0]


def test_gelu_by_tanh_where_it_saturates():
    x = np.array([0.0, -0.0, 1e4, -1e4, 40.0, -40.0, 1.0, -1.0])
    assert_agrees(jaxcnn.gelu, oracles.gelu, x, options={"approximate": True})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_nan(name):
    assert np.isnan(getattr(jaxcnn, name)(np.array([NAN]))).all()


@pytest.mark.parametrize("name", NAN_IN_PYTORCH)
def test_activations_at_infinity(name):
    op, x = getattr(jaxcnn, name), np.array([INF, -INF])
    y, slope = NAN_IN_PYTORCH[name]
    np.testing.assert_array_equal(op(x), y)
    np.testing.assert_array_equal(delta_x(op, x), slope)


def test_relu_slope_at_zero_and_nan_is_zero():
    """g'(x) is the bit x > 0: it is 0 at 0 (erratum 7) and, unlike PyTorch's 1, at NaN."""
    delta = np.array([3.0, 5.0, 7.0, 11.0, 13.0])
    assert delta_x(jaxcnn.relu, np.array([0.0, -0.0, NAN, INF, -INF]), delta).tolist() == [0, 0, 0, 11, 0]


@pytest.mark.parametrize(
    ("op", "x"),
    [
        (jaxcnn.relu, [-1.0, -1.0, 1.0]),
        (jaxcnn.relu6, [-1.0, 7.0, 1.0]),
        (jaxcnn.hard_tanh, [-2.0, 2.0, 0.5]),
        (jaxcnn.hard_sigmoid, [-3.0, 4.0, 1.0]),
        (jaxcnn.hard_swish, [-3.0, -INF, 4.0]),
    ],
)
def test_masks_stop_delta_that_is_not_finite(op, x):
    """A mask is used instead of a product, because 0·∞ is NaN.

    This runs without jit, because XLA turns a product with a bool into a mask.
    """
    _, pull = jax.vjp(op, np.array(x))
    assert pull(jnp.array([INF, NAN, INF]))[0].tolist() == [0, 0, INF]


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling


def integers(*shape, seed=0):
    """Draw a few distinct values, so that nearly every window has a tie."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float64)


MAX_POOLS = {
    # name: (x, options)
    "ties": (integers(2, 7, 7, 3), {"window": 3, "stride": 1}),
    "ties under padding": (integers(2, 7, 6, 3), {"window": (3, 2), "stride": 2, "padding": 1}),
    "ties with dilation": (integers(2, 9, 9, 2), {"window": 3, "stride": 1, "dilation": 2, "padding": 1}),
    "ties in 3-D": (integers(1, 5, 4, 5, 2), {"window": 2, "stride": (1, 2, 1)}),
    "all equal": (np.full((1, 6, 6, 1), 2.0), {"window": 2, "stride": 1}),
    "all equal, side by side": (np.full((1, 6, 6, 1), -2.0), {"window": 2}),
    "both zeros": (row(-0.0, 0.0, -0.0, 0.0), {"window": 2}),
    "one NaN": (row(1, NAN, 3, 4), {"window": 2, "stride": 1}),
    "NaN first, side by side": (row(NAN, 2, 3, 4), {"window": 2}),
    "NaN against infinity": (row(INF, NAN, -INF, 1), {"window": 2, "stride": 1}),
    "infinities": (row(-INF, INF, INF, -INF, 0), {"window": 3, "stride": 1}),
    "a window of -inf": (row(-INF, -INF, 1, -INF, -INF), {"window": 2}),
    "-inf under padding": (row(-INF, -INF, -INF), {"window": 3, "stride": 1, "padding": 1}),
    "-inf under padding, 2-D": (np.full((1, 4, 4, 1), -INF), {"window": 3, "stride": 1, "padding": 1}),
    "window as large as the input": (integers(2, 5, 4, 3), {"window": (5, 4)}),
    "window larger than the input": (integers(2, 3, 2, 3), {"window": (5, 4), "stride": 1, "padding": (2, 2)}),
    "stride larger than the window": (integers(2, 9, 8, 3), {"window": 2, "stride": 4}),
    "a remainder": (integers(2, 8, 9, 3), {"window": 3}),
    "a remainder, overlapping": (integers(2, 8, 9, 3), {"window": 3, "stride": 2}),
    "ceil_mode": (integers(2, 8, 9, 3), {"window": 3, "ceil_mode": True}),
    "ceil_mode under padding": (integers(2, 6, 7, 3), {"window": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    "ceil_mode, the last window in padding": (integers(1, 5, 5, 1), {"window": 2, "padding": 1, "ceil_mode": True}),
    "ceil_mode, the last window cut to one entry": (integers(1, 5, 1), {"window": 2, "ceil_mode": True}),
    "ceil_mode, only a partial window": (row(1), {"window": 2, "ceil_mode": True}),
    "ceil_mode, stride larger than the window": (integers(1, 6, 1), {"window": 2, "stride": 4, "ceil_mode": True}),
    "81 entries": (integers(2, 12, 13, 2), {"window": 9, "stride": 2, "padding": 4}),
    "81 entries, side by side": (integers(2, 18, 19, 2), {"window": 9}),
    "81 entries, one NaN": (np.where(np.arange(169).reshape(1, 13, 13, 1) == 70, NAN, integers(1, 13, 13, 1)),
        {"window": 9, "stride": 2}),
    "81 entries of -inf": (np.full((1, 10, 11, 1), -INF), {"window": 9, "stride": 1, "padding": 4}),
    "289 entries": (integers(1, 20, 18, 2), {"window": 17, "stride": 1, "padding": 8}),
    "289 entries with dilation": (integers(1, 35, 34, 1), {"window": 17, "stride": 3, "padding": 8, "dilation": 2}),
    "125 entries in 3-D": (integers(1, 7, 6, 7, 2), {"window": 5, "stride": 1, "padding": 2}),
    "70 entries in 1-D": (integers(1, 90, 2), {"window": 70, "stride": 7}),
}  # fmt: skip


@pytest.mark.parametrize("name", MAX_POOLS)
def test_max_pool(name):
    x, options = MAX_POOLS[name]
    assert_agrees(jaxcnn.max_pool, oracles.max_pool, x, options=options)


@pytest.mark.parametrize("name", MAX_POOLS)
def test_indices_of_the_winners(name):
    """The indices are PyTorch's `return_indices` where it supports the padding; of two NaNs, PyTorch takes the last."""
    x, options = MAX_POOLS[name]
    y, indices = jaxcnn.max_pool_with_indices(x, **options)
    np.testing.assert_array_equal(y, jaxcnn.max_pool(x, **options))
    size, stride, pads, dilation = oracles.pool_options(x, *map(options.get, POOLING, (2, None, "VALID", 1)))
    own = oracles.native(pads, size)
    if own is None:  # then compare the values at the indices
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        np.testing.assert_array_equal(
            np.take_along_axis(flat, np.asarray(indices).reshape(x.shape[0], -1, x.shape[-1]), 1).reshape(y.shape), y
        )
        return
    _, expected = oracles.MAX_POOL[len(size)](
        torch.tensor(x).movedim(-1, 1),
        size,
        stride,
        own,
        dilation,
        options.get("ceil_mode", False),
        return_indices=True,
    )
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, expected.movedim(1, -1))


POOLING = ("window", "stride", "padding", "dilation")
BY_HAND = {
    # name: (x, window, options, δ_x of δ = 1)
    "first of equals in row-major order": ([[1, 5], [5, 5]], 2, {}, [[0, 1], [0, 0]]),
    "NaN wins": ([1, NAN, 3, 4], 2, {"stride": 1}, [0, 2, 0, 1]),
    "the first NaN wins; in PyTorch the last": ([NAN, 1, NAN, 2], 4, {}, [1, 0, 0, 0]),
    "the first NaN wins, row-major": ([[1, NAN], [NAN, 9]], 2, {}, [[0, 1], [0, 0]]),
    "padding never wins": ([-INF, -INF, -INF], 3, {"stride": 1, "padding": 1}, [2, 1, 0]),
    "a remainder gets nothing": ([1, 2, 3, 4, 9], 2, {}, [0, 1, 0, 1, 0]),
    "between windows is nothing": ([9, 1, 9, 9, 2, 1], 2, {"stride": 4}, [1, 0, 0, 0, 1, 0]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_max_pool_by_hand(name):
    x, window, options, expected = BY_HAND[name]
    found = delta_x(lambda x: jaxcnn.max_pool(x, window, **options), as_image(x))
    np.testing.assert_array_equal(found, as_image(expected))


@pytest.mark.parametrize("name", BY_HAND)
def test_max_pool_by_hand_with_more_than_64_entries(name):
    """The long form gives the same results: each element gets a row with 80 others that never win."""
    x, window, options, expected = BY_HAND[name]
    x, expected = (as_image(a)[..., None, :] for a in (x, expected))
    ndim, pads = x.ndim - 3, options.get("padding", 0)
    widths = [(0, 0)] * (ndim + 1) + [(0, 80), (0, 0)]

    def with_row(value, last):
        return (*(value if isinstance(value, tuple) else (value,) * ndim), last)

    found = delta_x(
        lambda x: jaxcnn.max_pool(
            x, with_row(window, 81), stride=with_row(options.get("stride", window), 1), padding=with_row(pads, 0)
        ),
        np.pad(x, widths, constant_values=-INF),
    )
    np.testing.assert_array_equal(found, np.pad(expected, widths))


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (2, 1), (3, 2), (9, 5)])
def test_delta_that_is_nan_reaches_only_its_winner(window, stride):
    x = np.random.default_rng(0).standard_normal((1, 15, 15, 1))
    options = {"window": window, "stride": stride}
    delta = random_delta(jax.eval_shape(functools.partial(jaxcnn.max_pool, **options), x))
    delta[0, 0, 1] = NAN
    assert_agrees(jaxcnn.max_pool, oracles.max_pool, x, options=options, delta=delta)


# ---------------------------------------------------------------------------------------------------------------------
# Unpooling


@pytest.mark.parametrize(("ndim", "window"), [(1, 3), (2, 2), (3, 2)])
def test_max_unpool_is_pytorchs_where_windows_do_not_overlap(ndim, window):
    shape = (2, 7, 6, 5)[: ndim + 1]
    x = np.random.default_rng(0).permutation(math.prod(shape) * 3).reshape(*shape, 3).astype(np.float64)
    _, indices = jaxcnn.max_pool_with_indices(x, window)
    y = np.random.default_rng(1).standard_normal(indices.shape)

    def theirs(y):
        at = torch.tensor(np.asarray(indices)).long().movedim(-1, 1)
        unpool = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}[ndim]
        return unpool(y.movedim(-1, 1), at, window, output_size=shape[1:]).movedim(1, -1)

    assert_agrees(lambda y: jaxcnn.max_unpool(y, indices, shape[1:]), theirs, y)


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 3, "stride": 1, "padding": 1}, {"window": 9}])
def test_max_unpool_is_the_rule_of_max_pool(options):
    x = np.random.default_rng(0).standard_normal((2, 11, 10, 3))
    (y, indices), pull = jax.vjp(functools.partial(jaxcnn.max_pool_with_indices, **options), x)
    delta = random_delta(y)
    (delta_x,) = pull((delta, np.zeros(indices.shape, jax.dtypes.float0)))
    np.testing.assert_allclose(jaxcnn.max_unpool(delta, indices, (11, 10)), delta_x, rtol=1e-14)


def test_indices_out_of_range_under_jit_are_dropped():
    y, delta = row(3.0, 5.0, 7.0, 9.0), row(2.0, 4.0)
    index = row(1, -1, 2, 1).astype(np.int32)
    x, pull = jax.vjp(jax.jit(lambda y, index: jaxcnn.max_unpool(y, index, 2)), y, index)
    assert x.ravel().tolist() == [0, 12]
    assert pull(delta)[0].ravel().tolist() == [4, 0, 0, 4]


def test_indices_in_a_list_under_jit():
    """A list may hold traced elements, whose range cannot be checked."""
    unpool = jax.jit(lambda index: jaxcnn.max_unpool(np.ones((1, 2, 1)), [[[index], [2]]], 4))
    np.testing.assert_array_equal(unpool(1).ravel(), [0, 1, 1, 0])


def test_indices_of_8_bits_with_more_than_255_elements():
    y = np.ones((1, 1, 1))
    assert jaxcnn.max_unpool(y, np.full(y.shape, 255, np.uint8), 1000)[0, 255, 0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Average pooling

AVG_POOLS = {
    # name: (shape, options)
    "padding": ((2, 7, 6, 3), {"window": 3, "stride": 2, "padding": 1}),
    "stride 1": ((2, 5, 5, 2), {"window": (3, 2), "stride": 1, "padding": 1}),
    "a remainder": ((2, 8, 9, 3), {"window": 3}),
    "stride larger than the window": ((2, 9, 8, 3), {"window": 2, "stride": 4}),
    "window as large as the input": ((2, 5, 4, 3), {"window": (5, 4)}),
    "window larger than the input": ((2, 3, 2, 3), {"window": (5, 4), "stride": 1, "padding": 2}),
    "the last window in padding": ((1, 5, 5, 1), {"window": 2, "padding": 1}),
    "81 entries": ((1, 12, 13, 2), {"window": 9, "stride": 2, "padding": 4}),
    "70 entries in 1-D": ((2, 95, 2), {"window": 70, "stride": 10, "padding": 9}),
    "3-D": ((1, 6, 5, 6, 2), {"window": (2, 3, 2), "stride": 2, "padding": 1}),
}


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("name", AVG_POOLS)
def test_avg_pool(name, count_include_pad, ceil_mode):
    shape, options = AVG_POOLS[name]
    options = {**options, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    assert_agrees(jaxcnn.avg_pool, oracles.avg_pool, np.random.default_rng(0).standard_normal(shape), options=options)


@pytest.mark.parametrize("count_include_pad", [False, True])
def test_avg_pool_of_a_single_partial_window(count_include_pad):
    options = {"window": 3, "ceil_mode": True, "count_include_pad": count_include_pad}
    assert_agrees(jaxcnn.avg_pool, oracles.avg_pool, row(1, 5), options=options)


def test_avg_pool_keeps_non_finite_values_in_their_windows():
    x = row(NAN, 1, INF, 2, -INF, INF, 3, 4)
    assert_agrees(jaxcnn.avg_pool, oracles.avg_pool, x, options={"window": 2})


# ---------------------------------------------------------------------------------------------------------------------
# Power pooling, and windows of nearly equal size

LP_POOLS = {
    # name: (x, options)
    "a window of zeros": (row(0, 0, 3, 4, 0, -0.0), {"window": 2}),
    "a window of zeros, p = 1": (row(0, 0, 3, 4, 1, -1), {"window": 2, "p": 1}),
    "a window of zeros, p = 3": (row(0, 0, 3, 4), {"window": 2, "p": 3}),
    "negative entries, p = 1": (row(-1, -2, 3, -4), {"window": 2, "p": 1}),
    "negative entries, p = 2": (row(-1, -2, 3, -4), {"window": 2}),
    "a negative sum, p = 3": (row(-1, -2, 3, -1), {"window": 2, "p": 3}),
    "negative entries, p = 2.5": (row(-1, 2, 3, 1), {"window": 2, "p": 2.5}),
    "NaN and infinity": (row(NAN, 1, INF, 2, 3, 4), {"window": 2}),
    "ceil_mode": (row(1, 2, 3, 4, 5), {"window": 3, "stride": 2, "ceil_mode": True}),
    "ceil_mode, a single partial window": (row(3, 4), {"window": 3, "ceil_mode": True}),
}


@pytest.mark.parametrize("name", LP_POOLS)
def test_lp_pool(name):
    x, options = LP_POOLS[name]
    assert_agrees(jaxcnn.lp_pool, oracles.lp_pool, x, options=options)


@pytest.mark.slow("compiles every size")
@pytest.mark.parametrize("n", [1, 2, 5, 8, 12])
def test_adaptive_pooling_to_every_size(n):
    """Output sizes range beyond the input size, with ties, NaN and −∞ among the elements."""
    rng = np.random.default_rng(n)
    x = rng.integers(-1, 2, (2, n, 4)).astype(np.float64)
    x[0, rng.integers(n), 1], x[0, rng.integers(n), 2], x[:, :, 3] = NAN, -INF, -INF
    for size in range(1, n + 3):
        for name in ("adaptive_max_pool", "adaptive_avg_pool"):
            if name == "adaptive_max_pool":  # PyTorch takes the last of two NaNs, so a window has at most one
                assert_agrees(getattr(jaxcnn, name), getattr(oracles, name), x, options={"output_size": size})
            else:
                finite = np.where(np.isfinite(x), x, 7)
                assert_agrees(getattr(jaxcnn, name), getattr(oracles, name), finite, options={"output_size": size})


def test_global_pooling_is_adaptive_pooling_to_one():
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 3))
    np.testing.assert_array_equal(jaxcnn.global_max_pool(x), jaxcnn.adaptive_max_pool(x, 1)[:, 0, 0])
    np.testing.assert_allclose(jaxcnn.global_avg_pool(x), jaxcnn.adaptive_avg_pool(x, 1)[:, 0, 0], rtol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# Normalization


def test_batch_norm_with_given_statistics_equals_pytorch_in_evaluation():
    rng = np.random.default_rng(0)
    x, scale, bias, mean = (rng.standard_normal(shape) for shape in ((2, 3, 4, 5), (5,), (5,), (5,)))
    var = rng.uniform(0.1, 2, 5)

    def ours(x, scale, bias):
        return jaxcnn.batch_norm(x, scale, bias, mean, var, eps=0.01)

    def theirs(x, scale, bias):
        statistics = torch.tensor(mean), torch.tensor(var)
        return F.batch_norm(x.movedim(-1, 1), *statistics, scale, bias, eps=0.01).movedim(1, -1)

    assert_agrees(ours, theirs, x, scale, bias)


NORMS = {
    "batch_norm": (jaxcnn.batch_norm, oracles.batch_norm, {}),
    "layer_norm": (jaxcnn.layer_norm, oracles.layer_norm, {"axes": (1, 2)}),
    "group_norm": (jaxcnn.group_norm, oracles.group_norm, {"groups": 2}),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_group_of_equal_elements_is_zero(name):
    ours, theirs, options = NORMS[name]
    y, _ = assert_agrees(ours, theirs, np.full((2, 3, 4), 7.0), options=options)
    assert not y.any()


@pytest.mark.parametrize("name", NORMS)
def test_a_group_far_from_zero_is_precise(name):
    """In float32, Σ x²/n − m² loses all precision."""
    ours, _, options = NORMS[name]
    x = np.random.default_rng(0).integers(-8, 9, (4, 5, 6)).astype(np.float32)
    ours = functools.partial(ours, **options)
    np.testing.assert_allclose(ours(x + 2**12), ours(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NORMS)
def test_a_group_with_nan_is_nan_and_the_others_are_not(name):
    ours, theirs, options = NORMS[name]
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    x[0, 1, 2] = NAN
    y, (delta_x,) = assert_agrees(ours, theirs, x, options=options)
    assert 0 < np.isnan(y).sum() < y.size
    assert 0 < np.isnan(delta_x).sum() < delta_x.size


# ---------------------------------------------------------------------------------------------------------------------
# Residuals: exactly what the rule reads, in the smallest exact form

IMAGE, KERNEL, BIAS = np.ones((2, 32, 32, 3), np.float32), np.ones((5, 5, 3, 4), np.float32), np.ones(4, np.float32)
RESIDUALS = {
    "relu: the bit": (jaxcnn.relu, (IMAGE,), {("bool", (2, 32, 32, 3))}),
    "leaky_relu: the bit": (jaxcnn.leaky_relu, (IMAGE,), {("bool", (2, 32, 32, 3))}),
    "hard_sigmoid: the bit": (jaxcnn.hard_sigmoid, (IMAGE,), {("bool", (2, 32, 32, 3))}),
    "mish: its slope": (jaxcnn.mish, (IMAGE,), {("float32", (2, 32, 32, 3))}),
    "avg_pool: nothing": (lambda x: jaxcnn.avg_pool(x, 2), (IMAGE,), set()),
    "max_pool: a byte": (lambda x: jaxcnn.max_pool(x, 2), (IMAGE,), {("uint8", (2, 16, 16, 3))}),
    "max_pool_with_indices: a byte": (
        lambda x: jaxcnn.max_pool_with_indices(x, 2)[0], (IMAGE,), {("uint8", (2, 16, 16, 3))}
    ),
    "adaptive_avg_pool: nothing": (lambda x: jaxcnn.adaptive_avg_pool(x, 5), (IMAGE,), set()),
    "global_max_pool: two bytes": (jaxcnn.global_max_pool, (IMAGE,), {("uint16", (2, 1, 1, 3))}),
    "batch_norm: x and two numbers a channel": (
        jaxcnn.batch_norm, (IMAGE,), {("float32", IMAGE.shape), ("float32", (1, 1, 1, 3))},
    ),
    "max_pool, 255 entries: a byte": (lambda x: jaxcnn.max_pool(x, (15, 17)), (IMAGE,), {("uint8", (2, 2, 1, 3))}),
    "max_pool, 256 entries: two": (lambda x: jaxcnn.max_pool(x, 16), (IMAGE,), {("uint16", (2, 2, 2, 3))}),
    "hidden_layer: inputs and a byte": (
        jaxcnn.hidden_layer, (IMAGE, KERNEL, BIAS),
        {("float32", IMAGE.shape), ("float32", KERNEL.shape), ("uint8", (2, 14, 14, 4))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals(name):
    op, arrays, expected = RESIDUALS[name]
    kept = jax.tree.leaves(jax.eval_shape(lambda: jax.vjp(op, *arrays)[1]))
    assert {(str(a.dtype), a.shape) for a in kept} == expected


def test_dropout_keeps_the_key_and_not_the_mask():
    kept, *others = jax.tree.leaves(
        jax.eval_shape(lambda key: jax.vjp(lambda x: jaxcnn.dropout(x, 0.5, key), IMAGE)[1], jax.random.key(0))
    )
    assert not others
    assert jnp.issubdtype(kept.dtype, jax.dtypes.prng_key)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


def test_dropout_at_rate_zero_is_the_identity():
    x = np.array([1.0, -0.0, NAN, INF])
    y, pull = jax.vjp(lambda x: jaxcnn.dropout(x, 0, jax.random.key(0)), x)
    np.testing.assert_array_equal(y, x)
    delta = np.array([3.0, 5.0, 7.0, 11.0])
    np.testing.assert_array_equal(pull(delta)[0], delta)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_forward_and_backward_draw_the_same_mask(rate):
    x = np.random.default_rng(0).uniform(1, 2, (50, 40))  # no zeros in the input
    y, pull = jax.vjp(lambda x: jaxcnn.dropout(x, rate, jax.random.key(3)), x)
    mask = np.asarray(y) != 0
    delta = random_delta(y)
    np.testing.assert_allclose(y, mask * x / (1 - rate), rtol=1e-14)
    np.testing.assert_allclose(pull(delta)[0], mask * delta / (1 - rate), rtol=1e-14)
    assert abs(mask.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / mask.size)
    np.testing.assert_array_equal(y, jaxcnn.dropout(x, rate, jax.random.key(3)))
    assert (np.asarray(y) != np.asarray(jaxcnn.dropout(x, rate, jax.random.key(4)))).any()


def test_dropout_drops_non_finite_values():
    y = np.asarray(jaxcnn.dropout(np.full(100, NAN), 0.5, jax.random.key(0)))
    assert set(np.unique(np.nan_to_num(y, nan=1.0))) == {0.0, 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# The Kronecker product, and sizes from the lecture


def test_kron_with_the_numbers_of_the_lecture():
    """§7 multiplies every block by an element of B, which is B ⊗ A (erratum 1)."""
    a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[4.0, 5.0], [6.0, 7.0]])
    printed = [[4, 8, 5, 10], [12, 16, 15, 20], [6, 12, 7, 14], [18, 24, 21, 28]]
    np.testing.assert_array_equal(jaxcnn.kron(b, a), printed)
    np.testing.assert_array_equal(jaxcnn.kron(b, a), np.kron(b, a))
    assert (np.asarray(jaxcnn.kron(a, b)) != printed).any()


def test_kron_with_the_letters_of_the_lecture():
    """§8: a, b, c, d ⊗ 1 is *up*."""
    a, b, c, d = letters = np.array([2.0, 3.0, 5.0, 7.0])
    printed = [[a, a, b, b], [a, a, b, b], [c, c, d, d], [c, c, d, d]]
    x = letters.reshape(2, 2)
    np.testing.assert_array_equal(jaxcnn.kron(x, np.ones((2, 2))), printed)
    np.testing.assert_array_equal(jaxcnn.kron_up(x[None, :, :, None], 2)[0, :, :, 0], printed)


def test_sizes_of_the_lecture_24_12_24():
    """§7–9: pooling halves 24 × 24, and *up* restores δ to it: masked for max, divided for average (erratum 3)."""
    x = np.random.default_rng(0).standard_normal((2, 24, 24, 3))
    delta = np.random.default_rng(1).standard_normal((2, 12, 12, 3))
    up = functools.partial(jaxcnn.kron_up, factor=2)
    y = jaxcnn.max_pool(x, 2)
    assert (y.shape, up(y).shape) == ((2, 12, 12, 3), (2, 24, 24, 3))
    np.testing.assert_array_equal(delta_x(lambda x: jaxcnn.max_pool(x, 2), x, delta), up(delta) * (x == up(y)))
    np.testing.assert_allclose(delta_x(lambda x: jaxcnn.avg_pool(x, 2), x, delta), up(delta) / 4)
    np.testing.assert_array_equal(delta_x(lambda x: jaxcnn.block_sum(x, 2), x, delta), up(delta))


def test_relu_and_max_pool_commute_and_avg_pool_does_not():
    """Erratum 8."""
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    delta = np.random.default_rng(1).standard_normal((2, 4, 4, 3))

    def in_both_orders(pool):
        return (lambda x: jaxcnn.relu(pool(x, 2))), (lambda x: pool(jaxcnn.relu(x), 2))

    first, then = in_both_orders(jaxcnn.max_pool)
    np.testing.assert_array_equal(first(x), then(x))
    np.testing.assert_array_equal(delta_x(first, x, delta), delta_x(then, x, delta))
    first, then = in_both_orders(jaxcnn.avg_pool)
    assert not np.allclose(first(x), then(x), atol=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The hidden layer equals its three ops in sequence

HIDDEN = {
    # name: (x shape, w shape, options of the convolution, window and options of the pooling)
    "1-D": ((2, 13, 3), (4, 3, 5), {}, 2, {}),
    "2-D, the lecture's": ((2, 28, 28, 1), (5, 5, 1, 4), {}, 2, {}),
    "3-D": ((1, 6, 7, 6, 2), (2, 3, 2, 2, 3), {}, 2, {}),
    "overlapping windows": ((2, 9, 9, 2), (3, 3, 2, 3), {}, 3, {"stride": 2, "padding": 1}),
    "a remainder, twice": ((2, 10, 12, 2), (3, 2, 2, 4), {"stride": 2, "padding": ((2, 1), (0, 1))}, 2, {}),
    "dilation and groups": ((2, 12, 11, 4), (3, 2, 2, 6), {"dilation": 2, "groups": 2}, 3, {"stride": 1}),
    "81 entries": ((1, 14, 14, 2), (3, 3, 2, 3), {}, 9, {"stride": 1}),
    "gaps between windows": ((1, 11, 11, 2), (3, 3, 2, 3), {}, 2, {"stride": 5}),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_layer_equals_conv_relu_and_max_pool(name):
    """All windows pass the ReLU, about half of them, or none."""
    x_shape, w_shape, of_conv, window, of_pool = HIDDEN[name]
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal(x_shape), rng.standard_normal(w_shape), rng.standard_normal(w_shape[-1])

    def at_once(x, w, b):
        options = {f"pool_{k}": v for k, v in of_pool.items()}
        return jaxcnn.hidden_layer(x, w, b, window=window, **of_conv, **options)

    def in_turn(x, w, b):
        return jaxcnn.max_pool(jaxcnn.relu(jaxcnn.conv(x, w, b, **of_conv)), window, **of_pool)

    half = -np.median(compiled(at_once)(x, w, b + 100) - 100)
    for bias, share in [(100, 1), (half, 0.5), (-100, 0)]:
        arrays = x, w, b + bias
        delta = random_delta(jax.eval_shape(at_once, *arrays))
        found, expected = pulled(at_once, arrays, delta), pulled(in_turn, arrays, delta)
        chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)
        assert np.mean(np.asarray(found[0]) > 0) == pytest.approx(share, abs=0.3 if share == 0.5 else 0)
    assert not any(map(np.any, found[1])), "where nothing passes there is no δ"


def test_hidden_layer_returns_nan_and_blocks_its_delta():
    x = row(1, NAN, 3, 4, -5, -6)  # windows of two: NaN, 4, ≤ 0
    w, b = np.ones((1, 1, 1)), np.zeros(1)
    delta = row(3, 5, 7)
    y, pull = jax.vjp(jaxcnn.hidden_layer, x, w, b)
    np.testing.assert_array_equal(y, row(NAN, 4, 0))
    delta_x, grad_w, grad_b = pull(delta)
    np.testing.assert_array_equal(delta_x, row(0, 0, 0, 5, 0, 0))
    assert grad_b.tolist() == [5]
    assert np.isnan(grad_w).all()  # ∂E/∂w = Σ x·δ reads the NaN


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (jaxcnn.squareplus, 256.0),
        (jaxcnn.squareplus, -300.0),
        (jaxcnn.mish, 20000.0),
        (lambda x: jaxcnn.gelu(x, approximate=True), 1000.0),
        (lambda x: jaxcnn.gelu(x, approximate=True), 33000.0),
    ],
)
def test_activations_of_16_bits_do_not_overflow(f, x):
    """x² and eˣ are computed in float32."""
    half = jnp.float16(x)
    y, slope = f(half), jax.grad(lambda x: f(x).astype(np.float32))(half)
    assert y.dtype == slope.dtype == np.float16
    np.testing.assert_allclose([y, slope], [f(np.float64(x)), jax.grad(f)(np.float64(x))], rtol=1e-3, atol=1e-4)


def test_empty_inputs():
    empty = np.zeros((2, 0, 6, 4), np.float32)
    assert jaxcnn.block_sum(empty, 2).shape == (2, 0, 3, 4)
    y, pull = jax.vjp(lambda x: jaxcnn.kron_up(x, 2), empty)
    assert y.shape == (2, 0, 12, 4)
    assert pull(y)[0].shape == empty.shape


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"])
def test_no_classes(loss):
    logits = np.zeros((3, 0), np.float32)
    target = logits if loss == "softmax_cross_entropy" else np.zeros(3, int)
    for run in (getattr(jaxcnn, loss), jax.jit(getattr(jaxcnn, loss))):
        message = rf"^{loss}: logits must be \(…, C\) with C >= 1, got shape \(3, 0\)(?=\n|$)"
        with pytest.raises(ValueError, match=message):
            run(logits, target)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout of everything


@pytest.mark.parametrize("rule", [None, jaxcnn.rules.autodiff], ids=["exact", "autodiff"])
def test_dropout_of_everything_is_zero_forward_and_backward(rule):
    """Results are zero even for inputs of 0 and ∞, as in PyTorch, and no intermediate value is NaN."""
    x, delta = np.array([0.0, -2.0, 3.0]), np.array([0.0, 5.0, -7.0])
    t = torch.tensor(x, requires_grad=True)
    expected = F.dropout(t, 1.0)
    expected.backward(torch.tensor(delta))
    with jax.debug_nans(True):
        for drop in (
            lambda x: jaxcnn.dropout(x, 1, jax.random.key(0), rule=rule),
            lambda x: jaxcnn.Dropout(1.0).apply({}, x, key=jax.random.key(0), rule=rule),
        ):
            y, pull = jax.vjp(drop, jnp.asarray(x))
            np.testing.assert_array_equal(y, expected.detach().numpy())
            np.testing.assert_array_equal(pull(jnp.asarray(delta))[0], t.grad.numpy())
            y, pull = jax.vjp(drop, jnp.array([jnp.inf, -jnp.inf, 1.0]))
            np.testing.assert_array_equal(y, np.zeros(3))
            np.testing.assert_array_equal(pull(jnp.array([jnp.inf, 1.0, 0.0]))[0], np.zeros(3))


# ---------------------------------------------------------------------------------------------------------------------
# No intermediate value is NaN

FINITE = {
    "max_pool, padded": (functools.partial(jaxcnn.max_pool, window=3, stride=2, padding=1), IMAGE[:1, :6, :6]),
    "max_pool, large windows": (functools.partial(jaxcnn.max_pool, window=9, padding=4), IMAGE[:1, :9, :9]),
    "avg_pool": (
        functools.partial(jaxcnn.avg_pool, window=3, padding=1, count_include_pad=False), IMAGE[:1, :6, :6],
    ),
    "lp_pool of zeros": (functools.partial(jaxcnn.lp_pool, window=2, p=1.5), 0 * IMAGE[:1, :6, :6]),
    "layer_norm of equal entries": (functools.partial(jaxcnn.layer_norm, eps=1e-5), IMAGE[:1, :6, :6]),
    "match_template of equal entries": (
        lambda x: jaxcnn.match_template(x[0, :, :, 0], np.eye(3, dtype=np.float32)), IMAGE[:1, :6, :6],
    ),
    "tanh at infinity": (jaxcnn.tanh, np.array([INF, -INF, 0.0])),
    "relu6 at infinity": (jaxcnn.relu6, np.array([INF, -INF, 0.0])),
    "softmax_cross_entropy of an impossible class": (
        lambda x: jaxcnn.softmax_cross_entropy(x, np.array([0.0, 0.4, 0.6])), np.array([-INF, 1.0, 2.0]),
    ),
    "softmax_cross_entropy_with_integer_labels": (
        lambda x: jaxcnn.softmax_cross_entropy_with_integer_labels(x, np.array(1)), np.array([-INF, 1.0, 2.0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FINITE)
def test_debug_nans_finds_none_where_results_are_finite(name):
    op, x = FINITE[name]
    delta = random_delta(jax.eval_shape(op, x))
    with jax.debug_nans(True):
        y, pull = jax.vjp(op, jnp.asarray(x))
        (found,) = pull(jnp.asarray(delta))
    assert np.isfinite(y).all()
    assert np.isfinite(found).all()
