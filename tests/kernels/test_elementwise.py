"""Elementwise functions: the form for TPU equals the default, computed on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcnn.kernels import elementwise
from tests.cases import compiled

INF, NAN = np.inf, np.nan


def test_erfc_of_one_polynomial():
    """The relative error is that of exp(−z²) in float32, which grows with z²."""
    z = np.concatenate([np.linspace(-7, 9, 4001), [-0.0, 1e-30, -1e-30, -1e30]]).astype(np.float32)
    expected = compiled(lax.erfc)(z.astype(np.float64))
    found = compiled(elementwise.erfc_of_one_polynomial)(z)
    assert found.dtype == np.float32
    assert np.all(np.abs(found / expected - 1) < 4e-7 + 1e-7 * np.square(np.clip(z, 0, None), dtype=np.float64))
    special = jnp.array([-INF, INF, NAN, 1e30], jnp.float32)
    np.testing.assert_array_equal(compiled(elementwise.erfc_of_one_polynomial)(special), [2, 0, NAN, 0])


@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_of_erfc(order):
    """The derivatives are −2/√π·exp(−z²) and −2z times that, also at 0."""
    f = elementwise.erfc_of_one_polynomial
    z = np.linspace(-3, 3, 61).astype(np.float32)
    for _ in range(order):
        f = jax.grad(f)
    slope = -2 / np.sqrt(np.pi) * np.exp(-np.square(z, dtype=np.float64))
    expected = slope if order == 1 else -2 * z * slope
    np.testing.assert_allclose(compiled(jax.vmap(f))(z), expected, rtol=1e-5, atol=3e-4 if order == 2 else 0)


@pytest.mark.parametrize(("default", "other"), [
    (elementwise.over_product, elementwise.times_square_of_reciprocal),
    (elementwise.over_root, elementwise.times_reciprocal_root),
])  # fmt: skip
def test_quotients(default, other):
    a = np.array([0, 1, -3, 1e-10, INF, NAN, 2, 0], np.float32)
    b = np.array([1, 3, 0.7, 1e10, 2, 1, INF, INF], np.float32)
    np.testing.assert_allclose(compiled(other)(a, b), compiled(default)(a, b), rtol=1e-6)


@pytest.mark.parametrize("negative", [False, True])
def test_weighted(negative):
    """The products of every pair of numbers, special ones among them, and their derivatives, are the same."""
    numbers = np.array([0, -0.0, 1, -2.5, 1e38, -1e38, 1e-30, 3.4e38, INF, -INF, NAN], np.float32)
    weight, value = np.repeat(numbers, len(numbers)), np.tile(numbers, len(numbers))

    def products(form):
        y, pull = jax.vjp(lambda w, v: form(np.dtype(np.float32), negative, w, v), weight, value)
        return y, *pull(jnp.ones_like(y))

    expected = compiled(lambda: products(elementwise.weighted_by_comparison))()
    found = compiled(lambda: products(elementwise.weighted_by_exponent))()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found[0][weight == 0], 0)
