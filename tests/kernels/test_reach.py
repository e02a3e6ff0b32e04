"""A NaN, infinite or large element changes only the outputs and gradients that depend on it.

The layers are those for which Winograd's form, or another form that mixes neighbors, could be chosen. Batch sizes
differ because the choice of a lowering depends on them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

import jaxcnn
from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels.kernel_grad import kernel_grad
from tests.cases import compiled, with_cotangents

#: Side, input channels, output channels, kernel size, padding.
LAYERS = {"3x3": (8, 64, 64, 3, 1), "5x5": (12, 32, 64, 5, 0)}


def layer(name, batch):
    """Return compiled ``conv`` with its cotangents, and x, w, δ in float32."""
    side, inputs, outputs, size, pad = LAYERS[name]
    rng = np.random.default_rng(batch)
    out = side + 2 * pad - size + 1
    shapes = (batch, side, side, inputs), (size, size, inputs, outputs), (batch, out, out, outputs)
    x, w, delta = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return compiled(with_cotangents(lambda x, w: jaxcnn.conv(x, w, padding=pad))), x, w, delta


def dependent(name, at, n, offset):
    """Return a mask of the ``n`` positions along a dim that share a window with element ``at``.

    With ``offset`` these are the outputs that depend on an input; without it, the inputs that an output depends on.
    """
    size, pad = LAYERS[name][3:]
    first = at + pad - size + 1 if offset else at - pad
    return np.isin(np.arange(n), np.arange(first, first + size))


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_non_finite_elements_reach_only_dependent_results(name, batch):
    """With a NaN or an infinity in x, and then in δ, all results that do not depend on it are unchanged."""
    run, x, w, delta = layer(name, batch)
    y, (delta_x, grad_w) = run((x, w), delta)
    image, row, column, channel = batch // 2, 4, 5, 3
    for spoilt in (np.nan, np.inf):
        bad = x.copy()
        bad[image, row, column, channel] = spoilt
        found, (same, found_w) = run((bad, w), delta)
        depends = np.zeros(y.shape, bool)
        depends[image] = np.multiply.outer(*(dependent(name, at, y.shape[1], True) for at in (row, column)))[..., None]
        np.testing.assert_array_equal(np.isfinite(found), ~depends)
        np.testing.assert_allclose(found[~depends], y[~depends], rtol=1e-5, atol=1e-5 * np.abs(y).max())
        np.testing.assert_array_equal(same, delta_x)
        of_channel = np.arange(w.shape[2]) == channel
        assert not np.isfinite(found_w[:, :, channel]).any()
        np.testing.assert_allclose(found_w[:, :, ~of_channel], grad_w[:, :, ~of_channel], rtol=1e-5, atol=1e-3)

        bad = delta.copy()
        bad[image, row, column, channel] = spoilt
        _, (found_x, found_w) = run((x, w), bad)
        depends = np.zeros(x.shape, bool)
        depends[image] = np.multiply.outer(*(dependent(name, at, x.shape[1], False) for at in (row, column)))[..., None]
        np.testing.assert_array_equal(np.isfinite(found_x), ~depends)
        np.testing.assert_allclose(found_x[~depends], delta_x[~depends], rtol=1e-5, atol=1e-5 * np.abs(delta_x).max())
        assert np.isfinite(np.delete(found_w, channel, -1)).all()


@pytest.mark.parametrize("hot", [1e4, 1e6])
@pytest.mark.parametrize("name", LAYERS)
def test_errors_scale_with_the_elements_that_a_result_depends_on(name, hot):
    """With one large element in x and δ, each result is within 1e-5 of Σ|x||w| of PyTorch's float64 result."""
    run, x, w, delta = layer(name, 32)
    x[16, 4, 5, 3] = delta[16, 4, 5, 3] = hot
    pad = LAYERS[name][-1]

    def exact(x, w, delta):
        x, w = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, w))
        y = functional.conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1), padding=pad).permute(0, 2, 3, 1)
        y.backward(torch.tensor(delta, dtype=torch.float64))
        return y.detach().numpy(), x.grad.numpy(), w.grad.numpy()

    y, cotangents = run((x, w), delta)
    terms = exact(np.abs(x), np.abs(w), np.abs(delta))
    for found, expected, size in zip((y, *cotangents), exact(x, w, delta), terms, strict=True):
        assert (np.abs(found - expected) <= 1e-5 * size).all(), np.max(np.abs(found - expected) / size)


@pytest.mark.slow("compiles a deep net")
def test_gradients_of_a_deep_net_are_as_exact_as_stock_jaxs():
    """VGG16's 13 layers with 64 channels, compared with plain JAX in float64, parameter by parameter.

    Larger rounding errors flip a ReLU at its threshold: with these numbers Winograd's form is off by 1e-3.
    """
    rng = np.random.default_rng(3)
    inputs = [3, *(64,) * 12]
    ws = [rng.standard_normal((3, 3, i, 64)) * np.sqrt(2 / (9 * i)) for i in inputs]
    x, delta = rng.standard_normal((4, 32, 32, 3)), rng.standard_normal((4, 1, 1, 64))

    def net(convolve, pool):
        def run(ws, x, delta):
            for i, w in enumerate(ws):
                x = jax.nn.relu(convolve(x, w))
                if i in (1, 3, 6, 9, 12):
                    x = pool(x)
            return (x * delta).sum()

        return compiled(jax.grad(run))

    def stock(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def stock_pool(x):
        return jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    plain = net(stock, stock_pool)
    ours = net(lambda x, w: jaxcnn.conv(x, w, padding="SAME"), lambda x: jaxcnn.max_pool(x, 2))
    expected = plain(ws, x, delta)
    single = jax.tree.map(lambda a: a.astype(np.float32), (ws, x, delta))

    def errors(found):
        return [np.linalg.norm(f - e) / np.linalg.norm(e) for f, e in zip(found, expected, strict=True)]

    ours_off, plain_off = errors(ours(*single)), errors(plain(*single))
    assert max(ours_off) <= 2 * max(plain_off)
    assert np.median(ours_off) <= 1.2 * np.median(plain_off)


# ---------------------------------------------------------------------------------------------------------------------
# Programs of bounded size


def program_lines(f, *shapes):
    return len(jax.jit(f).lower(*(jnp.zeros(shape, jnp.float32) for shape in shapes)).as_text().splitlines())


#: Op, shapes of x and w, options. The second kernel has many more taps than the first.
LARGE = {
    "depthwise": (jaxcnn.depthwise_conv, (2, 40, 40, 8), [(9, 9, 1, 8), (31, 31, 1, 8)], {"padding": "SAME"}),
    "depthwise 1-D": (jaxcnn.depthwise_conv, (2, 900, 4), [(90, 1, 4), (800, 1, 4)], {}),
    "depthwise 3-D": (jaxcnn.depthwise_conv, (1, 9, 9, 9, 2), [(5, 5, 5, 1, 2), (9, 9, 9, 1, 2)], {"padding": "SAME"}),
    "of groups": (jaxcnn.conv, (2, 30, 30, 8), [(9, 9, 2, 8), (29, 29, 2, 8)], {"padding": "SAME", "groups": 4}),
    "dilated": (jaxcnn.depthwise_conv, (2, 40, 40, 4), [(9, 9, 1, 4), (20, 20, 1, 4)], {"dilation": 2, "padding": 9}),
    "strided": (jaxcnn.depthwise_conv, (2, 64, 64, 4), [(9, 9, 1, 4), (33, 33, 1, 4)], {"stride": 2}),
    "1-D": (jaxcnn.conv, (2, 2000, 1), [(100, 1, 1), (1001, 1, 1)], {}),
    "transposed": (jaxcnn.conv_transpose, (2, 16, 16, 8), [(9, 9, 2, 8), (25, 25, 2, 8)], {"groups": 8}),
}


@pytest.mark.parametrize("name", LARGE)
def test_programs_do_not_grow_with_the_kernel(name):
    """For up to 25 times as many taps, forward and both cotangents have at most 1.5 times as many lines."""
    op, x, kernels, options = LARGE[name]
    run = with_cotangents(lambda x, w: op(x, w, **options))

    def lines(w):
        y = jax.eval_shape(lambda x, w: op(x, w, **options), jnp.zeros(x), jnp.zeros(w))
        return program_lines(lambda x, w, delta: run((x, w), delta), x, w, y.shape)

    few, many = map(lines, kernels)
    assert many <= max(1.5 * few, 2500), (few, many)


@pytest.mark.parametrize("size", [16, 32])
def test_strided_patches_are_copied_dim_by_dim(size):
    """The gradient of a kernel with non-overlapping windows, as in vision transformers' patch embedding."""
    win = Window((64, 64), (size, size), (size, size), ((0, 0),) * 2, (1, 1))
    lines = program_lines(
        lambda x, delta: kernel_grad(Correlation(win, 1, np.dtype("f")), x, delta),
        (4, 64, 64, 3),
        (4, 64 // size, 64 // size, 64),
    )
    assert lines < 12 * size


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("method", ["direct", "fft"])
@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
@pytest.mark.parametrize("mode", ["full", "same", "valid"])
def test_non_finite_elements_of_signals_reach_only_dependent_results(mode, spoilt, method):
    """For an element of a, then of δ: results that depend on it are not finite, and all others are unchanged."""
    rng = np.random.default_rng(0)
    a, v = rng.standard_normal((17, 20)), rng.standard_normal((3, 4))
    run = compiled(with_cotangents(lambda a, v: jaxcnn.correlate(a, v, mode, method=method)))
    first = {"full": (-2, -3), "same": (-1, -2), "valid": (0, 0)}[mode]
    delta = rng.standard_normal({"full": (19, 23), "same": (17, 20), "valid": (15, 17)}[mode])
    y, (of_a, _) = run((a, v), delta)
    at = (8, 11)

    def dependents(shape, firsts):
        return np.multiply.outer(*(
            (np.arange(n) >= f) & (np.arange(n) < f + k) for n, f, k in zip(shape, firsts, v.shape, strict=True)
        ))  # fmt: skip

    bad = a.copy()
    bad[at] = spoilt
    found, (same, found_v) = run((bad, v), delta)
    # o + first <= i < o + first + K
    depends = dependents(y.shape, [i - f - k + 1 for i, f, k in zip(at, first, v.shape, strict=True)])
    np.testing.assert_array_equal(np.isfinite(found), ~depends)
    np.testing.assert_allclose(found[~depends], y[~depends], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(same, of_a, rtol=1e-10, atol=1e-10)
    assert not np.isfinite(found_v).any()

    bad = delta.copy()
    bad[at] = spoilt
    _, (found_a, _) = run((a, v), bad)
    depends = dependents(a.shape, [o + f for o, f in zip(at, first, strict=True)])
    np.testing.assert_array_equal(np.isfinite(found_a), ~depends)
    np.testing.assert_allclose(found_a[~depends], of_a[~depends], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, 1e3])
def test_template_matching_next_to_non_finite_elements(spoilt):
    """Windows without the element agree with NumPy's correlation coefficients, forward and backward."""
    rng = np.random.default_rng(0)
    image, template = rng.standard_normal((24, 22)), rng.standard_normal((13, 12))
    image[2, 3] = spoilt
    delta = rng.standard_normal((12, 11))
    y, (of_image, _) = compiled(with_cotangents(jaxcnn.match_template))((image, template), delta)
    clear = np.array([[i > 2 or j > 3 for j in range(11)] for i in range(12)])
    windows = np.lib.stride_tricks.sliding_window_view(image, template.shape)
    expected = [np.corrcoef(window.ravel(), template.ravel())[0, 1] for window in windows[clear]]
    np.testing.assert_allclose(y[clear], expected, rtol=1e-8, atol=1e-8)
    assert np.isfinite(y).all() == np.isfinite(spoilt)
    # Elements that share no window with it: row or column 15 and beyond.
    apart = np.array([[i >= 15 or j >= 15 for j in range(22)] for i in range(24)])
    assert np.isfinite(of_image[apart]).all()
    image[2, 3] = 0.5
    _, (without, _) = compiled(with_cotangents(jaxcnn.match_template))((image, template), delta)
    np.testing.assert_allclose(of_image[apart], without[apart], rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Loops over taps under transformations


@pytest.mark.slow("compiles large kernels")
def test_large_kernels_under_transformations():
    """A 9 × 9 depthwise kernel agrees with PyTorch, with a batch split in every way and under vmap.

    The forward result and both cotangents are compared.
    """
    rng = np.random.default_rng(0)
    x, w, delta = (rng.standard_normal(shape) for shape in ((2, 12, 11, 4), (9, 9, 1, 4), (2, 12, 11, 4)))
    run = with_cotangents(lambda x, w: jaxcnn.depthwise_conv(x, w, padding="SAME"))
    of_x, of_w = (torch.tensor(a, requires_grad=True) for a in (x, w))
    expected = functional.conv2d(of_x.permute(0, 3, 1, 2), of_w.permute(3, 2, 0, 1), padding="same", groups=4)
    expected.permute(0, 2, 3, 1).backward(torch.tensor(delta))
    expected = [expected.permute(0, 2, 3, 1).detach().numpy(), of_x.grad.numpy(), of_w.grad.numpy()]

    def check(found, sum_of_w=False):
        y, (delta_x, grad_w) = found
        for a, b in zip((y, delta_x, grad_w.sum(0) if sum_of_w else grad_w), expected, strict=True):
            np.testing.assert_allclose(np.reshape(a, b.shape), b, rtol=1e-10, atol=1e-10)

    check(compiled(run)((x, w), delta))
    each = jax.vmap(run, ((0, None), 0))
    check(compiled(each)((x[:, None], w), delta[:, None]), sum_of_w=True)
    for axis_type in jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit:
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
        split = jax.sharding.NamedSharding(mesh, jax.P("batch"))
        whole = jax.sharding.NamedSharding(mesh, jax.P())
        check(compiled(run)((jax.device_put(x, split), jax.device_put(w, whole)), jax.device_put(delta, split)))
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.P("batch"), jax.P()), jax.P("batch")
    check(compiled(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[::-1]))((x, w), delta))


#: Windows that do not overlap, and their sizes by dim.
LARGE_POOLS = {
    "global_max_pool": (jaxcnn.global_max_pool, (24, 18)),
    "max_pool": (lambda x: jaxcnn.max_pool(x, (2, 3)), (2, 3)),
    "max_pool, long": (lambda x: jaxcnn.max_pool(x, (12, 9)), (12, 9)),
    "max_pool_with_indices": (lambda x: jaxcnn.max_pool_with_indices(x, (6, 6))[0], (6, 6)),
    "adaptive_max_pool": (lambda x: jaxcnn.adaptive_max_pool(x, (3, 2)), (8, 9)),
}


@pytest.mark.parametrize("name", LARGE_POOLS)
def test_maxima_of_large_arrays_keep_nan(name):
    """XLA:CPU's library for the maximum of a large array drops NaN."""
    pool, (height, width) = LARGE_POOLS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 24, 18, 32)).astype(np.float32)
    x[rng.random(x.shape) < 0.01] = np.nan
    x[rng.random(x.shape) < 0.01] = np.inf
    expected = x.reshape(4, 24 // height, height, 18 // width, width, 32).max((2, 4))
    y, pull = jax.vjp(compiled(pool), x)
    np.testing.assert_array_equal(np.reshape(y, expected.shape), expected)
    assert np.isnan(expected).any()
    (delta,) = pull(jnp.ones_like(y))
    chosen = np.where(delta != 0, x, 0).reshape(4, 24 // height, height, 18 // width, width, 32)
    np.testing.assert_array_equal(chosen.sum((2, 4)), expected)  # one element of each window, which is the largest
