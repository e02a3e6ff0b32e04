"""The training step and evaluation: guarantees about state, tracing, keys and devices."""

import collections
import dataclasses
import functools
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
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
from tests.cases import compiled
from tests.checks import SPLIT_BY
from tests.compare_torch import net_in_torch, numbers, tensors

SHAPE, CLASSES = (10, 10, 1), 4
NET = serial(HiddenLayer(4, 3), Flatten(), Dense(CLASSES))
WITH_DROPOUT = serial(HiddenLayer(4, 3), Flatten(), Dropout(0.5), Dense(CLASSES))
labelled = jaxcnn.softmax_cross_entropy_with_integer_labels


def batch(n=8, seed=0):
    """Draw images that are brighter in the quarter given by their label."""
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


def test_parameters_and_steps_have_separate_keys():
    state = begun()
    chex.assert_trees_all_equal(state.params, begun().params)
    made_with_state_key = NET.init(state.key, SHAPE)
    assert np.any(made_with_state_key["dense1"]["weight"] != state.params["dense1"]["weight"])


def test_the_state_is_donated():
    state = begun()
    new, _ = make_train_step(NET, labelled, optax.sgd(0.1))(state, batch())
    assert all(a.is_deleted() for a in jax.tree.leaves(state.params))
    assert not any(a.is_deleted() for a in jax.tree.leaves(new))
    assert int(new.step) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Steps


class Counted:
    """A loss that counts how often it is traced."""

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
    """The metrics, loss and accuracy of each batch before its update, agree as well."""
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
        # Adam divides by the gradient's magnitude even where it is small.
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


@pytest.mark.slow("compiles steps of a net")
def test_every_step_draws_its_own_mask():
    """At a learning rate of 0 nothing is learned, so only the mask can change the loss."""
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
    assert np.any(state.params["dense1"]["weight"] != before["dense1"]["weight"])


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
    expected = np.mean((x.reshape(8, -1) @ params["weight"] + params["bias"] - targets) ** 2)
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
    """Return a state for a gradient descent step with rate 1, which subtracts the gradient from the parameters."""
    params = net.init(jax.random.key(0), SHAPE, jnp.float64)
    return TrainState(jnp.zeros((), jnp.int32), params, optax.sgd(1.0).init(params), jax.random.key(1))


def stepped(net, n, microbatch):
    x, labels = batch(n)
    step = make_train_step(net, labelled, optax.sgd(1.0), microbatch=microbatch)
    state, metrics = step(in_float64(net), (x.astype(np.float64), labels))
    return state.params, metrics


@pytest.mark.parametrize(("n", "microbatch"), [(8, 4), (8, 1), (10, 4), (7, 3), (7, 6), (6, 6), (6, 7), (0, 2)])
def test_microbatches_take_the_same_step(n, microbatch):
    """This holds even if the microbatch size does not divide the batch, and for one microbatch."""
    chex.assert_trees_all_close(stepped(NET, n, microbatch), stepped(NET, n, None), rtol=1e-10, atol=1e-12)


@pytest.mark.slow("compiles steps of a net")
@pytest.mark.parametrize(
    "net",
    [WITH_DROPOUT, serial(Conv(3, 3), BatchNorm(), Flatten(), Dense(CLASSES))],
    ids=["its own masks", "its own statistics"],
)
def test_a_microbatch_is_a_separate_batch(net):
    """The batch of 7 is split into two microbatches of 3 and one of 1.

    Each takes every third example, and its key is folded with its number. Their shares add up to the whole batch.
    """
    x, labels = batch(7)
    before = in_float64(net)
    key = jax.random.fold_in(before.key, 0)
    expected, loss = before.params, 0.0
    for i, part in enumerate([[0, 2, 4], [1, 3, 5], [6]]):

        def share(params, i=i, part=part):
            outputs = net.apply(params, x[part].astype(np.float64), key=jax.random.fold_in(key, i))
            return labelled(outputs, labels[part]).sum() / 7

        value, result = jax.value_and_grad(share)(before.params)
        expected, loss = jax.tree.map(jnp.subtract, expected, result), loss + value
    params, metrics = stepped(net, 7, 3)
    chex.assert_trees_all_close(numbers(params), numbers(expected), rtol=1e-9, atol=1e-12)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-10)


def test_shares_of_16_bits_are_added_in_float32():
    """In bfloat16, a sum of 256 shares of 1/256 stops growing once a share is less than half of the last bit."""
    net, n = serial(Dense(1, bias=False)), 256
    params = {"dense1": {"weight": jnp.zeros((1, 1), jnp.bfloat16)}}
    state = TrainState(jnp.zeros((), jnp.int32), params, optax.sgd(1.0).init(params), jax.random.key(0))
    x = np.full((n, 1), 1 + 1 / 128, jnp.bfloat16)
    step = make_train_step(net, lambda y, _: -y[:, 0], optax.sgd(1.0), microbatch=1)
    state, _ = step(state, (x, np.zeros(n)))
    assert state.params["dense1"]["weight"].dtype == jnp.bfloat16
    assert float(state.params["dense1"]["weight"][0, 0]) == 1 + 1 / 128


def test_the_loop_over_microbatches_only_adds():
    """XLA:TPU and XLA:GPU then take the sum over devices out of the loop, which otherwise communicates in each part."""
    traced = make_train_step(NET, labelled, optax.sgd(0.1), microbatch=2).trace(begun(), batch(8))
    (loop,) = (eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan")
    body = loop.params["jaxpr"].jaxpr
    made_by = {var: eqn for eqn in body.eqns for var in eqn.outvars}
    assert len(body.outvars) == 1 + 4 + 2
    assert [a.aval for a in body.outvars] == [a.aval for a in loop.outvars]  # all are carried, none is stacked
    for out in body.outvars:
        assert made_by[out].primitive.name == "add"
        (part,) = (var for var in made_by[out].invars if var not in body.invars)
        assert made_by[part].primitive.name != "mul"


def test_microbatches_need_less_memory():
    def temporary(microbatch):
        step = make_train_step(NET, labelled, optax.sgd(0.1), microbatch=microbatch)
        return step.lower(begun(), batch(256)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(None) / 4


# ---------------------------------------------------------------------------------------------------------------------
# Further metrics


def test_a_step_measures_its_backward_pass():
    """The function receives what `backprop` returns, with the key of the step and its rules, and the updates."""

    def measure(result, updates):
        assert result.activations.keys() == result.deltas.keys() == {name for name, _ in WITH_DROPOUT.layers}
        return {"deltas": result.deltas["dense1"], "updates": updates, "loss again": result.loss}

    rules = {"hidden_layer1": no_gradient}
    state, (x, labels) = begun(WITH_DROPOUT), batch()
    key = jax.random.fold_in(state.key, 0)
    expected = jaxcnn.backprop(WITH_DROPOUT, labelled, state.params, x, labels, key=key, rules=rules)
    plain, _ = make_train_step(WITH_DROPOUT, labelled, optax.sgd(0.1), rules=rules)(begun(WITH_DROPOUT), (x, labels))
    after, metrics = make_train_step(WITH_DROPOUT, labelled, optax.sgd(0.1), rules=rules, measure=measure)(
        state, (x, labels)
    )
    assert set(metrics) == {"loss", "accuracy", "deltas", "updates", "loss again"}
    chex.assert_trees_all_close(numbers(after.params), numbers(plain.params), rtol=1e-6)
    np.testing.assert_allclose(metrics["deltas"], expected.deltas["dense1"], rtol=1e-5, atol=1e-8)
    chex.assert_trees_all_close(
        numbers(metrics["updates"]), jax.tree.map(lambda g: -0.1 * g, numbers(expected.gradients)), rtol=1e-5, atol=1e-8
    )
    assert float(metrics["loss again"]) == float(metrics["loss"]) == pytest.approx(float(expected.loss), rel=1e-6)
    step = make_train_step(NET, labelled, optax.sgd(0.1), measure=lambda result, updates: result.loss)
    with pytest.raises(TypeError, match=r"^make_train_step: the result of measure must be a dict, got \w*Tracer"):
        step(begun(), (x, labels))


@pytest.mark.parametrize("microbatch", [3, 8])
def test_a_step_in_microbatches_measures_its_gradient(microbatch):
    def measure(result, updates):
        assert result.activations == result.deltas == {}
        return {"gradients": result.gradients, "updates": updates, "loss again": result.loss}

    expected = jaxcnn.backprop(NET, labelled, begun().params, *batch(8))
    step = make_train_step(NET, labelled, optax.sgd(0.1), microbatch=microbatch, measure=measure)
    _, metrics = step(begun(), batch(8))
    chex.assert_trees_all_close(numbers(metrics["gradients"]), numbers(expected.gradients), rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(
        numbers(metrics["updates"]), jax.tree.map(lambda g: -0.1 * g, numbers(metrics["gradients"])), rtol=1e-6
    )
    assert float(metrics["loss again"]) == float(metrics["loss"]) == pytest.approx(float(expected.loss), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision

MIXED = serial(
    Conv(4, 3), BatchNorm(), jaxcnn.Relu(), residual(Conv(4, 3, padding="SAME"), jaxcnn.GroupNorm(2)),
    HiddenLayer(4, 2), Flatten(), Dropout(0.2), Dense(CLASSES),
)  # fmt: skip


def to_bfloat16(tree):
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)


def cast_by_hand(net, params, x, labels, key=None):
    """Return the mean loss of a net in bfloat16: what `compute_dtype` should compute."""
    logits = net.apply(to_bfloat16(params), x.astype(jnp.bfloat16), key=key)
    return labelled(logits.astype(np.float32), labels).mean()


def noting(dtypes):
    def loss(outputs, labels):
        dtypes.append(outputs.dtype)
        return labelled(outputs, labels)

    return loss


def test_mixed_precision_is_that_of_casts_by_hand():
    """The parameters, the optimizer's state and the loss stay in float32."""
    optimizer, dtypes = optax.adam(1e-2), []
    step = make_train_step(MIXED, noting(dtypes), optimizer, compute_dtype=jnp.bfloat16)
    state = begun(MIXED, optimizer)
    x, labels = batch()
    key = jax.random.fold_in(state.key, 0)
    by_hand = jax.jit(jax.value_and_grad(functools.partial(cast_by_hand, MIXED)))
    loss, gradient = by_hand(state.params, x, labels, key)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    expected = numbers((optax.apply_updates(state.params, updates), opt_state))
    traced = step.trace(state, (x, labels))
    on_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in on_tpu.splitlines() if "stablehlo.convolution" in line or "dot_general" in line]
    assert len(products) > 8
    assert all("xf32>" not in line.split(" : ")[1].split("->")[0] for line in products), products

    state, metrics = step(state, (x, labels))
    assert set(dtypes) == {jnp.dtype(np.float32)}
    assert metrics["loss"].dtype == np.float32
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-3)
    assert {a.dtype for a in jax.tree.leaves((state.params, state.opt_state))} <= {np.dtype(np.float32), np.dtype("i4")}
    chex.assert_trees_all_close(numbers((state.params, state.opt_state)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow("compiles nets")
def test_the_gradient_of_mixed_precision_is_near_that_of_float32():
    net = serial(*(layer for name, layer in MIXED.layers if name != "dropout1"))
    params, (x, labels) = begun(net).params, batch()

    def loss(params, dtype):
        return labelled(net.apply(params, x, dtype=dtype), labels).mean()

    exact = jax.grad(loss)(params, None)
    result = jaxcnn.value_grad_and_deltas(functools.partial(loss, dtype=jnp.bfloat16))(params)
    assert result.loss.dtype == np.float32
    assert {d.dtype for d in result.deltas.values()} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(jax.tree.leaves(result.gradients), jax.tree.leaves(exact), strict=True):
        assert a.dtype == np.float32
        largest = max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(exact))
        assert float(jnp.linalg.norm(a - b)) < 0.03 * largest


@pytest.mark.slow("compiles whole nets, as the test above does")
@pytest.mark.parametrize("microbatch", [None, 3])
def test_mixed_precision_in_microbatches_and_per_example(microbatch):
    """Each part is one gradient in bfloat16; the parts are added in float32."""
    state, (x, labels) = begun(optimizer=optax.sgd(1.0)), batch(7)
    before = numbers(state.params)
    each = jax.vmap(jax.grad(lambda params, x, label: cast_by_hand(NET, params, x[None], label[None])), (None, 0, 0))
    each = numbers(each(state.params, x, labels))
    squares = sum((a.reshape(7, -1) ** 2).sum(1) for a in jax.tree.leaves(each))
    factors = np.minimum(1, 0.5 / np.sqrt(squares))

    def clipped(net, loss, params, x, labels, *, key):
        total = jaxcnn.clipped_gradient(net, loss, params, x, labels, 0.5, key=key)
        return jax.tree.map(lambda a: a / len(x), total)

    options = {"microbatch": microbatch} if microbatch else {"gradient": clipped}
    expected = jax.tree.map(
        lambda a: (a * (1 if microbatch else factors.reshape(-1, *(1,) * (a.ndim - 1)))).mean(0), each
    )
    step = make_train_step(NET, labelled, optax.sgd(1.0), compute_dtype="bfloat16", **options)
    after, _ = step(state, (x, labels))
    gradient = jax.tree.map(np.subtract, before, numbers(after.params))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


@dataclasses.dataclass(frozen=True)
class OwnNorm(jaxcnn.Layer):
    """A custom layer with a batch norm among its fields."""

    norm: BatchNorm = dataclasses.field(default_factory=BatchNorm)

    def init(self, key, shape, dtype=jnp.float32):
        return {"norm": self.norm.init(key, shape, dtype), "mean": jnp.full(shape[-1:], 0.1, dtype)}

    def apply(self, params, x, *, key=None, rule=None):
        return self.norm.apply(params["norm"], x, key=key, rule=rule) + params["mean"]


class Negated(jaxcnn.Serial):
    """A net with its own `apply`, which takes no dtype."""

    def apply(self, params, x, *, key=None, rules=None):
        return -super().apply(params, x, key=key, rules=rules)


def test_statistics_of_batch_norms_stay_in_float32():
    """In bfloat16, 257.3 would be 258."""
    statistics = {"mean": jnp.full(2, 257.3, np.float32), "var": jnp.full(2, 0.1, np.float32)}
    affine = {"scale": jnp.full(2, 0.7, np.float32), "bias": jnp.full(2, 0.3, np.float32)}
    params = {"batch_norm1": affine | statistics, "own_norm1": {"mean": jnp.full(2, 0.1), "norm": affine | statistics}}
    x = jnp.array([[256.0, 258.0]], np.float32)
    net = serial(BatchNorm(), lambda y: y + 257, OwnNorm())
    scale, bias, tenth = to_bfloat16((affine["scale"], affine["bias"], jnp.full(2, 0.1)))
    norm = functools.partial(jaxcnn.batch_norm, scale=scale, bias=bias, **statistics)
    expected = norm(norm(x.astype(jnp.bfloat16)) + 257) + tenth
    for run in (net, Negated(net.layers)):
        apply = jaxcnn.net.in_dtype(run, jnp.dtype(jnp.bfloat16)).apply
        result = apply(params, x)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, expected.astype(np.float32) * (1 if run is net else -1))
    np.testing.assert_array_equal(net.apply(params, x, dtype=jnp.bfloat16), expected.astype(np.float32))


def test_a_net_in_another_dtype_is_that_net():
    net = jaxcnn.branches(Conv(2, 3), Conv(2, 3), join="add")
    cast = jaxcnn.net.in_dtype(net, jnp.dtype(jnp.bfloat16))
    params = net.init(jax.random.key(0), SHAPE)
    chex.assert_trees_all_equal(cast.init(jax.random.key(0), SHAPE), params)
    assert str(cast.summary(SHAPE)) == str(net.summary(SHAPE))
    x, rules = batch()[0], {jaxcnn.net.Residual: jaxcnn.rules.Epsilon(), "conv1": jaxcnn.rules.Epsilon()}
    y = net.apply(params, x, rules=rules, dtype=jnp.bfloat16)
    np.testing.assert_allclose(y, net.apply(params, x), atol=0.05)


def test_training_in_bfloat16_reaches_the_loss_of_float32():
    optimizer, losses = optax.adam(1e-2), {}
    for dtype in (None, jnp.bfloat16):
        state, step = begun(NET, optimizer), make_train_step(NET, labelled, optimizer, compute_dtype=dtype)
        for seed in range(40):
            state, _ = step(state, batch(32, seed))
        losses[dtype] = evaluate(NET, labelled, state.params, [batch(200, seed=99)])["loss"]
    assert losses[jnp.bfloat16] == pytest.approx(losses[None], rel=0.05)
    assert losses[None] < 0.5


def test_float64_needs_x64():
    expected = r"a floating dtype of 32 bits or less unless jax_enable_x64 is on, got float64$"
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=rf"^make_train_step: compute_dtype must be {expected}"):
            make_train_step(NET, labelled, optax.sgd(1.0), compute_dtype="float64")
        with pytest.raises(ValueError, match=rf"^TrainState.create: dtype must be {expected}"):
            TrainState.create(NET, optax.sgd(1.0), jax.random.key(0), SHAPE, dtype=jnp.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Two devices


@pytest.mark.slow("compiles steps for eight devices")
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
    result = evaluate(NET, labelled, params, iter(parts))
    assert (result["loss"], result["accuracy"]) == pytest.approx(whole, rel=1e-6)
    means = np.mean([mean_loss(NET, params, *part) for part in parts], 0)
    assert result["loss"] != pytest.approx(means[0], rel=1e-3), "the mean of the batches' means is something else"


def test_an_empty_batch_among_others_counts_nothing():
    params, (x, labels) = begun().params, batch()
    expected = evaluate(NET, labelled, params, [(x, labels)])
    assert evaluate(NET, labelled, params, [(x[:0], labels[:0]), (x, labels)]) == pytest.approx(expected)


def test_dropout_is_off():
    params, (x, labels) = begun(WITH_DROPOUT).params, batch()
    result = evaluate(WITH_DROPOUT, labelled, params, [(x, labels)])
    assert result["loss"] == pytest.approx(mean_loss(WITH_DROPOUT, params, x, labels)[0], rel=1e-6)


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


def normalized():
    """Return parameters without zeros and ones, and data in uneven batches."""
    rng = np.random.default_rng(0)
    made = NORMS.init(jax.random.key(0), SHAPE, np.float64)
    params = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, a.shape), made)
    return params, [(rng.standard_normal((n, *SHAPE)) + n, None) for n in (3, 1, 0, 4)]


@pytest.mark.slow("compiles whole nets")
def test_calibrated_statistics_are_those_of_the_inputs_in_evaluation():
    """Over the whole training data, each layer's output has mean β and variance γ²·v/(v + ε)."""
    params, batches = normalized()
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
    params, batches = normalized()
    x = np.concatenate([x for x, _ in batches])
    at_once = calibrate(NORMS, params, [(x, None)])
    chex.assert_trees_all_close(calibrate(NORMS, params, batches), at_once, rtol=1e-12)
    again = calibrate(NORMS, at_once, [(x[:5], None), (x[5:], None)])  # existing statistics are replaced
    chex.assert_trees_all_close(again, at_once, rtol=1e-12)


def test_statistics_are_used_at_evaluation_and_not_while_training():
    params, batches = normalized()
    calibrated = calibrate(NORMS, params, batches)
    x, key = batches[0][0], jax.random.key(3)
    np.testing.assert_array_equal(NORMS.apply(calibrated, x, key=key), NORMS.apply(params, x, key=key))
    one = NORMS.apply(calibrated, x[:1])
    np.testing.assert_allclose(one, NORMS.apply(calibrated, x)[:1], rtol=1e-12)  # independent of the other examples
    assert np.abs(one - NORMS.apply(params, x)[:1]).max() > 1e-3


def test_the_optimizer_never_sees_statistics():
    params, batches = normalized()
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert names == {"weight", "bias", "scale"}
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


class Projected(jaxcnn.Serial):
    """A residual block whose shortcut is a convolution and a norm; its `apply` is not sequential."""

    def init(self, key, shape, dtype=jnp.float32):
        keys, (first, norm, second, last, short, short_norm) = jax.random.split(key, 6), self.layers
        made = {}
        for (name, layer), own, given in (
            (first, keys[0], shape), (norm, keys[1], (*shape[:-1], 4)), (second, keys[2], (*shape[:-1], 4)),
            (last, keys[3], (*shape[:-1], 4)), (short, keys[4], shape), (short_norm, keys[5], (*shape[:-1], 4)),
        ):  # fmt: skip
            made[name] = layer.init(own, given, dtype)
        return {**made, "gain": jnp.ones((3,), dtype)}

    def apply(self, params, x, *, key=None, rules=None):
        layers = dict(self.layers)

        def run(name, x):
            return layers[name].apply(params.get(name, {}), x, key=key)

        short = run("short_norm", run("short", x))
        branch = jax.checkpoint(lambda x: run("norm", run("first", x)))(x)
        return run("last", run("second", jnp.tanh(branch))) + short * params["gain"].sum()


def projected():
    return Projected(
        (("first", Conv(4, 3, padding="SAME")), ("norm", BatchNorm(scale=False, bias=False)),
         ("second", Conv(4, 1)), ("last", BatchNorm()), ("short", Conv(4, 1)), ("short_norm", BatchNorm()))
    )  # fmt: skip


NORM = BatchNorm()


@dataclasses.dataclass(frozen=True)
class Block(jaxcnn.Layer):
    """A user-defined layer with a norm as a field."""

    norm: BatchNorm = NORM
    called: str = "norm"

    def init(self, key, shape, dtype=jnp.float32):
        return {self.called: self.norm.init(key, shape, dtype)}

    def apply(self, params, x, *, key=None, rule=None):
        return self.norm.apply(params[self.called], x, key=key) ** 2


def inputs_of_norms(net, params, x):
    """Return (parameters, input) of every norm, from one call of the actual net without jit."""
    seen, apply = [], BatchNorm.apply

    def spy(self, own, x, **options):
        jax.debug.callback(lambda x: seen.append((own, np.asarray(x))), x)  # this works inside jax.checkpoint
        return apply(self, own, x, **options)

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(BatchNorm, "apply", spy)
        net.apply(params, x)
        jax.effects_barrier()
    return seen


OWN = serial(Conv(3, 3), BatchNorm(), projected(), Block(), residual(Conv(4, 1), BatchNorm()), Flatten(), Dense(2))


@pytest.mark.slow("compiles whole nets; tests/test_branches.py has smaller ones")
@pytest.mark.parametrize("keep_bytes", [2**32, 5000, 0])
def test_norms_inside_custom_nets_are_calibrated(keep_bytes):
    """Statistics match those of each norm's input in the calibrated net, for any ``keep_bytes``."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.uniform(0.5, 1, a.shape), OWN.init(jax.random.key(0), (6, 6, 1), np.float64))
    x = rng.standard_normal((5, 6, 6, 1))
    calibrated = calibrate(OWN, params, [(x[:3], None), (x[3:], None)], keep_bytes=keep_bytes)
    seen = inputs_of_norms(OWN, calibrated, x)
    assert len(seen) == 6
    for own, reached in seen:
        over = tuple(range(reached.ndim - 1))
        np.testing.assert_allclose(own["mean"], reached.mean(over), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(own["var"], reached.var(over), rtol=1e-10)
    run = compiled(OWN.apply)
    np.testing.assert_allclose(run(calibrated, x[:1]), run(calibrated, x)[:1], rtol=1e-10)


def test_each_batch_goes_through_the_net_once():
    """A callback inside the net shows that there is no pass per norm."""
    calls = []

    class Counting(jaxcnn.Layer):
        def apply(self, params, x, *, key=None, rule=None):
            def note(x):
                calls.append(len(x))
                return x

            return jax.pure_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    net = serial(Counting(), *(layer for _ in range(4) for layer in (BatchNorm(), Tanh())))
    x = np.random.default_rng(0).standard_normal((5, 2))
    calibrate(net, net.init(jax.random.key(0), (2,), np.float64), [(x[:3], None), (x[3:], None)])
    assert sorted(calls) == [2, 3]


class Looped(jaxcnn.Serial):
    def apply(self, params, x, **options):
        own, ((_, norm),) = params["batch_norm1"], self.layers
        return jax.lax.scan(lambda x, _: (norm.apply(own, x), None), x, None, length=2)[0]


class Twice(jaxcnn.Serial):
    def apply(self, params, x, **options):
        own, ((_, norm),) = params["batch_norm1"], self.layers
        return norm.apply(own, norm.apply(own, x) + 1)


class Idle(jaxcnn.Serial):
    def apply(self, params, x, **options):
        return x


REFUSED = {
    "in a loop": (Looped((("batch_norm1", BatchNorm()),)), "batch_norm1: statistics must reach the BatchNorm"),
    "fed by itself": (Twice((("batch_norm1", BatchNorm()),)), "batch_norm1: the output of a BatchNorm must not reach"),
    "never called": (Idle((("batch_norm1", BatchNorm()),)), "batch_norm1: the net must call every BatchNorm"),
    "hidden in a layer": (serial(Block(called="other")), "got one inside block1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_norms_that_cannot_be_calibrated_are_refused_by_name(name):
    net, message = REFUSED[name]
    params = net.init(jax.random.key(0), (2,), np.float64)
    with pytest.raises(ValueError, match=message):
        calibrate(net, params, [(np.ones((3, 2)), None)])


def test_a_norm_that_two_branches_share_sees_both():
    class Siamese(jaxcnn.Serial):
        def apply(self, params, x, **options):
            own, ((_, norm),) = params["batch_norm1"], self.layers
            return norm.apply(own, x) - norm.apply(own, 3 * x)

    net, x = Siamese((("batch_norm1", BatchNorm()),)), np.random.default_rng(0).standard_normal((5, 2))
    own = calibrate(net, net.init(jax.random.key(0), (2,), np.float64), [(x, None)])["batch_norm1"]
    np.testing.assert_allclose(own["var"], np.concatenate([x, 3 * x]).var(0), rtol=1e-12)


def test_calibrated_parameters_are_dicts_of_the_same_types():
    net, x = serial(residual(BatchNorm())), np.ones((3, 2))
    params = collections.OrderedDict(net.init(jax.random.key(0), (2,), np.float64))
    frozen = flax.core.freeze(dict(params))
    for given in (params, frozen):
        result = calibrate(net, given, [(x, None)])
        assert type(result) is type(given)
        assert "mean" not in given["residual1"]["batch_norm1"]
        np.testing.assert_array_equal(result["residual1"]["batch_norm1"]["mean"], [1, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Dense labels, sums, ignored labels

PIXELS = serial(Dense(3))


def of_pixels(n=5, seed=0):
    """Return logits that equal the input, and labels."""
    rng = np.random.default_rng(seed)
    x, labels = rng.standard_normal((n, 8, 8, 3)), rng.integers(0, 3, (n, 8, 8)).astype(np.int32)
    return {"dense1": {"weight": np.eye(3), "bias": np.zeros(3)}}, x, labels


def test_the_accuracy_of_pixels_is_a_mean():
    params, x, labels = of_pixels()
    right = x.argmax(-1)
    everything = [(x[:3], right[:3]), (x[:0], right[:0]), (x[3:], right[3:])]
    assert evaluate(PIXELS, labelled, params, everything)["accuracy"] == 1.0
    result = evaluate(PIXELS, labelled, params, [(x[:3], labels[:3]), (x[3:], labels[3:])])
    assert result["accuracy"] == pytest.approx(np.mean(right == labels), rel=1e-12)
    expected = F.cross_entropy(torch.tensor(x).reshape(-1, 3), torch.tensor(labels).long().reshape(-1))
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_labels_to_ignore_do_not_count_in_the_accuracy(microbatch, dtype):
    """The metrics of a step ignore them as well, even if microbatches have different numbers of them."""
    params, x, labels = of_pixels()
    labels = labels.astype(dtype)
    labels[0], labels[1, :4], labels[2, 0, 0] = -100, 255, 3
    counted = (labels >= 0) & (labels < 3)
    expected = (x.argmax(-1) == labels)[counted].mean()

    def loss(logits, targets):
        there = (targets >= 0) & (targets < 3)
        return jnp.where(there, labelled(logits, jnp.where(there, targets, 0)), 0)

    parts = [(x[:1], labels[:1]), (x[1:], labels[1:])]
    assert evaluate(PIXELS, loss, params, parts)["accuracy"] == pytest.approx(expected, rel=1e-12)
    optimizer = optax.sgd(0.1)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key(0))
    _, metrics = make_train_step(PIXELS, loss, optimizer, microbatch=microbatch)(state, (x, labels))
    assert float(metrics["accuracy"]) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(evaluate(PIXELS, loss, params, parts[:1])["accuracy"])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_labels_of_few_bits(dtype):
    """There are 300 classes, more than the dtype can hold."""
    net = serial(Dense(300))
    params = {"dense1": {"weight": np.eye(300), "bias": np.zeros(300)}}
    labels = np.array([3, 100, 7], dtype)
    result = evaluate(net, lambda y, _: y.sum(1), params, [(np.eye(300)[[3, 100, 263]], labels)])
    assert result["accuracy"] == pytest.approx(2 / 3)


def test_losses_of_16_bits_are_summed_in_float32():
    """In bfloat16, a sum of 4,096 losses near 1 stops at 256."""
    net = serial(Dense(1, bias=False))
    params = {"dense1": {"weight": jnp.ones((1, 1), jnp.bfloat16)}}
    x = np.random.default_rng(0).uniform(1, 2, (4096, 1)).astype(jnp.bfloat16)
    expected = x.astype(np.float64).mean()

    def loss(y, _):
        return y[:, 0]

    assert evaluate(net, loss, params, [(x, np.zeros(4096))])["loss"] == pytest.approx(expected, rel=1e-6)
    state = TrainState(jnp.zeros((), jnp.int32), params, optax.sgd(0.0).init(params), jax.random.key(0))
    _, metrics = make_train_step(net, loss, optax.sgd(0.0))(state, (x, np.zeros(4096)))
    assert metrics["loss"].dtype == np.float32
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_cannot_be_hashed():
    @dataclasses.dataclass
    class Weighted:
        weight: float = 2.0

        def __call__(self, outputs, targets):
            return self.weight * labelled(outputs, targets)

    params, x, labels = of_pixels()
    once = evaluate(PIXELS, labelled, params, [(x, labels)])
    assert evaluate(PIXELS, Weighted(), params, [(x, labels)])["loss"] == pytest.approx(2 * once["loss"])


def test_a_loss_for_the_batch_is_refused():
    params, x, labels = of_pixels()
    with pytest.raises(
        ValueError, match=r"evaluate: the result of loss must be one loss for each of 5 examples.*got shape \(\)"
    ):
        evaluate(PIXELS, lambda y, t: labelled(y, t).mean(), params, [(x, labels)])


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers that hold parameters, and those that need more than the gradient

TINY = serial(Dense(3))
DATA = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32), (np.arange(6) % 3).astype(np.int32)
ASKING = {
    # hold parameters
    "prodigy": optax.contrib.prodigy(),
    "dog": optax.contrib.dog(),
    "mechanize": optax.contrib.mechanize(optax.sgd(0.1)),
    "sam": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), sync_period=2),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    # need more than the gradient
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, rtol=1.0)),
    "plateau in multi-steps": optax.MultiSteps(optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), 2),
    "polyak": optax.polyak_sgd(),
    "momo": optax.contrib.momo(0.1),
    "lbfgs": optax.lbfgs(),
}


def tiny_error(params):
    return labelled(TINY.apply(params, DATA[0]), DATA[1]).mean()


@pytest.fixture
def narrow():
    """Use JAX's default configuration, in which optax keeps float32."""
    with jax.enable_x64(False):
        yield


@pytest.mark.slow("trains")
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ASKING)
def test_optimizers_take_the_steps_they_take_in_a_loop_of_optax(name):
    optimizer = ASKING[name]
    state = TrainState.create(TINY, optimizer, jax.random.key(0), (4,))
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(state) if a.size]
    assert len(pointers) == len(set(pointers))
    params, opt_state = jax.tree.map(jnp.copy, (state.params, state.opt_state))
    step = make_train_step(TINY, labelled, optimizer)
    optimizer_with_extra = (
        optimizer if isinstance(optimizer, optax.MultiSteps) else optax.with_extra_args_support(optimizer)
    )

    @jax.jit
    def by_hand(params, opt_state):
        value, result = jax.value_and_grad(tiny_error)(params)
        more = {} if name == "sam" else {"value": value, "grad": result, "value_fn": tiny_error}
        updates, opt_state = optimizer_with_extra.update(result, opt_state, params, **more)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        state, _ = step(state, DATA)
        params, opt_state = by_hand(params, opt_state)
    chex.assert_trees_all_close(numbers(state.params), numbers(params), rtol=1e-5, atol=1e-6)


@pytest.mark.slow("compiles steps of L-BFGS")
@pytest.mark.usefixtures("narrow")
def test_lbfgs_looks_at_the_whole_batch_in_microbatches():
    whole, parts = (
        make_train_step(TINY, labelled, optax.lbfgs(), microbatch=m)(
            TrainState.create(TINY, optax.lbfgs(), jax.random.key(0), (4,)), DATA
        )
        for m in (None, 4)
    )
    chex.assert_trees_all_close(numbers(parts[0].params), numbers(whole[0].params), rtol=1e-5, atol=1e-6)


def test_a_state_of_shared_arrays_is_donated():
    net = serial(Dense(4), Dense(4))
    shared = {"weight": jnp.eye(4, dtype=np.float32), "bias": jnp.zeros(4, np.float32)}
    params = {"dense1": shared, "dense2": shared}
    optimizer = optax.sgd(0.1)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key(0))
    result = jax.grad(lambda params: labelled(net.apply(params, DATA[0]), DATA[1]).mean())(params)
    expected = jax.tree.map(lambda p, g: np.asarray(p - 0.1 * g), params, result)
    state, _ = make_train_step(net, labelled, optimizer)(state, DATA)
    chex.assert_trees_all_close(numbers(state.params), expected, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# User-defined gradients


def dpsgd(**options):
    """Return optax's dpsgd without noise, ignoring a deprecation warning that optax itself causes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return optax.contrib.dpsgd(0.5, 0.1, 0.0, 0, **options)


PRIVATE = {
    "dpsgd": dpsgd(),
    "with momentum": dpsgd(momentum=0.9),
    "in a chain": optax.chain(dpsgd(), optax.scale(1.0)),
    "in multi-steps": optax.MultiSteps(dpsgd(momentum=0.9), 2),
}
#: It has as many inputs as examples, so rows of its weight could be mistaken for per-example gradients.
SQUARE = serial(Dense(6, bias=False))


@pytest.mark.parametrize("name", PRIVATE)
def test_optimizers_for_single_examples_are_refused_one_gradient(name):
    x = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    state = TrainState.create(SQUARE, PRIVATE[name], jax.random.key(0), (6,))
    with pytest.raises(ValueError, match=r"gradient=jaxcnn\.per_example_gradients; got one gradient for the batch"):
        make_train_step(SQUARE, labelled, PRIVATE[name])(state, (x, DATA[1]))


@pytest.mark.parametrize("name", ["dpsgd", "in a chain"])
def test_optimizers_for_single_examples_get_their_gradients(name):
    """Without noise, the steps are descent by the mean of the clipped gradients of `jax.vmap` of `jax.grad`."""
    x = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    state = TrainState.create(SQUARE, PRIVATE[name], jax.random.key(0), (6,))
    w = np.asarray(state.params["dense1"]["weight"], np.float64)
    each = np.asarray(
        jax.vmap(jax.grad(lambda w, x, t: labelled(x @ w, t)), (None, 0, 0))(w, x.astype(np.float64), DATA[1])
    )
    sizes = np.linalg.norm(each.reshape(6, -1), axis=1)
    expected = w - 0.5 * (each * np.minimum(1, 0.1 / sizes)[:, None, None]).mean(0)
    step = make_train_step(SQUARE, labelled, PRIVATE[name], gradient=jaxcnn.per_example_gradients)
    state, metrics = step(state, (x, DATA[1]))
    np.testing.assert_allclose(state.params["dense1"]["weight"], expected, rtol=1e-5)
    assert set(metrics) == {"loss", "accuracy"}


def test_a_custom_gradient_clips_and_draws_noise():
    def noisy(net, loss, params, x, targets, *, key):
        total = jaxcnn.clipped_gradient(net, loss, params, x, targets, 0.1, key=key)
        w = total["dense1"]["weight"]
        return {"dense1": {"weight": (w + jax.random.normal(jax.random.fold_in(key, 1), w.shape, w.dtype)) / len(x)}}

    x, optimizer = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32), optax.sgd(1.0)
    state = TrainState.create(SQUARE, optimizer, jax.random.key(0), (6,))
    w, key = np.asarray(state.params["dense1"]["weight"], np.float64), jax.random.fold_in(state.key, 0)
    each = np.asarray(
        jax.vmap(jax.grad(lambda w, x, t: labelled(x @ w, t)), (None, 0, 0))(w, x.astype(np.float64), DATA[1])
    )
    clipped = (each * np.minimum(1, 0.1 / np.linalg.norm(each.reshape(6, -1), axis=1))[:, None, None]).sum(0)
    noise = jax.random.normal(jax.random.fold_in(key, 1), w.shape, np.float32)
    state, metrics = make_train_step(SQUARE, labelled, optimizer, gradient=noisy)(state, (x, DATA[1]))
    np.testing.assert_allclose(state.params["dense1"]["weight"], w - (clipped + noise) / 6, rtol=1e-4, atol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(labelled(x @ w, DATA[1]).mean()), rel=1e-5)


def test_gradients_of_other_shapes_are_refused():
    state = TrainState.create(SQUARE, optax.sgd(1.0), jax.random.key(0), (6,))
    step = make_train_step(SQUARE, labelled, optax.sgd(1.0), gradient=jaxcnn.per_example_gradients)
    with pytest.raises(ValueError, match="the result of gradient must be a tree like params, got the shapes"):
        step(state, (np.ones((6, 6), np.float32), DATA[1]))
    for more in ({"rules": jaxcnn.rules.autodiff}, {"microbatch": 2}):
        with pytest.raises(ValueError, match="gradient must not be given together with rules or microbatch"):
            make_train_step(SQUARE, labelled, optax.sgd(1.0), gradient=jaxcnn.per_example_gradients, **more)
    with pytest.raises(TypeError, match=r"^make_train_step: gradient must be a function, got 3$"):
        make_train_step(SQUARE, labelled, optax.sgd(1.0), gradient=3)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes

PROCESS = """
import sys
import jax
import numpy as np
import optax
import jaxcnn

rank, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from jaxcnn import BatchNorm, Conv, Dense, Flatten, HiddenLayer, Relu
net = jaxcnn.serial(Conv(4, 3), BatchNorm(), Relu(), HiddenLayer(4, 2), Flatten(), Dense(3))
optimizer = optax.sgd(0.1, 0.9)
loss = jaxcnn.softmax_cross_entropy_with_integer_labels
mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere, split = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("batch",)))
state = jax.device_put(jaxcnn.TrainState.create(net, optimizer, jax.random.key(0), (7, 7, 2)), everywhere)
x, labels = np.random.default_rng(0).standard_normal((6, 7, 7, 2)).astype(np.float32), np.arange(6, dtype=np.int32) % 3
own = slice(3 * rank, 3 * rank + 3)
batch = [jax.make_array_from_process_local_data(split, a[own]) for a in (x, labels)]
step = jaxcnn.make_train_step(net, loss, optimizer)
for _ in range(2):
    state, metrics = step(state, tuple(batch))

def without_norm(params, x):
    return net.apply(params | {"batch_norm1": {"mean": np.zeros(4, "f"), "var": np.ones(4, "f")}}, x)

clipped = jax.jit(lambda *args: jaxcnn.clipped_gradient(without_norm, loss, *args, 0.1))(state.params, *batch)
print(float(metrics["loss"]), float(optax.tree.norm(clipped)))
"""


@pytest.mark.slow("starts two processes")
def test_a_state_goes_to_the_devices_of_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), port],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=flags, cwd=Path(jaxcnn.__file__).parents[1],
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], ended
    net = serial(Conv(4, 3), BatchNorm(), jaxcnn.Relu(), HiddenLayer(4, 2), Flatten(), Dense(3))
    with jax.enable_x64(False):
        x = np.random.default_rng(0).standard_normal((6, 7, 7, 2)).astype(np.float32)
        step = make_train_step(net, labelled, optax.sgd(0.1, 0.9))
        state = TrainState.create(net, optax.sgd(0.1, 0.9), jax.random.key(0), (7, 7, 2))
        for _ in range(2):
            state, metrics = step(state, (x, DATA[1]))
        statistics = {"batch_norm1": {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)}}
        clipped = jaxcnn.clipped_gradient(
            lambda params, x: net.apply(params | statistics, x), labelled, state.params, x, DATA[1], 0.1
        )
    expected = float(metrics["loss"]), float(optax.tree.norm(clipped))
    for out, _ in ended:
        assert [float(number) for number in out.split()[-2:]] == pytest.approx(expected, rel=1e-4)


@dataclasses.dataclass(frozen=True)
class CallsTheOp(jaxcnn.Layer):
    """A custom layer that calls the op `batch_norm`, without a layer `BatchNorm`."""

    def apply(self, params, x, *, key=None, rule=None):
        return jnp.tanh(jaxcnn.batch_norm(x))


def test_calibrate_changes_nothing_where_only_the_op_is_called():
    net = jaxcnn.serial(jaxcnn.Dense(2), CallsTheOp())
    params = net.init(jax.random.key(0), (3,))
    calibrated = jaxcnn.calibrate(net, params, [(jnp.ones((4, 3), jnp.float32), None)])
    assert jax.tree.structure(calibrated) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(calibrated), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
