"""Nets of Flax linen, Flax nnx, Equinox, Haiku and Keras."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcnn
from tests.tracing.agreement import assert_same, random


def names(fun, *args):
    return [(row.name, row.op) for row in jaxcnn.operations(fun)(*args).rows]


def in_float64(tree):
    return jax.tree.map(lambda a: random(*a.shape, seed=a.size) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_linen():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(4, (3, 3), feature_group_count=2, param_dtype=jnp.float64)(x)
            y = nn.relu(nn.GroupNorm(2, param_dtype=jnp.float64)(y))
            return nn.relu(x + nn.Conv(4, (3, 3), param_dtype=jnp.float64)(y))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Block()(nn.Conv(4, (3, 3), strides=2, param_dtype=jnp.float64)(x))
            x = nn.avg_pool(nn.max_pool(x, (2, 2), (1, 1)), (2, 2), (1, 1), "SAME", count_include_pad=False)
            return nn.Dense(3, param_dtype=jnp.float64)(x.mean((1, 2)))

    net, x = Net(), random(2, 8, 8, 3)
    params = in_float64(jax.eval_shape(net.init, jax.random.key(0), x))
    assert names(net.apply, params, x) == [
        ("Net/Conv_0", "conv"), ("Net/Block_0/Conv_0", "conv"), ("Net/Block_0/relu1", "relu"),
        ("Net/Block_0/Conv_1", "conv"), ("Net/Block_0/add1", "add"), ("Net/Block_0/relu2", "relu"),
        ("Net/max_pool1", "max_pool"), ("Net/avg_pool1", "avg_pool"), ("Net/global_avg_pool1", "global_avg_pool"),
        ("Net/Dense_0", "dense"),
    ]  # fmt: skip
    assert_same(net.apply, params, x, rtol=1e-10)
    result = jaxcnn.value_grad_and_deltas(jaxcnn.explicit(lambda p, x: net.apply(p, x).sum()))(params, x)
    assert result.deltas["Net/Block_0/Conv_1"].shape == (2, 4, 4, 4)


def test_linen_modules_that_take_the_convolution():
    nn = pytest.importorskip("flax.linen")
    options = {"feature_group_count": 2, "param_dtype": jnp.float64}
    own = nn.Conv(4, (3, 3), **options, conv_general_dilated=jaxcnn.lax.conv_general_dilated)
    stock, x = nn.Conv(4, (3, 3), **options), random(2, 5, 6, 4)
    params = in_float64(jax.eval_shape(stock.init, jax.random.key(0), x))

    def gradient(net):
        return jax.grad(lambda params: (net.apply(params, x) ** 2).sum())(params)

    for a, b in zip(*(jax.tree.leaves(gradient(net)) for net in (own, stock)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)
    text = str(jax.make_jaxpr(lambda p: own.apply(p, x))(params))
    assert "custom_vjp_call" in text
    jaxcnn.value_grad_and_deltas(lambda p: own.apply(p, own.apply(p, x)).sum())(params)  # it taps nothing
    assert names(own.apply, params, x) == [("Conv", "conv")]


def test_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 6, (3, 3), feature_group_count=3, param_dtype=jnp.float64, rngs=rngs)
            self.norm = nnx.BatchNorm(6, param_dtype=jnp.float64, rngs=rngs)
            self.dense = nnx.Linear(6, 2, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x):
            return self.dense(nnx.gelu(self.norm(self.conv(x))).mean((1, 2)))

    graph, *states = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    params, rest = map(in_float64, states)

    def fun(params, rest, x):
        net = nnx.merge(graph, params, rest)
        y = net(x)
        return y, jax.tree.leaves(nnx.state(net, nnx.BatchStat))

    x = random(2, 5, 5, 3)
    assert names(fun, params, rest, x) == [
        ("depthwise_conv1", "depthwise_conv"), ("gelu1", "gelu"), ("global_avg_pool1", "global_avg_pool"),
        ("dense1", "dense"),
    ]  # fmt: skip
    assert_same(fun, params, rest, x, rtol=1e-9)


def test_nnx_modules_that_take_the_convolution():
    nnx = pytest.importorskip("flax.nnx")
    options = {"feature_group_count": 2, "strides": 2, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    own = nnx.Conv(4, 4, (3, 3), **options, conv_general_dilated=jaxcnn.lax.conv_general_dilated)
    graph, params = nnx.split(own)
    stock, _ = nnx.split(nnx.Conv(4, 4, (3, 3), **options))
    params, x = in_float64(params), random(2, 5, 6, 4)

    def gradient(graph):
        return jax.grad(lambda params: (nnx.merge(graph, params)(x) ** 2).sum())(params)

    for a, b in zip(*(jax.tree.leaves(gradient(each)) for each in (graph, stock)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)
    assert "custom_vjp_call" in str(jax.make_jaxpr(lambda params: nnx.merge(graph, params)(x))(params))
    assert names(lambda params, x: nnx.merge(graph, params)(x), params, x) == [("conv1", "conv")]


def test_equinox():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 2)
    net = eqx.nn.Sequential([
        eqx.nn.Conv2d(4, 4, 3, groups=2, dtype=jnp.float64, key=keys[0]), eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.MaxPool2d(2, 2), eqx.nn.AvgPool2d(2, 1), eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(16, 3, dtype=jnp.float64, key=keys[1]),
    ])  # fmt: skip
    params, static = eqx.partition(net, eqx.is_array)

    def fun(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    x = random(2, 4, 8, 8)
    assert [op for _, op in names(fun, params, x)] == ["conv", "relu", "max_pool", "avg_pool", "dense"]
    assert len(jaxcnn.operations(fun)(params, x).rows[-1].input_shapes) == 3
    assert_same(fun, params, x, rtol=1e-11)
    np.testing.assert_allclose(jaxcnn.explicit(lambda net, x: jax.vmap(net)(x))(net, x), fun(params, x), rtol=1e-11)


def test_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = hk.Conv2D(4, 3, stride=2, name="first")(x)
        return hk.Linear(2)(hk.avg_pool(jax.nn.relu(x), (2, 2, 1), (2, 2, 1), "SAME").mean((1, 2)))

    net, x = hk.without_apply_rng(hk.transform(forward)), random(2, 8, 8, 3)
    params = in_float64(net.init(jax.random.key(0), x))
    assert names(net.apply, params, x) == [
        ("first", "conv"), ("relu1", "relu"), ("avg_pool1", "avg_pool"), ("global_avg_pool1", "global_avg_pool"),
        ("linear", "dense"),
    ]  # fmt: skip
    assert_same(net.apply, params, x, rtol=1e-11)


@pytest.mark.slow("imports Keras, and compiles its net in training mode")
def test_keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras was imported with another backend")
    layers, before = keras.layers, keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        inner = [
            keras.Input((8, 8, 3), name="x"), layers.Conv2D(4, 3, strides=2, padding="same", name="conv"),
            layers.BatchNormalization(name="norm"), layers.ReLU(name="relu"), layers.DepthwiseConv2D(3, name="depth"),
            layers.MaxPooling2D(2, 1, name="max"), layers.GlobalAveragePooling2D(name="mean"),
            layers.Dense(3, name="dense"),
        ]  # fmt: skip
    finally:
        keras.config.set_floatx(before)
    with jax.legacy_prng_key("allow"):  # Keras draws weights with them
        net = keras.Sequential(inner, name="net")
    params = [v.value for v in net.trainable_variables]
    state = [v.value for v in net.non_trainable_variables]

    def fun(training, params, state, x):
        return net.stateless_call(params, state, x, training=training)

    x = random(2, 8, 8, 3)
    for training in (False, True):
        run = functools.partial(fun, training)
        ops = [op for _, op in names(run, params, state, x) if op != "add"]  # additions of statistics in the norm
        assert ops == ["conv", "relu", "depthwise_conv", "max_pool", "global_avg_pool", "dense"]
        assert_same(run, params, state, x, rtol=1e-6, atol=1e-6)  # Keras computes the norm in float32
