"""Nets: names, parameters, counts in the summary, and the assignment of rules to layers."""

import copy
import dataclasses
import functools
import inspect
import multiprocessing
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxcnn
from jaxcnn import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DepthwiseConv,
    Dropout,
    Elu,
    Flatten,
    Gelu,
    GlobalAvgPool,
    GlobalMaxPool,
    HiddenLayer,
    LayerNorm,
    LeakyRelu,
    LpPool,
    MaxPool,
    Relu,
    Sigmoid,
    Silu,
    Softplus,
    Tanh,
    residual,
    serial,
)
from jaxcnn.layers import OpLayer, glorot_uniform, he_normal, he_normal_transposed
from tests.compare_torch import net_in_torch, numbers, pulled, random_delta, tensors
from tests.compilation import with_optimizations

LECTURE = serial(
    Conv(32, 5), Relu(), MaxPool(2), Conv(64, 5), Relu(), MaxPool(2), Flatten(), Dropout(0.5), Dense(10)
)  # fmt: skip


def key(seed=0):
    return jax.random.key(seed)


def images(*shape, dtype=np.float64):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def parameters(net, shape, dtype=np.float32):
    """Return random parameters, including biases, without compiling a random generator."""
    rng = np.random.default_rng(1)
    empty = jax.eval_shape(lambda: net.init(key(), shape))
    return jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(dtype), empty)


def shapes(params):
    return jax.tree.map(np.shape, params, is_leaf=lambda a: hasattr(a, "shape"))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def test_parameters_by_name_and_shape():
    assert shapes(jax.eval_shape(lambda: LECTURE.init(key(), (28, 28, 1)))) == {
        "conv1": {"weight": (5, 5, 1, 32), "bias": (32,)},
        "conv2": {"weight": (5, 5, 32, 64), "bias": (64,)},
        "dense1": {"weight": (4 * 4 * 64, 10), "bias": (10,)},
    }


LAYERS = {
    # name: (layer, input shape, parameter shapes, output shape)
    "conv 1-D": (Conv(4, 3), (8, 2), {"weight": (3, 2, 4), "bias": (4,)}, (6, 4)),
    "conv 3-D": (Conv(4, (2, 3, 1)), (5, 5, 5, 2), {"weight": (2, 3, 1, 2, 4), "bias": (4,)}, (4, 3, 5, 4)),
    "conv, groups": (Conv(6, 3, groups=2), (8, 8, 4), {"weight": (3, 3, 2, 6), "bias": (6,)}, (6, 6, 6)),
    "conv, no bias": (Conv(4, 3, bias=False), (8, 8, 2), {"weight": (3, 3, 2, 4)}, (6, 6, 4)),
    "conv, every option": (
        Conv(4, 3, stride=2, padding=((1, 0), (2, 1)), dilation=2), (8, 9, 2),
        {"weight": (3, 3, 2, 4), "bias": (4,)}, (3, 4, 4),
    ),
    "hidden layer": (HiddenLayer(4, 3), (8, 8, 2), {"weight": (3, 3, 2, 4), "bias": (4,)}, (3, 3, 4)),
    "hidden layer, options": (
        HiddenLayer(4, 3, window=3, pool_stride=2, stride=1, padding="SAME"), (9, 8, 2),
        {"weight": (3, 3, 2, 4), "bias": (4,)}, (4, 3, 4),
    ),
    "dense": (Dense(3), (5,), {"weight": (5, 3), "bias": (3,)}, (3,)),
    "dense, no bias": (Dense(3, bias=False), (5,), {"weight": (5, 3)}, (3,)),
    "dense on pixels": (Dense(3), (4, 4, 5), {"weight": (5, 3), "bias": (3,)}, (4, 4, 3)),
    "max_pool": (MaxPool(2, stride=1, padding="SAME"), (5, 5, 2), {}, (5, 5, 2)),
    "avg_pool": (AvgPool((2, 1)), (5, 5, 2), {}, (2, 5, 2)),
    "flatten": (Flatten(), (5, 4, 2), {}, (40,)),
    "dropout": (Dropout(0.5), (5, 4), {}, (5, 4)),
    "relu": (Relu(), (5, 4), {}, (5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer, shape, expected, out = LAYERS[name]
    params = parameters(layer, shape)
    assert shapes(params) == expected
    x = images(2, *shape, dtype=np.float32)
    assert jax.eval_shape(layer.apply, params, x).shape == (2, *out)
    (row,) = serial(layer).summary(shape).rows
    assert (row.output_shape, row.parameters) == (out, sum(np.prod(s, dtype=int) for s in expected.values()))


def test_the_same_key_makes_the_same_parameters():
    net = serial(Conv(2, 3), HiddenLayer(2, 3), Flatten(), Dense(3))
    params = net.init(key(), (8, 8, 2))
    chex.assert_trees_all_equal(params, net.init(key(), (8, 8, 2)))
    other = net.init(key(1), (8, 8, 2))
    assert all(np.any(params[name]["weight"] != other[name]["weight"]) for name in params)


def test_layers_of_one_shape_have_different_initial_parameters():
    params = serial(Conv(2, 3, padding="SAME"), residual(Conv(2, 3, padding="SAME"))).init(key(), (8, 8, 2))
    assert np.any(params["conv1"]["weight"] != params["residual1"]["conv1"]["weight"])


def test_another_layer_at_the_end_leaves_the_others_unchanged():
    shorter = serial(Conv(2, 3), Relu()).init(key(), (8, 8, 2))
    longer = serial(Conv(2, 3), Relu(), Conv(2, 3)).init(key(), (8, 8, 2))
    chex.assert_trees_all_equal(shorter["conv1"], longer["conv1"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_parameters_in_other_dtypes(dtype):
    net = serial(HiddenLayer(2, 3), Flatten(), Dense(3))
    params = net.init(key(), (8, 8, 1), dtype)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert jax.eval_shape(net.apply, params, jnp.ones((2, 8, 8, 1), dtype)).dtype == dtype


def test_initial_weights_preserve_the_scale_of_activations():
    """Weights follow He et al. 2015 before a ReLU and Glorot & Bengio 2010 elsewhere; biases are zero."""
    params = serial(Conv(64, 5), Flatten(), Dense(200)).init(key(), (12, 12, 16))
    fan_in, fan_out = 8 * 8 * 64, 200
    assert np.std(params["conv1"]["weight"]) == pytest.approx(np.sqrt(2 / (5 * 5 * 16)), rel=0.03)
    assert np.std(params["dense1"]["weight"]) == pytest.approx(np.sqrt(2 / (fan_in + fan_out)), rel=0.03)
    assert not any(np.any(layer["bias"]) for layer in params.values())


@pytest.mark.parametrize(
    ("default", "initializer"),
    [(he_normal, "he_normal"), (he_normal_transposed, "he_normal"), (glorot_uniform, "glorot_uniform")],
)
def test_default_initializers_are_those_of_jax_bit_for_bit(default, initializer):
    """They are compiled with other options than the rest; inside of another program they belong to it."""
    axes = {"in_axis": -1, "out_axis": -2} if default is he_normal_transposed else {}
    key, shape = jax.random.key(3), (2, 3, 2)
    with with_optimizations():
        expected = getattr(jax.nn.initializers, initializer)(**axes)(key, shape, "float32")
        chex.assert_trees_all_equal(default(key, shape), expected, strict=True)
        chex.assert_trees_all_equal(jax.jit(lambda: default(key, shape))(), expected, strict=True)
        vmapped = jax.vmap(lambda key: default(key, shape))(key[None])
    chex.assert_trees_all_equal(vmapped[0], expected, strict=True)


def test_other_initializers():
    layers = (Conv, HiddenLayer, Dense)
    for layer, patch in zip(layers, [(3,), (3,), ()], strict=True):
        made = layer(2, *patch, init_weight=jax.nn.initializers.ones, init_bias=jax.nn.initializers.constant(3))
        params = made.init(key(), (8, 8, 2))
        assert np.all(params["weight"] == 1)
        assert np.all(params["bias"] == 3)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_names():
    net = serial(
        Conv(2, 3, padding="SAME"), LeakyRelu(), Conv(2, 3, padding="SAME", name="second"), MaxPool(2), LeakyRelu(),
        residual(Conv(2, 1), serial(Relu(), name="inner"), Relu()), serial(Flatten(), Dense(3)),
    )  # fmt: skip
    assert [name for name, _ in net.walk()] == [
        "conv1", "leaky_relu1", "second", "max_pool1", "leaky_relu2",
        "residual1", "residual1/conv1", "residual1/inner", "residual1/inner/relu1", "residual1/relu1",
        "serial1", "serial1/flatten1", "serial1/dense1",
    ]  # fmt: skip
    params = parameters(net, (8, 8, 2))
    assert shapes(params) == {
        "conv1": {"weight": (3, 3, 2, 2), "bias": (2,)},
        "second": {"weight": (3, 3, 2, 2), "bias": (2,)},
        "residual1": {"conv1": {"weight": (1, 1, 2, 2), "bias": (2,)}},
        "serial1": {"dense1": {"weight": (32, 3), "bias": (3,)}},
    }


class Scale(jaxcnn.Layer):
    """A user-defined layer with one scalar parameter."""

    def init(self, key, shape, dtype=jnp.float32):
        return {"by": jnp.full((), 2, dtype)}

    def apply(self, params, x, *, key=None, rule=None):
        return x * params["by"]


def test_a_custom_layer():
    net = serial(Scale(), Relu(), Scale(name="again"))
    params = net.init(key(), (3,))
    np.testing.assert_array_equal(net.apply(params, np.array([[-1, 0, 2]], np.float32)), [[0, 0, 8]])
    assert set(params) == {"scale1", "again"}
    assert net.summary((3,)).parameters == 2


def test_a_residual_adds_its_input():
    layers = Conv(3, 3, padding="SAME"), Tanh()
    plain, added = serial(*layers), residual(*layers)
    params, x = parameters(plain, (6, 6, 3), np.float64), images(2, 6, 6, 3)
    delta = random_delta(x)
    y, (grads, delta_x) = pulled(plain.apply, (params, x), delta)
    expected = x + y, (grads, delta_x + delta)
    chex.assert_trees_all_close(pulled(added.apply, (params, x), delta), expected, rtol=1e-10, atol=1e-12)


def test_a_net_without_layers_is_the_identity():
    net = serial()
    x = images(2, 3)
    assert net.init(key(), (3,)) == {}
    np.testing.assert_array_equal(net.apply({}, x), x)
    assert (net.summary((3,)).parameters, net.summary((3,)).flops) == (0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and training


def test_a_key_means_training():
    net = serial(Dropout(0.5), serial(Dropout(0.5)))
    x = np.ones((50, 40), np.float32)
    np.testing.assert_array_equal(net.apply({}, x), x)
    y = np.asarray(net.apply({}, x, key=key()))
    assert set(np.unique(y)) == {0, 4}
    # Two masks with different keys: a quarter of the elements pass both. The same mask twice would pass half.
    assert np.mean(y == 4) == pytest.approx(0.25, abs=0.05)
    np.testing.assert_array_equal(net.apply({}, x, key=key()), y)
    assert np.any(np.asarray(net.apply({}, x, key=key(1))) != y)


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def test_summary_of_the_lecture_net_by_hand():
    summary = LECTURE.summary((28, 28, 1))
    per_output = {"conv1": 25 + 24 + 1, "conv2": 25 * 32 + (25 * 32 - 1) + 1, "dense1": 1024 + 1023 + 1}
    assert [(row.name, row.op, row.output_shape, row.parameters, row.flops) for row in summary.rows] == [
        ("conv1", "Conv", (24, 24, 32), 25 * 32 + 32, 24 * 24 * 32 * per_output["conv1"]),
        ("relu1", "Relu", (24, 24, 32), 0, 24 * 24 * 32),
        ("max_pool1", "MaxPool", (12, 12, 32), 0, 12 * 12 * 32 * 3),
        ("conv2", "Conv", (8, 8, 64), 25 * 32 * 64 + 64, 8 * 8 * 64 * per_output["conv2"]),
        ("relu2", "Relu", (8, 8, 64), 0, 8 * 8 * 64),
        ("max_pool2", "MaxPool", (4, 4, 64), 0, 4 * 4 * 64 * 3),
        ("flatten1", "Flatten", (1024,), 0, 0),
        ("dropout1", "Dropout", (1024,), 0, 0),
        ("dense1", "Dense", (10,), 1024 * 10 + 10, 10 * per_output["dense1"]),
    ]
    assert (summary.parameters, summary.flops) == (62_346, 7_535_104)
    params = jax.eval_shape(lambda: LECTURE.init(key(), (28, 28, 1)))
    assert sum(a.size for a in jax.tree.leaves(params)) == summary.parameters


FLOPS = {
    # name: (layers, shape, FLOPs by hand)
    "conv without bias": ((Conv(4, 3, bias=False),), (8, 8, 2), 6 * 6 * 4 * (18 + 17)),
    "groups": ((Conv(4, 3, groups=2),), (8, 8, 2), 6 * 6 * 4 * (9 + 8 + 1)),
    "dense without bias": ((Dense(4, bias=False),), (7,), 4 * (7 + 6)),
    "average": ((AvgPool(2),), (8, 8, 2), 4 * 4 * 2 * (3 + 1)),
    "activations": ((Gelu(), Silu()), (8, 8, 2), 2 * 8 * 8 * 2),
    "hidden layer: its three": (
        (HiddenLayer(4, 3, window=3),), (8, 8, 2), 6 * 6 * 4 * (18 + 17 + 1 + 1) + 2 * 2 * 4 * 8,
    ),
    "a net in a net": ((serial(Dense(4)),), (7,), 4 * (7 + 6 + 1)),
    "residual: and the sum": ((residual(Dense(7)),), (7,), 7 * (7 + 6 + 1) + 7),
    "depthwise": ((DepthwiseConv(3, 2),), (5, 5, 2), 3 * 3 * 4 * (9 + 8 + 1)),
    "transposed": ((ConvTranspose(4, 3),), (5, 5, 2), 5 * 5 * 2 * 9 * 4 * 2 + 7 * 7 * 4),
    "normalized by given statistics": ((BatchNorm(),), (4, 4, 3), 48 * 4),
    "normalized by its own": ((LayerNorm(),), (4, 4, 3), 48 * 7),
    "root of a sum of powers": ((LpPool(2),), (4, 4, 3), 2 * 2 * 3 * (4 + 3 + 1)),
    "largest of all": ((GlobalMaxPool(),), (4, 4, 3), 15 * 3),
    "mean of all": ((GlobalAvgPool(),), (4, 4, 3), 16 * 3),
    "largest of overlapping bins": ((AdaptiveMaxPool(3),), (4, 4, 3), 3 * 3 * 3 * (4 - 1)),
    "mean of overlapping bins": ((AdaptiveAvgPool(3),), (4, 4, 3), 3 * 3 * 3 * 4),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOPS)
def test_flops_by_hand(name):
    layers, shape, expected = FLOPS[name]
    assert serial(*layers).summary(shape).flops == expected


def test_summary_as_a_table():
    net = serial(Conv(8, 3), serial(Relu(), Flatten(), name="inner"), Dense(100))
    assert str(net.summary((10, 10, 3))).splitlines() == [
        "layer           op       output   parameters    FLOPs",
        "input                    10×10×3",
        "conv1           Conv     8×8×8           224   27,648",
        "inner/relu1     Relu     8×8×8             0      512",
        "inner/flatten1  Flatten  512               0        0",
        "dense1          Dense    100          51,300  102,400",
        "total                                 51,524  130,560",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Static arguments


def test_nets_are_values():
    def net(of=tuple):
        return serial(
            Conv(4, of([3, 3]), stride=of([1, 2]), padding=of([of([1, 1]), of([0, 1])])),
            HiddenLayer(4, of([2, 2]), of([2, 1])), MaxPool(of([2, 1])), AvgPool(of([1, 1]), padding=of([0, 0])),
        )  # fmt: skip

    assert net(list) == net(tuple) == net(np.array)
    assert len({net(list), net(tuple), net(np.array)}) == 1
    assert net() != serial(*(layer for _, layer in net().layers[:-1]))

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def apply(net, params, x):
        return net.apply(params, x)

    x = images(2, 12, 12, 1, dtype=np.float32)
    params = parameters(net(), x.shape[1:])
    np.testing.assert_array_equal(apply(net(list), params, x), apply(net(np.array), params, x))


# ---------------------------------------------------------------------------------------------------------------------
# Rules

STACK = serial(Conv(2, 3, padding="SAME"), residual(Conv(2, 3, padding="SAME"), Tanh()), Conv(2, 3))


def times(factor):
    def rule(call, delta):
        return tuple(factor * c for c in call.exact(delta))

    return rule


def gradients(rules):
    """Return the gradients of every convolution for a random δ."""
    params, x = parameters(STACK, (8, 8, 2), np.float64), images(2, 8, 8, 2)
    delta = random_delta(jax.eval_shape(STACK.apply, params, x))
    _, (grads,) = pulled(lambda params: STACK.apply(params, x, rules=rules), (params,), delta)
    return {"conv1": grads["conv1"], "residual1/conv1": grads["residual1"]["conv1"], "conv2": grads["conv2"]}


@pytest.fixture(scope="module")
def exact(strict):
    return gradients(None)


def named_like_a_convolution(name, layer):
    return name.endswith("conv1")


WHICH = {
    # rules: the factors of layers' gradients. conv1 has no single factor where its δ arrives by two paths.
    "none": (None, {"conv2": 1, "residual1/conv1": 1, "conv1": 1}),
    "name": ({"conv2": times(3)}, {"conv2": 3, "residual1/conv1": 3, "conv1": 3}),
    "name of the first": ({"conv1": times(3)}, {"conv2": 1, "residual1/conv1": 1, "conv1": 3}),
    "name inside": ({"residual1/conv1": times(3)}, {"conv2": 1, "residual1/conv1": 3}),
    "type": ({Tanh: times(3)}, {"conv2": 1, "residual1/conv1": 3}),
    "base class": ({jaxcnn.Layer: times(2)}, {"conv2": 2, "residual1/conv1": 8}),
    "predicate": ({named_like_a_convolution: times(3)}, {"conv2": 1, "residual1/conv1": 3}),
    "first match wins: name": ({"conv2": times(3), Conv: times(2)}, {"conv2": 3, "residual1/conv1": 6}),
    "first match wins: type": ({Conv: times(2), "conv2": times(3)}, {"conv2": 2, "residual1/conv1": 4}),
    "None is the exact rule": ({"residual1/conv1": None, Conv: times(2)}, {"conv2": 2, "residual1/conv1": 2}),
    "autodiff for all": (jaxcnn.rules.autodiff, {"conv2": 1, "residual1/conv1": 1, "conv1": 1}),
    "one for all": (times(2), {"conv2": 2, "residual1/conv1": 8}),
    "name of a net inside: all of its layers": ({"residual1": times(3)}, {"conv2": 1, "residual1/conv1": 9}),
}


@pytest.mark.parametrize("name", WHICH)
def test_which_layer_takes_which_rule(name, exact):
    rules, factors = WHICH[name]
    result = gradients(rules)
    for layer, factor in factors.items():
        expected = jax.tree.map(lambda a, factor=factor: factor * a, exact[layer])
        chex.assert_trees_all_close(result[layer], expected, rtol=1e-9, atol=1e-12)


EVERY_LAYER = serial(
    jaxcnn.DepthwiseConv(3, 2, padding="SAME"), jaxcnn.Selu(),
    jaxcnn.ConvTranspose(6, 2, stride=2, output_padding=1, groups=2), jaxcnn.Celu(0.8), jaxcnn.Mish(),
    jaxcnn.LpPool(2, ceil_mode=True), jaxcnn.Relu6(), jaxcnn.HardTanh(), jaxcnn.HardSigmoid(), jaxcnn.HardSwish(),
    Conv(6, 3, padding="SAME", groups=2), LeakyRelu(0.2), residual(Conv(6, 3, padding="SAME"), Silu(), name="skip"),
    jaxcnn.GroupNorm(3), MaxPool(3, stride=2, padding=1), jaxcnn.BatchNorm(), Elu(0.7),
    HiddenLayer(8, 3, padding="SAME"), AvgPool(2, stride=1, padding=1), jaxcnn.LayerNorm(), Gelu(),
    Conv(4, (1, 2), stride=(2, 1), dilation=(1, 2), bias=False), Softplus(), Relu(),
    jaxcnn.AdaptiveMaxPool((3, 2)), jaxcnn.Softsign(), jaxcnn.AdaptiveAvgPool(2), jaxcnn.Squareplus(2.0),
    serial(residual(jaxcnn.LogSigmoid()), jaxcnn.GlobalAvgPool()), Flatten(), Dropout(0.5),
    serial(Dense(12), Sigmoid(), Dense(9, bias=False), Tanh()), Dense(5),
)  # fmt: skip


EVERY_KIND = sorted(
    (v for v in vars(jaxcnn).values() if isinstance(v, type) and issubclass(v, jaxcnn.Layer)), key=lambda v: v.__name__
)

#: A net allows one global pooling per input.
TO_MAXIMA = serial(Conv(3, 2), jaxcnn.GlobalMaxPool(), Dense(2))


def test_the_nets_above_have_every_layer():
    kinds = {type(layer) for net in (EVERY_LAYER, TO_MAXIMA) for _, layer in net.walk()}
    in_test_branches = {jaxcnn.Branches, jaxcnn.Function, jaxcnn.Parallel, jaxcnn.Siamese}
    assert set(EVERY_KIND) - {jaxcnn.Layer} == kinds | in_test_branches


@pytest.mark.parametrize("net", [EVERY_LAYER, TO_MAXIMA], ids=["every layer", "to maxima"])
def test_a_net_of_every_layer_against_pytorch(net):
    """With the same weights, values, ∂E/∂w of every parameter, and δ_x for a random δ agree."""
    x = images(3, 12, 13, 4)
    params = parameters(net, x.shape[1:], np.float64)
    delta = random_delta(jax.eval_shape(net.apply, params, x))
    y, result = pulled(net.apply, (params, x), delta)

    leaves, x_there = tensors(params), torch.tensor(x, requires_grad=True)
    y_there = net_in_torch(net, leaves, x_there)
    y_there.backward(torch.tensor(delta))
    np.testing.assert_allclose(y, y_there.detach(), rtol=1e-9)
    expected = jax.tree.map(lambda a: a.grad, leaves), x_there.grad
    chex.assert_trees_all_close(numbers(result), numbers(expected), rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Layers have every option of their op

#: Arrays, and options that a net decides: the layout always has the channels last.
NO_FIELDS = {"x", "w", "b", "scale", "bias", "mean", "var", "key", "rule", "dimension_numbers"}
KINDS_WITH_OP = [kind for kind in EVERY_KIND if issubclass(kind, OpLayer)]


def test_every_layer_with_an_op_applies_the_op_of_its_name():
    assert set(EVERY_KIND) - set(KINDS_WITH_OP) == {
        jaxcnn.Layer, jaxcnn.Serial, jaxcnn.Residual, jaxcnn.Branches, jaxcnn.Parallel, jaxcnn.Siamese, Flatten,
        jaxcnn.Function,
    }  # fmt: skip
    for kind in KINDS_WITH_OP:
        assert kind.op.__name__.replace("_", "") == kind.__name__.lower()


@pytest.mark.parametrize("kind", KINDS_WITH_OP, ids=lambda kind: kind.__name__)
def test_layers_take_every_option_of_their_op(kind):
    """Layers have each option with the op's default, and pass it on."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    options = {
        {"size": "output_size"}.get(name, name): parameter
        for name, parameter in inspect.signature(kind.op).parameters.items()
        if name not in NO_FIELDS or (kind, name) == (jaxcnn.Squareplus, "b")
    }
    assert set(options) <= set(fields)
    for name, parameter in options.items():
        if parameter.default is not parameter.empty:
            assert fields[name].default == parameter.default, name


#: A value other than the default for every option of a layer.
OPTIONS = {
    "stride": 2, "padding": 1, "dilation": 2, "groups": 2, "output_padding": 1, "window": 3, "pool_stride": 1,
    "pool_padding": 1, "ceil_mode": True, "count_include_pad": False, "divisor": 3.0, "p": 3.0, "output_size": 3,
    "negative_slope": 0.3, "alpha": 0.5, "approximate": True, "b": 2.0, "eps": 0.1, "axes": (1, 2), "rate": 0.3,
    "preferred_element_type": np.dtype(np.float32), "precision": "highest", "axis_name": "devices",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_WITH_OP, ids=lambda kind: kind.__name__)
def test_layers_pass_each_option_to_the_op(kind, monkeypatch):
    received = {}

    def op(*arrays, **options):
        received.update(inspect.signature(original).bind(*arrays, **options).arguments)
        return arrays[0]

    fields = [field for field in dataclasses.fields(kind) if field.name in OPTIONS]
    required = {"features": 4, "kernel_size": 3, "window": 2, "output_size": 2, "rate": 0.5}
    names = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    original = kind.op
    monkeypatch.setattr(kind, "op", staticmethod(op))
    for field in fields:
        layer = kind(**{name: required[name] for name in names} | {field.name: OPTIONS[field.name]})
        params = {"weight": 1, "bias": 2, "scale": 3}
        assert layer.apply(params, "x", key="key", rule="rule") == "x"
        name = "size" if field.name == "output_size" and "size" in received else field.name
        assert received[name] == OPTIONS[field.name]
        assert received["rule"] == "rule"


HANDED_ON = {
    "conv": Conv(2, 3, precision="highest", preferred_element_type=np.float32),
    "depthwise_conv": DepthwiseConv(3, precision="highest", preferred_element_type="float32"),
    "conv_transpose": ConvTranspose(2, 3, precision="highest", preferred_element_type=jnp.float32),
}


@pytest.mark.parametrize("op", HANDED_ON)
def test_options_of_convolutions_reach_the_op(op):
    layer, x = HANDED_ON[op], images(1, 6, 6, 2).astype(jnp.bfloat16)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), parameters(layer, (6, 6, 2)))
    traced = str(jax.make_jaxpr(layer.apply)(params, x))
    assert "HIGHEST" in traced
    assert jax.eval_shape(layer.apply, params, x).dtype == np.float32
    assert layer == dataclasses.replace(layer, preferred_element_type=np.dtype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Summaries of user-defined nets


class Projection(jaxcnn.Serial):
    """Two convolutions in parallel with a third, and additional parameters."""

    def init(self, key, shape, dtype=jnp.float32):
        (a, first), (b, second), (c, short) = self.layers
        inner = first.init(key, shape, dtype)
        middle = (*shape[:-1], first.features)
        made = {a: inner, b: second.init(key, middle, dtype), c: short.init(key, shape, dtype)}
        return {
            **made,
            "mix": {"down": {"weight": jnp.ones((3, 2), dtype)}, "up": {"weight": jnp.ones((2, 3), dtype)}},
        }

    def apply(self, params, x, *, key=None, rules=None):
        (a, first), (b, second), (c, short) = self.layers
        return second.apply(params[b], first.apply(params[a], x)) + short.apply(params[c], x)


class Nested(jaxcnn.Layer):
    """A layer with two levels of parameters."""

    def init(self, key, shape, dtype=jnp.float32):
        return {"down": {"weight": jnp.ones((shape[-1], 2), dtype)}, "up": {"weight": jnp.ones((2, shape[-1]), dtype)}}

    def apply(self, params, x, *, key=None, rule=None):
        return x @ params["down"]["weight"] @ params["up"]["weight"]


@pytest.mark.parametrize("at", ["inside", "alone"])
def test_a_summary_counts_the_layers_of_custom_nets(at):
    inner = Projection(
        (("first", Conv(4, 3, padding="SAME")), ("second", Conv(5, 1)), ("short", Conv(5, 1, bias=False)))
    )
    net = serial(Conv(3, 3), inner, Nested(), name="all") if at == "inside" else inner
    shape = (8, 8, 2)
    params = jax.eval_shape(lambda: net.init(key(), shape))
    summary = net.summary(shape)
    assert summary.parameters == sum(a.size for a in jax.tree.leaves(params))
    rows = {row.name.rpartition("/")[2]: row for row in summary.rows}
    size, channels = (36, 3) if at == "inside" else (64, 2)
    assert rows["first"].parameters == 9 * channels * 4 + 4
    assert rows["short"].flops == size * 5 * (2 * channels - 1)  # for the shape that it actually gets
    assert rows["projection1" if at == "inside" else "projection"].parameters == 12


# ---------------------------------------------------------------------------------------------------------------------
# Rules without a match

HIDDEN = serial(HiddenLayer(2, 3), Flatten(), Dense(2))
NOWHERE = {
    "type": ({jaxcnn.Gelu: times(2)}, "got 'Gelu'; the layers are Dense, Flatten, HiddenLayer"),
    "inside a hidden layer": ({Relu: jaxcnn.rules.guided_relu}, r"HiddenLayerRules\(relu=\.\.\.\)"),
    "convolution of one": ({Conv: jaxcnn.rules.FeedbackAlignment(1)}, r"HiddenLayerRules\(conv=\.\.\.\)"),
    "pooling of one": ({MaxPool: jaxcnn.rules.winner}, r"HiddenLayerRules\(pool=\.\.\.\)"),
    "predicate": ({lambda name, layer: name == "conv7": times(2)}, "got '<lambda>'"),
    "a net": ({jaxcnn.Serial: times(2)}, "A net takes rules by its name"),
    "no sums": ({jaxcnn.Residual: times(2)}, "got 'Residual'"),
    "next to one that matches": ({Dense: times(2), Relu: times(2)}, "got 'Relu'"),
    "a layer that takes none": ({Flatten: times(2)}, "'Flatten', which matches only Flatten"),
    "its name": ({"flatten1": times(2)}, "'flatten1', which matches only Flatten"),
    "of None": ({Relu: None}, "got 'Relu'"),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_rules_that_match_nothing_are_refused(name):
    rules, message = NOWHERE[name]
    params, x = parameters(HIDDEN, (6, 6, 1)), images(2, 6, 6, 1, dtype=np.float32)
    with pytest.raises(ValueError, match=f"rules: a key must be .* that matches a layer .*{message}"):
        jax.eval_shape(lambda: HIDDEN.apply(params, x, rules=rules))


def test_rules_that_a_custom_net_does_not_hand_on_are_refused():
    inner = Projection((("first", Conv(4, 1)), ("second", Conv(5, 1)), ("short", Conv(5, 1))))
    net = serial(inner, Flatten(), Dense(2))
    params, x = parameters(net, (3, 3, 2)), images(2, 3, 3, 2, dtype=np.float32)
    for rules in ({Conv: times(2)}, {"projection1/short": times(2)}, {Dense: times(2), Conv: times(2)}):
        with pytest.raises(ValueError, match=r"^rules: a net with its own apply .* calls .*projection1/short without"):
            jax.eval_shape(lambda rules=rules: net.apply(params, x, rules=rules))
    jax.eval_shape(lambda: net.apply(params, x, rules={Dense: times(2)}))


class OneByOne(jaxcnn.Serial):
    """A custom net that applies its layers by name, in sequence."""

    def apply(self, params, x, *, key=None, rules=None):
        for name, _ in self.layers:
            x = self.apply_layer(name, params, x, key=key, rules=rules)
        return x


@pytest.mark.parametrize("inside", [False, True])
def test_apply_layer_passes_parameters_keys_rules_and_taps(inside):
    """Applied one by one, the layers compute what `serial` computes."""
    layers = serial(Dense(4), Dropout(0.5), serial(Dense(4), Tanh()), Dense(3)).layers
    plain, custom = jaxcnn.Serial(layers), OneByOne(layers)
    if inside:
        plain, custom = (serial(Dense(4), dataclasses.replace(net, name="net")) for net in (plain, custom))
    params, x = parameters(plain, (5,), np.float64), images(2, 5)
    rules = {"net/serial1/dense1" if inside else "serial1/dense1": times(3), Tanh: times(2)}
    expected, result = (
        jaxcnn.backprop(net, jaxcnn.squared_error, params, x, np.ones((2, 3)), key=key(1), rules=rules)
        for net in (plain, custom)
    )
    chex.assert_trees_all_equal(result, expected)
    assert {path for path, _ in custom.walk()} == set(result.deltas)


def test_composites_fit_every_net():
    """Keys of composites may match nothing, even after merging; they match by type."""
    composite = jaxcnn.attribution.epsilon_plus()
    assert composite[Dense] == jaxcnn.rules.Epsilon(1e-6)
    assert Conv in composite
    params, x = parameters(HIDDEN, (6, 6, 1)), images(2, 6, 6, 1, dtype=np.float32)
    for rules in (
        composite,
        {"dense1": jaxcnn.rules.pass_through, **composite},
        {**composite, Conv: jaxcnn.rules.ZPlus()},
    ):
        jax.eval_shape(lambda rules=rules: HIDDEN.apply(params, x, rules=rules))


# ---------------------------------------------------------------------------------------------------------------------
# Copies


@pytest.mark.parametrize("again", [lambda a: pickle.loads(pickle.dumps(a)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_nets_and_rules_are_copied_by_value(again):
    """This holds for every layer, rule and composite, and for a state; equal nets compile once."""
    for net in (EVERY_LAYER, TO_MAXIMA, serial(BatchNorm(axis_name=("a", "b")))):
        assert again(net) == net
        assert hash(again(net)) == hash(net)
    of = jaxcnn.rules
    made = {
        "ZBox": of.ZBox(-1.0, 1.0), "ClipDelta": of.ClipDelta(1.0),
        "HiddenLayerRules": of.HiddenLayerRules(relu=of.winner)
    }  # fmt: skip
    for name, rule in vars(of).items():
        if name.startswith("_") or name in ("Call", "Rule") or inspect.ismodule(rule):
            continue
        rule = made.get(name) or (rule() if isinstance(rule, type) else rule)
        assert again(rule) == rule, name
        assert hash(again(rule)) == hash(rule), name
    composite = jaxcnn.attribution.epsilon_gamma_box(HIDDEN, -1.0, 1.0)
    assert again(composite) == composite
    assert list(again(composite)) == list(composite)
    state = jaxcnn.TrainState.create(HIDDEN, optax.adam(0.1), key(), (6, 6, 1))
    there = again(state)
    assert jax.tree.structure(there) == jax.tree.structure(state)
    chex.assert_trees_all_equal(there, state)
    assert there.key.dtype == state.key.dtype


def outputs_of(net, params, x):
    return np.asarray(net.apply(params, x))


@pytest.mark.slow("starts a process")
def test_nets_go_to_other_processes():
    params, x = parameters(HIDDEN, (6, 6, 1)), images(2, 6, 6, 1, dtype=np.float32)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(outputs_of, (HIDDEN, params, x))
    np.testing.assert_allclose(there, outputs_of(HIDDEN, params, x), rtol=1e-5)
