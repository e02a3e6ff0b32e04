"""Rules for activations compared with their formulas in NumPy."""

import jax
import numpy as np
import pytest

import jaxcnn
from jaxcnn import rules
from tests.compare_torch import CLOSE, pulled, random_delta

X = np.random.default_rng(0).standard_normal((3, 5, 4, 2))
DELTA = random_delta(X)

FORMULAS = {
    # rule: δ_x as a function of x and δ
    rules.guided_relu: lambda x, delta: delta * (x > 0) * (delta > 0),
    rules.deconv_relu: lambda x, delta: delta * (delta > 0),
    rules.straight_through: lambda x, delta: delta,
    rules.SoftplusSmoothed(1.0): lambda x, delta: delta / (1 + np.exp(-x)),
    rules.SoftplusSmoothed(3.5): lambda x, delta: delta / (1 + np.exp(-3.5 * x)),
}


def name_of(rule):
    return getattr(rule, "__name__", repr(rule))


@pytest.mark.parametrize("rule", FORMULAS, ids=name_of)
def test_relu(rule):
    y, (delta_x,) = pulled(lambda x: jaxcnn.relu(x, rule=rule), (X,), DELTA)
    np.testing.assert_array_equal(y, np.maximum(X, 0))
    np.testing.assert_allclose(delta_x, FORMULAS[rule](X, DELTA), **CLOSE)


@pytest.mark.parametrize("window", [2, (3, 2)])
@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("rule", FORMULAS, ids=name_of)
def test_hidden_layer_is_its_three_ops(rule, window, stride):
    """With overlapping windows, an element receives a sum of δ, and the rule tests the sign of the sum."""
    rng = np.random.default_rng(1)
    args = X, rng.standard_normal((2, 3, 2, 3)), rng.standard_normal(3)

    def fused(x, w, b):
        return jaxcnn.hidden_layer(x, w, b, window=window, pool_stride=stride, padding="SAME", rule=rule)

    def in_turn(x, w, b):
        z = jaxcnn.conv(x, w, b, padding="SAME")
        return jaxcnn.max_pool(jaxcnn.relu(z, rule=rule), window, stride=stride)

    delta = random_delta(jax.eval_shape(fused, *args))
    for result, expected in zip(pulled(fused, args, delta)[1], pulled(in_turn, args, delta)[1], strict=True):
        np.testing.assert_allclose(result, expected, **CLOSE)


@pytest.mark.parametrize("op", ["leaky_relu", "elu", "gelu", "silu", "softplus", "sigmoid", "tanh"])
def test_straight_through_fits_every_activation(op):
    _, (delta_x,) = pulled(lambda x: getattr(jaxcnn, op)(x, rule=rules.straight_through), (X,), DELTA)
    np.testing.assert_array_equal(delta_x, DELTA)


def test_smoothing_vanishes_with_beta():
    _, (smoothed,) = pulled(lambda x: jaxcnn.relu(x, rule=rules.SoftplusSmoothed(1e9)), (X,), DELTA)
    np.testing.assert_allclose(smoothed, DELTA * (X > 0), **CLOSE)


@pytest.mark.parametrize(
    ("beta", "kind", "message"),
    [
        (-1.0, ValueError, "SoftplusSmoothed: beta must be a finite number >= 0, got -1.0"),
        (float("nan"), ValueError, "SoftplusSmoothed: beta must be a finite number >= 0, got nan"),
        ("1", TypeError, "SoftplusSmoothed: beta must be a Python float, got str"),
    ],
)
def test_beta(beta, kind, message):
    with pytest.raises(kind, match=message):
        rules.SoftplusSmoothed(beta)
