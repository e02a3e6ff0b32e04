"""LRP rules: agreement with zennit op by op, conservation, transformations, and refused arguments."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import zennit.rules
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn import (
    AdaptiveAvgPool,
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DepthwiseConv,
    GlobalAvgPool,
    HiddenLayer,
    LpPool,
    MaxPool,
    attribution,
)
from jaxcnn.ops.kinds import KINDS
from jaxcnn.ops.linear import add
from jaxcnn.rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus, pass_through, rescale
from tests import as_torch
from tests.cases import compiled
from tests.checks import SPLIT_BY
from tests.compare_torch import CLOSE, random_delta
from tests.compare_torch import pulled as pulled_by

#: Bounds of pixel values, one per channel for up to 12 channels.
LOW, HIGH = np.random.default_rng(7).uniform((-4,), (-3,), (2, 12)) * [[1], [-1]]


def channels(bounds, n):
    return torch.tensor(bounds[:n])


RULES = {
    # name: ours for n channels, zennit's for n channels and x of a given rank
    "epsilon": (lambda n: Epsilon(), lambda n, rank: zennit.rules.Epsilon()),
    "epsilon 0.3": (lambda n: Epsilon(0.3), lambda n, rank: zennit.rules.Epsilon(0.3)),
    "zplus": (lambda n: ZPlus(), lambda n, rank: zennit.rules.ZPlus()),
    "zplus 0.3": (lambda n: ZPlus(0.3), lambda n, rank: zennit.rules.ZPlus(0.3)),
    "alpha 2 beta 1": (lambda n: AlphaBeta(), lambda n, rank: zennit.rules.AlphaBeta()),
    "alpha 1.5 beta 0.5": (lambda n: AlphaBeta(1.5, 0.5, 0.1), lambda n, rank: zennit.rules.AlphaBeta(1.5, 0.5, 0.1)),
    "gamma": (lambda n: Gamma(), lambda n, rank: zennit.rules.Gamma()),
    "gamma 1": (lambda n: Gamma(1.0, 0.1), lambda n, rank: zennit.rules.Gamma(1.0, 0.1)),
    "wsquare": (lambda n: WSquare(), lambda n, rank: zennit.rules.WSquare()),
    "flat": (lambda n: Flat(), lambda n, rank: zennit.rules.Flat()),
    "zbox": (lambda n: ZBox(-4.0, 4.5), lambda n, rank: zennit.rules.ZBox(-4.0, 4.5)),
    "zbox of channels": (
        lambda n: ZBox(LOW[:n], HIGH[:n]),
        lambda n, rank: zennit.rules.ZBox(
            *(channels(b, n).reshape(1, n, *(1,) * (rank - 2)) for b in (LOW, HIGH)),
        ),
    ),
}

#: The same rules with other constants.
OTHER = ("epsilon 0.3", "zplus 0.3", "alpha 1.5 beta 0.5", "gamma 1", "zbox")

LAYERS = {
    # name: (layer, input shape)
    "conv": (Conv(5, 3), (2, 6, 7, 3)),
    "conv, stride 2, a remainder": (Conv(5, 3, stride=2), (2, 8, 7, 3)),
    "conv, padding": (Conv(5, (3, 2), padding=1), (2, 6, 5, 3)),
    "conv, dilation": (Conv(5, 2, dilation=2, padding=1), (2, 6, 5, 3)),
    "conv, groups": (Conv(6, 3, groups=2, padding=1, stride=2), (2, 6, 5, 4)),
    "conv, depthwise, no bias": (Conv(6, 3, groups=3, bias=False), (2, 6, 5, 3)),
    # In these two, every output depends on many inputs, so it has terms of both signs to conserve.
    "depthwise": (DepthwiseConv(5, 2, padding=1), (2, 8, 7, 3)),
    "transposed": (ConvTranspose(4, 4, stride=2, padding=3, groups=2), (2, 4, 5, 12)),
    "dense": (Dense(6), (3, 12)),
    "dense, no bias": (Dense(6, bias=False), (3, 12)),
    "hidden layer": (HiddenLayer(5, 3), (2, 8, 9, 3)),
    "hidden layer, windows overlap": (HiddenLayer(5, 3, window=3, pool_stride=2, padding=1, stride=2), (2, 13, 14, 3)),
}
POOLS = {
    "avg_pool": (AvgPool(2), (2, 6, 5, 3)),
    "avg_pool, windows overlap": (AvgPool(3, 2), (2, 7, 8, 3)),
    "avg_pool, padding counts": (AvgPool(3, 2, padding=1), (2, 7, 8, 3)),
    "avg_pool, divisor": (AvgPool(3, 2, divisor=5), (2, 7, 8, 3)),
    "avg_pool, padding does not": (AvgPool(3, 2, padding=1, count_include_pad=False), (2, 7, 8, 3)),
    "adaptive_avg_pool, windows overlap": (AdaptiveAvgPool((3, 2)), (2, 7, 8, 3)),
    "global_avg_pool": (GlobalAvgPool(), (2, 7, 8, 3)),
}
POOLING_RULES = {
    "norm": (lambda n: Epsilon(), lambda n, rank: zennit.rules.Norm()),
    "norm 0.3": (lambda n: Epsilon(0.3), lambda n, rank: zennit.rules.Norm(0.3)),
    "flat": (lambda n: Flat(), lambda n, rank: zennit.rules.Flat()),
}


@functools.cache
def drawn(layer, shape, bias=True, seed=0):
    """Draw inputs of both signs, and parameters with nonzero biases."""
    rng = np.random.default_rng(seed)
    params = layer.init(jax.random.key(seed), shape[1:], jnp.float64)
    params = {k: rng.standard_normal(a.shape) * (bias or k == "weight") for k, a in params.items()}
    return rng.standard_normal(shape), params


@functools.partial(jax.jit, static_argnums=(0, 1))
def sent_back(layer, rule, params, x, delta):
    return jax.vjp(lambda x: layer.apply(params, x, rule=rule), x)[1](delta)[0]


def relevance(layer, rule, x, params, delta=None):
    y = jax.eval_shape(layer.apply, params, x)
    delta = random_delta(y) if delta is None else delta
    return delta, np.asarray(sent_back(layer, rule, params, x, delta))


def relevance_by_zennit(layer, params, rule, x, delta):
    """Return zennit's relevance with the rule on the last module that takes one; a hidden layer's ReLU passes it on."""
    module = as_torch.module(layer, params).double().eval()
    parts = [*module] if isinstance(module, torch.nn.Sequential) else [module]
    hooks = [(part, rule.copy()) for part in parts[:1]]
    hooks += [(part, zennit.rules.Pass()) for part in parts if isinstance(part, torch.nn.ReLU)]
    handles = [hook.register(part) for part, hook in hooks]
    leaf = as_torch.channels_first(x).requires_grad_()
    y = module(leaf)
    (result,) = torch.autograd.grad(y, leaf, as_torch.channels_first(delta))
    for handle in handles:
        handle.remove()
    return as_torch.channels_last(result)


#: Rules and layers that cover conservation.
EACH = [name for name in RULES if name not in OTHER]
FEW = ["conv, padding", "conv, groups", "depthwise", "transposed", "dense", "hidden layer, windows overlap"]
PAIRS = [(a, r) for a in LAYERS for r in EACH] + [(a, r) for a in ("conv, groups", "dense") for r in OTHER]


@pytest.mark.parametrize(("layer", "rule"), PAIRS + [(a, r) for a in POOLS for r in POOLING_RULES])
def test_zennit(layer, rule):
    ours, theirs = {**RULES, **POOLING_RULES}[rule]
    layer, shape = {**LAYERS, **POOLS}[layer]
    x, params = drawn(layer, shape)
    delta, result = relevance(layer, ours(shape[-1]), x, params)
    expected = relevance_by_zennit(layer, params, theirs(shape[-1], len(shape)), x, delta)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


ZERO = {
    "epsilon": (Epsilon, zennit.rules.Epsilon),
    "zplus": (ZPlus, zennit.rules.ZPlus),
    "alpha 2 beta 1": (AlphaBeta, zennit.rules.AlphaBeta),
    "gamma": (Gamma, zennit.rules.Gamma),
    "wsquare": (WSquare, zennit.rules.WSquare),
    "flat": (Flat, zennit.rules.Flat),
    "zbox": (functools.partial(ZBox, -4.0, 4.5), functools.partial(zennit.rules.ZBox, -4.0, 4.5)),
}


@pytest.mark.parametrize("rule", ZERO)
def test_zero_params_are_zennits(rule):
    """The rules for dense layers and convolutions agree."""
    ours, theirs = ZERO[rule]
    for layer in ("dense", "conv, groups"):
        layer, shape = LAYERS[layer]
        x, params = drawn(layer, shape)
        for name in ("bias", "weight"):
            delta, result = relevance(layer, ours(zero_params=name if name == "bias" else (name,)), x, params)
            expected = relevance_by_zennit(layer, params, theirs(zero_params=[name]), x, delta)
            np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
            assert name == "weight" or np.abs(expected).max() > 0
            if name == "bias" and rule not in ("flat", "zbox"):  # these rules do not use b
                assert not np.allclose(result, relevance(layer, ours(), x, params)[1])


def test_zero_params_of_other_ops():
    """A hidden layer uses those of its convolution, batch norm its scale and bias; an average pool has none."""
    layer, shape = LAYERS["hidden layer"]
    x, params = drawn(layer, shape)
    delta, result = relevance(layer, ZPlus(zero_params="bias"), x, params)
    expected = relevance_by_zennit(layer, params, zennit.rules.ZPlus(zero_params=["bias"]), x, delta)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    layer = BatchNorm()
    x, params = drawn(layer, (2, 4, 3, 5))
    params = params | {"mean": np.linspace(-1, 1, 5), "var": np.linspace(0.5, 2, 5)}
    delta, result = relevance(layer, Epsilon(zero_params=("bias",)), x, params)
    expected = relevance_by_zennit(layer, params, zennit.rules.Epsilon(zero_params=["bias"]), x, delta)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    x, _ = drawn(AvgPool(2), (2, 4, 4, 3))
    zeroed, plain = (relevance(AvgPool(2), rule, x, {})[1] for rule in (Flat(zero_params=["weight", "bias"]), Flat()))
    np.testing.assert_array_equal(zeroed, plain)


@pytest.mark.parametrize("layer", [MaxPool(2), MaxPool(3, 2), MaxPool(3, 2, padding=1)], ids=str)
def test_max_pooling_by_its_exact_rule_is_zennits(layer):
    """zennit has no rule for max pooling: like the gradient, relevance goes to the winner."""
    x, params = drawn(layer, (2, 7, 8, 3))
    delta, result = relevance(layer, None, x, params)
    leaf = as_torch.channels_first(x).requires_grad_()
    expected = torch.autograd.grad(as_torch.module(layer, {})(leaf), leaf, as_torch.channels_first(delta))[0]
    np.testing.assert_allclose(result, as_torch.channels_last(expected), **CLOSE)


def exact(rule):
    """Return the rule with a negligible ε."""
    small = {field.name for field in dataclasses.fields(rule)} & {"epsilon", "stabilizer"}
    return dataclasses.replace(rule, **dict.fromkeys(small, 1e-14))


@pytest.mark.parametrize("spatial", [(9,), (4, 5, 4)])
def test_one_and_three_dims(spatial):
    """The 1-D rule equals the 2-D rule on an image one pixel high; the 3-D rule conserves relevance."""
    layer = Conv(4, 3, stride=2 if len(spatial) == 1 else 1, bias=False)
    x, params = drawn(layer, (2, *spatial, 4))
    for name in EACH:
        rule = exact(RULES[name][0](4))
        delta, result = relevance(layer, rule, x, params)
        np.testing.assert_allclose(result.sum(), delta.sum(), rtol=1e-6)
        if len(spatial) == 1:
            flat = Conv(4, (1, 3), stride=(1, 2), bias=False)
            of_2d = relevance(flat, rule, x[:, None], {"weight": params["weight"][None]}, delta[:, None])[1]
            np.testing.assert_allclose(result, of_2d[:, 0], **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# Conservation


def sums(layer, rule, bias):
    """Return Σ R at the input and at the output, per example."""
    layer, shape = {**LAYERS, **POOLS}[layer]
    x, params = drawn(layer, shape, bias)
    y = layer.apply(params, x)
    delta = np.random.default_rng(3).uniform(0.5, 1.5, y.shape)
    result = relevance(layer, exact(rule), x, params, delta)[1]
    return result.reshape(len(x), -1).sum(1), delta.reshape(len(x), -1).sum(1)


@pytest.mark.parametrize("layer", FEW)
@pytest.mark.parametrize("rule", EACH)
def test_relevance_is_conserved_without_bias(layer, rule):
    result, expected = sums(layer, RULES[rule][0](LAYERS[layer][1][-1]), bias=False)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("layer", FEW)
@pytest.mark.parametrize("rule", ["flat", "zbox of channels"])
def test_relevance_is_conserved_with_bias(layer, rule):
    """`Flat` treats the bias as 0, and in zᴮ it cancels."""
    result, expected = sums(layer, RULES[rule][0](LAYERS[layer][1][-1]), bias=True)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


CONSERVING = [name for name in POOLS if name != "avg_pool, padding counts"]


@pytest.mark.parametrize("layer", CONSERVING)
@pytest.mark.parametrize("rule", [Epsilon(), Flat()])
def test_relevance_is_conserved_by_pooling(layer, rule):
    result, expected = sums(layer, rule, bias=False)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_the_bias_keeps_its_share_of_epsilon():
    """Σ R_x = Σ R (z − b) / (z + ε sign z), one output at a time."""
    layer, shape = LAYERS["conv, padding"]
    x, params = drawn(layer, shape)
    z = np.asarray(layer.apply(params, x))
    for n, o in ((0, (1, 2, 3)), (1, (0, 0, 0))):  # in the middle and at the border
        delta = np.zeros(z.shape)
        delta[(n, *o)] = 2.0
        result = relevance(layer, Epsilon(0.1), x, params, delta)[1].sum()
        at = z[(n, *o)]
        np.testing.assert_allclose(result, 2 * (at - params["bias"][o[-1]]) / (at + 0.1 * np.sign(at)), rtol=1e-10)


@pytest.mark.slow("compiles whole nets")
def test_relevance_of_a_whole_net_sums_to_the_output():
    """Σ R_x is the output for a net with overlapping max and average pools and a hidden layer, without biases."""
    net = jaxcnn.serial(
        Conv(6, 3, padding=1, bias=False), jaxcnn.Relu(), MaxPool(3, 2), Conv(6, 2, bias=False), jaxcnn.Relu(),
        AvgPool(3, 2), HiddenLayer(8, 2, window=2, pool_stride=1), jaxcnn.Flatten(), Dense(5, bias=False),
    )  # fmt: skip
    params = net.init(jax.random.key(0), (18, 17, 3), jnp.float64)
    x = np.random.default_rng(0).uniform(0, 1, (3, 18, 17, 3))
    target = np.array([4, 0, 2])
    composites = {
        "plus": attribution.epsilon_plus(epsilon=1e-14, stabilizer=1e-14),
        "gamma": {
            "conv1": ZBox(0.0, 1.0, 1e-14), Conv: Gamma(0.25, 1e-14), HiddenLayer: Gamma(0.25, 1e-14),
            Dense: Epsilon(1e-14), AvgPool: Epsilon(1e-14), jaxcnn.Relu: pass_through,
        },
        "flat, square": {
            "conv1": Flat(), Conv: WSquare(1e-14), HiddenLayer: Gamma(0.25, 1e-14), Dense: Epsilon(1e-14),
            AvgPool: Flat(), jaxcnn.Relu: pass_through,
        },
    }  # fmt: skip
    y = np.take_along_axis(np.asarray(net.apply(params, x)), target[:, None], 1)[:, 0]
    for name, rules in composites.items():
        result = compiled(functools.partial(jaxcnn.attribute, net, rules=rules))(params, x, target)
        np.testing.assert_allclose(result.sum((1, 2, 3)), y, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_a_power_pool_divides_by_powers(p):
    """R_x = xᵖ / Σ xᵖ · R for nonnegative inputs and overlapping windows."""
    layer, x = LpPool(3, p, 2), np.random.default_rng(0).uniform(0, 1, (2, 7, 9, 3))
    delta, result = relevance(layer, Epsilon(1e-14), x, {})
    expected = np.zeros_like(x)
    for i, j in np.ndindex(3, 4):
        part = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] ** p
        share = part / part.sum((1, 2), keepdims=True)
        expected[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += share * delta[:, i : i + 1, j : j + 1]
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


def test_a_sum_gives_each_of_its_terms_a_share():
    x, y, delta = np.random.default_rng(0).standard_normal((3, 4, 5))
    of_epsilon = pulled_by(functools.partial(add, rule=Epsilon(0.1)), (x, y), delta)[1]
    s = delta / (x + y + 0.1 * np.sign(x + y))
    np.testing.assert_allclose(of_epsilon[0], x * s, **CLOSE)
    np.testing.assert_allclose(of_epsilon[1], y * s, **CLOSE)
    of_flat = pulled_by(functools.partial(add, rule=Flat(0.0)), (x, y), delta)[1]
    np.testing.assert_allclose(of_flat, [delta / 2, delta / 2], **CLOSE)
    of_rescale = pulled_by(functools.partial(add, rule=rescale), (x, y), delta)[1]
    np.testing.assert_array_equal(of_rescale, [delta, delta])


def test_batch_norm_by_statistics_is_a_product_with_a_bias():
    """R_x = a·x / (a·x + c) · R, a = γ/√(v + ε), c = β − a·m."""
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((2, 4, 5, 5, 3))
    scale, bias, mean = rng.standard_normal((3, 3))
    var = rng.uniform(0.5, 2, 3)
    params = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    a = scale / np.sqrt(var + 1e-5)
    z = a * x + bias - a * mean
    result = relevance(BatchNorm(), Epsilon(0.1), x, params, delta)[1]
    np.testing.assert_allclose(result, a * x * delta / (z + 0.1 * np.sign(z)), **CLOSE)


NO_EPSILON = {"epsilon": 1e-14, "stabilizer": 1e-14}
WHOLE = {
    "plus": attribution.epsilon_plus(**NO_EPSILON),
    "alpha 2 beta 1": attribution.epsilon_alpha2_beta1(**NO_EPSILON),
    "epsilon": {jaxcnn.Relu: pass_through, jaxcnn.Residual: Epsilon(1e-14), jaxcnn.AdaptiveMaxPool: None,
                jaxcnn.Layer: Epsilon(1e-14)},
}  # fmt: skip


@pytest.mark.slow("compiles whole nets")
@pytest.mark.parametrize("rules", WHOLE.values(), ids=WHOLE)
def test_sums_and_other_convolutions_and_pools_conserve(rules):
    """All layers of the composites conserve without biases; large kernels give every output terms of both signs."""
    block = (Conv(8, 3, padding=1, bias=False), jaxcnn.Relu(), Conv(8, 3, padding=1, bias=False))
    net = jaxcnn.serial(
        Conv(8, 3, padding=1, bias=False), jaxcnn.Relu(), jaxcnn.residual(*block),
        jaxcnn.residual(jaxcnn.residual(block[0]), jaxcnn.Relu()), DepthwiseConv(5, 2, bias=False), LpPool(3, 2, 2),
        ConvTranspose(4, 3, padding=1, groups=2, bias=False), AdaptiveAvgPool((4, 3)), jaxcnn.AdaptiveMaxPool(3),
        GlobalAvgPool(), Dense(5, bias=False),
    )  # fmt: skip
    params = net.init(jax.random.key(0), (12, 11, 3), jnp.float64)
    x = np.random.default_rng(0).uniform(0, 1, (3, 12, 11, 3))
    y = np.asarray(compiled(net.apply)(params, x))[:, 2]
    result = compiled(functools.partial(jaxcnn.attribute, net, rules=rules))(params, x, 2)
    np.testing.assert_allclose(result.sum((1, 2, 3)), y, rtol=1e-6)


def test_epsilon_of_nearly_nothing_is_gradient_times_input():
    """This holds in nets of ReLUs and max pooling without biases (Shrikumar et al. 2016)."""
    net = jaxcnn.serial(Conv(6, 3, bias=False), jaxcnn.Relu(), MaxPool(2), jaxcnn.Flatten(), Dense(5, bias=False))
    params = net.init(jax.random.key(0), (8, 9, 3), jnp.float64)
    x = np.random.default_rng(0).standard_normal((3, 8, 9, 3))
    rules = {Conv: Epsilon(0.0), Dense: Epsilon(1e-14), jaxcnn.Relu: pass_through}
    attribute_class = functools.partial(jaxcnn.attribute, net, target=2)
    result = compiled(functools.partial(attribute_class, rules=rules))(params, x)
    expected = compiled(functools.partial(attribute_class, method="gradient_times_input"))(params, x)
    np.testing.assert_allclose(result, expected, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Transformations

ALL = [RULES[name][0](3) for name in EACH]


def pulled(rule, params, x, delta):
    return jax.vjp(lambda x: HiddenLayer(5, 3).apply(params, x, rule=rule), x)[1](delta)[0]


@pytest.mark.slow("compiles whole nets for two devices")
@pytest.mark.parametrize("rule", ALL, ids=str)
def test_jit_vmap_and_a_split_batch(rule):
    x, params = drawn(HiddenLayer(5, 3), (4, 8, 9, 3))
    delta = random_delta(HiddenLayer(5, 3).apply(params, x))
    run = functools.partial(pulled, rule, params)
    expected = compiled(run)(x, delta)
    mapped = compiled(jax.vmap(run))(x[:, None], delta[:, None])
    np.testing.assert_allclose(mapped[:, 0], expected, **CLOSE)
    for axis_type in SPLIT_BY:
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
        split = NamedSharding(mesh, PartitionSpec("batch"))
        parted = compiled(run)(*jax.device_put((x, delta), split))
        assert len(parted.sharding.device_set) == 2
        np.testing.assert_allclose(parted, expected, **CLOSE)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    by_hand = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec("batch"), out_specs=PartitionSpec("batch"))
    np.testing.assert_allclose(compiled(by_hand)(x, delta), expected, **CLOSE)


@pytest.mark.slow("runs op by op")
def test_eager_is_the_same():
    x, params = drawn(HiddenLayer(5, 3), (4, 8, 9, 3))
    delta = random_delta(HiddenLayer(5, 3).apply(params, x))
    for rule in (Gamma(), rescale):
        run = functools.partial(pulled, rule, params)
        np.testing.assert_allclose(run(x, delta), compiled(run)(x, delta), **CLOSE)


@pytest.mark.parametrize("rule", [*ALL, rescale], ids=lambda rule: getattr(rule, "__name__", str(rule)))
def test_in_a_training_step_parameters_that_relevance_reaches_stay(rule):
    """Kernels get no relevance: the layer with the rule does not change, and the layer above it learns."""
    net = jaxcnn.serial(HiddenLayer(4, 3), jaxcnn.Flatten(), Dense(5))
    optimizer = optax.sgd(0.1)
    state = jaxcnn.TrainState.create(net, optimizer, jax.random.key(0), (8, 8, 3))
    before = jax.tree.map(np.array, state.params)
    step = jaxcnn.make_train_step(
        net, jaxcnn.softmax_cross_entropy_with_integer_labels, optimizer, rules={HiddenLayer: rule}
    )
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    state, metrics = step(state, (x, np.arange(4)))
    assert np.isfinite(metrics["loss"])
    np.testing.assert_array_equal(state.params["hidden_layer1"]["weight"], before["hidden_layer1"]["weight"])
    assert not np.array_equal(state.params["dense1"]["weight"], before["dense1"]["weight"])


def test_float32_stays_float32_and_is_near():
    for name in ("zplus", "gamma", "zbox of channels", "epsilon 0.3"):
        x, params = drawn(Conv(5, 3), (2, 6, 7, 3))
        rule = RULES[name][0](3)
        delta, wide = relevance(Conv(5, 3), rule, x, params)
        narrow = jax.tree.map(lambda a: a.astype(np.float32), (x, params, delta))
        result = relevance(Conv(5, 3), rule, *narrow)[1]
        assert result.dtype == np.float32
        assert np.linalg.norm(result - wide) < 1e-4 * np.linalg.norm(wide), name


def test_rules_are_values():
    """Rules constructed with the same arguments are equal and have the same hash."""
    for make in (ours for ours, _ in RULES.values()):
        assert make(3) == make(3)
        assert hash(make(3)) == hash(make(3))
    assert ZBox(np.zeros(3), np.ones(3)) == ZBox((0.0, 0.0, 0.0), [1, 1, 1])
    assert Epsilon(1) == Epsilon(1.0) != Epsilon(2.0)


def test_pass_through():
    x, delta = np.random.default_rng(0).standard_normal((2, 3, 4))
    for op in (jaxcnn.relu, jaxcnn.gelu, lambda x, rule: jaxcnn.dropout(x, 0.5, jax.random.key(0), rule=rule)):
        np.testing.assert_array_equal(jax.vjp(functools.partial(op, rule=pass_through), x)[1](delta)[0], delta)


def test_nothing_out_of_nothing():
    """Zero inputs and outputs cause no division by zero."""
    x, params = drawn(Conv(5, 3), (2, 6, 7, 3), bias=False)
    for rule in ALL:
        result = relevance(Conv(5, 3), rule, 0 * x, params)[1]
        assert np.isfinite(result).all(), rule


# ---------------------------------------------------------------------------------------------------------------------
# DeepLIFT's rule

ACTIVATIONS = ["relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "sigmoid", "tanh"]
PAIRED = {
    **{name: getattr(jaxcnn, name) for name in ACTIVATIONS},
    "max_pool": functools.partial(jaxcnn.max_pool, window=2),
    "max_pool, windows overlap": functools.partial(jaxcnn.max_pool, window=3, stride=1, padding=1),
    "global_max_pool": jaxcnn.global_max_pool,
    "adaptive_max_pool": functools.partial(jaxcnn.adaptive_max_pool, output_size=3),
    "avg_pool": functools.partial(jaxcnn.avg_pool, window=3, stride=1),
    "adaptive_avg_pool": functools.partial(jaxcnn.adaptive_avg_pool, output_size=3),
    "batch_norm": lambda x, rule=None: jaxcnn.batch_norm(x, *W[0, 0, :3, :3], V, rule=rule),
    "conv_transpose": lambda x, rule=None: jaxcnn.conv_transpose(x, W.swapaxes(2, 3), rule=rule),
    "depthwise_conv": lambda x, rule=None: jaxcnn.depthwise_conv(x, W[:, :, :1, :3], rule=rule),
    "hidden_layer": lambda x, rule=None: jaxcnn.hidden_layer(x, W, B, window=3, pool_stride=2, rule=rule),
    "conv": lambda x, rule=None: jaxcnn.conv(x, W, B, rule=rule),
}
V = np.array([0.5, 1.0, 2.0])
W, B = np.random.default_rng(5).standard_normal((3, 3, 3, 4)), np.random.default_rng(6).standard_normal(4)


@pytest.mark.parametrize("op", PAIRED)
def test_differences_are_conserved(op):
    """Σ m ∘ (x − x₀) = Σ δ ∘ (y − y₀) for each pair, even where x = x₀ for some elements."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 8, 8, 3))
    x[3, :3] = x[0, :3]
    y = np.asarray(PAIRED[op](x))
    delta = rng.standard_normal((3, *y.shape[1:]))
    _, (result,) = pulled_by(functools.partial(PAIRED[op], rule=rescale), (x,), np.concatenate([delta, delta]))
    m, again = np.split(np.asarray(result), 2)
    np.testing.assert_array_equal(m, again)
    result = (m * (x[:3] - x[3:])).reshape(3, -1).sum(1)
    np.testing.assert_allclose(result, (delta * (y[:3] - y[3:])).reshape(3, -1).sum(1), rtol=1e-9)


def test_equal_points_use_the_slope():
    x = np.random.default_rng(0).standard_normal((3, 4))
    twice = np.concatenate([x, x])
    for op in ("tanh", "relu"):
        _, (m,) = pulled_by(functools.partial(PAIRED[op], rule=rescale), (twice,), np.ones_like(twice))
        np.testing.assert_allclose(m[:3], pulled_by(PAIRED[op], (x,), np.ones_like(x))[1][0], **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# Refused arguments

X = np.ones((2, 6, 6, 4), np.float32)
KEY = jax.random.key(0)
AFFINE, SUMS = (", ".join(KINDS[kind]) for kind in ("affine", "sum"))
EPSILON = f"{AFFINE}, {SUMS}, lp_pool, batch_norm, hidden_layer"
ELEMENTWISE = ", ".join((*KINDS["activation"], *KINDS["dropout"], *KINDS["norm"]))
RESCALE = ", ".join(
    (*KINDS["affine"], "hidden_layer", *KINDS["sum"], *KINDS["max"], *KINDS["activation"], "dropout", "batch_norm")
)
NO_STATISTICS = "because statistics of the batch mix examples (see jaxcnn.calibrate), got neither"


def unfit(op, rule, fits):
    return f"{op}: rule must be one that fits {op}, got {rule}, which fits {fits}"


REFUSED = [
    # message, call with one image and a rule
    (unfit("relu", "ZPlus(stabilizer=1e-06)", f"{AFFINE}, hidden_layer; rules.pass_through fits relu"),
     lambda x: jaxcnn.relu(x, rule=ZPlus())),
    (unfit("add", "ZPlus(stabilizer=1e-06)", f"{AFFINE}, hidden_layer; Epsilon and Flat fit add"),
     lambda x: add(x, x, rule=ZPlus())),
    (unfit("lp_pool", "ZPlus(stabilizer=1e-06)", f"{AFFINE}, hidden_layer; Epsilon fits lp_pool"),
     lambda x: jaxcnn.lp_pool(x, 2, rule=ZPlus())),
    (unfit("global_max_pool", "Flat(stabilizer=1e-06)",
           f"{AFFINE}, {SUMS}, hidden_layer; global_max_pool keeps its exact rule, R to the winner"),
     lambda x: jaxcnn.global_max_pool(x, rule=Flat())),
    (unfit("layer_norm", "Epsilon(epsilon=1e-06)", f"{EPSILON}; rules.pass_through fits layer_norm"),
     lambda x: jaxcnn.layer_norm(x, rule=Epsilon())),
    (f"batch_norm: mean and var must be given for rule Epsilon(epsilon=1e-06), {NO_STATISTICS}",
     lambda x: jaxcnn.batch_norm(x, rule=Epsilon())),
    (f"batch_norm: mean and var must be given for rule rescale, {NO_STATISTICS}",
     lambda x: jaxcnn.batch_norm(x, rule=rescale)),
    (unfit("gelu", "Epsilon(epsilon=1e-06)", f"{EPSILON}; rules.pass_through fits gelu"),
     lambda x: jaxcnn.gelu(x, rule=Epsilon())),
    (unfit("max_pool", "Epsilon(epsilon=1e-06)", f"{EPSILON}; max_pool keeps its exact rule, R to the winner"),
     lambda x: jaxcnn.max_pool(x, 2, rule=Epsilon())),
    (unfit("avg_pool", "Gamma(gamma=0.25, stabilizer=1e-06)",
           f"{AFFINE}, hidden_layer; Epsilon and Flat fit avg_pool"),
     lambda x: jaxcnn.avg_pool(x, 2, rule=Gamma())),
    (unfit("kron", "Flat(stabilizer=1e-06)", f"{AFFINE}, {SUMS}, hidden_layer"),
     lambda x: jaxcnn.kron(x, x, rule=Flat())),
    (unfit("conv", "pass_through", ELEMENTWISE),
     lambda x: jaxcnn.conv(x, np.ones((1, 1, 4, 4), np.float32), rule=pass_through)),
    (unfit("max_pool", "pass_through", ELEMENTWISE), lambda x: jaxcnn.max_pool(x, 2, rule=pass_through)),
    # these two keep the shape, and mix elements
    (unfit("max_pool", "pass_through", ELEMENTWISE),
     lambda x: jaxcnn.max_pool(x, 3, stride=1, padding=1, rule=pass_through)),
    (unfit("avg_pool", "pass_through", ELEMENTWISE),
     lambda x: jaxcnn.avg_pool(x, 3, stride=1, padding=1, rule=pass_through)),
    ("ZBox: low must be one number or 4, one for each channel, got 3",
     lambda x: jaxcnn.conv(x, np.ones((1, 1, 4, 4), np.float32), rule=ZBox((0.0, 0.0, 0.0), 1.0))),
    ("relu: x must be examples followed by as many references, for rule rescale, got shape (3, 6, 6, 4)",
     lambda x: jaxcnn.relu(jnp.concatenate([x, x[:1]]), rule=rescale)),
    (unfit("kron", "rescale", RESCALE), lambda x: jaxcnn.kron(x, x, rule=rescale)),
    # it keeps the shape, and is not elementwise
    (unfit("autocorrelate", "rescale", RESCALE),
     lambda x: jaxcnn.autocorrelate(x[:, 0, 0, 0], mode="same", rule=rescale)),
]  # fmt: skip


def exactly(message):
    """Return a pattern for the exact message, allowing for the note that JAX adds to errors raised during tracing."""
    return f"^{re.escape(message)}(?=\n|$)"


@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_ops_that_a_rule_does_not_fit(message, call):
    def gradient(x):
        y, pull = jax.vjp(call, x)
        return pull(y)

    for run in (gradient, functools.partial(jax.eval_shape, gradient)):
        with pytest.raises(ValueError, match=exactly(message)):
            run(X)


NAMES = "'weight', 'bias' or a sequence of them"
MADE = [
    (TypeError, "ZBox: low must be given, as in ZBox(0.0, 1.0), got None", ZBox),
    (TypeError, "ZBox: high must be given, as in ZBox(0.0, 1.0), got None", lambda: ZBox(0.0)),
    (TypeError, "ZBox: high must be a Python float, got str", lambda: ZBox(0.0, "1")),
    (ValueError, "ZBox: low must be at most high, got low 1.0, high 0.0", lambda: ZBox(1.0, 0.0)),
    (ValueError, "ZBox: low must be at most high, got low (0.0, 2.0), high 1.0", lambda: ZBox((0, 2), 1)),
    (ValueError, "AlphaBeta: alpha − beta must be 1, got alpha 2.0, beta 0.0", lambda: AlphaBeta(2, 0)),
    (ValueError, "Epsilon: epsilon must be a finite number >= 0, got -1.0", lambda: Epsilon(-1.0)),
    (ValueError, "Gamma: gamma must be a finite number >= 0, got inf", lambda: Gamma(float("inf"))),
    (ValueError, f"ZPlus: zero_params must be {NAMES}, got 'biases'",
     lambda: ZPlus(zero_params="biases")),
    (TypeError, f"Flat: zero_params must be {NAMES}, got None", lambda: Flat(zero_params=None)),
    (TypeError, f"ZBox: zero_params must be {NAMES}, got [1]",
     lambda: ZBox(0.0, 1.0, zero_params=[1])),
    (TypeError, "ZPlus: stabilizer must be a Python float, got str", lambda: ZPlus("0.1")),
    (TypeError, "Epsilon: epsilon must be a Python float, got a value traced by jax; it must be static",
     lambda: jax.jit(Epsilon)(0.1)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "make"), MADE)
def test_invalid_options(error, message, make):
    with pytest.raises(error, match=exactly(message)):
        make()
