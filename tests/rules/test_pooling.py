"""Rules for max pooling compared with NumPy loops over windows."""

import itertools

import jax
import numpy as np
import pytest

import jaxcnn
from jaxcnn import rules
from tests.compare_torch import CLOSE, pulled, random_delta

WINDOWS = {
    # name: (shape of x, options)
    "side by side": ((2, 4, 6, 3), {"window": 2}),
    "a remainder": ((2, 5, 7, 3), {"window": (2, 3)}),
    "overlapping": ((2, 6, 7, 2), {"window": 3, "stride": (1, 2)}),
    "gaps": ((2, 8, 7, 2), {"window": 2, "stride": 3}),
    "padded": ((2, 5, 6, 2), {"window": 3, "stride": 2, "padding": "SAME"}),
    "partial, dilated": ((2, 7, 8, 2), {"window": 2, "stride": 3, "dilation": 2, "padding": 1, "ceil_mode": True}),
    "one dim": ((2, 9, 2), {"window": 3, "stride": 2, "padding": ((1, 1),)}),
    "three dims": ((1, 4, 3, 5, 2), {"window": 2, "stride": 1}),
}


def winners(entries):
    """Return a mask of the first maximum."""
    return np.arange(len(entries)) == np.argmax(entries)


def ties(entries):
    return (entries == entries.max()) / (entries == entries.max()).sum()


def shares(entries):
    size = np.abs(entries)
    return size / size.sum() if size.sum() else np.full(len(size), 1 / len(size))


FORMULAS = {
    # rule: the factor for each element of a window
    rules.winner: winners,
    rules.literal_up: np.ones_like,
    rules.proportional: shares,
    rules.even_split: ties,
}


def by_loops(factors, x, delta, window, stride=None, padding=0, dilation=1, ceil_mode=False):
    """Return δ_x: each window adds δ times the factors to its elements inside the input."""
    spatial = x.shape[1:-1]
    size, stride, dilation = (np.broadcast_to(a, len(spatial)) for a in (window, stride or window, dilation))
    if padding == "SAME":
        total = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(spatial, size, stride, dilation, strict=True)
        ]
        before = [t // 2 for t in total]
    else:
        before = [p[0] for p in padding] if isinstance(padding, tuple) else [padding] * len(spatial)
    delta_x = np.zeros_like(x)
    for n, c in itertools.product(range(x.shape[0]), range(x.shape[-1])):
        for o in np.ndindex(*delta.shape[1:-1]):
            places = [
                tuple(i * s + k * d - lo for i, s, k, d, lo in zip(o, stride, tap, dilation, before, strict=True))
                for tap in np.ndindex(*size)
            ]
            places = [p for p in places if all(0 <= i < m for i, m in zip(p, spatial, strict=True))]
            entries = np.array([x[(n, *p, c)] for p in places])
            for p, factor in zip(places, factors(entries), strict=True):
                delta_x[(n, *p, c)] += factor * delta[(n, *o, c)]
    return delta_x


def drawn(shape, kind):
    rng = np.random.default_rng(0)
    return rng.integers(-1, 2, shape).astype(float) if kind == "ties" else rng.standard_normal(shape)


@pytest.mark.parametrize("kind", ["apart", "ties"])
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("rule", FORMULAS, ids=lambda rule: rule.__name__)
def test_by_loops(rule, name, kind):
    shape, options = WINDOWS[name]
    x = drawn(shape, kind)
    delta = random_delta(jax.eval_shape(lambda x: jaxcnn.max_pool(x, **options), x))
    y, (delta_x,) = pulled(lambda x: jaxcnn.max_pool(x, **options, rule=rule), (x,), delta)
    np.testing.assert_array_equal(y, jaxcnn.max_pool(x, **options))
    np.testing.assert_allclose(delta_x, by_loops(FORMULAS[rule], x, delta, **options), **CLOSE)


@pytest.mark.parametrize("rule", [rules.proportional, rules.even_split], ids=lambda rule: rule.__name__)
def test_delta_is_conserved(rule):
    """δ is conserved, even in windows of zeros, of −∞, and of −∞ next to padding."""
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 3))
    x[0, :3] = 0
    if rule is rules.even_split:
        x[1, :3] = -np.inf
    delta = random_delta(np.empty((2, 3, 3, 3)))
    _, (delta_x,) = pulled(lambda x: jaxcnn.max_pool(x, 3, stride=2, padding=1, rule=rule), (x,), delta)
    np.testing.assert_allclose(np.sum(delta_x, (1, 2)), delta.sum((1, 2)), rtol=1e-12)


def test_even_split_of_nan():
    """NaN wins, and several NaNs share δ."""
    x = np.array([1.0, np.nan, 2.0, np.nan]).reshape(1, 4, 1)
    _, (delta_x,) = pulled(
        lambda x: jaxcnn.max_pool(x, 4, rule=rules.even_split), (x,), np.full((1, 1, 1), 6.0)
    )  # fmt: skip
    assert delta_x.ravel().tolist() == [0, 3, 0, 3]


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("rule", FORMULAS, ids=lambda rule: rule.__name__)
def test_hidden_layer_is_its_three_ops(rule, stride):
    rng = np.random.default_rng(1)
    args = drawn((2, 6, 7, 2), "apart"), rng.standard_normal((2, 3, 2, 3)), rng.standard_normal(3)

    def fused(x, w, b):
        return jaxcnn.hidden_layer(x, w, b, pool_stride=stride, rule=rule)

    def in_turn(x, w, b):
        return jaxcnn.max_pool(jaxcnn.relu(jaxcnn.conv(x, w, b)), 2, stride=stride, rule=rule)

    delta = random_delta(jax.eval_shape(fused, *args))
    for result, expected in zip(pulled(fused, args, delta)[1], pulled(in_turn, args, delta)[1], strict=True):
        np.testing.assert_allclose(result, expected, **CLOSE)
