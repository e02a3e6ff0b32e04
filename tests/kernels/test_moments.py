"""Mean and variance in one pass have nearly the digits of those in two, whatever the elements are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcnn.kernels import moments

#: Several rounding errors of float32, because sums of thousands of elements have more than one.
TOLERANCE = 16 * 2.0**-24


def shifted_sample(rng, shape):
    """Elements near 0, but those of the sample near 1: the worst case, since its mean is far from all others'."""
    x = rng.normal(scale=1e-3, size=shape)
    x[:, :: min(moments.SAMPLED, shape[1])] += 1
    return x


IMAGES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "large mean": lambda rng, shape: 1000 + rng.normal(size=shape),
    "small": lambda rng, shape: 1e-6 * rng.normal(size=shape),
    "shifted sample": shifted_sample,
    "trend": lambda rng, shape: np.linspace(100, 200, shape[1])[:, None, None] + rng.normal(size=shape),
    "equal": lambda rng, shape: np.full(shape, 3.7),
    "shifted images": lambda rng, shape: rng.normal(size=shape) + 100 * np.arange(shape[0])[:, None, None, None],
}


def relative_errors(found, x, over):
    """Return the largest error of the mean in standard deviations, and of the variance relative to itself."""
    m, v = (np.asarray(a, np.float64) for a in found)
    x = np.asarray(x, np.float64)
    expected = x.mean(over, keepdims=True), x.var(over, keepdims=True)
    # An error of the mean that the elements' own rounding explains is not counted.
    rounding = 2.0**-24 * np.abs(x).max()
    of_mean = np.maximum(np.abs(m - expected[0]) - rounding, 0) / np.sqrt(expected[1] + 1e-300)
    return of_mean.max(), (np.abs(v - expected[1]) / (expected[1] + 1e-300)).max()


@pytest.mark.parametrize("of", IMAGES)
@pytest.mark.parametrize("height", [1, 5, 16, 40])
@pytest.mark.parametrize("over", [(0, 1, 2), (1, 2)])
def test_moments_in_one_pass(of, height, over):
    """The variance loses at most the factor of the sample's share."""
    x = IMAGES[of](np.random.default_rng(0), (4, height, 24, 3)).astype(np.float32)
    m, v = moments.in_one_pass(over, 1, jnp.asarray(x))
    assert m.shape == v.shape == tuple(1 if d in over else n for d, n in enumerate(x.shape))
    if of == "equal":
        np.testing.assert_array_equal(np.asarray(m), np.float32(3.7))
        np.testing.assert_array_equal(np.asarray(v), 0)
        return
    of_mean, of_variance = relative_errors((m, v), x, over)
    assert of_mean < TOLERANCE * moments.SAMPLED
    assert of_variance < TOLERANCE * moments.SAMPLED


@pytest.mark.parametrize("of", IMAGES)
@pytest.mark.parametrize("over", [(0, 1, 2), (1, 2)])
def test_moments_in_one_pass_if_precise(of, over):
    """The mean is that of two passes, and the variance has nearly their digits."""
    x = jnp.asarray(IMAGES[of](np.random.default_rng(0), (4, 40, 24, 3)), jnp.float32)
    (m, v), (expected_m, expected_v) = moments.in_one_pass_if_precise(over, x), moments.in_two_passes(over, x)
    np.testing.assert_array_equal(np.asarray(m), np.asarray(expected_m))
    np.testing.assert_allclose(v, expected_v, rtol=TOLERANCE * moments.SAMPLED)
    precise = np.square(np.asarray(m, np.float64)) < moments.SAMPLED * np.asarray(v, np.float64)
    assert precise.all() == (of in ("normal", "small", "shifted sample") or (of == "shifted images" and 0 in over))


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_squares_out_of_range_are_not_used(scale):
    """Σ x² overflows, but Σ (x − m)² does not; or x² underflows, as (x − m)² does."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(scale * (1 + 1e-3 * rng.normal(size=(8, 20, 20, 2))), jnp.float32)
    over = (0, 1, 2)
    for found, expected in zip(moments.in_one_pass_if_precise(over, x), moments.in_two_passes(over, x), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        assert np.isfinite(found).all()


def test_moments_in_one_pass_if_precise_of_images_split_over_devices():
    """All devices take the same branch, for a mean near 0 and for a large one."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    run = jax.jit(moments.in_one_pass_if_precise, static_argnums=0)
    for of in ("normal", "large mean"):
        x = IMAGES[of](np.random.default_rng(0), (4, 10, 12, 3)).astype(np.float32)
        _, v = run((0, 1, 2), jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch"))))
        np.testing.assert_allclose(v, np.var(x.astype(np.float64), (0, 1, 2), keepdims=True), rtol=1e-6)


def test_sums_of_squares_would_lose_all_digits():
    """The formula without a shift exceeds the tolerance for a large mean."""
    x = jnp.asarray(IMAGES["large mean"](np.random.default_rng(0), (4, 40, 24, 3)), jnp.float32)
    over = (0, 1, 2)
    m = x.mean(over, keepdims=True)
    v = jnp.square(x).mean(over, keepdims=True) - jnp.square(m)
    assert relative_errors((m, v), x, over)[1] > 10 * TOLERANCE * moments.SAMPLED


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_numbers_that_are_not_finite_reach_the_variance(bad):
    x = np.random.default_rng(0).normal(size=(2, 20, 8, 3)).astype(np.float32)
    x[1, 2, 3, 1] = bad
    x = jnp.asarray(x)
    over = (0, 1, 2)
    each = moments.in_one_pass(over, 1, x), moments.in_two_passes(over, x), moments.in_one_pass_if_precise(over, x)
    for found in each:
        np.testing.assert_array_equal(np.isfinite(found[1]).ravel(), [True, False, True])
