"""The training step and evaluation: what they promise about state, traces, keys and devices."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn import (
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Flatten,
    HiddenLayer,
    Tanh,
    TrainState,
    calibrate,
    evaluate,
    make_train_step,
    residual,
    serial,
)
from tests.agreement import net_in_torch, numbers, tensors
from tests.cases import compiled
from tests.checks import SPLIT_BY

SHAPE, CLASSES = (10, 10, 1), 4
NET = serial(HiddenLayer(4, 3), Flatten(), Dense(CLASSES))
WITH_DROPOUT = serial(HiddenLayer(4, 3), Flatten(), Dropout(0.5), Dense(CLASSES))
labelled = jaxcnn.softmax_cross_entropy_with_integer_labels


def batch(n=8, seed=0):
    """Pictures, each brighter in the quarter that its label names."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, *SHAPE)).astype(np.float32)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    quarters = x.reshape(n, 2, 5, 2, 5, 1)
    quarters[np.arange(n), labels // 2, :, labels % 2] += 1.5
    return x, labels


def begun(net=NET, optimizer=None, seed=0):
    return TrainState.create(net, optimizer or optax.sgd(0.1), jax.random.key(seed), SHAPE)


def mean_loss(net, params, x, labels, **options):
    logits = jax.jit(net.apply)(params, x, **options)
    return float(labelled(logits, labels).mean()), float(np.mean(np.argmax(logits, -1) == labels))


# ---------------------------------------------------------------------------------------------------------------------
# State


def test_the_state_is_a_frozen_pytree():
    state = begun(optimizer=optax.adam(1e-3))
    assert state.step == 0
    leaves, structure = jax.tree.flatten(state)
    assert len(leaves) == 1 + 4 + (1 + 4 + 4) + 1  # step; params; adam's count, mean, square; key
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, TrainState)
    chex.assert_trees_all_equal(again.params, state.params)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = 1
    assert dataclasses.replace(state, step=3).step == 3


def test_parameters_and_the_steps_have_keys_of_their_own():
    state = begun()
    chex.assert_trees_all_equal(state.params, begun().params)
    made_with_state_key = NET.init(state.key, SHAPE)
    assert np.any(made_with_state_key["dense1"]["w"] != state.params["dense1"]["w"])


def test_the_state_is_donated():
    state = begun()
    new, _ = make_train_step(NET, labelled, optax.sgd(0.1))(state, batch())
    assert all(a.is_deleted() for a in jax.tree.leaves(state.params))
    assert not any(a.is_deleted() for a in jax.tree.leaves(new))
    assert int(new.step) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Steps


class Counted:
    """A loss that counts its traces."""

    def __init__(self, loss=labelled):
        self.loss, self.traces = loss, 0

    def __call__(self, outputs, targets):
        self.traces += 1
        return self.loss(outputs, targets)


def test_a_step_is_traced_once_for_a_shape():
    loss = Counted()
    step, state = make_train_step(WITH_DROPOUT, loss, optax.adam(1e-3)), begun(WITH_DROPOUT, optax.adam(1e-3))
    for seed in range(3):
        state, _ = step(state, batch(8, seed))
    assert loss.traces == 1
    assert int(state.step) == 3
    step(state, batch(5))
    assert loss.traces == 2


OPTIMIZERS = {
    # name: (in optax, in PyTorch)
    "sgd": (optax.sgd(0.1), functools.partial(torch.optim.SGD, lr=0.1)),
    "momentum": (optax.sgd(0.1, momentum=0.9), functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "adam": (optax.adam(1e-2), functools.partial(torch.optim.Adam, lr=1e-2)),
}


def test_a_scan_takes_the_same_steps():
    step = make_train_step(WITH_DROPOUT, labelled, optax.adam(1e-2))
    batches = [batch(seed=seed) for seed in range(3)]
    state, losses = begun(WITH_DROPOUT, optax.adam(1e-2)), []
    for one in batches:
        state, metrics = step(state, one)
        losses.append(metrics["loss"])
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    scanned, metrics = jax.jit(lambda state: jax.lax.scan(step, state, stacked))(begun(WITH_DROPOUT, optax.adam(1e-2)))
    assert scanned.step == 3
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    chex.assert_trees_all_close(scanned.params, state.params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_pytorch_from_the_same_weights(name):
    """Also the metrics: loss and accuracy of each batch before its update."""
    optimizer, of_torch = OPTIMIZERS[name]
    state = begun(optimizer=optimizer)
    step = make_train_step(NET, labelled, optimizer)
    params = tensors(state.params)
    there = of_torch(jax.tree.leaves(params))
    for seed in range(3):
        x, labels = batch(seed=seed)
        state, metrics = step(state, (x, labels))
        logits = net_in_torch(NET, params, torch.tensor(x))
        loss = F.cross_entropy(logits, torch.tensor(labels).long())
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics["accuracy"]) == np.mean(logits.argmax(1).numpy() == labels)
        there.zero_grad()
        loss.backward()
        there.step()
        # Adam divides by the gradient's size, also where it is small.
        chex.assert_trees_all_close(
            numbers(state.params), numbers(params), rtol=1e-4, atol=1e-4 if name == "adam" else 1e-6
        )


def test_one_step_of_gradient_descent_by_hand():
    """w ← w − lr·∂E/∂w (lecture §9), in float64 to the last digits."""
    x, labels = batch()
    x = x.astype(np.float64)
    params = NET.init(jax.random.key(0), SHAPE, jnp.float64)
    leaves = tensors(params)
    F.cross_entropy(net_in_torch(NET, leaves, torch.tensor(x)), torch.tensor(labels).long()).backward()
    expected = jax.tree.map(lambda w: w.detach().numpy() - 0.3 * w.grad.numpy(), leaves)
    optimizer = optax.sgd(0.3)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key(1))
    state, _ = make_train_step(NET, labelled, optimizer)(state, (x, labels))
    chex.assert_trees_all_close(numbers(state.params), expected, rtol=1e-10, atol=1e-12)


def test_metrics_are_those_before_the_update_with_dropout_on():
    state = begun(WITH_DROPOUT)
    before, key = numbers(state.params), jax.random.fold_in(state.key, 0)
    x, labels = batch()
    after, metrics = make_train_step(WITH_DROPOUT, labelled, optax.sgd(1.0))(state, (x, labels))
    loss, accuracy = mean_loss(WITH_DROPOUT, before, x, labels, key=key)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(accuracy)
    for other in (
        mean_loss(WITH_DROPOUT, before, x, labels)[0],
        mean_loss(WITH_DROPOUT, after.params, x, labels, key=key)[0],
    ):
        assert float(metrics["loss"]) != pytest.approx(other, rel=1e-3)


def run(seed, steps=4):
    optimizer = optax.adam(1e-2)
    state, step = begun(WITH_DROPOUT, optimizer, seed), make_train_step(WITH_DROPOUT, labelled, optimizer)
    losses = []
    for i in range(steps):
        state, metrics = step(state, batch(seed=i))
        losses.append(float(metrics["loss"]))
    return numbers(state.params), losses


def test_the_same_seed_is_the_same_run_bit_by_bit():
    (params, losses), (again, losses_again), (_, losses_of_another) = run(0), run(0), run(1)
    chex.assert_trees_all_equal(params, again)
    assert losses == losses_again
    assert losses != losses_of_another


def test_every_step_draws_its_own_mask():
    """Nothing is learned at a rate of 0, so that only the mask can change the loss."""
    optimizer = optax.sgd(0.0)
    state, step = begun(WITH_DROPOUT, optimizer), make_train_step(WITH_DROPOUT, labelled, optimizer)
    losses = set()
    for _ in range(3):
        state, metrics = step(state, batch())
        losses.add(float(metrics["loss"]))
    assert len(losses) == 3


def test_the_loss_falls():
    optimizer = optax.adam(1e-2)
    state, step = begun(WITH_DROPOUT, optimizer), make_train_step(WITH_DROPOUT, labelled, optimizer)
    first = evaluate(WITH_DROPOUT, labelled, state.params, [batch(200, seed=99)])
    for seed in range(60):
        state, _ = step(state, batch(32, seed))
    last = evaluate(WITH_DROPOUT, labelled, state.params, [batch(200, seed=99)])
    assert first["accuracy"] < 0.5
    assert last["accuracy"] > 0.95
    assert last["loss"] < first["loss"] / 4


def no_gradient(call, delta):
    delta_x, *parameters = call.exact(delta)
    return (delta_x, *(None if c is None else jnp.zeros_like(c) for c in parameters))


def test_rules_reach_the_step():
    state = begun()
    before = numbers(state.params)
    step = make_train_step(
        NET, labelled, optax.sgd(0.1), rules={"hidden_layer1": no_gradient, Dense: jaxcnn.rules.autodiff}
    )
    state, _ = step(state, batch())
    chex.assert_trees_all_equal(numbers(state.params["hidden_layer1"]), before["hidden_layer1"])
    assert np.any(state.params["dense1"]["w"] != before["dense1"]["w"])


def test_rules_by_autodiff_take_the_same_step():
    exact, plain = (
        make_train_step(NET, labelled, optax.sgd(0.1), rules=rules)(begun(), batch())
        for rules in (None, jaxcnn.rules.autodiff)
    )
    chex.assert_trees_all_close(numbers(exact[0].params), numbers(plain[0].params), rtol=1e-5, atol=1e-6)
    assert float(exact[1]["loss"]) == pytest.approx(float(plain[1]["loss"]), rel=1e-6)


def test_regression_has_no_accuracy():
    net = serial(Flatten(), Dense(3))
    x, targets = batch()[0], np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32)
    state = begun(net)
    params = numbers(state.params)["dense1"]
    expected = np.mean((x.reshape(8, -1) @ params["w"] + params["b"] - targets) ** 2)
    assert evaluate(net, jaxcnn.squared_error, state.params, [(x, targets)]) == pytest.approx(
        {"loss": expected}, rel=1e-5
    )
    _, metrics = make_train_step(net, jaxcnn.squared_error, optax.sgd(0.1))(state, (x, targets))
    assert set(metrics) == {"loss"}
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_losses_of_optax_fit():
    net = serial(Flatten(), Dense(3))
    targets = np.random.default_rng(1).integers(0, 2, (8, 3)).astype(np.float32)
    step = make_train_step(net, optax.sigmoid_binary_cross_entropy, optax.sgd(0.1))
    _, metrics = step(begun(net), (batch()[0], targets))
    assert set(metrics) == {"loss"}


# ---------------------------------------------------------------------------------------------------------------------
# Microbatches


def in_float64(net):
    """A state before a step of plain descent whose rate is 1: the gradient is what the parameters lose."""
    params = net.init(jax.random.key(0), SHAPE, jnp.float64)
    return TrainState(jnp.zeros((), jnp.int32), params, optax.sgd(1.0).init(params), jax.random.key(1))


def stepped(net, n, microbatch):
    x, labels = batch(n)
    step = make_train_step(net, labelled, optax.sgd(1.0), microbatch=microbatch)
    state, metrics = step(in_float64(net), (x.astype(np.float64), labels))
    return state.params, metrics


@pytest.mark.parametrize(("n", "microbatch"), [(8, 4), (8, 1), (10, 4), (7, 3), (7, 6), (6, 6), (6, 7), (0, 2)])
def test_microbatches_take_the_same_step(n, microbatch):
    """Also where they do not divide the batch, and where one is all of it."""
    chex.assert_trees_all_close(stepped(NET, n, microbatch), stepped(NET, n, None), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "net",
    [WITH_DROPOUT, serial(Conv(3, 3), BatchNorm(), Flatten(), Dense(CLASSES))],
    ids=["masks of its own", "statistics of its own"],
)
def test_a_microbatch_is_a_batch_by_itself(net):
    """Two of 3 and one of 1, each every so manieth, under a key folded with its number; their shares of 7 added up."""
    x, labels = batch(7)
    before = in_float64(net)
    key = jax.random.fold_in(before.key, 0)
    expected, loss = before.params, 0.0
    for i, part in enumerate([[0, 2, 4], [1, 3, 5], [6]]):

        def share(params, i=i, part=part):
            outputs = net.apply(params, x[part].astype(np.float64), key=jax.random.fold_in(key, i))
            return labelled(outputs, labels[part]).sum() / 7

        value, found = jax.value_and_grad(share)(before.params)
        expected, loss = jax.tree.map(jnp.subtract, expected, found), loss + value
    params, metrics = stepped(net, 7, 3)
    chex.assert_trees_all_close(numbers(params), numbers(expected), rtol=1e-9, atol=1e-12)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-10)


def test_shares_of_16_bits_are_added_in_float32():
    """256 shares of 1/256: a sum in bfloat16 stops growing where a share is less than half of its last bit."""
    net, n = serial(Dense(1, bias=False)), 256
    params = {"dense1": {"w": jnp.zeros((1, 1), jnp.bfloat16)}}
    state = TrainState(jnp.zeros((), jnp.int32), params, optax.sgd(1.0).init(params), jax.random.key(0))
    x = np.full((n, 1), 1 + 1 / 128, jnp.bfloat16)
    step = make_train_step(net, lambda y, _: -y[:, 0], optax.sgd(1.0), microbatch=1)
    state, _ = step(state, (x, np.zeros(n)))
    assert state.params["dense1"]["w"].dtype == jnp.bfloat16
    assert float(state.params["dense1"]["w"][0, 0]) == 1 + 1 / 128


def test_microbatches_need_less_memory():
    def temporary(microbatch):
        step = make_train_step(NET, labelled, optax.sgd(0.1), microbatch=microbatch)
        return step.lower(begun(), batch(256)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(None) / 4


# ---------------------------------------------------------------------------------------------------------------------
# Two devices


@pytest.mark.parametrize("net", [NET, WITH_DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("axis_type", SPLIT_BY, ids=str)
@pytest.mark.parametrize("microbatch", [None, 2])
def test_a_batch_split_over_devices_takes_the_same_steps(net, axis_type, microbatch):
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(net, labelled, optimizer, microbatch=microbatch)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(axis_type,))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
    one, two = begun(net, optimizer), jax.device_put(begun(net, optimizer), everywhere)
    for seed in range(2):
        one, metrics = step(one, batch(8, seed))
        two, metrics_of_two = step(two, jax.device_put(batch(8, seed), split))
        chex.assert_trees_all_close(numbers(metrics_of_two), numbers(metrics), rtol=1e-5)
    assert all(len(a.sharding.device_set) == 2 for a in jax.tree.leaves(two.params))
    chex.assert_trees_all_close(numbers(two.params), numbers(one.params), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_every_example_counts_the_same_whatever_its_batch():
    params = begun().params
    x, labels = batch(9)
    whole = mean_loss(NET, params, x, labels)
    parts = [(x[i:j], labels[i:j]) for i, j in [(0, 5), (5, 8), (8, 9)]]
    found = evaluate(NET, labelled, params, iter(parts))
    assert (found["loss"], found["accuracy"]) == pytest.approx(whole, rel=1e-6)
    means = np.mean([mean_loss(NET, params, *part) for part in parts], 0)
    assert found["loss"] != pytest.approx(means[0], rel=1e-3), "the mean of the batches' means is something else"


def test_an_empty_batch_among_others_counts_nothing():
    params, (x, labels) = begun().params, batch()
    expected = evaluate(NET, labelled, params, [(x, labels)])
    assert evaluate(NET, labelled, params, [(x[:0], labels[:0]), (x, labels)]) == pytest.approx(expected)


def test_dropout_is_off():
    params, (x, labels) = begun(WITH_DROPOUT).params, batch()
    found = evaluate(WITH_DROPOUT, labelled, params, [(x, labels)])
    assert found["loss"] == pytest.approx(mean_loss(WITH_DROPOUT, params, x, labels)[0], rel=1e-6)


def test_evaluation_is_traced_once_for_a_shape():
    loss, params = Counted(), begun().params
    for seed in range(2):
        evaluate(NET, loss, params, [batch(8, seed), batch(8, seed + 10)])
    assert loss.traces == 1


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of the training data

NORMS = serial(
    *(BatchNorm(), Conv(3, 3)),
    residual(Conv(3, 3, padding="SAME"), BatchNorm(eps=0.01), serial(Tanh(), BatchNorm(), name="in")),
    *(Flatten(), Dropout(0.5), Dense(4), BatchNorm(scale=False)),
)


def normalised():
    """Parameters, none of them 0 or 1, and data in uneven batches."""
    rng = np.random.default_rng(0)
    made = NORMS.init(jax.random.key(0), SHAPE, np.float64)
    params = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, a.shape), made)
    return params, [(rng.standard_normal((n, *SHAPE)) + n, None) for n in (3, 1, 0, 4)]


def test_calibrated_statistics_are_those_of_what_reaches_the_layer_at_evaluation():
    """So that over the training data together each layer's output has the mean β and the variance γ²·v/(v + ε)."""
    params, batches = normalised()
    calibrated = calibrate(NORMS, params, batches)
    seen = {}

    def spying(layer):
        def apply(params, x, **options):
            y = type(layer).apply(layer, params, x, **options)
            seen[layer] = (np.asarray(x), np.asarray(y))
            return y

        return apply

    x = np.concatenate([x for x, _ in batches])
    layers = {path: layer for path, layer in NORMS.walk() if isinstance(layer, BatchNorm)}
    assert list(layers) == ["batch_norm1", "residual1/batch_norm1", "residual1/in/batch_norm1", "batch_norm2"]
    for path, layer in layers.items():
        object.__setattr__(layer, "apply", spying(layer))
        try:
            NORMS.apply(calibrated, x)
        finally:
            object.__delattr__(layer, "apply")
        own = functools.reduce(lambda tree, name: tree[name], path.split("/"), calibrated)
        (reached, y), over = seen[layer], tuple(range(seen[layer][0].ndim - 1))
        np.testing.assert_allclose(own["mean"], reached.mean(over), rtol=1e-12, err_msg=path)
        np.testing.assert_allclose(own["var"], reached.var(over), rtol=1e-12, err_msg=path)
        np.testing.assert_allclose(y.mean(over), own["bias"], rtol=1e-10)
        share = own["var"] / (own["var"] + layer.eps)
        np.testing.assert_allclose(y.var(over), own.get("scale", 1) ** 2 * share, rtol=1e-10)


def test_calibrated_statistics_do_not_depend_on_the_batches():
    params, batches = normalised()
    x = np.concatenate([x for x, _ in batches])
    at_once = calibrate(NORMS, params, [(x, None)])
    chex.assert_trees_all_close(calibrate(NORMS, params, batches), at_once, rtol=1e-12)
    again = calibrate(NORMS, at_once, [(x[:5], None), (x[5:], None)])  # statistics that were there are replaced
    chex.assert_trees_all_close(again, at_once, rtol=1e-12)


def test_statistics_are_used_at_evaluation_and_not_while_training():
    params, batches = normalised()
    calibrated = calibrate(NORMS, params, batches)
    x, key = batches[0][0], jax.random.key(3)
    np.testing.assert_array_equal(NORMS.apply(calibrated, x, key=key), NORMS.apply(params, x, key=key))
    one = NORMS.apply(calibrated, x[:1])
    np.testing.assert_allclose(one, NORMS.apply(calibrated, x)[:1], rtol=1e-12)  # whatever its neighbours
    assert np.abs(one - NORMS.apply(params, x)[:1]).max() > 1e-3


def test_the_optimiser_never_sees_statistics():
    params, batches = normalised()
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert names == {"w", "b", "scale", "bias"}
    calibrated = calibrate(NORMS, params, batches)
    assert "mean" not in params["batch_norm1"], "what went in was changed"
    gradients = compiled(jax.grad(lambda params: (NORMS.apply(params, batches[0][0]) ** 2).sum()))(calibrated)
    for statistic in ("mean", "var"):
        assert not np.any(gradients["batch_norm1"][statistic])
    assert np.any(gradients["batch_norm1"]["scale"])


def test_statistics_of_16_bits_are_in_float32():
    net = serial(BatchNorm())
    x = (1000 + np.random.default_rng(0).standard_normal((300, 2))).astype(jnp.bfloat16)
    own = calibrate(net, net.init(jax.random.key(0), (2,), jnp.bfloat16), [(x, None)])["batch_norm1"]
    assert own["mean"].dtype == own["var"].dtype == np.float32
    np.testing.assert_allclose(own["mean"], x.astype(np.float64).mean(0), rtol=1e-6)
    assert net.apply({"batch_norm1": own}, x).dtype == jnp.bfloat16


def test_a_net_without_batch_norm_is_calibrated_already():
    params = NET.init(jax.random.key(0), SHAPE)
    assert calibrate(NET, params, iter([])) is params
