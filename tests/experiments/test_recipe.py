"""Schedules, optimizers, averages and losses of a recipe, compared with their formulas."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcnn
from experiments import recipe
from experiments.recipe import RecipeOptions

PARAMS = {"dense1": {"weight": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones((2, 2))}}
ZERO = {"dense1": {"weight": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}, "norm": {"scale": jnp.zeros((2, 2))}}


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("cosine", 0, {0: 1.0, 50: 0.5, 100: 0.0}),
        ("cosine", 20, {0: 1 / 21, 20: 1.0, 60: 0.5, 100: 0.0}),
        ("step", 0, {0: 1.0, 49: 1.0, 51: 0.1, 76: 0.01}),
        ("step", 20, {0: 1 / 21, 20: 1.0, 49: 1.0, 51: 0.1, 76: 0.01}),
        ("constant", 0, {0: 1.0, 99: 1.0}),
        ("constant", 4, {0: 0.2, 1: 0.4, 4: 1.0, 99: 1.0}),
        ("one-cycle", 0, {0: 0.04, 30: 1.0, 100: 4e-6}),
    ],
)
def test_the_learning_rate_over_the_steps(name, warmup, expected):
    schedule = recipe.make_schedule(name, 2.0, 100, warmup)
    for step, share in expected.items():
        assert float(schedule(step)) == pytest.approx(2 * share, rel=1e-5, abs=1e-6), step


def test_weight_decay_reaches_kernels_only():
    assert recipe.decayed(PARAMS) == {"dense1": {"weight": True, "bias": False}, "norm": {"scale": False}}
    for name, decay in (("adamw", 0.05), ("lion", 0.3)):
        optimizer = recipe.make_optimizer(RecipeOptions(optimizer=name, schedule="constant"), 10, 10)
        updates, _ = optimizer.update(ZERO, optimizer.init(PARAMS), PARAMS)
        rate = recipe.OPTIMIZERS[name].learning_rate
        np.testing.assert_allclose(updates["dense1"]["weight"], -rate * decay * PARAMS["dense1"]["weight"], rtol=1e-5)
        assert not updates["dense1"]["bias"].any()
        assert not updates["norm"]["scale"].any()
    optimizer = recipe.make_optimizer(RecipeOptions(optimizer="sgd", schedule="constant", weight_decay=0.1), 10, 10)
    updates, _ = optimizer.update(ZERO, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["dense1"]["weight"], np.full((2, 2), -0.05 * 0.1 * 2), rtol=1e-5)


def test_the_default_is_adam_with_a_cosine():
    gradient = {"dense1": {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones((2, 2))}}
    ours, optax_own = recipe.make_optimizer(RecipeOptions(), 10, 5), optax.adam(optax.cosine_decay_schedule(2e-3, 10))
    got, expected = (optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)[0] for optimizer in (ours, optax_own))
    np.testing.assert_array_equal(got["dense1"]["weight"], expected["dense1"]["weight"])


def test_gradients_are_clipped_and_parameters_averaged():
    options = RecipeOptions(optimizer="sgd", schedule="constant", learning_rate=1.0, clip_norm=0.5, ema=0.75)
    optimizer = recipe.make_optimizer(options, 10, 10)
    params = {"weight": jnp.array([[3.0, 0.0]])}
    state, values = optimizer.init(params), []
    for _ in range(3):
        updates, state = optimizer.update({"weight": jnp.array([[0.0, 7.0]])}, state, params)
        params = optax.apply_updates(params, updates)
        values.append(np.array(params["weight"]))
    np.testing.assert_allclose(values[0], [[3.0, -0.5]], rtol=1e-6)
    weights = 0.25 * 0.75 ** np.arange(3)[::-1]
    expected = np.tensordot(weights / weights.sum(), np.stack(values), 1)

    class State:
        opt_state = state

    np.testing.assert_allclose(recipe.averaged_params(options, State)["weight"], expected, rtol=1e-6)


def test_smoothed_labels_and_mixed_targets():
    logits, labels = jnp.array([[1.0, -2.0, 0.5], [0.0, 0.3, 0.1]]), jnp.array([0, 2])
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    plain = recipe.make_loss(0.0)
    exact = jaxcnn.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_array_equal(plain(logits, labels), exact)
    targets = np.eye(3)[np.array(labels)]
    smooth = 0.7 * targets + 0.3 / 3
    np.testing.assert_allclose(recipe.make_loss(0.3)(logits, labels), -(smooth * log_p).sum(-1), rtol=1e-5)
    mixed = np.array([[0.6, 0.4, 0.0], [0.1, 0.1, 0.8]], np.float32)
    np.testing.assert_allclose(plain(logits, jnp.array(mixed)), -(mixed * log_p).sum(-1), rtol=1e-5)


def test_the_recipe_in_one_line():
    assert recipe.describe(RecipeOptions()) == "adam at 0.002, cosine"
    options = RecipeOptions(
        optimizer="lion",
        schedule="step",
        warmup=1,
        label_smoothing=0.1,
        ema=0.99,
        clip_norm=1,
        augment=("flip", "crop"),
    )
    assert recipe.describe(options) == (
        "lion at 0.0003, step, warm-up 1 epochs, weight decay 0.3, label smoothing 0.1, average with decay 0.99, "
        "gradients clipped at 1, flip, crop"
    )
