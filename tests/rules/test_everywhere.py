"""Every ready-made rule under jit, vmap and a split batch, in a training step, and on an op that it does not fit."""

import functools
import inspect
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn import Conv, Dense, Flatten, HiddenLayer, MaxPool, Relu, make_train_step, rules, serial
from jaxcnn.ops.kinds import KINDS
from tests.cases import compiled, with_cotangents
from tests.checks import SPLIT_BY, assert_close

RELU, POOL, AFFINE = ("relu",), ("max_pool",), ("conv", "depthwise_conv", "conv_transpose", "dense")
ANY = (*RELU, *POOL, "conv", "dense")

FITS = {
    # rule: the ops it fits, in addition to hidden_layer
    rules.guided_relu: RELU,
    rules.deconv_relu: RELU,
    rules.straight_through: RELU,
    rules.SoftplusSmoothed(2.0): RELU,
    rules.winner: POOL,
    rules.literal_up: POOL,
    rules.proportional: POOL,
    rules.even_split: POOL,
    rules.FeedbackAlignment(3): AFFINE,
    rules.sign_symmetric: AFFINE,
    rules.ClipDelta(0.5): ANY,
    rules.QuantizedDelta("bfloat16"): ANY,
    rules.QuantizedDelta("float8_e4m3fn"): ANY,
    rules.QuantizedDelta("int8"): ANY,
    rules.QuantizedDelta("int8", stochastic=False): ANY,
    rules.HiddenLayerRules(conv=rules.sign_symmetric, relu=rules.guided_relu, pool=rules.literal_up): (),
}

OPS = {
    # op: (function, shapes of its arrays)
    "relu": (jaxcnn.relu, ((4, 6, 6, 2),)),
    "max_pool": (functools.partial(jaxcnn.max_pool, window=3, stride=2, padding=1), ((4, 6, 6, 2),)),
    "conv": (functools.partial(jaxcnn.conv, padding=1), ((4, 6, 5, 2), (3, 2, 2, 3), (3,))),
    "dense": (jaxcnn.dense, ((4, 5), (5, 3), (3,))),
    "hidden_layer": (functools.partial(jaxcnn.hidden_layer, pool_stride=1), ((4, 6, 5, 2), (3, 2, 2, 3), (3,))),
}
LAYERS = {"relu": Relu, "max_pool": MaxPool, "conv": Conv, "dense": Dense, "hidden_layer": HiddenLayer}
FITTING = [(rule, op) for rule, ops in FITS.items() for op in (*ops, "hidden_layer") if op in OPS]
STRANGE = [(rule, op) for rule, ops in FITS.items() for op in OPS if op not in (*ops, "hidden_layer")]


def name_of(value):
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


def drawn(op, rule=None, seed=0):
    """Return (function, arrays, δ)."""
    function, shapes = OPS[op]
    rng = np.random.default_rng(seed)
    args = tuple(rng.standard_normal(shape) for shape in shapes)
    delta = rng.standard_normal(jax.eval_shape(function, *args).shape)
    return pulled(op, rule), args, delta


@functools.cache
def pulled(op, rule):
    """Return the same function for the same arguments, so that JAX finds it in its caches."""
    return with_cotangents(functools.partial(OPS[op][0], rule=rule))


def flat(result):
    return jax.tree.leaves(result)


def test_the_table_is_whole():
    """The table has a row for every ready-made rule in these modules."""
    modules = [f"jaxcnn.rules.{name}" for name in ("rectifiers", "pooling", "training", "compose")]
    listed = {getattr(rule, "__name__", type(rule).__name__) for rule in FITS}
    exported = {name for name, value in vars(rules).items() if getattr(value, "__module__", "") in modules}
    assert listed == exported


@pytest.mark.parametrize(("rule", "op"), FITTING, ids=name_of)
def test_jit_equals_eager(rule, op):
    run, args, delta = drawn(op, rule)
    result = jax.jit(run)(args, delta)
    assert_close(flat(result), flat(run(tuple(map(jnp.asarray, args)), jnp.asarray(delta))), 1e-10)
    exact = drawn(op)[0](args, delta)
    assert_close([result[0]], [exact[0]], 1e-12)  # the forward result is unchanged
    same = all(np.allclose(a, b, rtol=1e-6) for a, b in zip(flat(result[1]), flat(exact[1]), strict=True))
    assert same == (rule in (rules.winner, rules.even_split))


@pytest.mark.parametrize(("rule", "op"), FITTING, ids=name_of)
def test_vmap_equals_a_loop(rule, op):
    turns = [drawn(op, rule, seed)[1:] for seed in (0, 1)]
    run = drawn(op, rule)[0]
    args, deltas = jax.tree.map(lambda *a: np.stack(a), *turns)
    expected = [compiled(run)(*turn) for turn in turns]
    result = compiled(jax.vmap(run))(args, deltas)
    assert_close(flat(result), flat(jax.tree.map(lambda *a: np.stack(a), *expected)), 1e-10)


# A rule for several ops is split by both types of axes.
@pytest.mark.parametrize(
    ("rule", "op", "axis_type"),
    [(*fitting, SPLIT_BY[i % len(SPLIT_BY)]) for i, fitting in enumerate(FITTING)],
    ids=name_of,
)
def test_a_split_batch(rule, op, axis_type):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    run, args, delta = drawn(op, rule)
    spread = (jax.device_put(args[0], split), *(jax.device_put(a, whole) for a in args[1:]))
    result = compiled(run)(spread, jax.device_put(delta, split))
    assert len(result[0].sharding.device_set) == 2
    assert_close(flat(result), flat(compiled(run)(args, delta)), 1e-10)


NETS = {
    True: serial(HiddenLayer(3, 3, pool_stride=1), Flatten(), Dense(3)),
    False: serial(Conv(3, 3), Relu(), MaxPool(3, stride=2), Flatten(), Dense(3)),
}


@functools.cache
def created(net):
    return jaxcnn.TrainState.create(net, optax.sgd(1.0), jax.random.key(0), (8, 8, 1))


def initial(net):
    """Return parameters and a copy of the state with them, which the step may donate."""
    return created(net).params, jax.tree.map(jnp.copy, created(net))


@pytest.mark.parametrize(("rule", "op"), FITTING, ids=name_of)
def test_in_a_training_step(rule, op):
    """A gradient descent step subtracts the gradient given by the net's `rules=`, and no element of it is NaN."""
    net = NETS[op == "hidden_layer"]
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((4, 8, 8, 1)).astype(np.float32), np.array([0, 1, 2, 0])
    loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    which = {LAYERS[op]: rule}
    before, state = initial(net)
    # Compiled like the step, because stochastic rounding depends on the exact bits of δ.
    gradients = jax.jit(jax.grad(lambda p: loss(net.apply(p, x, rules=which), labels).mean()))(before)
    step = make_train_step(net, loss, optax.sgd(1.0), rules=which)
    state, metrics = step(state, (x, labels))
    assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: a - b, before, jax.device_get(state.params))
    assert_close(flat(moved), flat(gradients), 1e-5)


@pytest.mark.parametrize(("rule", "op"), STRANGE, ids=name_of)
def test_an_op_that_it_does_not_fit(rule, op):
    run, args, delta = drawn(op, rule)
    ops = ", ".join(FITS[rule] if rule is not rules.straight_through else KINDS["activation"])
    name = re.escape(getattr(rule, "__name__", repr(rule)))
    fits = f"{ops}, hidden_layer" if ops else "hidden_layer"
    with pytest.raises(ValueError, match=f"^{op}: rule must be one that fits {op}, got {name}, which fits {fits}$"):
        run(args, delta)


@pytest.mark.parametrize("rule", FITS, ids=name_of)
def test_rules_are_values(rule):
    """Rules constructed with the same arguments are equal and have the same hash."""
    same = rule if not hasattr(rule, "__dataclass_fields__") else type(rule)(**vars(rule))
    assert same == rule
    assert hash(same) == hash(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule


@pytest.mark.parametrize("rule", [rules.guided_relu, rules.SoftplusSmoothed(2.0)], ids=name_of)
def test_a_decorated_rule_looks_like_its_function(rule):
    """It keeps the name, module, documentation and signature, and its arguments may be keywords."""
    call = rule if rule is rules.guided_relu else rule.__call__
    assert list(inspect.signature(call).parameters) == ["call", "delta"]
    assert call.__doc__
    assert call.__module__ == "jaxcnn.rules.rectifiers"
    assert call.__name__ == ("guided_relu" if rule is rules.guided_relu else "__call__")
    seen = []

    def by_keywords(call, delta):
        seen.append(rule(call=call, delta=delta))
        return seen[0]

    jax.grad(lambda x: jaxcnn.relu(x, rule=by_keywords))(1.0)
    assert len(seen) == 1


def test_a_custom_rule_in_a_hidden_layer():
    """A hidden layer accepts a user-defined rule."""

    def mine(call, delta):
        assert call.name == "relu"
        return (3 * call.exact(delta)[0],)

    run, args, delta = drawn("hidden_layer", rules.HiddenLayerRules(relu=mine))
    exact, result = (compiled(r)(args, delta)[1] for r in (drawn("hidden_layer")[0], run))
    for a, b in zip(result, exact, strict=True):
        np.testing.assert_allclose(a, 3 * np.asarray(b), rtol=1e-10)
