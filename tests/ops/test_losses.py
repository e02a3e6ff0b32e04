"""The losses compared with optax: values, δ, and limits of the number range."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxcnn
from jaxcnn.rules import autodiff
from tests.compare_torch import CLOSE, pulled, random_delta

INF = np.inf


def assert_as_optax(ours, theirs, *arrays, **tolerance):
    """Assert that values and, for a random δ, all cotangents agree with optax."""
    delta = random_delta(jax.eval_shape(ours, *arrays))
    (y, found), (expected_y, expected) = (pulled(f, arrays, delta) for f in (ours, theirs))
    np.testing.assert_allclose(y, expected_y, **(tolerance or CLOSE))
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, **(tolerance or CLOSE))
    return y, found


def of_labels(labels):
    labels = np.asarray(labels)
    return (
        lambda logits: jaxcnn.softmax_cross_entropy_with_integer_labels(logits, labels),
        lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    )


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (3, 1)])
def test_values_and_delta(shape):
    logits, targets = normal(*shape), np.random.default_rng(1).uniform(0.1, 1, shape)
    assert_as_optax(jaxcnn.squared_error, optax.squared_error, logits, targets)
    assert_as_optax(jaxcnn.softmax_cross_entropy, optax.softmax_cross_entropy, logits, targets)  # rows do not sum to 1
    assert_as_optax(*of_labels(np.random.default_rng(2).integers(0, shape[-1], shape[:-1])), logits)


@pytest.mark.parametrize("labels", [[0, 0, 0], [4, 4, 4], [0, 4, 2]], ids=str)
def test_labels_at_both_ends(labels):
    assert_as_optax(*of_labels(labels), normal(3, 5))


def test_labels_equal_one_hot_targets():
    logits, labels = normal(4, 5), np.array([0, 4, 2, 2])
    delta = normal(4)
    y, (found,) = pulled(of_labels(labels)[0], (logits,), delta)
    expected_y, (expected, _) = pulled(jaxcnn.softmax_cross_entropy, (logits, np.eye(5)[labels]), delta)
    np.testing.assert_allclose(y, expected_y, **CLOSE)
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_huge_logits_neither_overflow_nor_lose_precision(dtype):
    """optax runs in float64; in float32 it loses log 3 = 1.0986 against 10⁴, because it subtracts after the log."""
    logits = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]])
    labels, delta = np.array([0, 1, 2, 0]), normal(4)
    expected_y, (expected,) = pulled(of_labels(labels)[1], (logits,), delta)
    np.testing.assert_allclose(expected_y, [0, 2e4, np.log(3), np.log(3)])
    narrow, delta = logits.astype(dtype), delta.astype(dtype)
    y, (found,) = pulled(of_labels(labels)[0], (narrow,), delta)
    y_of_targets, (found_of_targets, _) = pulled(
        jaxcnn.softmax_cross_entropy, (narrow, np.eye(3, dtype=dtype)[labels]), delta
    )
    for got, want in [(y, expected_y), (y_of_targets, expected_y), (found, expected), (found_of_targets, expected)]:
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_an_impossible_class_costs_nothing_if_its_target_is_zero():
    """0·log 0 = 0; optax has a separate loss for this."""
    logits, targets = np.array([[-INF, 0.0, 1.0], [2.0, -INF, -INF]]), np.array([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    delta = normal(2)
    (y, (found, _)), (expected_y, (expected, _)) = (
        pulled(f, (logits, targets), delta) for f in (jaxcnn.softmax_cross_entropy, optax.safe_softmax_cross_entropy)
    )
    assert np.all(np.isfinite(y))
    np.testing.assert_allclose(y, expected_y, **CLOSE)
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert_as_optax(*of_labels([2, 0]), logits)


def test_an_impossible_true_class_costs_infinity():
    logits = np.array([[-INF, 0.0, 1.0]])
    assert jaxcnn.softmax_cross_entropy_with_integer_labels(logits, np.array([0])).tolist() == [INF]
    assert jaxcnn.softmax_cross_entropy(logits, np.array([[1.0, 0.0, 0.0]])).tolist() == [INF]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("classes", [5, 128, 256, 300])
def test_every_integer_dtype_holds_every_class_that_it_can(dtype, classes):
    """This holds even if there are more classes than the dtype can hold: 256 classes with labels of one byte."""
    top = min(classes, np.iinfo(dtype).max + 1) - 1
    labels = np.array([0, top, top // 2], dtype)
    logits = normal(3, classes)
    ours, theirs = of_labels(labels)[0], of_labels(labels.astype(np.int64))[1]
    assert_as_optax(ours, theirs, logits)


def test_concrete_labels_are_checked_inside_a_trace():
    labels = jnp.array([1, 5])

    @jax.jit
    def loss(logits):
        return jaxcnn.softmax_cross_entropy_with_integer_labels(logits, labels)

    with pytest.raises(ValueError, match="labels must be in 0 … 4, got 1 … 5"):
        loss(np.zeros((2, 5)))
    assert loss(np.zeros((2, 6))).shape == (2,)


def test_labels_out_of_range_under_jit_are_nan_in_the_loss_and_in_delta():
    """Under jit, labels cannot be validated. Other rows are not affected."""
    logits, labels, delta = normal(4, 5), np.array([2, -1, 5, 0]), normal(4)

    @jax.jit
    def run(logits, labels, delta):
        y, pull = jax.vjp(lambda a: jaxcnn.softmax_cross_entropy_with_integer_labels(a, labels), logits)
        return y, pull(delta)[0]

    y, found = run(logits, labels, delta)
    assert np.isnan(y).tolist() == [False, True, True, False]
    assert np.isnan(found).all(1).tolist() == np.isnan(found).any(1).tolist() == [False, True, True, False]
    rest = [0, 3]
    expected_y, (expected,) = pulled(of_labels(labels[rest])[1], (logits[rest],), delta[rest])
    np.testing.assert_allclose(y[np.array(rest)], expected_y, **CLOSE)
    np.testing.assert_allclose(found[np.array(rest)], expected, **CLOSE)


def test_squared_error_of_non_finite_values():
    y, pull = jax.vjp(jaxcnn.squared_error, np.array([INF, 1e200, np.nan]), np.array([0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(y, [INF, INF, np.nan])
    np.testing.assert_array_equal(pull(jnp.array([1.0, 2.0, 1.0]))[0], [INF, 4e200, np.nan])


LABELS = np.array([0, 2, 1])
LOSSES = {
    "squared_error": lambda y, rule: jaxcnn.squared_error(y, np.ones((3, 4)), rule=rule),
    "softmax_cross_entropy": lambda y, rule: jaxcnn.softmax_cross_entropy(y, np.full((3, 4), 0.25), rule=rule),
    "softmax_cross_entropy_with_integer_labels": (
        lambda y, rule: jaxcnn.softmax_cross_entropy_with_integer_labels(y, LABELS, rule=rule)
    ),
}  # fmt: skip


def doubled(call, delta):
    """Return twice the exact δ, after checking that a rule can read its op and call it at other inputs."""
    assert call.name in LOSSES
    y, *others = call.inputs
    assert call.at(y + 1, *others).output.shape == call.output.shape
    delta_y, *_ = call.exact(delta)
    return 2 * delta_y, *(None for _ in others)


@pytest.mark.parametrize("name", LOSSES)
def test_another_rule(name):
    rng = np.random.default_rng(0)
    y = rng.standard_normal((3, 4))
    delta = rng.standard_normal(jax.eval_shape(LOSSES[name], y, None).shape)
    (found,), (exact,), (plain,) = (
        jax.vjp(lambda y, rule=rule: LOSSES[name](y, rule), y)[1](delta) for rule in (doubled, None, autodiff)
    )
    np.testing.assert_array_equal(found, 2 * exact)
    np.testing.assert_allclose(plain, exact, rtol=1e-12, atol=1e-15)
    tangent = rng.standard_normal(y.shape)
    _, forward = jax.jvp(lambda y: LOSSES[name](y, autodiff), (y,), (tangent,))
    np.testing.assert_allclose((forward * delta).sum(), (exact * tangent).sum(), rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# δ = 0 gives 0


@pytest.mark.parametrize("compile_it", [True, False])
def test_masked_labels_have_no_gradient(compile_it):
    """The value and the gradient agree with PyTorch's `ignore_index` and with optax."""
    logits, labels = normal(6, 5), np.array([2, -100, 0, -100, 7, 4])

    def masked(loss):
        return lambda logits, labels: jnp.where((labels >= 0) & (labels < 5), loss(logits, labels), 0).sum()

    grad = jax.value_and_grad(masked(jaxcnn.softmax_cross_entropy_with_integer_labels))
    if compile_it:
        found_y, found = jax.jit(grad)(logits, labels)
    else:  # traced, although nothing is compiled
        found_y, found = (a[0] for a in jax.vmap(grad)(logits[None], labels[None]))
    expected_y, expected = jax.value_and_grad(masked(optax.softmax_cross_entropy_with_integer_labels))(logits, labels)
    torch_logits = torch.tensor(logits, requires_grad=True)
    torch_labels = torch.tensor(np.where(labels == 7, -100, labels))
    y = torch.nn.functional.cross_entropy(torch_logits, torch_labels, ignore_index=-100, reduction="sum")
    y.backward()
    for value, gradient in ((expected_y, expected), (y.detach(), torch_logits.grad)):
        np.testing.assert_allclose(found_y, value, **CLOSE)
        np.testing.assert_allclose(found, gradient, **CLOSE)


@pytest.mark.parametrize("wrong", [INF, -INF, np.nan])
@pytest.mark.parametrize("loss", [jaxcnn.squared_error, jaxcnn.softmax_cross_entropy])
def test_masked_rows_have_no_gradient(loss, wrong):
    """Masked rows may have any predictions and targets; the other rows have the same gradient as without them."""
    y, target, keep = normal(4, 3), np.abs(normal(4, 3)), np.array([True, False, True, False])
    spoiled = y.copy(), target.copy()
    spoiled[0][1], spoiled[1][3, 0] = wrong, wrong
    (of_rows,) = [jax.eval_shape(loss, y, target).shape]
    delta = np.random.default_rng(5).standard_normal(of_rows)
    delta[~keep] = 0
    _, found = pulled(loss, spoiled, delta)
    _, expected = pulled(loss, (y, target), delta)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
        assert not np.any(a[~keep])


def test_the_rule_of_the_rule_where_delta_is_zero():
    """The derivative with respect to δ at δ = 0 is the slope, as elsewhere."""
    logits, labels = normal(2, 3), jnp.array([0, 2])

    def pull(delta):
        return jax.vjp(lambda a: jaxcnn.softmax_cross_entropy_with_integer_labels(a, labels), logits)[1](delta)[0]

    xi = np.random.default_rng(6).standard_normal((2, 3))
    found = jax.vjp(pull, np.zeros(2))[1](xi)[0]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, (xi * (p - np.eye(3)[[0, 2]])).sum(-1), rtol=1e-6)
