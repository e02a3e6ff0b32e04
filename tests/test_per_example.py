"""Per-example gradients, their norms and their clipped sum, compared with `vmap` of autodiff's `grad`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxcnn
from experiments.models import lecture
from jaxcnn import (
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DepthwiseConv,
    Dropout,
    Flatten,
    GroupNorm,
    HiddenLayer,
    LayerNorm,
    MaxPool,
    Relu,
    Tanh,
    clipped_gradient,
    per_example_gradients,
    per_example_norms,
    residual,
    rules,
    serial,
)
from jaxcnn import softmax_cross_entropy_with_integer_labels as cross_entropy
from jaxcnn.geometry import Correlation, window
from jaxcnn.kernels import correlate, onednn
from jaxcnn.kernels import per_example as kernels
from tests.cases import compiled
from tests.checks import SPLIT_BY, assert_close

HEAD = (Flatten(), Dense(3))
NETS = {
    # name: (net, shape of an example)
    "lecture": (lecture(10), (28, 28, 1)),
    "conv": (serial(Conv(4, 3), Relu(), MaxPool(2), Conv(5, (2, 1), bias=False), Tanh(), *HEAD), (8, 8, 2)),
    "conv, options": (
        serial(
            Conv(4, 3, stride=2, padding=((1, 0), (2, 1)), dilation=2), Tanh(), Conv(6, 2, padding="REFLECT", groups=2),
            Tanh(), Conv(3, 1, padding="SAME"), *HEAD,
        ),
        (9, 10, 2),
    ),
    "1-D": (serial(Conv(4, 3, padding="CAUSAL"), Tanh(), Conv(3, 4, stride=3), *HEAD), (11, 2)),
    "3-D": (serial(Conv(3, (2, 1, 2)), Tanh(), *HEAD), (3, 4, 3, 2)),
    "depthwise": (serial(DepthwiseConv(3, multiplier=2), Relu(), *HEAD), (6, 5, 3)),
    "hidden layers, options": (
        serial(
            HiddenLayer(4, 3, window=3, pool_stride=1, pool_padding=1, padding="SAME"),
            HiddenLayer(4, 2, window=2, groups=2, dilation=2), *HEAD,
        ),
        (8, 7, 2),
    ),
    "dense on pixels": (serial(Dense(5), Tanh(), Dense(4, bias=False), Conv(3, 2), *HEAD), (5, 4, 2)),
    "residual, nested": (
        serial(Conv(3, 3), residual(serial(Conv(3, 3, padding="SAME"), Tanh()), Conv(3, 1)), AvgPool(2), *HEAD),
        (8, 8, 2),
    ),
    "layers that have no product here": (
        serial(Conv(4, 3), GroupNorm(2), ConvTranspose(3, 2, stride=2), LayerNorm(), Relu(), *HEAD), (6, 6, 2),
    ),
    "batch norm, calibrated": (serial(Conv(4, 3), BatchNorm(), Relu(), *HEAD), (6, 6, 2)),
    "one layer": (serial(Dense(3)), (5,)),
}  # fmt: skip


def given(name, dtype=np.float64, batch=5):
    net, shape = NETS[name]
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(dtype), empty)
    x = rng.standard_normal((batch, *shape)).astype(dtype)
    if "batch norm" in name:
        statistics = {"mean": rng.normal(0, 1, 4).astype(dtype), "var": rng.uniform(0.5, 2, 4).astype(dtype)}
        params["batch_norm1"] |= statistics
    return net, params, x, np.arange(batch, dtype=np.int32) % 3


def by_vmap(net, loss=cross_entropy):
    """Vectorize autodiff over single examples."""

    def one(params, x, y):
        return loss(net.apply(params, x[None], rules=rules.autodiff), y[None]).mean()

    return compiled(jax.vmap(jax.grad(one), (None, 0, 0)))


def norms_of(gradients):
    return np.sqrt(
        sum(np.square(np.asarray(g, float)).sum(tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradients))
    )


def run(f, net, *args, loss=cross_entropy, **options):
    """Compile and run ``f(net, loss, params, x, y, …)``."""
    return compiled(lambda params, x, y, *rest: f(net, loss, params, x, y, *rest, **options))(*args)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_gradients(name):
    net, params, x, y = given(name)
    result, expected = run(per_example_gradients, net, params, x, y), by_vmap(net)(params, x, y)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    assert_close(jax.tree.leaves(result), jax.tree.leaves(expected), 1e-10)


@pytest.mark.parametrize("name", NETS)
def test_norms(name):
    net, params, x, y = given(name)
    assert_close([run(per_example_norms, net, params, x, y)], [norms_of(by_vmap(net)(params, x, y))], 1e-10)


@pytest.mark.parametrize("name", NETS)
def test_clipped_sum(name):
    net, params, x, y = given(name)
    gradients = by_vmap(net)(params, x, y)
    norms = norms_of(gradients)
    limit = float(np.median(norms))  # some are clipped and some are not
    factors = np.minimum(1, limit / norms)
    assert (factors < 1).any()
    assert (factors == 1).any()
    expected = jax.tree.map(lambda g: np.einsum("n...,n->...", g, factors), gradients)
    result = run(clipped_gradient, net, params, x, y, limit)  # traced
    static = run(clipped_gradient, net, params, x, y, max_norm=limit)
    assert jax.tree.structure(result) == jax.tree.structure(static) == jax.tree.structure(expected)
    assert_close(jax.tree.leaves(static), jax.tree.leaves(expected), 1e-10)
    assert_close(jax.tree.leaves(result), jax.tree.leaves(expected), 1e-10)


def in_float64(a):
    return np.asarray(a, np.float64) if a.dtype == np.float32 else a


@pytest.mark.parametrize("name", ["lecture", "residual, nested", "layers that have no product here"])
def test_float32(name):
    net, params, x, y = given(name, np.float32)
    expected = by_vmap(net)(*jax.tree.map(in_float64, (params, x, y)))  # vmap in float32 is as inexact as ours
    result = run(per_example_gradients, net, params, x, y)
    assert {g.dtype for g in jax.tree.leaves(result)} == {np.dtype(np.float32)}
    flat = [np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)]) for tree in (result, expected)]
    assert_close(flat[:1], flat[1:], 1e-6)
    # A scale's gradient is a sum of few terms that cancel: its rounding depends on the machine (up to 1.2e-6 seen).
    assert_close(jax.tree.leaves(result), jax.tree.leaves(expected), 2e-6)
    norms = run(per_example_norms, net, params, x, y)
    assert norms.dtype == np.float32
    assert_close([norms], [norms_of(expected)], 1e-6)
    clipped = run(clipped_gradient, net, params, x, y, np.float32(1e9))
    assert {g.dtype for g in jax.tree.leaves(clipped)} == {np.dtype(np.float32)}


def test_sixteen_bits():
    net, params, x, y = given("conv", jnp.bfloat16)
    result = run(per_example_gradients, net, params, x, y)
    assert {g.dtype for g in jax.tree.leaves(result)} == {jnp.dtype(jnp.bfloat16)}
    assert run(per_example_norms, net, params, x, y).dtype == jnp.float32


def by_vmap_with_keys(net, key):
    """Vectorize autodiff over single examples, each of which has the key folded with its index."""

    def one(params, x, y, n):
        outputs = net.apply(params, x[None], key=jax.random.fold_in(key, n), rules=rules.autodiff)
        return cross_entropy(outputs, y[None]).mean()

    return compiled(jax.vmap(jax.grad(one), (None, 0, 0, 0)))


def test_each_example_has_its_own_key():
    """With dropout on, each example has its own mask."""
    net = serial(Conv(4, 3), Dropout(0.5), Tanh(), Flatten(), Dropout(0.3), Dense(3))
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda: net.init(jax.random.key(0), (6, 6, 2)))
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape), empty)
    x, y, key = rng.standard_normal((5, 6, 6, 2)), np.array([0, 1, 2, 0, 1]), jax.random.key(3)
    each = by_vmap_with_keys(net, key)(params, x, y, np.arange(5))
    result = run(per_example_gradients, net, params, x, y, key=key)
    assert_close(jax.tree.leaves(result), jax.tree.leaves(each), 1e-10)
    unclipped = run(clipped_gradient, net, params, x, y, 1e9, key=key)
    assert_close(jax.tree.leaves(unclipped), [g.sum(0) for g in jax.tree.leaves(each)], 1e-10)
    without = run(per_example_gradients, net, params, x, y)
    assert np.abs(without["conv1"]["weight"] - result["conv1"]["weight"]).max() > 1e-3


def test_several_losses_of_an_example_are_averaged():
    net, params, x, _ = given("conv")
    target = np.random.default_rng(1).standard_normal((5, 3))
    result = run(per_example_gradients, net, params, x, target, loss=jaxcnn.squared_error)
    expected = by_vmap(net, jaxcnn.squared_error)(params, x, target)
    assert_close(jax.tree.leaves(result), jax.tree.leaves(expected), 1e-10)


def test_parameters_that_no_layer_reads():
    net, params, x, y = given("one layer")
    result = per_example_gradients(net, cross_entropy, {**params, "old": {"weight": np.ones((2, 3))}}, x, y)
    np.testing.assert_array_equal(result["old"]["weight"], np.zeros((5, 2, 3)))


@pytest.mark.slow("compiles every function")
def test_no_examples_and_no_parameters():
    net, params, x, y = given("conv")
    assert {g.shape[0] for g in jax.tree.leaves(per_example_gradients(net, cross_entropy, params, x[:0], y[:0]))} == {0}
    assert per_example_norms(net, cross_entropy, params, x[:0], y[:0]).shape == (0,)
    assert per_example_gradients(serial(Tanh()), cross_entropy, {}, x[:, 0, 0], y % 2) == {}
    np.testing.assert_array_equal(per_example_norms(serial(Tanh()), cross_entropy, {}, x[:, 0, 0], y % 2), 0)


def test_a_gradient_of_zero_is_not_clipped_to_nan():
    net, params, x, _ = given("one layer")
    target = net.apply(params, x)
    clipped = run(clipped_gradient, net, params, x, target, 1.0, loss=jaxcnn.squared_error)
    for g in jax.tree.leaves(clipped):
        np.testing.assert_array_equal(g, 0)


@pytest.mark.slow("compiles whole nets for two devices")
@pytest.mark.parametrize("axis_type", SPLIT_BY, ids=str)
def test_a_split_batch(axis_type):
    net, params, x, y = given("residual, nested", batch=4)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    args = jax.device_put(params, whole), jax.device_put(x, rows), jax.device_put(y, rows)
    for f, rest in ((per_example_gradients, ()), (per_example_norms, ()), (clipped_gradient, (0.5,))):
        result, expected = run(f, net, *args, *rest), run(f, net, params, x, y, *rest)
        assert_close(jax.tree.leaves(result), jax.tree.leaves(expected), 1e-10)
    assert len(run(per_example_norms, net, *args).sharding.device_set) == 2


@pytest.mark.slow("trains")
def test_private_aggregation():
    """Without noise, optax's private aggregation gives the mean of the clipped gradient; with noise, it differs."""
    net, params, x, y = given("residual, nested")
    gradients = run(per_example_gradients, net, params, x, y)
    limit = float(np.median(norms_of(gradients)))

    def aggregated(noise):
        private = optax.contrib.differentially_private_aggregate(limit, noise, key=0)
        updates, _ = private.update(gradients, private.init(params))
        return jax.tree.leaves(updates)

    result = [g / len(x) for g in jax.tree.leaves(run(clipped_gradient, net, params, x, y, limit))]
    assert_close(result, aggregated(0.0), 1e-10)
    assert np.abs(aggregated(1.0)[0] - result[0]).max() > 0.01


def test_no_convolution_with_a_group_for_each_example(monkeypatch):
    """Such convolutions make `vmap` of `grad` slow. No layer's forward pass is computed twice."""
    net, params, x, y = given("lecture", np.float32)
    # Forward passes are convolutions, whatever lowering costs least.
    monkeypatch.setattr(correlate, "choose_correlate", lambda *_: "xla")
    monkeypatch.setattr(onednn, "choose_native", lambda *_: None)
    jax.clear_caches()

    def text(f):
        return jax.jit(f).lower(params, x, y).compile().as_text()

    plain = text(jax.grad(lambda p, x, y: cross_entropy(net.apply(p, x), y).sum()))
    ours = text(lambda p, x, y: per_example_gradients(net, cross_entropy, p, x, y))
    assert "feature_group_count=5" in text(functools.partial(slow_with_autodiff, net))
    assert "group_count=5" not in ours
    assert 0 < ours.count(" convolution(") <= plain.count(" convolution(")
    jax.clear_caches()


def slow_with_autodiff(net, params, x, y):
    def one(params, x, y):
        return cross_entropy(net.apply(params, x[None], rules=rules.autodiff), y[None])[0]

    return jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y)


# ---------------------------------------------------------------------------------------------------------------------
# The two ways to compute a norm

GEOMETRIES = {
    # name: (spatial, size, input channels, output channels, options)
    "2-D": ((7, 6), (3, 2), 4, 5, {}),
    "options": ((9, 8), (3, 2), 4, 6, {"stride": (2, 1), "padding": ((2, 0), (1, 3)), "dilation": (1, 2)}),
    "groups": ((6, 7), (2, 3), 4, 6, {"groups": 2, "padding": "SAME"}),
    "depthwise": ((6, 7), (2, 3), 3, 6, {"groups": 3}),
    "a remainder": ((8, 9), (2, 2), 2, 3, {"stride": 3}),
    "1-D": ((9,), (4,), 2, 3, {"stride": 2}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_ghost_norms_are_norms(name):
    spatial, size, inputs, outputs, options = GEOMETRIES[name]
    groups = options.get("groups", 1)
    placed = {k: v for k, v in options.items() if k != "groups"}
    c = Correlation(window("conv", spatial, size, **placed), groups, np.dtype(np.float64))
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3, *spatial, inputs)), rng.standard_normal((3, *c.window.out, outputs))
    w = rng.standard_normal((*size, inputs // groups, outputs))

    @compiled
    def one(x, y, w):
        return jax.vjp(lambda w: jaxcnn.conv(x, w, rule=rules.autodiff, **options), w)[1](y)[0]

    each = [one(x[n : n + 1], y[n : n + 1], w) for n in range(3)]
    for kernel_grad_each in (kernels.kernel_grad_each, kernels.by_patches, kernels.one_by_one):
        w = compiled(functools.partial(kernel_grad_each, c))(x, y)
        np.testing.assert_allclose(w, np.stack(each), rtol=1e-10, atol=1e-12)
    expected = [np.square(w).sum() for w in each]
    terms = compiled(functools.partial(kernels.ghost_terms, c))(x, y)
    np.testing.assert_allclose(np.sum(terms, (1, 2, 3)), expected, rtol=1e-10)
    np.testing.assert_allclose(compiled(functools.partial(kernels.kernel_grad_squares, c))(x, y), expected, rtol=1e-10)


@pytest.mark.slow("compiles whole nets")
@pytest.mark.parametrize("layers", [(Conv(64, 3, bias=False),), (Dense(256, bias=False),)], ids=["conv", "dense"])
def test_norms_whose_ghosts_cancel(layers):
    """Norms stay accurate in float32 for inputs with a large mean and δ that sum to almost zero.

    Clipping depends on this accuracy.
    """
    net, rng = serial(*layers), np.random.default_rng(0)
    shape = (8, 8, 64) if isinstance(layers[0], Conv) else (8, 256)
    params = jax.tree.map(np.zeros_like, net.init(jax.random.key(0), shape))
    x = (1000 + 0.1 * rng.standard_normal((6, *shape))).astype(np.float32)
    y = rng.standard_normal(net.apply(params, x).shape).astype(np.float32)
    y -= y.mean(tuple(range(1, y.ndim - 1)), keepdims=True)

    def loss(z, y):
        return (z * y).sum(tuple(range(1, z.ndim)))

    each = compiled(functools.partial(per_example_gradients, net, loss))(params, x, y)
    norms = compiled(functools.partial(per_example_norms, net, loss))(params, x, y)
    np.testing.assert_allclose(norms, norms_of(each), rtol=1e-5)
    for n in range(len(x)):
        clipped = clipped_gradient(net, loss, params, x[n : n + 1], y[n : n + 1], 1.0)
        assert np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(clipped))) < 1 + 1e-4


@pytest.mark.parametrize(("places", "inputs", "outputs"), [(1, 5, 4), (2, 9, 8), (40, 3, 2)])
def test_norms_of_rows(places, inputs, outputs):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3, places, inputs)), rng.standard_normal((3, places, outputs))
    each = np.stack([a.T @ b for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(kernels.outer_each(x, y), each, rtol=1e-12)
    np.testing.assert_allclose(kernels.outer_squares(x, y), np.square(each).sum((1, 2)), rtol=1e-12)


def test_the_cheaper_way_is_taken():
    """The lecture's first layer has many positions and a small kernel, its second few positions and a large one."""
    first, second = (
        Correlation(window("conv", spatial, (5, 5)), 1, np.dtype(np.float32)) for spatial in ((28, 28), (12, 12))
    )
    assert not kernels.ghost_is_cheaper(first, 1, 32)
    assert kernels.ghost_is_cheaper(second, 32, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Unsupported cases


@pytest.mark.parametrize("f", [per_example_gradients, per_example_norms, clipped_gradient], ids=lambda f: f.__name__)
def test_batch_norm_that_mixes_examples(f):
    net, params, x, y = given("batch norm, calibrated")
    rest = (1.0,) if f is clipped_gradient else ()
    uncalibrated = {**params, "batch_norm1": {k: params["batch_norm1"][k] for k in ("scale", "bias")}}
    message = f"{f.__name__}: batch_norm1 must be used without a key and with statistics from jaxcnn.calibrate, got"
    for given_params, key in ((uncalibrated, None), (params, jax.random.key(0))):
        with pytest.raises(ValueError, match=message):
            f(net, cross_entropy, given_params, x, y, *rest, key=key)


def test_a_loss_without_a_value_for_each_example():
    net, params, x, y = given("one layer")
    with pytest.raises(
        ValueError, match=r"the result of loss must be \(5, …\), a loss for each example, got shape \(\)"
    ):
        per_example_norms(net, lambda z, y: cross_entropy(z, y).mean(), params, x, y)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_invalid_max_norm(limit):
    net, params, x, y = given("one layer")
    with pytest.raises(ValueError, match="clipped_gradient: max_norm must be a number > 0, got"):
        clipped_gradient(net, cross_entropy, params, x, y, limit)


class Scaled(Dense):
    """A user-defined subclass of `Dense` that behaves differently."""

    def apply(self, params, x, *, key=None, rule=None):
        return 3 * super().apply(params, x, key=key, rule=rule)


def test_a_custom_layer():
    net = serial(Scaled(4), Tanh(), Dense(3))
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda: net.init(jax.random.key(0), (5,)))
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape), empty)
    x, y = rng.standard_normal((4, 5)), np.array([0, 1, 2, 0])
    result = run(per_example_gradients, net, params, x, y)
    assert_close(jax.tree.leaves(result), jax.tree.leaves(by_vmap(net)(params, x, y)), 1e-10)
    key = jax.random.key(0)
    expected = by_vmap_with_keys(net, key)(params, x, y, np.arange(4))
    result = run(per_example_gradients, net, params, x, y, key=key)
    assert_close(jax.tree.leaves(result), jax.tree.leaves(expected), 1e-10)
