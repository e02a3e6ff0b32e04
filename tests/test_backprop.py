"""value_grad_and_deltas: gradients, δ and activations against an independent computation, and unsupported taps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcnn
from experiments.models import lecture
from jaxcnn import (
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Flatten,
    HiddenLayer,
    MaxPool,
    Relu,
    Tanh,
    backprop,
    residual,
    rules,
    serial,
    tap,
    value_grad_and_deltas,
)
from jaxcnn import softmax_cross_entropy_with_integer_labels as cross_entropy
from tests.cases import compiled
from tests.checks import SPLIT_BY

NETS = {
    # name: (net, shape of an example)
    "lecture": (lecture(10), (28, 28, 1)),
    "lecture, op by op": (
        serial(Conv(4, 5), Relu(), MaxPool(2), Conv(6, 5), Relu(), MaxPool(2), Flatten(), Dropout(0.5), Dense(10)),
        (28, 28, 1),
    ),
    "residual": (
        serial(
            Conv(3, 3), residual(Conv(3, 3, padding="SAME"), Tanh(), Conv(3, 1), name="block"), AvgPool(2), Flatten(),
            Dense(10),
        ),
        (8, 8, 2),
    ),
    "batch norm": (
        serial(
            Conv(4, 3, bias=False), BatchNorm(), Relu(),
            residual(Conv(4, 3, padding="SAME", bias=False), BatchNorm()), Flatten(), Dense(10),
        ),
        (8, 8, 2),
    ),
    "nested": (
        serial(
            serial(HiddenLayer(4, 3), residual(serial(Dense(5), Tanh(), name="up"), Dense(4))), Flatten(), Dense(10),
        ),
        (8, 8, 2),
    ),
}  # fmt: skip


def given(name, dtype=np.float64, batch=4):
    net, shape = NETS[name]
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(dtype), empty)
    labels = np.arange(batch, dtype=np.int32) % 10
    return net, params, rng.standard_normal((batch, *shape)).astype(dtype), lambda z: cross_entropy(z, labels)


def backprop_of(net, loss, params, x, **options):
    """Run `backprop` with a loss of the outputs alone."""
    return backprop(net, lambda outputs, _: loss(outputs), params, x, None, **options)


def by_addition(net, params, x, error, key=None, layer_rule=None):
    """Return (E, ∂E/∂params, activations, δ) by running the layers one by one.

    δ is the derivative with respect to a value added to each layer's output.
    """
    seen = {}

    def run(net, params, x, added, key, path):
        y = x
        for i, (name, layer) in enumerate(net.layers):
            here, part = path + name, None if key is None else jax.random.fold_in(key, i)
            own = params.get(name, {})
            if isinstance(layer, jaxcnn.Serial):
                y = run(layer, own, y, added, part, here + "/")
            else:
                y = layer.apply(own, y, key=part, rule=layer_rule)
            seen[here] = y
            y = y + added.get(here, 0)
        return x + y if type(net).__name__ == "Residual" else y

    def total(params, added):
        seen.clear()
        return error(run(net, params, x, added, key, "")).mean(), dict(seen)

    shapes = jax.eval_shape(lambda: total(params, {})[1])
    added = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    (value, activations), (gradients, deltas) = compiled(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(
        params, added
    )
    return value, gradients, activations, deltas


def assert_same(result, expected, tolerance=1e-12):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(float(np.abs(b).max(initial=0)), 1e-300))


# ---------------------------------------------------------------------------------------------------------------------
# Against autodiff


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True])
def test_loss_gradients_activations_and_deltas(name, training):
    net, params, x, error = given(name)
    key = jax.random.key(3) if training else None
    result = compiled(functools.partial(backprop_of, net, error, key=key))(params, x)
    assert set(result.deltas) == set(result.activations) == {name for name, _ in net.walk()}
    expected = by_addition(net, params, x, error, key, rules.autodiff)
    assert_same((result.loss, result.gradients, result.activations, result.deltas), expected)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_grad(name):
    net, params, x, error = given(name)
    result = compiled(functools.partial(backprop_of, net, error))(params, x)
    value, gradients = compiled(jax.value_and_grad(lambda params: error(net.apply(params, x)).mean()))(params)
    assert_same((result.loss, result.gradients), (value, gradients))


@pytest.mark.slow("runs op by op")
def test_without_jit():
    net, params, x, error = given("residual")
    result = backprop_of(net, error, params, x)
    assert_same(result, compiled(functools.partial(backprop_of, net, error))(params, x))


def test_an_error_that_is_a_scalar_is_not_averaged_again():
    net, params, x, error = given("residual")
    result = backprop_of(net, lambda z: error(z).sum(), params, x)
    mean = backprop_of(net, error, params, x)
    assert_same(result.deltas, jax.tree.map(lambda d: len(x) * d, mean.deltas))


def test_rules_change_only_deltas():
    net, params, x, error = given("lecture, op by op")

    def doubled(call, delta):
        return jax.tree.map(lambda c: 2 * c, call.exact(delta))

    exact, other = (
        compiled(functools.partial(backprop_of, net, error, rules=r))(params, x) for r in (None, {"relu2": doubled})
    )
    assert_same(other.activations, exact.activations)
    factors = {"conv1": 2, "relu1": 2, "max_pool1": 2, "conv2": 2}
    assert_same(other.deltas, {name: factors.get(name, 1) * d for name, d in exact.deltas.items()})


def test_float32_stays_float32():
    net, params, x, error = given("residual", np.float32)
    result = jax.eval_shape(functools.partial(backprop_of, net, error), params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {np.dtype(np.float32)}


# ---------------------------------------------------------------------------------------------------------------------
# Transformations


def test_vmap_equals_a_loop():
    net, params, x, _ = given("residual")
    labels = np.arange(4, dtype=np.int32)

    def one(x, label):
        return backprop(net, cross_entropy, params, x[None], label[None])

    result = compiled(jax.vmap(one))(x, labels)
    turns = [compiled(one)(x[i], labels[i]) for i in range(4)]
    assert_same(result, jax.tree.map(lambda *leaves: np.stack(leaves), *turns))


@pytest.mark.parametrize("axis_type", SPLIT_BY, ids=str)
def test_a_split_batch(axis_type):
    net, params, x, error = given("nested")
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    run = compiled(functools.partial(backprop_of, net, error))
    result = run(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), split)
    assert len(result.deltas["dense1"].sharding.device_set) == 2
    assert_same(result, run(params, x))


def test_inside_shard_map():
    net, params, x, error = given("residual")
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    labels = np.arange(4, dtype=np.int32)

    def local(params, x, labels):
        result = backprop(net, lambda z, t: cross_entropy(z, t).sum() / 4, params, x, labels)
        return lax.psum(result.loss, "batch"), result.gradients, result.deltas

    rows = PartitionSpec("batch")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=(PartitionSpec(), PartitionSpec(), rows)
    )
    whole = backprop_of(net, error, params, x)
    assert_same(compiled(run)(params, x, labels), (whole.loss, whole.gradients, whole.deltas))


def test_again_in_reverse():
    """Derivatives of δ by the parameters agree with autodiff, with plain JAX ops in forward mode as well."""
    net, params, x, _ = given("residual")

    def error(outputs):
        return outputs**3

    def squared_delta(params, rules=None):
        return (backprop_of(net, error, params, x, rules=rules).deltas["conv1"] ** 2).sum()

    def plain(params):
        def rest(a):
            for name, layer in net.layers[1:]:
                option = "rules" if isinstance(layer, jaxcnn.Serial) else "rule"
                a = layer.apply(params.get(name, {}), a, **{option: rules.autodiff})
            return error(a).mean()

        first = net.layers[0][1].apply(params["conv1"], x, rule=rules.autodiff)
        return (jax.grad(rest)(first) ** 2).sum()

    expected = compiled(jax.grad(plain))(params)
    assert_same(compiled(jax.grad(squared_delta))(params), expected, 1e-11)
    forward = jax.jacfwd(functools.partial(squared_delta, rules=rules.autodiff))
    assert_same(compiled(forward)(params), expected, 1e-11)


def products(f, *args) -> int:
    """Count convolutions and matrix products in the compiled program."""
    text = jax.jit(f).lower(*args).compile().as_text()
    return sum(line.count(" convolution(") + line.count(" dot(") for line in text.splitlines())


@pytest.mark.parametrize("name", ["lecture", "residual"])
def test_one_forward_and_one_backward(name):
    """There are no more products than in `jax.value_and_grad`."""
    net, params, x, error = given(name, np.float32)
    plain = jax.value_and_grad(lambda params, x: error(net.apply(params, x)).mean())
    expected = products(plain, params, x)
    assert expected > 4
    assert products(functools.partial(backprop_of, net, error), params, x) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Any function


def test_a_function_with_taps():
    def fun(params, x, *, factor):
        first = tap("first", jnp.sin(params["a"] * x))
        tap("on no path", first * 2)
        return (tap("second", first**2) * factor).sum()

    params, x = {"a": jnp.array(0.7)}, jnp.array([1.0, -2.0])
    result = value_grad_and_deltas(fun)(params, x, factor=3.0)

    def with_more(params, x, *, factor):
        return fun(params, x, factor=factor), {"twice": 2 * x}

    again, more = value_grad_and_deltas(with_more, has_aux=True)(params, x, factor=3.0)
    jax.tree.map(np.testing.assert_array_equal, again, result)
    np.testing.assert_array_equal(more["twice"], 2 * x)
    s, c = np.sin(0.7 * x), np.cos(0.7 * x)
    expected = {"first": 6 * s, "second": np.full(2, 3.0), "on no path": np.zeros(2)}
    np.testing.assert_allclose(result.loss, 3 * (s**2).sum(), rtol=1e-15)
    np.testing.assert_allclose(result.gradients["a"], (6 * s * c * x).sum(), rtol=1e-14)
    assert_same(result.deltas, jax.tree.map(jnp.asarray, expected), 1e-14)
    assert_same(result.activations, {"first": s, "second": s**2, "on no path": 2 * s}, 1e-14)


def test_a_tap_alone_does_nothing():
    x = np.ones(3)
    assert tap("x", x) is x
    assert "name" not in str(jax.make_jaxpr(lambda x: tap("x", x))(x))
    assert len(jax.make_jaxpr(lambda x: tap("x", x))(x).eqns) == 0


def test_integers_have_no_delta():
    result = value_grad_and_deltas(lambda w, n: (w * tap("n", n)).sum())(2.0, jnp.arange(3))
    assert result.deltas == {}
    np.testing.assert_array_equal(result.activations["n"], [0, 1, 2])


def test_nested_calls_have_separate_taps():
    def inner(a):
        return value_grad_and_deltas(lambda a: (tap("y", a * a) * 3).sum())(a)

    def outer(a):
        return tap("y", inner(a).deltas["y"] * a).sum()

    result = value_grad_and_deltas(outer)(jnp.array(2.0))
    assert result.activations["y"] == 6
    assert result.gradients == 3


def test_jit_within_without_taps():
    double = jax.jit(lambda x: 2 * x)
    result = value_grad_and_deltas(lambda a: tap("y", double(a)) ** 2)(jnp.array(3.0))
    assert (result.gradients, result.deltas["y"]) == (24, 12)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot work


def tapped(x):
    return tap("y", 2 * x)


WITHIN = {
    "jit": jax.jit(tapped),
    "checkpoint": jax.checkpoint(tapped),
    "vmap": lambda x: jax.vmap(tapped)(x[None])[0],
    "grad": lambda x: jax.grad(tapped)(x),
    "scan": lambda x: lax.scan(lambda c, _: (tapped(c), None), x, length=2)[0],
    "cond": lambda x: lax.cond(x > 0, tapped, lambda x: x, x),
    "while_loop": lambda x: lax.fori_loop(0, 2, lambda _, x: tapped(x), x),
}


@pytest.mark.parametrize("name", WITHIN)
def test_a_tap_that_delta_cannot_leave(name):
    with pytest.raises(ValueError, match=r"tap: 'y' is inside a function transformed by JAX"):
        value_grad_and_deltas(WITHIN[name])(jnp.array(1.0))


def test_a_tap_in_a_function_that_jit_has_traced():
    """The function was traced with inactive taps, so the cached version has none."""
    known = jax.jit(lambda x: tap("y", 3 * x))
    assert known(2.0) == 6
    with pytest.raises(ValueError, match="tap: 'y' is inside"):
        value_grad_and_deltas(known)(2.0)
    assert known(2.0) == 6


def test_after_an_error_taps_are_idle_again():
    with pytest.raises(ValueError, match="twice"):
        value_grad_and_deltas(lambda x: tapped(tapped(x)))(1.0)
    assert tapped(3.0) == 6
    assert value_grad_and_deltas(tapped)(3.0).loss == 6


def test_a_name_twice():
    net, params, x, error = given("residual")

    def twice(params):
        return (error(net.apply(params, x)) + error(net.apply(params, x))).mean()

    with pytest.raises(ValueError, match="tap: name must be used once, got 'conv1' twice"):
        value_grad_and_deltas(twice)(params)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: value_grad_and_deltas(3), TypeError, "value_grad_and_deltas: fun must be a function, got 3"),
        (
            lambda: value_grad_and_deltas(lambda x: x)(jnp.ones(3)), TypeError,
            r"value_grad_and_deltas: the result of fun must be a floating scalar, got float64\[3\]",
        ),
        (
            lambda: value_grad_and_deltas(lambda x: None)(jnp.ones(3)), TypeError,
            "value_grad_and_deltas: the result of fun must be a floating scalar, got NoneType",
        ),
        (
            lambda: value_grad_and_deltas(lambda x: jnp.argmax(x))(jnp.ones(3)), TypeError,
            r"value_grad_and_deltas: the result of fun must be a floating scalar, got int64\[\]",
        ),
        (lambda: value_grad_and_deltas(lambda x: tap(3, x))(1.0), TypeError, "tap: name must be a str, got 3"),
    ],
)  # fmt: skip
def test_messages(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_refused_losses_and_rules():
    net, params, x, _ = given("residual")
    with pytest.raises(TypeError, match="backprop: the result of loss must be of a floating dtype, got int"):
        backprop_of(net, lambda z: z.argmax(-1), params, x)
    with pytest.raises(
        ValueError, match="rules: a key must be the name of a layer, got 'conv9'; the nearest are conv1"
    ):
        backprop_of(net, jnp.mean, params, x, rules={"conv9": rules.autodiff})


def test_errors_that_are_numbers_of_numpy():
    """`jax.grad` accepts them as well."""
    for value in (np.float32(2), np.float64(3), np.array(4.0)):
        result = jaxcnn.value_grad_and_deltas(lambda w, value=value: value)(jnp.ones(2))
        assert (result.loss, result.gradients.tolist()) == (value, [0, 0])
