"""Curvature along a vector, compared with the full matrix from autodiff in float64 and with finite differences."""

import collections
import functools
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from jaxcnn import (
    AvgPool,
    Conv,
    ConvTranspose,
    Dense,
    Flatten,
    Gelu,
    HiddenLayer,
    LayerNorm,
    MaxPool,
    Relu,
    Tanh,
    gauss_newton_vp,
    hvp,
    residual,
    rules,
    serial,
    squared_error,
)
from jaxcnn import softmax_cross_entropy_with_integer_labels as cross_entropy
from tests.cases import compiled
from tests.checks import assert_close

HEAD = (Flatten(), Dense(3))
NETS = {
    "smooth": serial(Conv(2, 3, stride=2), Tanh(), *HEAD),
    "pooled": serial(Conv(2, 3), Relu(), MaxPool(2), *HEAD),
    "hidden layer": serial(HiddenLayer(2, 3), *HEAD),
    "residual, norm": serial(Conv(2, 2), residual(serial(Conv(2, 3, padding="SAME"), Gelu())), LayerNorm(), *HEAD),
    "transposed": serial(ConvTranspose(2, 2, stride=2), Tanh(), AvgPool(3, 2), *HEAD),
}


def given(name, dtype=np.float64):
    rng = np.random.default_rng(0)
    net = NETS[name]
    empty = jax.eval_shape(lambda: net.init(jax.random.key(0), (6, 5, 1)))
    params = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(dtype), empty)
    v = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(dtype), empty)
    x, labels = rng.standard_normal((4, 6, 5, 1)).astype(dtype), np.array([0, 1, 2, 1])
    ones = np.ones((4, 3), dtype)
    losses = {
        "cross-entropy": lambda y: cross_entropy(y, labels).mean(),
        "squared": lambda y: squared_error(jnp.tanh(y), ones).mean(),  # not convex
    }
    plain = {
        "cross-entropy": lambda y: optax.softmax_cross_entropy_with_integer_labels(y, labels).mean(),
        "squared": lambda y: jnp.square(jnp.tanh(y) - ones).mean(),
    }
    return net, params, x, v, (losses, plain)


def flat(f, params):
    """Return ``f`` as a function of a vector, and that vector."""
    p, tree = ravel_pytree(params)
    return lambda p: f(tree(p)), p


@pytest.mark.parametrize("error", ["cross-entropy", "squared"])
@pytest.mark.parametrize("name", NETS)
def test_hessian(name, error):
    net, params, x, v, (losses, without) = given(name)
    plain, p = flat(lambda p: without[error](net.apply(p, x, rules=rules.autodiff)), params)
    expected = compiled(jax.hessian(plain))(p) @ ravel_pytree(v)[0]
    result = compiled(lambda p, v: hvp(lambda p: losses[error](net.apply(p, x)), p, v))(params, v)
    assert jax.tree.structure(result) == jax.tree.structure(params)
    assert_close([ravel_pytree(result)[0]], [expected], 1e-10)


@pytest.mark.parametrize("error", ["cross-entropy", "squared"])
@pytest.mark.parametrize("name", NETS)
def test_gauss_newton(name, error):
    net, params, x, v, (losses, without) = given(name)
    plain, p = flat(lambda p: net.apply(p, x, rules=rules.autodiff).ravel(), params)
    j, y = compiled(jax.jacfwd(plain))(p), plain(p)
    h = jax.hessian(lambda y: without[error](y.reshape(4, 3)))
    expected = j.T @ compiled(h)(y) @ j @ ravel_pytree(v)[0]
    product = functools.partial(gauss_newton_vp, lambda p: net.apply(p, x), losses[error])
    assert_close([ravel_pytree(compiled(product)(params, v))[0]], [expected], 1e-10)


@pytest.mark.slow("compiles large programs")
def test_finite_differences():
    net, params, x, v, (losses, _) = given("smooth")
    gradient = jax.grad(lambda p: losses["squared"](net.apply(p, x)))

    def at(t):
        return ravel_pytree(gradient(jax.tree.map(lambda p, v: p + t * v, params, v)))[0]

    result = ravel_pytree(hvp(lambda p: losses["squared"](net.apply(p, x)), params, v))[0]
    assert_close([result], [(at(1e-5) - at(-1e-5)) / 2e-5], 1e-8)


@pytest.mark.slow("compiles large programs")
def test_positive_where_the_error_is_convex():
    net, params, x, v, (losses, _) = given("residual, norm")
    result = gauss_newton_vp(lambda p: net.apply(p, x), losses["cross-entropy"], params, v)
    assert float(ravel_pytree(v)[0] @ ravel_pytree(result)[0]) > 0


def test_linear_in_v_and_mapped_over_it():
    net, params, x, v, (losses, _) = given("pooled")
    product = functools.partial(hvp, lambda p: losses["cross-entropy"](net.apply(p, x)), params)
    many = jax.tree.map(lambda a: np.stack([a, -2 * a, 0 * a]), v)
    result, one = compiled(jax.vmap(product))(many), compiled(product)(v)
    expected = jax.tree.map(lambda a: np.stack([a, -2 * a, 0 * a]), one)
    assert_close(jax.tree.leaves(result), jax.tree.leaves(expected), 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_dtypes_stay(dtype):
    net, params, x, v, (losses, _) = given("pooled", dtype)
    of_net = functools.partial(hvp, lambda p: losses["cross-entropy"](net.apply(p, x)))
    of_model = functools.partial(gauss_newton_vp, lambda p: net.apply(p, x), losses["cross-entropy"])
    for product in (of_net, of_model):
        assert {a.dtype for a in jax.tree.leaves(jax.eval_shape(product, params, v))} == {jnp.dtype(dtype)}


def test_trees_of_outputs():
    params, v = {"weight": np.array([1.0, 2.0])}, {"weight": np.array([3.0, -1.0])}

    def model(p):
        return {"a": p["weight"] ** 2, "bias": (p["weight"].sum(),)}

    def loss(y):
        return (y["a"] ** 2).sum() + 3 * y["bias"][0] ** 2

    j = np.array([[2.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
    expected = j.T @ np.diag([2.0, 2.0, 6.0]) @ j @ v["weight"]
    np.testing.assert_allclose(gauss_newton_vp(model, loss, params, v)["weight"], expected, rtol=1e-12)


class NoHash:
    """A function that cannot be hashed."""

    def __init__(self, f):
        self.f = f

    def __eq__(self, other):
        return self is other

    def __call__(self, *args):
        return self.f(*args)


@pytest.mark.slow("compiles large programs")
@pytest.mark.parametrize("kind", [flax.core.freeze, lambda p: collections.OrderedDict(reversed(p.items()))])
def test_other_mappings_and_functions_without_a_hash(kind):
    net, params, x, v, (losses, _) = given("smooth")
    loss, model = losses["cross-entropy"], lambda p: net.apply(p, x)
    expected = compiled(lambda p, v: (hvp(lambda p: loss(model(p)), p, v), gauss_newton_vp(model, loss, p, v)))(
        params, v
    )

    def both(p, v):
        return hvp(NoHash(lambda p: loss(model(p))), p, v), gauss_newton_vp(NoHash(model), NoHash(loss), p, v)

    result = compiled(both)(kind(params), kind(v))
    for a, b in zip(result, expected, strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(kind(params))
        for name, part in ((name, part) for name, own in b.items() for part in own):
            np.testing.assert_allclose(a[name][part], b[name][part], rtol=1e-12)


def test_inside_shard_map():
    """As in autodiff, H for parameters shared by all devices is that of the sum over devices."""
    net, params, x, v, _ = given("smooth")
    mesh, rows, whole = jax.make_mesh((2,), ("batch",)), PartitionSpec("batch"), PartitionSpec()

    def both(p, v, x):
        def loss(y):
            return jnp.square(jnp.tanh(y)).sum()

        return hvp(lambda p: loss(net.apply(p, x)), p, v), gauss_newton_vp(lambda p: net.apply(p, x), loss, p, v)

    mapped = jax.shard_map(both, mesh=mesh, in_specs=(whole, whole, rows), out_specs=whole)
    place = functools.partial(NamedSharding, mesh)
    result = compiled(mapped)(*jax.device_put((params, v), place(whole)), jax.device_put(x, place(rows)))
    assert_close(jax.tree.leaves(result), jax.tree.leaves(compiled(both)(params, v, x)), 1e-10)


P, COUNTS = {"weight": np.zeros((2, 3))}, {"n": np.arange(2)}
REFUSED = [
    (ValueError, "v must be a tree like params, ", lambda op: op(P, {"v": P["weight"]})),
    (ValueError, r"v\['weight'\] must be of the shape of params\['weight'\], \(2, 3\), got \(3,\)",
     lambda op: op(P, {"weight": P["weight"][0]})),
    (TypeError, r"params\['n'\] must be a floating array, got int64", lambda op: op(COUNTS, COUNTS)),
    (TypeError, "params must be a floating array, got mappingproxy",
     lambda op: op(types.MappingProxyType(P), types.MappingProxyType(P))),
]  # fmt: skip
OPS = {
    "hvp": lambda loss: functools.partial(hvp, lambda p: loss(p["weight"])),
    "gauss_newton_vp": lambda loss: functools.partial(gauss_newton_vp, lambda p: p["weight"], loss),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("kind", "message", "call"), REFUSED)
def test_refused_trees(op, kind, message, call):
    with pytest.raises(kind, match=f"^{op}: {message}"):
        call(OPS[op](jnp.sum))


def test_refused_functions_and_outputs():
    for message, call in (
        ("hvp: loss must be a function, got 3", lambda: hvp(3, P, P)),
        ("gauss_newton_vp: model must be a function, got 3", lambda: gauss_newton_vp(3, jnp.sum, P, P)),
        ("gauss_newton_vp: loss must be a function, got 3", lambda: gauss_newton_vp(lambda p: p["weight"], 3, P, P)),
        (
            r"gauss_newton_vp: the result of model must be a tree of floating arrays, got int64 at \[1\]",
            lambda: gauss_newton_vp(lambda p: (p["weight"], jnp.arange(3)), lambda y: y[0].sum(), P, P),
        ),
    ):
        with pytest.raises(TypeError, match=f"^{message}$"):
            call()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("got", "loss"),
    [
        (r"float64\[3\]", lambda w: w.sum(0)),
        (r"int64\[\]", lambda w: jnp.argmax(w)),
        ("tuple", lambda w: (w.sum(), w)),
    ],
)
def test_refused_losses(op, got, loss):
    with pytest.raises(TypeError, match=f"^{op}: the result of loss must be a floating scalar, got {got}"):
        OPS[op](loss)(P, P)
