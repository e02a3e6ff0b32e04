import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcnn
from experiments import watch

LOSS = jaxcnn.softmax_cross_entropy_with_integer_labels
NET = jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(5), jaxcnn.Tanh(), jaxcnn.Dense(3))
BATCH = (np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 2, 2, 1), np.arange(8, dtype=np.int32) % 3)


def test_the_norm_of_large_numbers_does_not_overflow():
    tree = {"a": jnp.array([3e30, 0.0]), "b": jnp.array([[4e30]])}
    assert float(watch.norm(tree)) == pytest.approx(5e30, rel=1e-6)
    assert float(watch.norm({"a": jnp.zeros(3)})) == 0
    assert math.isnan(float(watch.norm({"a": jnp.array([1.0, math.nan])})))


make_step = functools.partial(watch.make_step, NET, LOSS)


@pytest.mark.slow("compiles two training steps")
def test_a_step_measures_norms_and_stays_the_same():
    optimizer = optax.adam(0.01)
    state = jaxcnn.TrainState.create(NET, optimizer, jax.random.key(0), (2, 2, 1))
    copied = functools.partial(jax.tree.map, jnp.copy, state)
    expected, metrics = jaxcnn.make_train_step(NET, LOSS, optimizer)(copied(), BATCH)
    result, plain = make_step(optimizer, by_layer=False)(copied(), BATCH)
    by_layer, got = make_step(optimizer, by_layer=True)(copied(), BATCH)
    for one in (result, by_layer):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, expected)
    for name in ("loss", "accuracy"):
        assert float(got[name]) == pytest.approx(float(metrics[name]), rel=1e-6)
    assert set(plain) == {"loss", "accuracy", "gradient_norm", "update_norm"}
    updates = jax.tree.map(jnp.subtract, expected.params, state.params)
    assert float(plain["update_norm"]) == pytest.approx(float(optax.tree.norm(updates)), rel=1e-3)
    through = jaxcnn.backprop(NET, LOSS, state.params, *BATCH)
    assert float(got["gradient_norm"]) == pytest.approx(float(optax.tree.norm(through.gradients)), rel=1e-5)
    assert set(got["delta_norms"]) == {"flatten1", "dense1", "tanh1", "dense2"} == set(got["activation_norms"])
    assert float(got["delta_norms"]["dense1"]) == pytest.approx(
        float(jnp.linalg.norm(through.deltas["dense1"])), rel=1e-5
    )
    assert set(got["gradient_norms"]) == {f"dense{n}/{p}" for n in (1, 2) for p in ("weight", "bias")}


def test_the_accuracy_of_targets_that_are_probabilities_is_that_of_their_largest():
    optimizer = optax.sgd(0.1)

    def loss(outputs, targets):
        return LOSS(outputs, targets) if targets.ndim == 1 else jaxcnn.softmax_cross_entropy(outputs, targets)

    step = watch.make_step(NET, loss, optimizer, by_layer=False)
    x, labels = BATCH
    for targets in (labels, 0.7 * np.eye(3, dtype=np.float32)[labels] + 0.1):
        _, metrics = step(jaxcnn.TrainState.create(NET, optimizer, jax.random.key(0), (2, 2, 1)), (x, targets))
        net_outputs = NET.apply(NET.init(jax.random.split(jax.random.key(0))[0], (2, 2, 1)), x)
        assert float(metrics["accuracy"]) == pytest.approx(float((net_outputs.argmax(-1) == labels).mean()))


def norms(**changed: float) -> dict:
    finite = {"a": 1.0, "b": 2.0, "c": 3.0}
    gradients = {"gradient_norm": 1.0, "gradient_norms": {"a/weight": 1.0}}
    return {**gradients, "activation_norms": finite, "delta_norms": finite, **changed}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (norms(), ""),
        (
            norms(delta_norms={"a": math.nan, "b": math.inf, "c": 3.0}),
            "the first δ is that of b (norm inf, 2 in the step before)",
        ),
        (
            norms(activation_norms={"a": 1.0, "b": math.inf, "c": math.nan}),
            "the first activation that is not finite is that of b",
        ),
        (
            norms(gradient_norm=math.inf, gradient_norms={"a/weight": math.inf}),
            "every δ is finite, and the gradient of a/weight is not",
        ),
    ],
)
def test_the_first_layer_in_the_backward_pass_is_named(metrics, expected):
    assert watch.first_not_finite(["a", "b", "c"], metrics, norms()) == expected


def test_the_step_and_the_layer_of_an_overflow():
    optimizer = optax.sgd(1.0)
    state = jaxcnn.TrainState.create(NET, optimizer, jax.random.key(0), (2, 2, 1))
    bad = (np.where(np.arange(8)[:, None, None, None] == 3, np.nan, BATCH[0]).astype(np.float32), BATCH[1])
    step = make_step(optimizer, by_layer=True)
    text = watch.locate(NET, step, state, lambda n: bad if n == 6 else BATCH, 4, 9)
    assert text.startswith("step 7: the first activation that is not finite is that of flatten1, and the first δ is")
    assert "dense2 (norm nan, " in text
    assert watch.locate(NET, step, state, lambda n: BATCH, 0, 2) == ""
