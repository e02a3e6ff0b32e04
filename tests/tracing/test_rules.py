"""Names, taps and replacement rules of explicit functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcnn
from jaxcnn import rules
from jaxcnn.ops import mark
from jaxcnn.tracing import evaluate, execute, trace
from tests.tracing.agreement import integers, random


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def block(x, w):
    with jax.named_scope("conv_a"):
        y = conv(x, w)
    y = jax.nn.relu(y)
    with jax.named_scope("conv_b"):
        y = conv(y, w)
    return jax.nn.relu(x + y)


def net(w, x):
    with jax.named_scope("net"):
        for i in range(2):
            with jax.named_scope(f"block{i}"):
                x = block(x, w)
    return x.mean((1, 2)).sum()


W, X = random(3, 3, 2, 2), random(2, 4, 4, 2, seed=1)

NAMES = [
    "net/block0/conv_a", "net/block0/relu1", "net/block0/conv_b", "net/block0/add1", "net/block0/relu2",
    "net/block1/conv_a", "net/block1/relu1", "net/block1/conv_b", "net/block1/add1", "net/block1/relu2",
    "global_avg_pool1",
]  # fmt: skip


def names(fun, *args):
    return [operation.name for operation in trace(fun, *args).operations]


@pytest.mark.parametrize(
    "fun",
    [
        net, jax.jit(net), jax.checkpoint(net), lambda w, x: jax.jit(jax.jit(net))(w, x), jaxcnn.explicit(net),
        lambda w, x: jax.vmap(lambda x: net(w, x[None]))(x).sum(),
    ],
)  # fmt: skip
def test_names_are_those_of_the_scopes(fun):
    assert names(fun, W, X) == NAMES


def test_names_without_scopes():
    def fun(w, x):
        y = conv(conv(x, w), w)
        return lax.scan(lambda c, _: (jax.nn.relu(conv(c, w)), None), y, length=2)[0]

    assert names(fun, W, X) == ["conv1", "conv2", "conv3", "relu1"]


def test_name_of_a_module_that_is_called_twice():
    def fun(w, x):
        for _ in range(2):
            with jax.named_scope("shared"):
                x = conv(x, w)
        with jax.named_scope("shared/inner"):
            return conv(x, w)

    assert names(fun, W, X) == ["shared/conv1", "shared/conv2", "shared/inner"]


def test_name_of_a_tap():
    def fun(w, x):
        y = jaxcnn.tap("conv1", jax.nn.relu(conv(x, w)))
        return jaxcnn.tap("flat", conv(y, w).reshape(2, -1)).sum()

    assert names(fun, W, X) == ["conv2", "conv1", "flat"]
    result = jaxcnn.value_grad_and_deltas(jaxcnn.explicit(fun))(W, X)
    assert sorted(result.deltas) == ["conv1", "conv2", "flat"]
    stock = jaxcnn.value_grad_and_deltas(fun)(W, X)
    for name in ("conv1", "flat"):
        np.testing.assert_allclose(result.deltas[name], stock.deltas[name], rtol=1e-12)


def test_every_delta_by_name():
    result = jax.jit(jaxcnn.value_grad_and_deltas(jaxcnn.explicit(net)))(W, X)
    assert sorted(result.deltas) == sorted(NAMES)
    value, gradient = jax.value_and_grad(net)(W, X)
    np.testing.assert_allclose(result.loss, value, rtol=1e-12)
    np.testing.assert_allclose(result.gradients, gradient, rtol=1e-12)
    # δ of the last sum, by hand: 1/16 of the mean, where the ReLU is active.
    last = result.activations["net/block1/add1"]
    np.testing.assert_allclose(result.deltas["net/block1/add1"], (last > 0) / 16, rtol=1e-12)


def test_deltas_inside_of_inner_jits_but_not_of_loops():
    @jax.jit
    def inner(x, w):
        return jax.nn.relu(conv(x, w))

    def fun(w, x):
        y = inner(x, w)
        return lax.scan(lambda c, _: (inner(c, w), None), y, length=2)[0].sum()

    result = jaxcnn.value_grad_and_deltas(jaxcnn.explicit(fun))(W, X)
    assert sorted(result.deltas) == ["conv1", "relu1"]


def test_a_tap_in_a_loop_is_refused_as_elsewhere():
    def fun(w, x):
        return lax.scan(lambda c, _: (jaxcnn.tap("inside", jnp.sin(c)), None), x, length=2)[0].sum() + w.sum()

    with pytest.raises(ValueError, match="'inside'"):
        jaxcnn.value_grad_and_deltas(jaxcnn.explicit(fun))(W, X)
    jaxcnn.explicit(fun)(W, X)


# ---------------------------------------------------------------------------------------------------------------------
# Rules


def by_hand(relu):
    """Return the gradient of `net` with respect to x with this ReLU."""

    def fun(x):
        for _ in range(2):
            x = relu(x + conv(relu(conv(x, W)), W))
        return x.mean((1, 2)).sum()

    return jax.grad(fun)(X)


def gradient(given, fun=net, x=X):
    return jax.grad(lambda x: jaxcnn.explicit(fun, rules=given)(W, x))(x)


def test_rule_of_an_op():
    expected = by_hand(lambda x: jaxcnn.relu(x, rule=rules.guided_relu))
    np.testing.assert_allclose(gradient({jaxcnn.relu: rules.guided_relu}), expected, rtol=1e-12)
    np.testing.assert_allclose(gradient({lambda name, op: op is jaxcnn.relu: rules.guided_relu}), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda: gradient({jaxcnn.relu: rules.guided_relu}))(), expected, rtol=1e-12)


def test_rule_by_name():
    each = iter([rules.guided_relu] * 2 + [None] * 2)
    expected = by_hand(lambda x: jaxcnn.relu(x, rule=next(each)))
    found = gradient({"net/block0/conv_a": None, "net/block0/conv_b": None, "net/block0/add1": None,
                      "net/block0": rules.guided_relu})  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_first_key_that_matches_wins():
    given = {"net/block0/relu1": None, jaxcnn.relu: rules.guided_relu}
    each = iter([None] + [rules.guided_relu] * 3)
    np.testing.assert_allclose(gradient(given), by_hand(lambda x: jaxcnn.relu(x, rule=next(each))), rtol=1e-12)


def test_one_rule_for_all():
    def exact(call, delta):
        return call.exact(delta)

    np.testing.assert_allclose(gradient(exact), gradient(None), rtol=1e-12)
    np.testing.assert_allclose(gradient(rules.autodiff), gradient(None), rtol=1e-12)


def test_rule_in_a_loop():
    def fun(w, x):
        return lax.scan(lambda c, _: (jax.nn.relu(conv(c, w)), None), x, length=2)[0].sum()

    guided = jax.grad(
        lambda x: jaxcnn.relu(conv(jaxcnn.relu(conv(x, W), rule=rules.guided_relu), W), rule=rules.guided_relu).sum()
    )(X)
    np.testing.assert_allclose(gradient({jaxcnn.relu: rules.guided_relu}, fun), guided, rtol=1e-12)


@pytest.mark.parametrize("relu", [lambda x: jnp.maximum(x, 0), lambda x: jnp.where(x > 0, x, 0), jax.nn.relu])
def test_guided_relu_in_every_spelling(relu):
    """The exact rule is that of the spelling, so that a tie has half of δ in `maximum`."""
    x, delta = integers(3, 9), integers(3, 9, seed=1)
    pull = jax.vjp(jaxcnn.explicit(relu, rules={jaxcnn.relu: rules.guided_relu}), x)[1]
    exact = jax.vjp(relu, x)[1](delta)[0]
    np.testing.assert_array_equal(pull(delta)[0], jnp.where(delta > 0, exact, 0))


def test_what_a_rule_sees():
    seen = {}

    def look(call, delta):
        shapes = [a if a is None else a.shape for a in call.inputs]
        again = call.at(*(a if a is None else 2 * a for a in call.inputs))
        seen[call.name] = shapes, call.output.shape, delta.shape, call.static, again.name
        return call.exact(delta)

    def fun(w, x):
        x = jnp.transpose(lax.conv_general_dilated(jnp.transpose(x, (0, 3, 1, 2)), w, (1, 1), "SAME"), (0, 2, 3, 1))
        x = jnp.where(x > 0, x, 0.5 * x) + jnp.ones(2)
        return (x.max((1, 2)) @ jnp.ones((2, 3))).sum()

    w = random(2, 2, 3, 3)
    jax.grad(lambda x: jaxcnn.explicit(fun, rules=look)(w, x))(X)
    assert sorted(seen) == ["conv", "dense", "global_max_pool", "leaky_relu"]
    shapes, out, delta, static, again = seen["conv"]
    assert shapes == [(2, 4, 4, 2), (3, 3, 2, 2), None]
    assert out == delta == (2, 4, 4, 2)
    assert (static.window.size, again) == ((3, 3), "conv")
    assert seen["leaky_relu"][3].constant == 0.5
    assert seen["global_max_pool"][3].size == (4, 4)
    assert seen["dense"][0] == [(2, 2), (2, 3), None]


def test_relevance_by_rules():
    """LRP-ε of a function in plain JAX is that of the same net in the library's ops."""

    def plain(w, x):
        y = jax.nn.relu(conv(x, w) + jnp.array([0.1, -0.2]))
        return (y.mean((1, 2)) @ jnp.array([[1.0, 2.0], [-1.0, 0.5]]) + jnp.array([0.3, 0.1])).sum()

    def own(x):
        rule = rules.Epsilon(0.1)
        y = jaxcnn.relu(jaxcnn.conv(x, W, jnp.array([0.1, -0.2]), padding="SAME", rule=rule), rule=rules.pass_through)
        y = jaxcnn.global_avg_pool(y, rule=rule)
        return jaxcnn.dense(y, jnp.array([[1.0, 2.0], [-1.0, 0.5]]), jnp.array([0.3, 0.1]), rule=rule).sum()

    given = {jaxcnn.relu: rules.pass_through, lambda name, op: True: rules.Epsilon(0.1)}
    np.testing.assert_allclose(gradient(given, plain), jax.grad(own)(X), rtol=1e-10)


WRONG = [
    (
        {"net/block0/conv_c": None}, ValueError,
        "explicit: a key of rules must be the name or op of an operation, got 'net/block0/conv_c'; the nearest names "
        "are 'net/block0/conv_b', 'net/block0/conv_a', 'net/block1/conv_b'",
    ),
    (
        {jaxcnn.max_pool: None}, ValueError,
        "explicit: a key of rules must be the name or op of an operation, got max_pool; the ops of the function are "
        "conv, relu, add, global_avg_pool",
    ),
    (
        {jaxcnn.conv: rules.guided_relu}, ValueError,
        "net/block0/conv_a: conv: rule must be one that fits conv, got guided_relu, which fits relu, hidden_layer",
    ),
    (
        {jaxcnn.relu: lambda call, delta: (delta, delta)}, ValueError,
        "net/block0/relu1: relu: the result of rule <lambda> must be a tuple of length 1, one cotangent per input, got "
        "length 2",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_rule_that_does_not_fit_is_refused_before_anything_runs(given, error, message):
    def fun(w, x):
        jax.debug.callback(lambda: pytest.fail("something runs"))
        return net(w, x)

    with pytest.raises(error) as raised:
        jaxcnn.explicit(fun, rules=given)(W, X)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "explicit: rules must be a rule, or a mapping from names, ops or predicates to rules, got 3"),
        (
            {3: None},
            "explicit: a key of rules must be a name, an op such as jaxcnn.conv, or a predicate (name, op), got 3",
        ),
    ],
)
def test_rules_of_a_wrong_type(given, message):
    with pytest.raises(TypeError) as raised:
        jaxcnn.explicit(net, rules=given)
    assert str(raised.value) == message


def test_fun_must_be_a_function():
    for make in (jaxcnn.explicit, jaxcnn.operations):
        with pytest.raises(TypeError, match="fun must be a function, got 3"):
            make(3)


# ---------------------------------------------------------------------------------------------------------------------
# Nets of layers

NET = jaxcnn.serial(
    jaxcnn.Conv(2, 3, padding="SAME"), jaxcnn.BatchNorm(),
    jaxcnn.residual(jaxcnn.Conv(2, 3, padding="SAME"), jaxcnn.Relu(), jaxcnn.Dropout(0.5)),
    jaxcnn.MaxPool(2), jaxcnn.GlobalAvgPool(), jaxcnn.Dense(3),
)  # fmt: skip


@pytest.mark.slow("compiles a net")
def test_net_of_layers_has_the_names_of_its_layers():
    params = NET.init(jax.random.key(0), (4, 4, 2), jnp.float64)

    def loss(params, x):
        return (NET.apply(params, x, key=jax.random.key(1)) ** 2).mean()

    expected = jaxcnn.value_grad_and_deltas(loss)(params, X)
    found = jaxcnn.value_grad_and_deltas(jaxcnn.explicit(loss))(params, X)
    assert sorted(found.deltas) == sorted(expected.deltas)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)
    rows = jaxcnn.operations(loss)(params, X).rows
    assert [row.name for row in rows] == [
        "conv1", "batch_norm1", "residual1/conv1", "residual1/relu1", "residual1/dropout1", "residual1", "max_pool1",
        "global_avg_pool1", "dense1",
    ]  # fmt: skip
    assert jaxcnn.operations(loss)(params, X).parameters == NET.summary((4, 4, 2)).parameters


def test_a_net_with_adaptive_pooling_and_two_outputs():
    """The layer returns a tuple, which its tap does not stack."""
    net = jaxcnn.serial(jaxcnn.AdaptiveAvgPool(3), lambda x: (jaxcnn.relu(x), -x))
    expected, found = net.apply({}, X), jaxcnn.explicit(net.apply, rules={"function1": rules.guided_relu})({}, X)
    assert isinstance(found, tuple)
    np.testing.assert_array_equal(found, expected)
    rows = jaxcnn.operations(net.apply)({}, X).rows
    assert [(row.name, row.op) for row in rows[:2]] == [
        ("adaptive_avg_pool1", "adaptive_avg_pool"), ("function1", "relu")
    ]  # fmt: skip


def test_rules_of_a_net_of_layers():
    params = NET.init(jax.random.key(0), (4, 4, 2), jnp.float64)

    def fun(w, x):
        return NET.apply(params, x).sum()

    found = gradient({jaxcnn.relu: rules.guided_relu, "residual1": None}, fun)
    expected = jax.grad(lambda x: NET.apply(params, x, rules={jaxcnn.Relu: rules.guided_relu}).sum())(X)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_own_op_under_a_transformation_stays():
    """A call that vmap has changed is no longer the op's call, but still has its rule."""

    def fun(w, x):
        return jax.vmap(lambda x: jaxcnn.relu(jaxcnn.conv(x[None], w, padding="SAME"))[0])(x).sum()

    np.testing.assert_allclose(jax.grad(jaxcnn.explicit(fun))(W, X), jax.grad(fun)(W, X), rtol=1e-12)


def test_the_table_of_marked_calls_is_bounded(monkeypatch):
    """A call that is no longer in the table has no name, and the same value."""
    monkeypatch.setattr(mark, "MAX_CALLS", 3)
    monkeypatch.setattr(mark, "_CALLS", {})
    monkeypatch.setattr(mark, "_NUMBERS", {})

    def fun(w, x):
        for slope in (0.1, 0.2, 0.3, 0.1, 0.4):
            x = jaxcnn.leaky_relu(x, negative_slope=slope)
        return x.sum()

    assert names(fun, W, X) == ["leaky_relu1", "leaky_relu2", "leaky_relu3", "leaky_relu4"]
    assert len(mark._CALLS) == len(mark._NUMBERS) == 3
    np.testing.assert_allclose(jaxcnn.explicit(fun)(W, X), fun(W, X), rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Analyses


def test_a_run_of_ones_own_sees_every_step():
    seen = []

    def fun(w, x):
        return lax.scan(lambda c, _: (jax.nn.relu(conv(c, w)), None), jnp.sin(x), length=2)[0]

    def run(step, inputs):
        seen.append(getattr(step, "name", step.primitive))
        return execute(step, inputs, run)

    traced = trace(fun, W, X)
    (y,) = evaluate(traced.program, traced.arrays, run)
    np.testing.assert_allclose(traced.result([y]), fun(W, X), rtol=1e-12)
    assert [name for name in seen if name in ("sin", "scan", "conv1", "relu1")] == ["sin", "scan", "conv1", "relu1"]


def test_paths_of_the_arrays():
    traced = trace(lambda params, x, *, flag: params["w"] * x, {"w": X}, X, flag=True)
    assert [jax.tree_util.keystr(path) for path in traced.paths] == ["[0][0]['w']", "[0][1]"]
