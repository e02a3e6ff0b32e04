"""Nets that are not sequences agree with the same nets in stock JAX: values, gradients, δ, relevance, and the rest."""

import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxcnn
from jaxcnn import (
    BatchNorm,
    Branches,
    Conv,
    ConvTranspose,
    Dense,
    Dropout,
    Flatten,
    Function,
    GlobalAvgPool,
    GlobalMaxPool,
    MaxPool,
    Relu,
    Residual,
    Tanh,
    attribution,
    backprop,
    branches,
    parallel,
    residual,
    serial,
    siamese,
)
from jaxcnn import softmax_cross_entropy_with_integer_labels as cross_entropy
from jaxcnn.rules import Epsilon, ZPlus
from tests.cases import compiled
from tests.checks import assert_close


def distance(a, b):
    return jnp.abs(a - b)


def difference(a, b):
    return a - b


def every_other_row(x):
    return x[:, ::2]


def up(x, *, rule=None):
    return jaxcnn.kron_up(x, 2, rule=rule)


def same(features, kernel_size=3, **options):
    return Conv(features, kernel_size, padding="SAME", **options)


# ---------------------------------------------------------------------------------------------------------------------
# The nets, and the same in stock JAX


def conv(x, p, padding="VALID"):
    y = lax.conv_general_dilated(x, p["weight"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + p["bias"]


def up_conv(x, p):
    """Compute ``ConvTranspose(features, 2, stride=2)``: each pixel becomes a block of 2×2."""
    n, h, w, _ = x.shape
    y = jnp.einsum("nhwi,abfi->nhawbf", x, p["weight"])
    return y.reshape(n, 2 * h, 2 * w, -1) + p["bias"]


def pooled(x, size, stride, padding="VALID"):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), padding)


def dense(x, p):
    return x @ p["weight"] + p["bias"]


def inception(params, x):
    of = params["branches1"]
    one = conv(x, of["conv1"])
    two = conv(jax.nn.relu(conv(x, of["serial1"]["conv1"])), of["serial1"]["conv2"], "SAME")
    three = conv(pooled(x, 3, 1, "SAME"), of["serial2"]["conv1"])
    y = jax.nn.relu(jnp.concatenate([one, two, three], -1))
    return dense(y.mean((1, 2)), params["dense1"])


def dense_block(params, x):
    for i in (1, 2):
        y = conv(jax.nn.relu(x), params[f"branches{i}"]["serial2"]["conv1"], "SAME")
        x = jnp.concatenate([x, y], -1)
    return dense(x.reshape(len(x), -1), params["dense1"])


def u_net(params, x):
    x = jax.nn.relu(conv(x, params["conv1"], "SAME"))
    of = params["branches1"]["serial2"]
    inner = jax.nn.relu(conv(pooled(x, 2, 2), of["conv1"], "SAME"))
    deepest = jax.nn.relu(conv(pooled(inner, 2, 2), of["branches1"]["serial2"]["conv1"], "SAME"))
    inner = jnp.concatenate([inner, up_conv(deepest, of["branches1"]["serial2"]["conv_transpose1"])], -1)
    x = jnp.concatenate([x, up_conv(inner, of["conv_transpose1"])], -1)
    return conv(x, params["conv2"]).mean((1, 2))


def added(params, x):
    of = params["branches1"]
    y = conv(x, of["conv1"]) + conv(x, of["conv2"], "SAME") + x
    return dense(jax.nn.relu(y).reshape(len(x), -1), params["dense1"])


def two_inputs(params, x):
    image, row = x
    of = params["parallel1"]
    y = jnp.concatenate([conv(image, of["serial1"]["conv1"]).max((1, 2)), dense(row, of["dense1"])], -1)
    return dense(jnp.tanh(y), params["dense1"])


def pair(params, x):
    a, b = x if isinstance(x, tuple) else (x[:, 0], x[:, 1])
    one, other = (conv(each, params["siamese1"]["conv1"]).max((1, 2)) for each in (a, b))
    return dense(jnp.abs(one - other), params["dense1"])


def functions(params, x):
    x = jax.nn.relu(jnp.sin(conv(x, params["conv1"])))[:, ::2]
    x = x.repeat(2, 1).repeat(2, 2)
    return dense(x.reshape(len(x), -1), params["dense1"])


U_NET = serial(
    same(3), Relu(),
    branches(serial(), serial(
        MaxPool(2), same(3), Relu(),
        branches(serial(), serial(MaxPool(2), same(4), Relu(), ConvTranspose(3, 2, stride=2))),
        ConvTranspose(2, 2, stride=2),
    )),
    Conv(3, 1), GlobalAvgPool(),
)  # fmt: skip
IMAGE = (6, 6, 2)
NETS = {
    # name: (net, shape of an example, the same net in stock JAX)
    "inception": (
        serial(
            branches(
                Conv(2, 1), serial(Conv(2, 1), Relu(), same(3)),
                serial(MaxPool(3, stride=1, padding="SAME"), Conv(2, 1)),
            ),
            Relu(), GlobalAvgPool(), Dense(3),
        ), IMAGE, inception,
    ),
    "dense block": (
        serial(*(branches(serial(), serial(Relu(), same(2))) for _ in range(2)), Flatten(), Dense(3)), IMAGE,
        dense_block,
    ),
    "u-net": (U_NET, (8, 8, 2), u_net),
    "added": (
        serial(branches(Conv(2, 1), same(2), serial(), join="add"), Relu(), Flatten(), Dense(3)), IMAGE, added,
    ),
    "two inputs": (
        serial(parallel(serial(Conv(2, 3), GlobalMaxPool()), Dense(3)), Tanh(), Dense(3)), (IMAGE, (4,)), two_inputs,
    ),
    "siamese": (serial(siamese(Conv(4, 3), GlobalMaxPool(), join=distance), Dense(3)), (IMAGE, IMAGE), pair),
    "siamese, one array": (
        serial(siamese(Conv(4, 3), GlobalMaxPool(), join=distance), Dense(3)), (2, *IMAGE), pair,
    ),
    "functions": (
        serial(Conv(2, 3), jnp.sin, jaxcnn.relu, every_other_row, up, Flatten(), Dense(3)), IMAGE, functions,
    ),
}  # fmt: skip
LABELS = np.array([0, 1, 2, 0])


def drawn(name, n=4):
    """Return the net with random parameters and inputs, in float64."""
    net, shape, _ = NETS[name]
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    params = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape), empty)
    x = jax.tree.map(lambda s: rng.standard_normal((n, *s)), shape, is_leaf=lambda s: isinstance(s[0], int))
    return net, params, x


def loss_of(apply, params, x):
    return cross_entropy(apply(params, x), LABELS).mean()


@pytest.mark.parametrize("name", NETS)
def test_values_and_gradients(name):
    net, params, x = drawn(name)
    plain = NETS[name][2]
    assert_close([compiled(net.apply)(params, x)], [plain(params, x)], 1e-12)
    actual, expected = (
        compiled(jax.grad(functools.partial(loss_of, f), argnums=(0, 1)))(params, x) for f in (net.apply, plain)
    )
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert_close(jax.tree.leaves(actual), jax.tree.leaves(expected), 1e-10)


@pytest.mark.parametrize("name", NETS)
def test_every_layer_has_its_delta(name):
    """The gradient of each bias is the sum of its layer's δ, and a sum of δ over all paths reaches each input."""
    net, params, x = drawn(name)
    result = compiled(functools.partial(backprop, net, cross_entropy))(params, x, LABELS)
    assert set(result.deltas) == {path for path, _ in net.walk()}
    with_bias = [path for path, layer in net.walk() if hasattr(layer, "bias")]
    assert len(with_bias) >= 2
    for path in with_bias:
        bias = functools.reduce(lambda tree, part: tree[part], path.split("/"), result.gradients)["bias"]
        delta = result.deltas[path]
        np.testing.assert_allclose(delta.sum(range(delta.ndim - 1)), bias, rtol=1e-10, atol=1e-14)


def test_delta_of_each_branch_is_its_part_of_delta():
    net, params, x = drawn("inception")
    deltas = backprop(net, cross_entropy, params, x, LABELS).deltas
    parts = [deltas[f"branches1/{name}"] for name in ("conv1", "serial1", "serial2")]
    np.testing.assert_array_equal(np.concatenate(parts, -1), deltas["branches1"])
    net, params, x = drawn("added")
    deltas = backprop(net, cross_entropy, params, x, LABELS).deltas
    for name in ("conv1", "conv2", "serial1"):
        np.testing.assert_array_equal(deltas[f"branches1/{name}"], deltas["branches1"])


def test_siamese_inputs_are_one_batch():
    """A tap inside has the rows of the first example's inputs first."""
    net, params, (a, b) = drawn("siamese")
    activation = backprop(net, cross_entropy, params, (a, b), LABELS).activations["siamese1/conv1"]
    p = params["siamese1"]["conv1"]
    for i, each in enumerate((a, b)):
        np.testing.assert_allclose(activation[i::2], conv(each, p), rtol=1e-10)
    stacked = net.apply(params, np.stack([a, b], 1))
    np.testing.assert_allclose(stacked, net.apply(params, (a, b)), rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters, keys, summary


def test_parameters():
    net, shape, _ = NETS["two inputs"]
    params = net.init(jax.random.key(0), shape, jnp.bfloat16)
    assert jax.tree.map(jnp.shape, params) == {
        "parallel1": {"serial1": {"conv1": {"weight": (3, 3, 2, 2), "bias": (2,)}},
                      "dense1": {"weight": (4, 3), "bias": (3,)}},
        "dense1": {"weight": (5, 3), "bias": (3,)},
    }  # fmt: skip
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    twins = branches(Dense(3), Dense(3)).init(jax.random.key(0), (4,))
    assert np.any(twins["dense1"]["weight"] != twins["dense2"]["weight"])
    assert list(siamese(Dense(3)).init(jax.random.key(0), ((4,), (4,)))) == ["dense1"]


def test_each_branch_has_its_own_mask():
    x = np.ones((30, 40), np.float32)
    y = np.asarray(branches(Dropout(0.5), Dropout(0.5)).apply({}, x, key=jax.random.key(0)))
    assert np.mean(y[:, :40] != y[:, 40:]) == pytest.approx(0.5, abs=0.1)
    y = np.asarray(siamese(Dropout(0.5)).apply({}, (x, x), key=jax.random.key(0)))
    assert np.mean(y[:, :40] != y[:, 40:]) == pytest.approx(0.5, abs=0.1)


class Doubled(jaxcnn.Serial):
    """A custom net."""

    def apply(self, params, x, *, key=None, rules=None):
        return 2 * super().apply(params, x, key=key, rules=rules)


SUMMARIES = {
    # name: (net, shape, rows after the layers' own: (name, op, output shape, FLOPs))
    "added": (
        branches(Dense(3), Dense(3), serial(), join="add"), (3,),
        [("dense1", "Dense", (3,), 18), ("dense2", "Dense", (3,), 18), ("branches", "Branches", (3,), 6)],
    ),
    "two inputs": (
        serial(parallel(Dense(2), Dense(3))), ((3,), (4,)),
        [("parallel1/dense1", "Dense", (2,), 12), ("parallel1/dense2", "Dense", (3,), 24),
         ("parallel1", "Parallel", (5,), 0)],
    ),
    "siamese": (
        siamese(Dense(2), join="add"), (3, 4),
        [("dense1", "Dense", (2,), 3 * 16), ("siamese", "Siamese", (2,), 4)],
    ),
    "inside a custom net": (
        Doubled(serial(branches(Dense(2), Dense(2), join="add"), residual(Relu())).layers), (4,),
        [("branches1/dense1", "Dense", (2,), 16), ("branches1/dense2", "Dense", (2,), 16),
         ("branches1", "Branches", (2,), 2), ("residual1/relu1", "Relu", (2,), 2), ("residual1", "Residual", (2,), 2)],
    ),
    "a custom net inside": (
        branches(Doubled(serial(Dense(2)).layers), jnp.square), (2,),
        [("doubled1/dense1", "Dense", (2,), 8), ("square1", "Function", (2,), 0), ("branches", "Branches", (4,), 0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMMARIES)
def test_summaries(name):
    net, shape, rows = SUMMARIES[name]
    summary = net.summary(shape)
    assert [(row.name, row.op, row.output_shape, row.flops) for row in summary.rows] == rows
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    assert summary.parameters == sum(a.size for a in jax.tree.leaves(params))
    text = "3, 4" if name == "two inputs" else "×".join(map(str, shape))
    assert str(summary).splitlines()[1].split(maxsplit=1) == ["input", text]


def test_nets_are_values():
    net = NETS["siamese"][0]
    assert pickle.loads(pickle.dumps(net)) == net
    assert hash(pickle.loads(pickle.dumps(net))) == hash(net)
    assert net != serial(siamese(Conv(4, 3), GlobalMaxPool(), join="add"), Dense(3))
    assert branches(Relu()) != parallel(Relu())


# ---------------------------------------------------------------------------------------------------------------------
# Functions as layers


def test_functions_become_layers():
    net = serial(jaxcnn.relu, jaxcnn.global_avg_pool, jnp.square, every_other_row, functools.partial(up), lambda x: x)
    assert [name for name, _ in net.layers] == [
        "relu1", "global_avg_pool1", "square1", "every_other_row1", "up1", "function1",
    ]  # fmt: skip
    assert [layer for _, layer in net.layers[:3]] == [Relu(), GlobalAvgPool(), Function(jnp.square)]
    assert serial(jaxcnn.relu, Relu()).layers == (("relu1", Relu()), ("relu2", Relu()))
    assert Function(up).takes_rule
    assert not Function(jnp.square).takes_rule


def times(factor):
    def rule(call, delta):
        return tuple(factor * c for c in call.exact(delta))

    return rule


def test_a_function_with_an_argument_rule_takes_the_rule():
    net, x = serial(up), np.random.default_rng(0).standard_normal((2, 3, 3, 1))

    def delta_x(rules):
        return jax.grad(lambda x: (net.apply({}, x, rules=rules) ** 2).sum())(x)

    for key in (Function, "up1"):
        np.testing.assert_allclose(delta_x({key: times(3)}), 3 * delta_x(None), rtol=1e-12)
    message = "rules: a key must be .* that matches a layer that takes a rule, got 'Function', which matches only Func"
    with pytest.raises(ValueError, match=message):
        serial(jnp.square).apply({}, x, rules={Function: times(3)})


# ---------------------------------------------------------------------------------------------------------------------
# Rules


def gradients(rules, net=None):
    net, params, x = drawn("inception") if net is None else net
    return jax.grad(lambda params: (net.apply(params, x, rules=rules) ** 2).sum())(params)


WHICH = {
    # rules: layers whose gradients are tripled
    "a branch by its name": ({"branches1/conv1": times(3)}, {"branches1/conv1"}),
    "a layer of a branch": (
        {"branches1/serial1/conv2": times(3)}, {"branches1/serial1/conv2", "branches1/serial1/conv1"}
    ),
    "a type inside": ({MaxPool: times(3)}, set()),
    "a predicate": ({lambda name, layer: name.endswith("serial2/conv1"): times(3)}, {"branches1/serial2/conv1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WHICH)
def test_rules_reach_the_layers_of_branches(name):
    rules, tripled = WHICH[name]
    exact, actual = gradients(None), gradients(rules)
    paths = [path for path, layer in drawn("inception")[0].walk() if hasattr(layer, "bias")]
    for path in paths:
        expected, result = (
            functools.reduce(lambda tree, part: tree[part], path.split("/"), tree)["weight"] for tree in (exact, actual)
        )
        np.testing.assert_allclose(result, (3 if path in tripled else 1) * expected, rtol=1e-10, err_msg=path)


@pytest.mark.parametrize("key", [Branches, Residual, jaxcnn.Serial])
def test_the_rule_of_a_sum(key):
    """The types `Branches` and `Residual` select it; it is applied to each of the two sums of three outputs."""
    net, params, x = drawn("added")
    given = net, params, x
    if key is jaxcnn.Serial:
        with pytest.raises(ValueError, match="got 'Serial'"):
            gradients({key: times(3)}, given)
        return
    exact, actual = (gradients(rules, given)["branches1"] for rules in (None, {key: times(3)}))
    for name in ("conv1", "conv2"):
        np.testing.assert_allclose(actual[name]["weight"], 9 * exact[name]["weight"], rtol=1e-10)


def test_a_rule_for_sums_needs_a_sum():
    net, params, x = drawn("inception")
    with pytest.raises(ValueError, match="got 'Branches'"):
        net.apply(params, x, rules={Branches: times(3)})


def test_a_custom_net_hands_rules_to_branches():
    net = serial(Doubled(serial(branches(Dense(2), Dense(2))).layers), Dense(1))
    params, x = net.init(jax.random.key(0), (3,)), np.ones((2, 3), np.float32)
    exact, actual = (gradients(rules, (net, params, x)) for rules in (None, {"doubled1/branches1/dense2": times(3)}))
    for name, factor in (("dense1", 1), ("dense2", 3)):
        of_exact, of_found = (tree["doubled1"]["branches1"][name]["weight"] for tree in (exact, actual))
        np.testing.assert_allclose(of_found, factor * of_exact, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Attribution

TARGET = np.array([0, 1, 2, 0])
IMAGES = ["inception", "dense block", "u-net", "added"]
LRP_0 = {kind: Epsilon(1e-14) for kind in (Conv, ConvTranspose, Dense, GlobalAvgPool, Residual)}


def attributed(net, params, x, **options):
    return compiled(functools.partial(jaxcnn.attribute, net, target=TARGET, **options))(params, x)


def without_biases(params):
    return jax.tree_util.tree_map_with_path(lambda path, a: 0 * a if path[-1].key == "bias" else a, params)


def only_those_of(net, rules):
    """Return the rules whose types are in the net."""
    layers = [layer for _, layer in net.walk()]
    there = [kind for kind in rules if any(isinstance(layer, kind) or kind in getattr(layer, "sum_keys", ())
                                           for layer in layers)]  # fmt: skip
    return {kind: rules[kind] for kind in there}


@pytest.mark.parametrize("name", IMAGES)
def test_relevance_without_biases(name):
    """LRP-0 equals gradient × input in a net of ReLUs and max pooling, and is conserved; so is that of a composite."""
    net, params, x = drawn(name)
    params = without_biases(params)
    y = net.apply(params, x)[np.arange(4), TARGET]
    plain = functools.partial(NETS[name][2], params)
    expected = x * compiled(jax.grad(lambda x: plain(x)[np.arange(4), TARGET].sum()))(x)
    heat = attributed(net, params, x, rules=only_those_of(net, LRP_0))
    np.testing.assert_allclose(heat, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(heat.sum((1, 2, 3)), y, rtol=1e-7)


@pytest.mark.parametrize("name", IMAGES)
def test_relevance_of_a_composite_is_conserved(name):
    """With z⁺ for convolutions, for positive inputs and weights, so that no denominator is 0."""
    net, params, x = drawn(name)
    params = jax.tree.map(np.abs, without_biases(params))
    composite = attribution.epsilon_plus(epsilon=1e-14, stabilizer=1e-14)
    heat = attributed(net, params, np.abs(x), rules=composite)
    np.testing.assert_allclose(heat.sum((1, 2, 3)), net.apply(params, np.abs(x))[np.arange(4), TARGET], rtol=1e-9)
    assert (heat >= 0).all()


def test_the_sum_of_branches_needs_a_rule():
    net, params, x = drawn("added")
    message = "none for branches1/add1, an add"
    with pytest.raises(ValueError, match=message):
        attributed(net, params, x, rules={Conv: Epsilon(), Dense: Epsilon()})
    by_kind, by_residual = (
        attributed(net, params, x, rules={Conv: ZPlus(), Dense: Epsilon(), key: Epsilon(0.1)})
        for key in (Branches, Residual)
    )
    np.testing.assert_array_equal(by_kind, by_residual)


def test_norms_in_branches_are_folded():
    """Relevance equals that of the net in which each norm is part of the convolution before it."""
    net = serial(
        branches(serial(Conv(2, 1), BatchNorm()), serial(same(2, bias=False), BatchNorm())), Flatten(), Dense(3)
    )
    plain = serial(branches(serial(Conv(2, 1)), serial(same(2))), Flatten(), Dense(3))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape), net.init(jax.random.key(0), IMAGE))
    x = rng.standard_normal((4, *IMAGE))
    params = jaxcnn.calibrate(net, params, [(x, None)])
    folded, of_folded = jaxcnn.fold_batch_norm(net, params)
    assert [name for name, _ in folded.walk()] == [name for name, _ in plain.walk()]
    np.testing.assert_allclose(folded.apply(of_folded, x), net.apply(params, x), rtol=1e-10)
    composite = attribution.epsilon_plus()
    actual = attributed(net, params, x, rules=composite)
    np.testing.assert_allclose(actual, attributed(plain, of_folded, x, rules=composite), rtol=1e-9)


def test_a_norm_that_is_a_branch_stays():
    net = branches(Conv(2, 1), BatchNorm(), Conv(2, 1))
    x = np.random.default_rng(0).standard_normal((4, *IMAGE))
    params = jaxcnn.calibrate(net, net.init(jax.random.key(0), IMAGE, np.float64), [(x, None)])
    folded, of_folded = jaxcnn.fold_batch_norm(net, params)
    assert folded == net
    np.testing.assert_array_equal(folded.apply(of_folded, x), net.apply(params, x))


LINEAR_PAIR = serial(
    siamese(same(3), Relu(), GlobalMaxPool(), Dense(4), Tanh(), join=difference), Dense(3)
)  # fmt: skip


@pytest.mark.parametrize("name", [*IMAGES, "siamese, linear"])
def test_deep_lift_sums_to_the_difference(name):
    if name == "siamese, linear":
        net, shape, rng = LINEAR_PAIR, (2, *IMAGE), np.random.default_rng(0)
        params = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape), net.init(jax.random.key(0), shape))
        x = rng.standard_normal((4, *shape))
    else:
        net, params, x = drawn(name)
    heat = attributed(net, params, x, method="deep_lift", reference=0.3)
    rise = (net.apply(params, x) - net.apply(params, 0 * x + 0.3))[np.arange(4), TARGET]
    np.testing.assert_allclose(heat.sum(tuple(range(1, heat.ndim))), rise, rtol=1e-9)


def test_other_methods_are_those_of_any_function():
    net, params, x = drawn("u-net")
    plain = functools.partial(NETS["u-net"][2], params)
    expected = compiled(jax.grad(lambda x: plain(x)[np.arange(4), TARGET].sum()))(x)
    actual = attributed(net, params, x, method="gradient")
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
    assert attributed(net, params, x, method="grad_cam", layer="branches1").shape == (4, 8, 8)


REFUSED = {
    # name: (net, method, rules, message)
    "a function": (
        serial(jnp.square, Flatten(), Dense(3)), "relevance", attribution.epsilon_plus(),
        "net must be a composition of ops with a rule for relevance, got square at square1, which depends on x",
    ),
    "a function as join": (
        serial(branches(Conv(2, 1), Conv(2, 1), join=distance), Flatten(), Dense(3)), "relevance",
        attribution.epsilon_plus(), "net must be a composition of ops with a rule for relevance, got sub at branches1",
    ),
    "a function that is not linear": (
        serial(jnp.square, Flatten(), Dense(3)), "deep_lift", None,
        "net must be a composition of ops with a rule for DeepLIFT, got square at square1, which depends on x",
    ),
    "a join that is not linear": (
        serial(branches(Conv(2, 1), Conv(2, 1), join=distance), Flatten(), Dense(3)), "deep_lift", None,
        "net must be a composition of ops with a rule for DeepLIFT, got abs at branches1, which depends on x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_attribution_refuses(name):
    net, method, rules, message = REFUSED[name]
    params, x = net.init(jax.random.key(0), IMAGE), np.ones((4, *IMAGE), np.float32)
    options = {} if rules is None else {"rules": rules}
    with pytest.raises(ValueError, match=f"^attribute: {re.escape(message)}"):
        jaxcnn.attribute(net, params, x, 1, method=method, **options)


def test_relevance_through_a_function_that_takes_the_rule():
    net = serial(Conv(2, 1, bias=False), up, Flatten(), Dense(3, bias=False))
    params = net.init(jax.random.key(0), IMAGE, jnp.float64)
    x = np.random.default_rng(0).standard_normal((4, *IMAGE))
    heat = attributed(net, params, x, rules=Epsilon(1e-14))
    np.testing.assert_allclose(heat.sum((1, 2, 3)), net.apply(params, x)[np.arange(4), TARGET], rtol=1e-7)


@pytest.mark.parametrize("rules", [Epsilon(1e-14), attribution.epsilon_plus(epsilon=1e-14)], ids=["one", "composite"])
def test_relevance_through_a_function_that_moves_elements(rules):
    """It needs no rule: R of the rows that are not read is 0."""
    net = serial(every_other_row, Flatten(), Dense(3, bias=False))
    params = net.init(jax.random.key(0), IMAGE, jnp.float64)
    x = np.random.default_rng(0).standard_normal((4, *IMAGE))
    heat = attributed(net, params, x, rules=rules)
    np.testing.assert_allclose(heat.sum((1, 2, 3)), net.apply(params, x)[np.arange(4), TARGET], rtol=1e-7)
    assert not heat[:, 1::2].any()


# ---------------------------------------------------------------------------------------------------------------------
# Per-example gradients, statistics, training


@pytest.mark.parametrize("name", NETS)
def test_per_example_gradients(name):
    net, params, x = drawn(name)
    expected = by_vmap_of_trees(net)(params, x, LABELS)
    run = functools.partial(jaxcnn.per_example_gradients, net, cross_entropy)
    actual = compiled(run)(params, x, LABELS)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert_close(jax.tree.leaves(actual), jax.tree.leaves(expected), 1e-10)
    squares = sum(np.square(g).sum(tuple(range(1, g.ndim))) for g in jax.tree.leaves(expected))
    norms = compiled(functools.partial(jaxcnn.per_example_norms, net, cross_entropy))(params, x, LABELS)
    np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-10)


def by_vmap_of_trees(net):
    def one(params, x, label):
        return cross_entropy(net.apply(params, jax.tree.map(lambda a: a[None], x)), label[None]).mean()

    return compiled(jax.vmap(jax.grad(one), (None, 0, 0)))


@pytest.mark.slow("compiles whole nets")
def test_per_example_gradients_of_branches_take_keys():
    """Each example has the key folded with its index, and so its own mask."""
    net = serial(branches(serial(Dense(3), Dropout(0.5)), serial()), Dense(3))
    params = net.init(jax.random.key(0), (4,), jnp.float64)
    x, key = np.random.default_rng(0).standard_normal((4, 4)), jax.random.key(1)
    each = jaxcnn.per_example_gradients(net, cross_entropy, params, x, LABELS, key=key)

    def one(params, x, label, n):
        return cross_entropy(net.apply(params, x[None], key=jax.random.fold_in(key, n)), label[None]).mean()

    expected = jax.vmap(jax.grad(one), (None, 0, 0, 0))(params, x, LABELS, np.arange(4))
    assert_close(jax.tree.leaves(each), jax.tree.leaves(expected), 1e-12)


def test_calibrated_statistics():
    """Each norm's output has mean 0 and variance v/(v + ε) over the data, in a branch and for several inputs."""
    net = serial(
        parallel(serial(Conv(2, 3), BatchNorm(), GlobalAvgPool()), branches(BatchNorm(), Dense(3))),
        siamese_of_halves(), BatchNorm(),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, *IMAGE)), rng.standard_normal((7, 4))
    params = net.init(jax.random.key(0), (IMAGE, (4,)), np.float64)
    batches = [(jax.tree.map(lambda a, part=part: a[part], x), None) for part in (slice(0, 5), slice(5, 7))]
    calibrated = jaxcnn.calibrate(net, params, batches)
    run = compiled(functools.partial(backprop, net, lambda y, _: y, targets=None))
    activations = run(calibrated, x).activations
    norms = [path for path, layer in net.walk() if isinstance(layer, BatchNorm)]
    assert len(norms) == 4
    for path in norms:
        y = activations[path]
        over = tuple(range(y.ndim - 1))
        var = functools.reduce(lambda tree, part: tree[part], path.split("/"), calibrated)["var"]
        np.testing.assert_allclose(y.mean(over), np.zeros(y.shape[-1]), atol=1e-12, err_msg=path)
        np.testing.assert_allclose(y.var(over), var / (var + 1e-5), rtol=1e-10, err_msg=path)


def siamese_of_halves():
    return serial(lambda x: x[:, :8].reshape(-1, 2, 4), siamese(Dense(3), BatchNorm(), join="add"))


@pytest.mark.slow("compiles steps of a net")
@pytest.mark.parametrize("microbatch", [None, 2])
def test_training_with_several_inputs(microbatch):
    net, params, x = drawn("two inputs")
    plain = NETS["two inputs"][2]
    optimizer = optax.sgd(0.1)
    state = jaxcnn.TrainState.create(net, optimizer, jax.random.key(0), (IMAGE, (4,)), dtype=jnp.float64)
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float64)}
    params = jax.tree.map(np.array, state.params)
    step = jaxcnn.make_train_step(net, cross_entropy, optimizer, microbatch=microbatch)
    state, metrics = step(state, (x, LABELS))
    value, grad = jax.value_and_grad(functools.partial(loss_of, plain))(params, x)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-10)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grad)
    assert_close(jax.tree.leaves(state.params), jax.tree.leaves(expected), 1e-10)
    actual = jaxcnn.evaluate(net, cross_entropy, params, [(x, LABELS)])
    assert actual["loss"] == pytest.approx(float(value), rel=1e-10)
