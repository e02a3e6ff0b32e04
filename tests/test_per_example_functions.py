"""Per-example gradients of functions that are not this library's nets, compared with `vmap` of `grad`."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn import clipped_gradient, per_example, per_example_gradients, per_example_norms
from tests.cases import compiled
from tests.checks import assert_close

LOSS = optax.softmax_cross_entropy_with_integer_labels
SHAPE = (8, 8, 2)


class Block(nn.Module):
    """A residual block with group norm."""

    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.GroupNorm(2)(nn.Conv(self.features, (3, 3), use_bias=False, feature_group_count=2)(x)))
        y = nn.GroupNorm(2)(nn.Conv(self.features, (3, 3), kernel_dilation=2)(y))
        return nn.relu(nn.Conv(self.features, (1, 1))(x) + y)


class Resnet(nn.Module):
    """A net with residual blocks and a transposed convolution."""

    again: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.again else Block
        x = nn.max_pool(block(4)(x), (2, 2), (2, 2))
        x = nn.avg_pool(nn.ConvTranspose(4, (2, 2), (2, 2))(block(6)(x)), (2, 2), (2, 2))
        return nn.Dense(3)(nn.gelu(x).mean((1, 2)))


class OfNnx(nnx.Module):
    """A convolution, a norm and a dense layer."""

    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def linen(net):
    return lambda params, x: net.apply({"params": params}, x), net.init(jax.random.key(0), jnp.ones((1, *SHAPE)))[
        "params"
    ]


def of_nnx():
    graph, state = nnx.split(OfNnx(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state


def equinox():
    keys = jax.random.split(jax.random.key(0))
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, groups=2, padding=1, key=keys[0]), eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.GroupNorm(2, 4), eqx.nn.MaxPool2d(2, 2), eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(64, 3, key=keys[1]),
        ]
    )  # fmt: skip
    params, rest = eqx.partition(net, eqx.is_inexact_array)
    return lambda params, x: jax.vmap(eqx.combine(params, rest))(jnp.moveaxis(x, -1, 1)), params


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(jax.nn.relu(hk.Conv2D(4, 3)(x)).mean((1, 2)))))
    return net.apply, net.init(jax.random.key(0), jnp.ones((1, *SHAPE)))


def conv(x, w, stride=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, w, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def standardized(w):
    return (w - w.mean((0, 1, 2))) / jnp.sqrt(w.var((0, 1, 2)) + 1e-5)


def ends(y, params):
    """Return three outputs for each example."""
    return jnp.tanh(y).mean(tuple(range(1, y.ndim - 1))) @ params["d"]


def of_library(p, x):
    y = jaxcnn.group_norm(jaxcnn.conv(x, standardized(p["w"])), p["s"], groups=2)
    return ends(jaxcnn.hidden_layer(y, p["h"], p["b"]), p)


def attention(p, x):
    h = x.reshape(len(x), -1, 2)
    q, k, v = (jnp.einsum("nti,io->nto", h, p[name]) for name in "qkv")
    return ends(jax.nn.softmax(jnp.einsum("nto,nso->nts", q, k)) @ v, p)


def with_options(p, x):
    y = conv(x, p["w"], (2, 1), rhs_dilation=(2, 1), feature_group_count=2)
    return ends(conv(jnp.tanh(y), p["v"], padding=((1, -1), (0, 2)), lhs_dilation=(1, 2)), p)


def with_embedding(p, x):
    return ends(conv(x, p["w"]) + (x.mean((1, 2)) @ p["e"])[:, None, None], p)


def of_frames(p, x):
    return ends((conv(x.reshape(-1, 4, 8, 2), p["w"]) + p["b"]).reshape(len(x), 2, 4, 8, 4), p)


def weights_of_input(p, x):
    return ends(jax.vmap(lambda x: conv(x[None], p["w"] * x.mean())[0])(x), p)


@jax.custom_vjp
def tripled(x, w):
    return x @ w


tripled.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, delta: (2 * delta @ saved[1].T, 3 * saved[0].T @ delta))

W, D = (3, 3, 2, 4), (4, 3)
PLAIN = {
    # name: (function, shapes of its parameters)
    "tied": (lambda p, x: ends(conv(jnp.tanh(conv(x, p["w"])), p["w"]), p), {"w": (3, 3, 2, 2), "d": (2, 3)}),
    "tied, transposed": (lambda p, x: ends(jnp.tanh(x @ p["w"]) @ p["w"].T, p), {"w": (2, 5), "d": (2, 3)}),
    "tied, in a convolution and elsewhere": (
        lambda p, x: ends(conv(x, p["w"]) * p["w"].sum() + p["w"][0, 0, 0], p), {"w": W, "d": D},
    ),
    "weight standardization": (
        lambda p, x: ends(conv(x, standardized(p["w"]) * p["g"]) + p["b"], p), {"w": W, "g": (4,), "b": (4,), "d": D},
    ),
    "scale vectors": (
        lambda p, x: ends(conv(x, p["w"]) * p["s"] + p["t"][None, :, None, None], p),
        {"w": W, "s": (4,), "t": (8,), "d": D},
    ),
    "scan": (
        lambda p, x: ends(lax.scan(lambda h, w: (jnp.tanh(conv(h, w)), None), x, p["w"])[0], p),
        {"w": (3, 3, 3, 2, 2), "d": (2, 3)},
    ),
    "transposed": (lambda p, x: ends(lax.conv_transpose(x, p["w"], (2, 2), "SAME"), p), {"w": W, "d": D}),
    "options": (with_options, {"w": (3, 3, 1, 4), "v": (2, 3, 4, 4), "d": D}),
    "channels first": (
        lambda p, x: jnp.tanh(
            lax.conv_general_dilated(jnp.moveaxis(x, -1, 1), p["w"], (1, 1), "SAME") + p["b"][:, None, None]
        ).mean((2, 3)) @ p["d"],
        {"w": (4, 2, 3, 3), "b": (4,), "d": D},
    ),
    "an addend of the example": (with_embedding, {"w": W, "e": (2, 4), "d": D}),
    "several images of an example": (of_frames, {"w": W, "b": (4,), "d": D}),
    "attention": (attention, {"q": (2, 4), "k": (2, 4), "v": (2, 4), "d": D}),
    "ops of the library": (of_library, {"w": W, "h": (2, 2, 4, 4), "s": (4,), "b": (4,), "d": D}),
    "ops of the library, vmapped": (
        lambda p, x: ends(jax.vmap(lambda x: jaxcnn.relu(jaxcnn.conv(x[None], p["w"]))[0])(x), p), {"w": W, "d": D},
    ),
    "weights that depend on the input": (weights_of_input, {"w": W, "d": D}),
    "parameters in the output": (
        lambda p, x: ends(x, p) + (p["w"] ** 2).sum() * jnp.array([1.0, 2, 0]), {"w": (3,), "d": (2, 3)},
    ),
    "the input itself": (lambda p, x: x.reshape(len(x), -1) @ p["w"] @ p["d"], {"w": (128, 4), "d": D}),
    "cond": (
        lambda p, x: lax.cond(p["w"].sum() > 0, lambda h: h @ p["w"], lambda h: -h @ p["w"], x.mean((1, 2))) @ p["d"],
        {"w": (2, 4), "d": D},
    ),
    "a rule of its own": (lambda p, x: tripled(x.mean((1, 2)), p["w"]) @ p["d"], {"w": (2, 4), "d": D}),
}  # fmt: skip


def plain(name):
    fun, shapes = PLAIN[name]
    return fun, {key: np.zeros(shape) for key, shape in shapes.items()}


CASES = {
    "linen": lambda: linen(Resnet()),
    "linen, remat": lambda: linen(Resnet(again=True)),
    "nnx": of_nnx,
    "equinox": equinox,
    "haiku": haiku,
    **{name: functools.partial(plain, name) for name in PLAIN},
}


def given(name):
    fun, params = CASES[name]()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(a, np.float64) + rng.normal(0, 0.3, a.shape), params)
    return fun, params, rng.standard_normal((5, *SHAPE)), np.arange(5) % 3


def all_three(fun, params, x, y, limit):
    each, norms = per_example_gradients(fun, LOSS, params, x, y), per_example_norms(fun, LOSS, params, x, y)
    return each, norms, clipped_gradient(fun, LOSS, params, x, y, limit)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_vmap_of_grad(name):
    fun, params, x, y = given(name)
    one = jax.grad(lambda params, x, y: LOSS(fun(params, x[None]), y[None]).mean())
    expected = compiled(jax.vmap(one, (None, 0, 0)))(params, x, y)
    squares = [np.square(np.asarray(g)).sum(tuple(range(1, g.ndim))) for g in jax.tree.leaves(expected)]
    norms = np.sqrt(sum(squares))
    limit = float(np.median(norms))
    each, of_each, clipped = compiled(functools.partial(all_three, fun))(params, x, y, limit)
    assert jax.tree.structure(each) == jax.tree.structure(clipped) == jax.tree.structure(expected)
    summed = [np.einsum("n...,n->...", g, np.minimum(1, limit / norms)) for g in jax.tree.leaves(expected)]
    for result, wanted in ((each, jax.tree.leaves(expected)), ([of_each], [norms]), (clipped, summed)):
        for a, b in zip(jax.tree.leaves(result), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tied", "scale vectors", "transposed"])
@pytest.mark.parametrize("wrong", ["a", "δ"])
def test_a_wrong_input_or_delta_is_found(monkeypatch, name, wrong):
    """The comparison fails if the product of one operation has the input or δ of another example."""
    exact = per_example._products

    def spoiled(use, a, w, b, delta, n):
        if use.form.kind == "dense":
            return exact(use, a, w, b, delta, n)
        return exact(use, *((jnp.roll(a, 1, 0), w, b, delta) if wrong == "a" else (a, w, b, jnp.roll(delta, 1, 0))), n)

    monkeypatch.setattr(per_example, "_products", spoiled)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_equal_to_vmap_of_grad(name)


def test_function_that_cannot_be_traced():
    with pytest.raises(jax.errors.TracerBoolConversionError) as raised:
        per_example_norms(lambda p, x: x if x.sum() > 0 else -x, LOSS, np.ones(2), np.ones((2, 3)), np.zeros(2, int))
    assert any("per_example_norms needs a function that jax.jit accepts" in note for note in raised.value.__notes__)


def test_on_eight_devices():
    """Inside `jax.shard_map` each device has the gradients of its own examples."""
    fun, params, x, y = given("weight standardization")
    x, y = np.concatenate([x, x[:3] + 1]), np.concatenate([y, y[:3]])
    whole = compiled(functools.partial(all_three, fun))(params, x, y, 0.3)

    def run(params, x, y):
        each, norms, clipped = all_three(fun, params, x, y, 0.3)
        return each, norms, jax.tree.map(lambda g: g[None], clipped)

    mesh, rows = jax.make_mesh((8,), ("batch",)), PartitionSpec("batch")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows)
    args = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((params, PartitionSpec()), (x, rows), (y, rows)))
    each, norms, clipped = compiled(mapped)(*args)
    assert_close(jax.tree.leaves((each, norms)), jax.tree.leaves(whole[:2]), 1e-10)
    assert_close([g.sum(0) for g in jax.tree.leaves(clipped)], jax.tree.leaves(whole[2]), 1e-10)


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_norms_of_the_library_that_mix_examples(norm):
    def fun(params, x):
        y = x.mean((1, 2)) @ params
        return jaxcnn.batch_norm(y) if norm == "batch_norm" else jaxcnn.layer_norm(y, axes=0)

    with pytest.raises(ValueError, match=f"per_example_norms: {norm}"):
        per_example_norms(fun, LOSS, np.ones((2, 3)), np.ones((4, *SHAPE)), np.zeros(4, int))
