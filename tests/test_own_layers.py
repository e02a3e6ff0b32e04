"""Functions of a whole net with user-defined layers and parameters: exact results, or an error that names the layer."""

import collections
import dataclasses
import functools
import types
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn import (
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
    Relu,
    Tanh,
    clipped_gradient,
    fold_batch_norm,
    per_example_gradients,
    per_example_norms,
    residual,
    serial,
)
from jaxcnn import softmax_cross_entropy_with_integer_labels as cross_entropy
from jaxcnn.layers import Layer
from jaxcnn.net import Residual, Serial
from tests.cases import compiled
from tests.checks import assert_close
from tests.test_per_example import by_vmap

HEAD = (Flatten(), Dense(3))


@dataclasses.dataclass(frozen=True)
class Bottleneck(Layer):
    """A layer whose parameters are nested dicts."""

    features: int = 2

    def init(self, key, shape, dtype=jnp.float32):
        return {
            "down": {"weight": jnp.ones((shape[-1], self.features), dtype)},
            "up": [jnp.ones((self.features, shape[-1]))],
        }

    def apply(self, params, x, *, key=None, rule=None):
        return x + jnp.tanh(x @ params["down"]["weight"]) @ params["up"][0]


class Projection(Serial):
    """``layers(x) + x·w``: the shortcut has a weight, stored next to the parameters of the layers."""

    def init(self, key, shape, dtype=jnp.float32):
        out = jax.eval_shape(super().apply, super().init(key, shape, dtype), jnp.zeros((1, *shape), dtype)).shape[-1]
        return {**super().init(key, shape, dtype), "shortcut": {"weight": jnp.ones((shape[-1], out), dtype)}}

    def apply(self, params, x, **options):
        return super().apply(params, x, **options) + x @ params["shortcut"]["weight"]


class Backwards(Serial):
    """Applies the last layer first."""

    def apply(self, params, x, **options):
        return serial(*(layer for _, layer in self.layers[::-1])).apply(
            {f"{name[:-1]}{3 - int(name[-1])}": own for name, own in params.items()}, x, **options
        )


class Halved(Residual):
    """Returns half the result of a residual net."""

    def apply(self, params, x, **options):
        return super().apply(params, x, **options) / 2


class Renamed(Serial):
    """A net with only a custom ``__init__``."""

    def __init__(self, width):
        super().__init__(serial(Conv(width, 1), BatchNorm(), Relu()).layers)


@dataclasses.dataclass(frozen=True)
class TwoBranches(Layer):
    """Has two nets as fields, whose layers have the same names."""

    one: Serial = dataclasses.field(default_factory=lambda: serial(Conv(3, 3, padding="SAME"), Tanh()))
    two: Serial = dataclasses.field(default_factory=lambda: serial(Conv(3, 1), Tanh()))

    def init(self, key, shape, dtype=jnp.float32):
        return {name: getattr(self, name).init(key, shape, dtype) for name in ("one", "two")}

    def apply(self, params, x, *, key=None, rule=None):
        return self.one.apply(params["one"], x) + self.two.apply(params["two"], x)


@dataclasses.dataclass(frozen=True)
class Standardized(Layer):
    """Mixes examples by standardizing over the batch."""

    def init(self, key, shape, dtype=jnp.float32):
        return {"scale": jnp.ones(shape[-1:], dtype)}

    def apply(self, params, x, *, key=None, rule=None):
        return params["scale"] * (x - 0.5 * x.mean(0))


class Centred(Layer):
    """Mixes examples, without parameters."""

    def apply(self, params, x, *, key=None, rule=None):
        return x - 0.5 * x.mean(0)


@dataclasses.dataclass(frozen=True)
class Fourier(Layer):
    """A layer with complex parameters."""

    def init(self, key, shape, dtype=jnp.float32):
        return {"weight": jnp.ones(shape[-1:], jnp.complex128)}

    def apply(self, params, x, *, key=None, rule=None):
        return jnp.abs(jnp.fft.fft(x) * params["weight"])


class Tripled(Conv):
    """A convolution with a different apply."""

    def apply(self, params, x, *, key=None, rule=None):
        return 3 * super().apply(params, x, key=key, rule=rule)


class Wide(Conv):
    """A subclass of Conv without changes."""


def replaced(layer):
    """Return the layer with another ``apply`` on this instance only."""
    plain = layer.apply
    object.__setattr__(layer, "apply", lambda params, x, **options: 2 * plain(params, x, **options))
    return layer


CUSTOM = {
    # name: (net, shape of an example)
    "nested parameters": (serial(Conv(4, 3), Bottleneck(), Tanh(), *HEAD), (5, 5, 2)),
    "a net with its own apply": (serial(Projection(serial(Conv(3, 1), Tanh()).layers), *HEAD), (4, 4, 2)),
    "in a net": (serial(Conv(2, 1), residual(Halved(serial(Conv(2, 1), Tanh()).layers)), *HEAD), (4, 4, 2)),
    "the net itself": (Projection(serial(Dense(4), Tanh(), Dense(3)).layers), (5,)),
    "the net itself, residual": (Halved(serial(Dense(3), Tanh(), Dense(3)).layers), (3,)),
    "another order": (serial(Backwards(serial(Dense(4), Dense(4)).layers), Dense(3)), (4,)),
    "names that meet": (serial(Conv(2, 2), TwoBranches(), *HEAD), (4, 4, 1)),
    "mixes examples": (serial(Dense(4), Standardized(), Tanh(), Dense(3)), (5,)),
    "mixes examples, no parameters": (serial(Dense(4), Centred(), Tanh(), Dense(3)), (5,)),
    "complex": (serial(Dense(4), Fourier(), Dense(3)), (5,)),
    "one name twice": (Serial((("a", Dense(3)), ("t", Tanh()), ("a", Dense(3)))), (3,)),
    "subclasses of layers": (serial(Tripled(2, 2), Wide(3, 2), *HEAD), (4, 4, 1)),
    "an instance's own apply": (serial(replaced(Conv(2, 2)), Tanh(), replaced(Dense(3)), *HEAD), (4, 4, 1)),
    "transposed, options": (
        serial(
            ConvTranspose(4, (3, 2), (2, 3), 1, output_padding=1, groups=2, bias=False), Tanh(),
            ConvTranspose(2, 2, dilation=3, output_padding=2), *HEAD,
        ),
        (3, 4, 2),
    ),
}  # fmt: skip


def drawn(net, shape):
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda: net.init(jax.random.key(0), shape, np.float64))
    params = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(a.dtype), empty)
    return params, rng.standard_normal((4, *shape)), np.array([0, 1, 2, 0])


def all_three(net, params, x, y, limit, loss=cross_entropy):
    """Return gradients, norms and clipped sum."""
    each, norms = per_example_gradients(net, loss, params, x, y), per_example_norms(net, loss, params, x, y)
    return each, norms, clipped_gradient(net, loss, params, x, y, limit)


def compare(net, params, x, y, loss=cross_entropy, expected=None):
    """Assert that all three agree with autodiff of each example."""
    expected = by_vmap(net, loss)(params, x, y) if expected is None else expected
    norms = norms_of(expected)
    limit = float(np.median(norms))
    factors = np.minimum(1, limit / norms)
    assert (factors < 1).any()
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected) if g.size)
    each, of_each, clipped = compiled(functools.partial(all_three, net, loss=loss))(params, x, y, limit)
    assert jax.tree.structure(each) == jax.tree.structure(clipped) == jax.tree.structure(expected)
    summed = [np.einsum("n...,n->...", g, factors) for g in jax.tree.leaves(expected)]
    for result, wanted in ((each, jax.tree.leaves(expected)), ([of_each], [norms]), (clipped, summed)):
        for a, b in zip(jax.tree.leaves(result), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CUSTOM)
def test_gradients_of_single_examples(name):
    net, shape = CUSTOM[name]
    compare(net, *drawn(net, shape))


def norms_of(gradients):
    """Return the norms of gradients, which may be complex."""
    return np.sqrt(sum(np.square(np.abs(g)).sum(tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradients)))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and losses


@jax.tree_util.register_pytree_node_class
class Shared(Mapping):
    """One matrix used by two layers, transposed in one of them."""

    def __init__(self, w):
        self.w = w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __getitem__(self, name):
        return {"weight": self.w if name == "encode" else self.w.T}

    def __iter__(self):
        return iter(("encode", "decode"))

    def __len__(self):
        return 2


class Sorted(collections.UserDict):
    """A mapping that is not registered with JAX."""


PLAIN = serial(Conv(2, 2), Tanh(), *HEAD), (4, 4, 1)


@pytest.mark.parametrize("kind", [flax.core.FrozenDict, collections.OrderedDict])
def test_other_mappings(kind):
    net, shape = PLAIN
    params, x, y = drawn(net, shape)
    params = kind({name: kind(own) for name, own in reversed(params.items())})
    compare(net, params, x, y)


def test_a_mapping_that_is_no_tree():
    net, shape = PLAIN
    params, x, y = drawn(net, shape)
    expected = by_vmap(net)(params, x, y)
    for kind in (types.MappingProxyType, Sorted):
        result = per_example_gradients(net, cross_entropy, kind({k: kind(v) for k, v in params.items()}), x, y)
        assert jax.tree.structure(result) == jax.tree.structure(expected)
        assert_close(jax.tree.leaves(result), jax.tree.leaves(expected), 1e-10)


def test_parameters_that_two_layers_read():
    net = serial(Dense(3, name="encode"), Tanh(), Dense(3, name="decode"))
    rng = np.random.default_rng(0)
    compare(net, Shared(rng.standard_normal((3, 3))), rng.standard_normal((4, 3)), np.array([0, 1, 2, 0]))


def test_extra_entries():
    """Unused parameters have a gradient of 0, as in autodiff; None is not a parameter."""
    net, shape = PLAIN
    params, x, y = drawn(net, shape)
    conv, dense = params["conv1"], params["dense1"]
    extra = {
        "conv1": {**conv, "old": np.ones(2)},
        "dense1": {"weight": dense["weight"], "bias": None},
        "more": {"weight": np.ones((2, 3))},
    }
    expected = by_vmap(net)(extra, x, y)
    each, norms, clipped = compiled(functools.partial(all_three, net))(extra, x, y, 0.1)
    assert jax.tree.structure(each) == jax.tree.structure(expected) == jax.tree.structure(clipped)
    assert_close(jax.tree.leaves(each), jax.tree.leaves(expected), 1e-10)
    assert_close([norms], [norms_of(expected)], 1e-10)
    np.testing.assert_array_equal(clipped["conv1"]["old"], np.zeros(2))


class Weighted:
    """A loss that cannot be hashed."""

    def __eq__(self, other):
        return self is other

    def __call__(self, outputs, y):
        return 2 * cross_entropy(outputs, y)


LOSSES = {
    "no hash": Weighted(),
    "partial": functools.partial(lambda outputs, y, scale: scale * cross_entropy(outputs, y), scale=np.array(3.0)),
    "one more dim": lambda outputs, y: cross_entropy(outputs, y)[:, None],
    "a tree of targets": lambda outputs, y: cross_entropy(outputs, y["labels"]) * y["weights"],
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    net, shape = serial(Dense(3)), (2,)
    params, x, y = drawn(net, shape)
    if "tree" in name:
        y = {"labels": y, "weights": np.array([1.0, 0.5, 2.0, 3.0])}

    def one(params, x, y):
        return LOSSES[name](
            net.apply(params, x[None], rules=jaxcnn.rules.autodiff), jax.tree.map(lambda a: a[None], y)
        ).mean()

    expected = compiled(jax.vmap(jax.grad(one), (None, 0, 0)))(params, x, y)
    compare(net, params, x, y, LOSSES[name], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Refused layers and arguments


class Pair(Layer):
    """Returns two outputs."""

    def apply(self, params, x, *, key=None, rule=None):
        return x, x


class Joined(Layer):
    """Flattens to rows of pixels, which removes the batch dim."""

    def apply(self, params, x, *, key=None, rule=None):
        return x.reshape(-1, x.shape[-1])


NET = serial(Dense(3))
GIVEN = {"dense1": {"weight": np.ones((2, 3)), "bias": np.zeros(3)}}
X, Y = np.ones((4, 2)), np.array([0, 1, 2, 0])
CALIBRATED = "must be used without a key and with statistics from jaxcnn.calibrate, got statistics of the batch"
REFUSED = {
    "integers": (TypeError, r"params\['n'\] must be a floating array, got int64", NET, {**GIVEN, "n": np.arange(2)}, X,
                 {}),
    "strings": (TypeError, r"params\['n'\] must be an array, got 'a'", NET, {**GIVEN, "n": "a"}, X, {}),
    "two outputs": (TypeError, "dense1: x must be one array, got a tuple of 2", serial(Pair(), Dense(3)), GIVEN, X, {}),
    "no batch": (ValueError, r"the result of fun must be \(1, …\) for a batch of one example, got shape \(5, 3\)",
                 serial(Joined(), Dense(3)), GIVEN, np.ones((4, 5, 2)), {}),
    "axes of the batch": (ValueError, r"layer_norm: axes must be dims of one example, got \(0,\)",
                          serial(LayerNorm(axes=0, scale=False, bias=False), Dense(3)), GIVEN, X, {}),
    "targets": (ValueError, r"targets must be \(3, …\), with a value for each example, got shape \(4,\)",
                serial(Dense(3)), GIVEN, np.ones((3, 2)), {}),
    "a norm inside": (ValueError, f"halved1/batch_norm1 {CALIBRATED}",
                      serial(Halved(serial(BatchNorm()).layers)), {}, X, {}),
    "statistics of None": (ValueError, f"batch_norm1 {CALIBRATED}",
                           serial(BatchNorm()), {"batch_norm1": {"mean": None, "var": None}}, X, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    kind, message, net, params, x, options = REFUSED[name]
    functions = {f.__name__: f for f in (per_example_gradients, per_example_norms)}
    functions["clipped_gradient"] = functools.partial(clipped_gradient, max_norm=1.0)
    for op, f in functions.items():
        with pytest.raises(kind, match=message) as error:
            f(net, cross_entropy, params, x, Y, **options)
        assert op in "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])


@pytest.mark.parametrize(
    ("got", "loss"),
    [
        ("an array, got tuple", lambda z, y: (cross_entropy(z, y),)),
        ("of a floating dtype, got int64", lambda z, y: jnp.argmax(z, -1)),
    ],
)
def test_refused_losses(got, loss):
    with pytest.raises(TypeError, match=f"^per_example_norms: the result of loss must be {got}"):
        per_example_norms(NET, loss, GIVEN, X, Y)


def test_keys_reach_layers_without_parameters():
    """Each example draws its own numbers."""

    class Noise(Layer):
        def apply(self, params, x, *, key=None, rule=None):
            return x if key is None else x + jax.random.normal(key, x.shape)

    each = per_example_gradients(
        serial(Noise(), Dense(3)), cross_entropy, GIVEN, X, np.zeros(4, int), key=jax.random.key(0)
    )
    w = np.asarray(each["dense1"]["weight"])
    assert all(np.abs(w[i] - w[j]).max() > 1e-3 for i in range(4) for j in range(i))


# ---------------------------------------------------------------------------------------------------------------------
# Several devices

SPLIT = serial(
    Conv(4, 3), GroupNorm(2), BatchNorm(), ConvTranspose(3, 2, stride=2), LayerNorm(), HiddenLayer(3, 3),
    DepthwiseConv(2), Bottleneck(), TwoBranches(), Flatten(), Dense(3),
)  # fmt: skip


def split_case():
    params, x, y = drawn(SPLIT, (8, 8, 2))
    params["batch_norm1"] |= {"mean": np.array([0.1, -1, 2, 0]), "var": np.array([0.5, 1, 2, 3.0])}
    return params, x, y


@pytest.fixture(scope="module")
def whole():
    return compiled(functools.partial(all_three, SPLIT))(*split_case(), 3.0)


@pytest.mark.parametrize("check", [True, False])
def test_inside_shard_map(whole, check):
    """With parameters shared by all devices, each device has the gradients of its own examples, and their sum."""
    mesh, rows = jax.make_mesh((2,), ("batch",)), PartitionSpec("batch")

    def run(params, x, y):
        each, norms, clipped = all_three(SPLIT, params, x, y, 3.0)
        return each, norms, jax.tree.map(lambda g: g[None], clipped)

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows, check_vma=check)
    params, x, y = split_case()
    given = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((params, PartitionSpec()), (x, rows), (y, rows)))
    each, norms, of_devices = compiled(mapped)(*given)
    assert_close(jax.tree.leaves((each, norms)), jax.tree.leaves(whole[:2]), 1e-10)
    assert_close([g.sum(0) for g in jax.tree.leaves(of_devices)], jax.tree.leaves(whole[2]), 1e-10)


def test_a_batch_split_by_automatic_axes(whole):
    """XLA's `vmap` of `grad` of a stock convolution is wrong here: it uses convolutions with one group per example."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x, y = split_case()
    everywhere, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
    given = jax.device_put(params, everywhere), *jax.device_put((x, y), rows)
    result = compiled(functools.partial(all_three, SPLIT))(*given, 3.0)
    assert_close(jax.tree.leaves(result), jax.tree.leaves(whole), 1e-10)


def test_a_loss_that_varies_where_x_does_not():
    """δ would be a sum over devices."""
    mesh = jax.make_mesh((2,), ("batch",))

    def norms(params, x, y):
        scale = lax.axis_index("batch") + 1.0
        return per_example_norms(NET, lambda z, y: scale * cross_entropy(z, y), params, x, y)

    mapped = jax.shard_map(norms, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("batch"))
    with pytest.raises(
        ValueError, match=r"^per_example_norms: x must be varying over \('batch',\), as the result of loss is"
    ):
        mapped(*jax.device_put((GIVEN, X, Y), NamedSharding(mesh, PartitionSpec())))


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm folded


CONV, NORM = Conv(4, 1), BatchNorm()
PROJECTED, DOUBLED = Projection(serial(Conv(3, 1), BatchNorm()).layers), (Conv(3, 1), Dense(3), BatchNorm())
UNFOLDED = {
    # name: (net, number of batch norms that remain)
    "a net with its own apply": (serial(PROJECTED, Conv(2, 1), BatchNorm()), 1),
    "norms at its borders": (serial(BatchNorm(), Projection(serial(Dense(4)).layers), BatchNorm()), 2),
    "the net itself": (PROJECTED, 1),
    "a residual one": (serial(Halved(serial(Conv(4, 1), BatchNorm()).layers)), 1),
    "subclasses of layers": (serial(Tripled(3, 1), BatchNorm(), Tripled(2, 1)), 1),
    "an instance's own apply": (serial(replaced(Conv(3, 1)), BatchNorm(), *map(replaced, DOUBLED)), 2),
    "one name twice": (Serial((("a", CONV), ("n", NORM), ("t", Tanh()), ("a", CONV))), 1),
    "one net twice": (Serial((("a", serial(CONV, NORM)), ("t", Tanh()), ("a", serial(CONV, NORM)))), 2),
    "its own __init__": (serial(Renamed(3), Dropout(0.5)), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFOLDED)
def test_folding_keeps_the_outputs(name):
    net, stay = UNFOLDED[name]
    params, x, _ = drawn(net, (3, 3, 4))
    rng = np.random.default_rng(1)

    def with_statistics(own):
        if not isinstance(own, dict):
            return own
        if set(own) == {"scale", "bias"}:
            return {**own, "mean": rng.normal(0, 1, own["bias"].shape), "var": rng.uniform(0.5, 2, own["bias"].shape)}
        return {key: with_statistics(value) for key, value in own.items()}

    params = with_statistics(params)
    folded, of_folded = fold_batch_norm(net, params)
    assert type(folded) is type(net)
    assert sum(isinstance(layer, BatchNorm) for _, layer in folded.walk()) == stay
    np.testing.assert_allclose(folded.apply(of_folded, x), net.apply(params, x), rtol=1e-12, atol=1e-12)


def test_folding_other_mappings_and_rank_promotion():
    net = serial(Conv(4, 1, bias=False), BatchNorm(), Conv(2, 1))
    params, x, _ = drawn(net, (3, 3, 4))
    params["batch_norm1"] |= {"mean": np.arange(4.0), "var": np.arange(1.0, 5.0)}
    frozen = flax.core.freeze(params)
    with jax.numpy_rank_promotion("raise"):
        folded, of_folded = fold_batch_norm(net, frozen)
    assert [name for name, _ in folded.walk()] == ["conv1", "conv2"]
    np.testing.assert_allclose(folded.apply(of_folded, x), net.apply(params, x), rtol=1e-12)
    with pytest.raises(
        TypeError, match=r"^fold_batch_norm: conv1: params must be a dict as init makes it, got ndarray"
    ):
        fold_batch_norm(net, {**params, "conv1": np.ones(3)})
