"""Products on all threads are bitwise equal to the original products, and jaxlib 0.10 does parallelize them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import correlate, input_grad
from jaxcnn.kernels.parallel import MIN_MULTIPLICATIONS, ONE_THREAD, batched_product, on_all_threads
from tests.cases import compiled, normal

A, B = (jnp.asarray(np.random.default_rng(seed).normal(size=(4, 64, 64)), jnp.float32) for seed in (0, 1))


@pytest.mark.parametrize("first", [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_the_added_zero_changes_nothing(first, dtype):
    """The added zero changes nothing, whatever element it is made from."""
    product = jnp.array([[1.5, -0.0, 0.0], [np.inf, -np.inf, np.nan]], dtype)
    for a, b in ((A.at[0, 0, 0].set(first), B), (A, B.at[0, 0, 0].set(first)), (A, B.at[0, 0, 0].set(np.nan))):
        found = compiled(on_all_threads)(product, a.astype(dtype), b.astype(dtype))
        assert found.dtype == product.dtype
        found, expected = (np.asarray(a, np.float64) for a in (found, product))
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found[:, :2]), np.signbit(expected[:, :2]))  # NaN has no sign


def test_empty_products():
    product = jnp.zeros((2, 3), jnp.float32)
    np.testing.assert_array_equal(on_all_threads(product, jnp.zeros((2, 0)), jnp.zeros((0, 3))), product)


@pytest.mark.parametrize(("over_a", "over_b"), [(2, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("shape", [(3, 2), (64, 64), (512, 256)], ids=["small", "divided", "large"])
def test_batched_product(over_a, over_b, shape):
    rng = np.random.default_rng(0)
    rows, summed = shape
    a = normal(rng, (2, rows, summed) if over_a == 2 else (2, summed, rows))
    b = normal(rng, (2, summed, 5 * rows) if over_b == 1 else (2, 5 * rows, summed))
    assert (rows * summed * 5 * rows >= MIN_MULTIPLICATIONS) == (rows > 3)
    letters = f"n{'ik' if over_a == 2 else 'ki'},n{'kj' if over_b == 1 else 'jk'}->nij"
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
        found = compiled(lambda a, b: batched_product(a, b, over_a, over_b, None))(a.astype(dtype), b.astype(dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, np.einsum(letters, a, b), rtol=tolerance, atol=20 * tolerance)


def test_derivatives_ignore_the_added_zero():
    def error(a, b):
        return jnp.sum(jnp.sin(batched_product(a, b, 2, 1, None)))

    def plain(a, b):
        return jnp.sum(jnp.sin(a @ b))

    for found, expected in zip(jax.grad(error, (0, 1))(A, B), jax.grad(plain, (0, 1))(A, B), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_under_vmap_and_scan():
    def product(a, b):
        return batched_product(a, b, 2, 1, None)

    many = jnp.stack([A, 2 * A])
    expected = jnp.einsum("xnij,njk->xnik", many, B)
    np.testing.assert_allclose(jax.vmap(product, (0, None))(many, B), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.lax.map(lambda a: product(a, B), many), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# XLA's compiled programs

ONE_THREAD_ONLY = pytest.mark.skipif(jax.default_backend() != "cpu" or not ONE_THREAD, reason="jaxlib 0.10 on CPU only")


def layer(batch, side, inputs, outputs):
    win = Window((side, side), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    x = jax.ShapeDtypeStruct((batch, side, side, inputs), np.float32)
    return Correlation(win, 1, np.dtype(np.float32)), x, jax.ShapeDtypeStruct((3, 3, inputs, outputs), np.float32)


def count_products(f, *arguments):
    """Return the numbers of products in computations with and without a reduction."""
    computations = re.split(r"\n(?=%|ENTRY)", jax.jit(f).lower(*arguments).compile().as_text())
    counts = [(len(re.findall(r" (?:convolution|dot)\(", c)), len(re.findall(r" reduce\(", c))) for c in computations]
    return sum(n for n, reductions in counts if reductions), sum(n for n, reductions in counts if not reductions)


@ONE_THREAD_ONLY
def test_convolutions_share_a_computation_with_a_reduction():
    c, x, w = layer(64, 16, 32, 32)
    for table in (correlate.CORRELATE, input_grad.INPUT_GRAD):
        assert count_products(functools.partial(table["all_threads"], c), x, w) == (1, 0)
        assert count_products(functools.partial(table["xla"], c), x, w) == (0, 1)


@ONE_THREAD_ONLY
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_float32_divided_is_float64_rounded(stride, dilation):
    """Float32 is tested here because the lowerings that Hypothesis draws are in float64, which is not divided."""
    win = Window((19, 17), (3, 3), (stride, stride), ((dilation, dilation), (dilation, dilation)), (dilation, dilation))
    rng = np.random.default_rng(0)
    x, w, y = (normal(rng, shape) for shape in ((48, 19, 17, 24), (3, 3, 24, 40), (48, *win.out, 40)))

    def run(product, dtype, *factors):
        c = Correlation(win, 1, np.dtype(dtype))
        return compiled(lambda a, w: product(c, a, w))(*(a.astype(dtype) for a in factors))

    for table, a in ((correlate.CORRELATE, x), (input_grad.INPUT_GRAD, y)):
        found, expected = run(table["all_threads"], np.float32, a, w), run(table["xla"], np.float64, a, w)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@ONE_THREAD_ONLY
def test_each_product_has_its_own_reduction():
    """Two products of one input, and a loop with one kernel, are parallelized as well."""
    c, x, w = layer(64, 16, 32, 32)
    run = functools.partial(correlate.CORRELATE["all_threads"], c)

    def two(x, v, w):
        return run(x, v), run(x, w)

    def loop(many, w):
        return jax.lax.map(lambda x: run(x, w), many)

    assert count_products(two, x, w, w) == (2, 0)
    assert count_products(loop, jax.ShapeDtypeStruct((3, *x.shape), x.dtype), w) == (1, 0)


@ONE_THREAD_ONLY
def test_batched_products_share_a_computation_with_a_reduction():
    def f(a, b):
        return batched_product(a, b, 2, 1, None)

    assert count_products(f, A, B) == (1, 0)
    assert count_products(f, A[:, :8], B[:, :, :8]) == (0, 1)  # too small to divide
