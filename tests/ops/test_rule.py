"""``rule=`` replaces the backward pass of every op that takes one."""

import contextlib
import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn.geometry import Correlation, Window
from jaxcnn.ops.activation import Activation
from jaxcnn.ops.hidden import Hidden
from jaxcnn.ops.linear import add
from tests.cases import CASES, one_each, with_cotangents
from tests.compare_torch import CLOSE, random_delta


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


X = normal(2, 6, 6, 3)

OPS = {
    # name: (op as a function of its arrays, differentiable arrays, type of Call.static)
    "relu": (jaxcnn.relu, (X,), type(None)),
    "silu": (jaxcnn.silu, (X,), Activation),
    "leaky_relu": (functools.partial(jaxcnn.leaky_relu, negative_slope=0.3), (X,), Activation),
    "conv": (functools.partial(jaxcnn.conv, padding="SAME"), (X, normal(3, 3, 3, 4), normal(4)), Correlation),
    "conv without bias": (functools.partial(jaxcnn.conv, stride=2), (X, normal(3, 3, 3, 4)), Correlation),
    "dense": (jaxcnn.dense, (X, normal(3, 5), normal(5)), type(None)),
    "max_pool": (functools.partial(jaxcnn.max_pool, window=3, stride=1), (X,), Window),
    "kron": (jaxcnn.kron, (normal(2, 3), normal(3, 2)), type(None)),
    "kron_up": (functools.partial(jaxcnn.kron_up, factor=2), (X,), Window),
    "block_sum": (functools.partial(jaxcnn.block_sum, factor=2), (X,), Window),
    "hidden_layer": (jaxcnn.hidden_layer, (X, normal(3, 3, 3, 4), normal(4)), Hidden),
    "squared_error": (jaxcnn.squared_error, (normal(4, 3), normal(4, 3, seed=1)), type(None)),
    "softmax_cross_entropy": (jaxcnn.softmax_cross_entropy, (normal(4, 3), normal(4, 3, seed=1)), type(None)),
}


@pytest.mark.parametrize("name", OPS)
def test_a_rule_reads_every_field_of_its_call(name):
    """These are name, inputs, output, static part, the exact rule, and the same op at other inputs."""
    op, arrays, kind = OPS[name]
    expected_y, pull = jax.vjp(op, *arrays)
    elsewhere_y, elsewhere_pull = jax.vjp(op, *(a + 1 for a in arrays))
    delta = random_delta(expected_y)
    calls = []

    def spy(call, delta):
        calls.append(call)
        np.testing.assert_array_equal(call.output, expected_y)
        for found, array in zip(call.inputs, [*arrays, None][: len(call.inputs)], strict=True):
            assert (found is None) == (array is None)
            if array is not None:
                np.testing.assert_array_equal(found, array)
        assert isinstance(call.static, kind)
        assert call.name == name.split()[0]
        exact = call.exact(delta)
        elsewhere = call.at(*(None if a is None else a + 1 for a in call.inputs))
        np.testing.assert_allclose(elsewhere.output, elsewhere_y, **CLOSE)
        for found, expected in zip(elsewhere.exact(delta), elsewhere_pull(delta), strict=False):
            np.testing.assert_allclose(found, expected, **CLOSE)
        return tuple(None if a is None else k * a for k, a in enumerate(exact, start=2))

    y, pull_spied = jax.vjp(functools.partial(op, rule=spy), *arrays)
    np.testing.assert_array_equal(y, expected_y)
    for k, (found, exact) in enumerate(zip(pull_spied(delta), pull(delta), strict=True), start=2):
        np.testing.assert_allclose(found, k * np.asarray(exact), **CLOSE)
    assert len(calls) == 1


def test_a_rule_of_avg_pool_dropout_and_the_loss_of_labels():
    """These ops have inputs that are not differentiable, or a static part without a public type."""

    def doubled(call, delta):
        first, *rest = call.exact(delta)
        return (2 * first, *rest)

    key, labels = jax.random.key(0), np.ones(X.shape[:-1], np.int32)
    for op in (
        functools.partial(jaxcnn.avg_pool, window=2),
        lambda x, rule: jaxcnn.dropout(x, 0.5, key, rule=rule),
        lambda x, rule: jaxcnn.softmax_cross_entropy_with_integer_labels(x, labels, rule=rule),
    ):
        y, pull = jax.vjp(functools.partial(op, rule=None), X)
        delta = random_delta(y)
        for rule, times in ((doubled, 2), (jaxcnn.rules.autodiff, 1)):
            found = jax.vjp(functools.partial(op, rule=rule), X)[1](delta)[0]
            np.testing.assert_allclose(found, times * pull(delta)[0], **CLOSE)


def only_positive(call, delta):
    """Guided backpropagation's rule for ReLU (Springenberg et al. 2015): only positive δ passes."""
    return (jnp.where(delta > 0, call.exact(delta)[0], 0),)


def test_a_rule_under_jit_vmap_and_grad():
    """A rule is differentiated as written, so second derivatives are those of the rule."""
    x, delta, xi = (normal(4, 5, seed=seed) for seed in range(3))

    def pulled(x, delta):
        return jax.vjp(functools.partial(jaxcnn.relu, rule=only_positive), x)[1](delta)[0]

    expected = np.where((x > 0) & (delta > 0), delta, 0)
    assert 0 < np.count_nonzero(expected) < np.count_nonzero(x > 0)
    np.testing.assert_array_equal(pulled(x, delta), expected)
    np.testing.assert_array_equal(jax.jit(pulled)(x, delta), expected)
    np.testing.assert_array_equal(jax.vmap(pulled)(x, delta), expected)
    np.testing.assert_array_equal(jax.vjp(lambda d: pulled(x, d), delta)[1](xi)[0], np.where(expected != 0, xi, 0))


def test_cotangents_take_the_dtype_of_their_primals():
    x, w = normal(2, 5, 5, 3).astype(np.float32), normal(3, 3, 3, 4).astype(np.float32)

    def wide(call, delta):
        return tuple(c if c is None else c.astype(jnp.float64) for c in call.exact(delta))

    y, pull = jax.vjp(functools.partial(jaxcnn.conv, rule=wide), x, w)
    assert [c.dtype for c in pull(random_delta(y))] == [np.float32, np.float32]


def test_a_cotangent_of_none_is_zero():
    """None stops δ, as in feedback alignment with frozen kernels."""
    x, w = normal(2, 5, 5, 3), normal(3, 3, 3, 4)

    def frozen(call, delta):
        return (call.exact(delta)[0], None, None)

    y, pull = jax.vjp(functools.partial(jaxcnn.conv, rule=frozen), x, w)
    delta_x, grad_w = pull(random_delta(y))
    np.testing.assert_array_equal(grad_w, np.zeros_like(w))
    assert np.any(delta_x)


@pytest.mark.parametrize("case", [case for case in one_each(CASES) if case.takes_rule], ids=str)
def test_equal_calls_have_the_same_name_and_equal_static(case):
    """Static parts are hashable, so a rule can use them as static arguments or cache keys."""
    seen = []

    def note(call, delta):
        seen.append((call.name, call.static))
        return call.exact(delta)

    args = case.arrays()
    for _ in range(2):
        options = copy.deepcopy(dict(case.options))
        op = functools.partial(case.function.func, **options, rule=note)
        jax.eval_shape(with_cotangents(op), args, jax.eval_shape(case.function, *args))
    assert len(seen) == 2
    ((name, _),) = {*seen}
    assert name == case.op


@pytest.mark.parametrize("rule", [None, jaxcnn.rules.autodiff])
def test_the_sum_of_a_residual_block(rule):
    x, y, delta = (normal(2, 3, seed=seed) for seed in range(3))
    z, pull = jax.vjp(functools.partial(add, rule=rule), x, y)
    np.testing.assert_array_equal(z, x + y)
    np.testing.assert_array_equal(pull(delta), (delta, delta))
    with pytest.raises(ValueError, match=r"^add: x and y must be of one shape, got x \(2, 3\), y \(3,\)$"):
        add(x, y[0], rule=rule)


def test_the_value_does_not_call_the_rule():
    """Computing only the value never calls the rule."""

    def broken(call, delta):
        raise AssertionError

    np.testing.assert_array_equal(jaxcnn.relu(X, rule=broken), jaxcnn.relu(X))


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_requires_autodiff(name):
    """`custom_vjp` has no forward mode, but ``rule=autodiff`` does; it agrees with the transpose of the exact rule."""
    op, arrays, _ = OPS[name]
    y, pull = jax.vjp(op, *arrays)
    delta, tangents = random_delta(y), tuple(random_delta(a, seed=3) for a in arrays)
    plain = functools.partial(op, rule=jaxcnn.rules.autodiff)
    _, along = jax.jvp(plain, arrays, tangents)
    backward = sum(np.vdot(t, c) for t, c in zip(tangents, pull(delta), strict=True))
    np.testing.assert_allclose(np.vdot(along, delta), backward, rtol=1e-10)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(op, arrays, tangents)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays with mesh axes in their types


@pytest.mark.slow("compiles for eight devices")
@pytest.mark.parametrize("inside", [True, False], ids=["jax.set_mesh", "no mesh set"])
def test_a_split_is_part_of_the_type(inside):
    """Results are split along the batch only, have the same values, and each gradient is split like its array."""
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Explicit,))
    x, w = X, normal(3, 3, 3, 4)

    def error(x, w):
        return (jaxcnn.max_pool(jaxcnn.conv(x, w, padding="SAME"), 2) ** 3).sum()

    gradients = jax.grad(error, (0, 1))
    of_gradients = jax.grad(lambda x, w: (gradients(x, w)[0] ** 2).sum(), (0, 1))
    for spec_of_x, spec_of_w in ((("devices",), ()), ((), (None, None, None, "devices")), ((None, "devices"), ())):
        specs = PartitionSpec(*spec_of_x), PartitionSpec(*spec_of_w)
        split = tuple(jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip((x, w), specs, strict=True))
        with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
            y = jaxcnn.conv(*split)
            found = jax.jit(gradients)(*split), jax.jit(of_gradients)(*split)
        assert jax.typeof(y).sharding.spec == PartitionSpec(*spec_of_x[:1], *(None,) * (4 - len(spec_of_x[:1])))
        np.testing.assert_allclose(y, jaxcnn.conv(x, w), **CLOSE)
        for got, expected in zip(found, (gradients(x, w), of_gradients(x, w)), strict=True):
            for a, b, like in zip(got, expected, split, strict=True):
                assert jax.typeof(a).sharding == jax.typeof(like).sharding
                np.testing.assert_allclose(a, b, **CLOSE)
