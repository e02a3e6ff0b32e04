"""`convolve`, `correlate`, `autocorrelate`, `match_template` compared with NumPy, SciPy, scikit-image, and autodiff."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from skimage.feature import match_template as skimage_match_template

from jaxcnn import rules
from jaxcnn.kernels import fourier
from jaxcnn.ops import signal
from jaxcnn.ops.signal import MODES, autocorrelate, convolve, correlate, match_template
from tests.compare_torch import pulled

PAIRS = [  # a and v: either one longer, even and odd, 2-D and 3-D, neither inside the other
    ((9,), (4,)),
    ((4,), (7,)),
    ((5,), (1,)),
    ((5, 5), (2, 4)),
    ((2, 3), (6, 5)),
    ((6, 2), (3, 5)),
    ((4, 5, 3), (2, 3, 3)),
]
MATCHES = [((7,), (3,)), ((7, 6), (3, 2)), ((5, 5), (5, 5)), ((4, 5, 4), (2, 3, 2))]


def drawn(*shapes, seed=0, dtype=np.float64):
    rng = np.random.default_rng([seed, *(n for shape in shapes for n in shape)])
    return [jnp.asarray(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def distance(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-300)


def skimage_match(image, template):
    return skimage_match_template(np.asarray(image), np.asarray(template))


def scipys(op, a, v, mode):
    """Return SciPy's result, or NumPy's in 1-D if v is longer, where mode "same" differs."""
    theirs = scipy.signal if a.ndim > 1 or a.size >= v.size else np
    return getattr(theirs, op.__name__)(np.asarray(a), np.asarray(v), mode)


def fits(a, v):
    return all(n >= k for n, k in zip(a, v, strict=True)) or all(n <= k for n, k in zip(a, v, strict=True))


def cases(pairs=PAIRS):
    """Return every op of two signals with every pair and every applicable mode."""
    return [
        pytest.param(op, a, v, mode, id=f"{op.__name__}-{a}-{v}-{mode}")
        for op, (a, v), mode in itertools.product((convolve, correlate), pairs, MODES)
        if mode != "valid" or fits(a, v)
    ]


# ---- forward ------------------------------------------------------------------------------------------------------


shapes = st.integers(1, 3).flatmap(lambda ndim: st.tuples(*[st.tuples(*[st.integers(1, 6)] * ndim)] * 2))


@pytest.mark.slow("compiles each of many sizes")
@settings(max_examples=40)
@given(st.sampled_from([convolve, correlate]), shapes, st.sampled_from(MODES), st.sampled_from(fourier.METHODS))
def test_random_sizes_equal_numpy_in_one_dim_and_scipy_in_more(op, pair, mode, method):
    a, v = drawn(*pair)
    if mode == "valid" and not fits(*pair):
        with pytest.raises(ValueError, match="at least as large as the other"):
            op(a, v, mode)
    else:
        assert distance(op(a, v, mode, method=method), scipys(op, a, v, mode)) < 1e-12


@pytest.mark.parametrize("op", [convolve, correlate])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "k"), [(4, 1), (1, 4), (5, 2), (2, 5), (6, 4), (4, 6), (5, 5), (6, 6), (3, 8)])
def test_one_dim_equals_numpy_even_where_v_is_longer(op, n, k, mode):
    a, v = drawn((n,), (k,))
    assert distance(op(a, v, mode), getattr(np, op.__name__)(np.asarray(a), np.asarray(v), mode)) < 1e-12


@pytest.mark.parametrize("op", [convolve, correlate])
@pytest.mark.parametrize(("a", "v"), [((3, 2), (3, 4)), ((3, 4), (3, 2)), ((2, 5, 1), (6, 5, 1))])
def test_valid_accepts_equal_dims_next_to_unequal_ones(op, a, v):
    a, v = drawn(a, v)
    assert distance(op(a, v, "valid"), scipys(op, a, v, "valid")) < 1e-12


def test_same_in_one_dim_with_longer_v_has_the_length_of_v():
    a, v = drawn((3,), (8,))
    assert convolve(a, v, "same").shape == correlate(a, v, "same").shape == (8,)
    a, v = drawn((3, 3), (8, 8))
    assert convolve(a, v, "same").shape == correlate(a, v, "same").shape == (3, 3)


@pytest.mark.parametrize(("a", "v"), PAIRS)
def test_convolution_is_correlation_with_the_flipped_kernel(a, v):
    a, v = drawn(a, v)
    assert distance(convolve(a, v), correlate(a, jnp.flip(v))) < 1e-13
    assert distance(correlate(a, v), convolve(a, jnp.flip(v))) < 1e-13
    if fits(a.shape, v.shape):
        assert distance(convolve(a, v, "valid"), correlate(a, jnp.flip(v), "valid")) < 1e-13


def test_convolution_commutes_and_swapped_correlation_is_reversed():
    for shapes in PAIRS:
        a, v = drawn(*shapes)
        assert distance(convolve(a, v), convolve(v, a)) < 1e-13
        assert distance(correlate(a, v), jnp.flip(correlate(v, a))) < 1e-13


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 4, 2)])
def test_autocorrelation_is_correlation_with_itself(shape, mode):
    (a,) = drawn(shape)
    assert distance(autocorrelate(a, mode), correlate(a, a, mode)) < 1e-13


def test_autocorrelation_is_even_and_its_middle_is_the_energy_and_the_largest():
    for shape in ((9,), (5, 6), (3, 4, 5)):
        (a,) = drawn(shape)
        y = autocorrelate(a)
        assert distance(y, jnp.flip(y)) < 1e-13
        middle = y[tuple(n - 1 for n in shape)]
        np.testing.assert_allclose(middle, np.sum(np.square(a)))
        assert middle == y.max()
        np.testing.assert_allclose(autocorrelate(a, "valid"), np.full((1,) * a.ndim, middle))


@pytest.mark.parametrize(("image", "template"), [(a, v) for a, v in MATCHES if len(a) > 1])
def test_match_template_equals_scikit_image(image, template):
    image, template = drawn(image, template)
    assert distance(match_template(image, template), skimage_match(image, template)) < 1e-12


@pytest.mark.slow("compiles each of many sizes")
@settings(max_examples=12)
@given(st.data())
def test_match_template_equals_scikit_image_at_random_sizes(data):
    image = data.draw(st.tuples(*[st.integers(2, 9)] * data.draw(st.integers(2, 3))))
    template = tuple(data.draw(st.integers(2, n)) for n in image)
    x, t = drawn(image, template)
    assert distance(jax.jit(match_template)(x, t), skimage_match(x, t)) < 1e-9


def test_match_template_of_a_large_template_uses_the_fourier_transform():
    image, template = drawn((60, 50), (14, 13))
    assert fourier.choose_fourier((0, 0), (47, 38), "auto", image, template)
    assert distance(match_template(image, template), skimage_match(image, template)) < 1e-10


def test_match_template_is_one_where_the_window_is_the_template_up_to_brightness_and_contrast():
    (image,) = drawn((12, 10))
    y = match_template(image, 3 * image[4:8, 2:7] + 100)
    assert np.unravel_index(jnp.argmax(y), y.shape) == (4, 2)
    np.testing.assert_allclose(y[4, 2], 1, atol=1e-12)
    np.testing.assert_allclose(match_template(image, -image[4:8, 2:7])[4, 2], -1, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.3, 1e6])
def test_flat_regions_give_zero_and_no_nan_in_gradients(value):
    image, template = drawn((10, 9), (3, 3))
    image = image.at[:5, :6].set(value)
    y, pull = jax.vjp(match_template, image, template)
    flat = np.zeros(y.shape, bool)
    flat[:3, :4] = True
    np.testing.assert_array_equal(np.asarray(y) == 0, flat)
    if value == 0.5:  # a number that stays exact in scikit-image's running sums
        assert distance(y, skimage_match(image, template)) < 1e-12
    (ct,) = drawn(y.shape, seed=1)
    assert all(np.isfinite(g).all() for g in pull(ct))
    assert not np.any(pull(jnp.where(flat, ct, 0))[0])


def test_flat_templates_give_zero():
    (image,) = drawn((6, 6))
    y, pull = jax.vjp(match_template, image, jnp.full((3, 3), 0.1))
    assert not np.any(y)
    assert all(not np.any(g) for g in pull(jnp.ones_like(y)))


def test_match_template_is_precise_on_a_bright_image():
    """In float32, Σ x² − (Σ x)²/n loses all precision here."""
    image, template = drawn((20, 20), (4, 5))
    bright = (100 + 0.01 * image).astype(np.float32)
    got = match_template(bright, template.astype(np.float32))
    expected = match_template(bright.astype(np.float64), template)
    assert got.dtype == np.float32
    assert distance(got, expected) < 1e-5


# ---- gradients ----------------------------------------------------------------------------------------------------


def table():
    """Return (op, input shapes) for every op here, in every mode, with both lowerings."""
    for param in cases():
        op, a, v, mode = param.values
        yield pytest.param(functools.partial(op, mode=mode), (a, v), id=param.id)
    for op, pair in itertools.product((convolve, correlate), [((9,), (4,)), ((2, 3), (6, 5))]):
        yield pytest.param(functools.partial(op, method="fft"), pair, id=f"{op.__name__}-{pair}-fft")
    for shape, mode in [((7,), "full"), ((4, 3), "full"), ((4, 3), "same"), ((7,), "same"), ((3, 2, 2), "valid")]:
        yield pytest.param(functools.partial(autocorrelate, mode=mode), (shape,), id=f"autocorrelate-{shape}-{mode}")
    for pair in MATCHES:
        yield pytest.param(match_template, pair, id=f"match_template-{pair}")


@functools.partial(jax.jit, static_argnums=0)
def once_and_twice(op, inputs, ct, cts):
    """Return value, cotangents, and the cotangents of these for the inputs and for δ."""

    def once(ct, *inputs):
        y, pull = jax.vjp(op, *inputs)
        return y, pull(ct)

    (y, found), pull = jax.vjp(once, ct, *inputs)
    return y, found, pull((jnp.zeros_like(y), cts))


@pytest.mark.parametrize(("op", "shapes"), list(table()))
def test_first_and_second_derivatives_equal_autodiff_of_the_reference(op, shapes):
    inputs = drawn(*shapes)
    (ct,) = drawn(jax.eval_shape(op, *inputs).shape, seed=1)
    cts = tuple(drawn(*shapes, seed=2))
    plain = functools.partial(op, rule=rules.autodiff)
    results = [jax.tree.leaves(once_and_twice(f, inputs, ct, cts)) for f in (op, plain)]
    for got, expected in zip(*results, strict=True):
        assert distance(got, expected) < 1e-10


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        pytest.param(convolve, ((5,), (3,)), id="convolve"),
        pytest.param(functools.partial(correlate, method="fft"), ((3, 4), (2, 3)), id="correlate-fft"),
        pytest.param(functools.partial(correlate, mode="same"), ((3,), (6,)), id="correlate-same"),
        pytest.param(autocorrelate, ((5,),), id="autocorrelate"),
        pytest.param(match_template, ((5, 4), (3, 2)), id="match_template"),
    ],
)
def test_first_and_second_derivatives_equal_finite_differences(op, shapes):
    check_grads(jax.jit(op), drawn(*shapes), order=2, modes=["rev"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "a", "v", "mode"), cases())
def test_both_cotangents_are_adjoint_to_the_op(op, a, v, mode):
    a, v = drawn(a, v)
    op = functools.partial(op, mode=mode)
    (ct,) = drawn(jax.eval_shape(op, a, v).shape, seed=1)
    y, (delta_a, delta_v) = pulled(op, (a, v), ct)
    np.testing.assert_allclose(jnp.vdot(y, ct), jnp.vdot(a, delta_a), rtol=1e-10)
    np.testing.assert_allclose(jnp.vdot(y, ct), jnp.vdot(v, delta_v), rtol=1e-10)


def test_a_planted_error_is_seen():
    """An unflipped kernel in the backward pass (lecture §15) gives a wrong gradient, which is detected."""
    a, v = drawn((9,), (4,))

    def unflipped(call, delta):
        _, delta_v = call.exact(delta)
        lags = dataclasses.replace(call.static.negated(call.inputs[0]), first=(0,))
        return signal._correlate(lags, delta, call.inputs[1]), delta_v

    (ct,) = drawn((12,), seed=1)
    wrong = pulled(functools.partial(correlate, rule=unflipped), (a, v), ct)[1][0]
    assert distance(wrong, pulled(correlate, (a, v), ct)[1][0]) > 0.1


# ---- lowerings ----------------------------------------------------------------------------------------------------

LARGE = [((4000,), (300,)), ((300,), (4000,)), ((70, 60), (20, 15)), ((14, 12, 16), (6, 7, 5))]


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-12), (np.float32, 2e-6)])
@pytest.mark.parametrize(("op", "a", "v", "mode"), cases(LARGE))
def test_lowerings_agree(op, a, v, mode, dtype, bound):
    a, v = drawn(a, v, dtype=dtype)
    exact = op(a.astype(np.float64), v.astype(np.float64), mode, method="direct")
    for method in fourier.METHODS:
        y = op(a, v, mode, method=method)
        assert y.dtype == dtype
        assert distance(y, exact) < bound
    assert distance(exact, scipys(op, a.astype(np.float64), v.astype(np.float64), mode)) < 1e-12


@pytest.mark.parametrize(
    ("a", "v", "size", "fourier_runs"),
    [
        ((4096,), (128,), (4096,), False),
        ((4096,), (129,), (4096,), True),
        ((128,), (4096,), (4096,), False),
        ((4096,), (4089,), (8,), False),
        ((4096,), (4088,), (9,), True),
        ((100, 100), (11, 11), (100, 100), False),
        ((100, 100), (12, 12), (100, 100), True),
    ],
)
def test_the_smallest_of_the_three_sizes_selects_the_lowering(a, v, size, fourier_runs):
    a, v = drawn(a, v)
    assert fourier.choose_fourier((0,) * a.ndim, size, "auto", a, v) is fourier_runs
    assert fourier.choose_fourier((0,) * a.ndim, size, "fft", a, v)
    assert not fourier.choose_fourier((0,) * a.ndim, size, "direct", a, v)


def test_direct_is_exact_on_whole_numbers():
    a, v = (jnp.round(10 * x) for x in drawn((500,), (200,)))
    np.testing.assert_array_equal(convolve(a, v, method="direct"), np.convolve(a, v))


@pytest.mark.parametrize("op", [convolve, correlate, autocorrelate])
def test_direct_is_direct_in_the_backward_pass(op):
    """One NaN in δ reaches only the elements that depend on it."""
    shapes = ((140,), (130,)) if op is not autocorrelate else ((140,),)
    y, pull = jax.vjp(functools.partial(op, method="direct"), *drawn(*shapes))
    for cotangent in pull(y.at[0].set(jnp.nan)):
        assert 0 < np.isnan(cotangent).sum() < cotangent.size


@pytest.mark.parametrize("op", [convolve, correlate])
def test_fft_is_a_transform(op):
    """FFT rounding errors scale with the largest element; the direct form rounds each result independently."""
    a, v = drawn((9,), (3,))
    large = a.at[0].set(1e12)
    exact = op(a, v, method="direct")[3:-3]  # results that do not depend on the first element
    errors = {m: np.abs(op(large, v, method=m)[3:-3] - exact).max() for m in ("fft", "direct")}
    assert errors["direct"] < 1e-12
    assert 1e-6 < errors["fft"] < 1e-2


def test_fast_lengths():
    for n in range(1, 2000):
        length = fourier.fast_length(n)
        assert length >= n
        for prime in (2, 3, 5):
            while length % prime == 0:
                length //= prime
        assert length == 1
    assert [fourier.fast_length(n) for n in (1, 7, 11, 17, 97, 513)] == [1, 8, 12, 18, 100, 540]


# ---- transformations, dtypes, errors ------------------------------------------------------------------------------

OPS = [
    pytest.param(convolve, ((9,), (4,)), id="convolve"),
    pytest.param(functools.partial(correlate, method="fft"), ((6, 5), (3, 4)), id="correlate"),
    pytest.param(autocorrelate, ((4, 5),), id="autocorrelate"),
    pytest.param(match_template, ((7, 6), (3, 2)), id="match_template"),
]


@pytest.mark.slow("compiles many programs")
@pytest.mark.parametrize(("op", "shapes"), OPS)
def test_jit_and_vmap_over_each_input_and_over_all(op, shapes):
    inputs = drawn(*shapes)
    batched = drawn(*((3, *shape) for shape in shapes))
    (ct,) = drawn(jax.eval_shape(op, *inputs).shape, seed=1)

    def slopes(*inputs):
        return jax.vjp(op, *inputs)[1](ct)

    for f in (op, slopes):
        once = f(*inputs)
        jitted = jax.jit(f)
        jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-10, atol=1e-12), jitted(*inputs), once)
        for axes in itertools.product((0, None), repeat=len(inputs)):
            if not any(axis == 0 for axis in axes):
                continue
            mixed = [b if axis == 0 else x for axis, b, x in zip(axes, batched, inputs, strict=True)]
            got = jax.jit(jax.vmap(f, axes))(*mixed)
            for i in range(3):
                one = jitted(*(m[i] if axis == 0 else m for axis, m in zip(axes, mixed, strict=True)))
                part = jax.tree.map(lambda leaf, i=i: leaf[i], got)
                jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-12), part, one)


@pytest.mark.parametrize(("op", "shapes"), OPS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(np.float64, 1e-10), (np.float32, 1e-5), (jnp.bfloat16, 0.03), (np.float16, 5e-3)]
)
def test_results_and_gradients_have_the_dtype_of_the_inputs(op, shapes, dtype, bound):
    inputs = [x.astype(dtype) for x in drawn(*shapes)]
    wide = [x.astype(np.float64) for x in inputs]
    (ct,) = drawn(jax.eval_shape(op, *inputs).shape, seed=1)
    y, found = pulled(op, tuple(inputs), ct.astype(dtype))
    exact, exact_cotangents = pulled(op, tuple(wide), ct)
    assert y.dtype == dtype
    assert distance(y, exact) < bound
    for got, expected in zip(found, exact_cotangents, strict=True):
        assert got.dtype == dtype
        assert distance(got, expected) < 2 * bound


@pytest.mark.parametrize(("op", "shapes"), OPS)
def test_another_rule_is_used(op, shapes):
    inputs = drawn(*shapes)
    doubled = functools.partial(op, rule=lambda call, delta: tuple(2 * g for g in call.exact(delta)))
    (ct,) = drawn(jax.eval_shape(op, *inputs).shape, seed=1)
    for got, exact in zip(pulled(doubled, inputs, ct)[1], pulled(op, inputs, ct)[1], strict=True):
        np.testing.assert_allclose(got, 2 * exact, rtol=1e-12)


def test_forward_mode_through_autodiff():
    a, v = drawn((5,), (3,))
    jacobian = jax.jacfwd(functools.partial(convolve, rule=rules.autodiff))(a, v)
    np.testing.assert_allclose(jacobian @ a, np.convolve(a, v))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: convolve([1, 2], [1.0]), TypeError, "convolve: a must be of a floating dtype, got int64"),
        (lambda: correlate(None, [1.0]), TypeError, "correlate: a must be an array, got None"),
        (
            lambda: correlate(jnp.ones(3, np.float32), jnp.ones(2, np.float64)),
            TypeError,
            "correlate: arrays must be of one dtype, got a float32, v float64",
        ),
        (
            lambda: convolve(jnp.ones((2, 2)), jnp.ones(2)),
            ValueError,
            "convolve: a and v must be of one rank, got a (2, 2), v (2,)",
        ),
        (
            lambda: autocorrelate(jnp.ones((1, 1, 1, 1))),
            ValueError,
            "autocorrelate: a must be of rank 1, 2 or 3, got a (1, 1, 1, 1)",
        ),
        (
            lambda: convolve(jnp.ones(0), jnp.ones(2)),
            ValueError,
            "convolve: a and v must be non-empty, got a (0,), v (2,)",
        ),
        (
            lambda: correlate(jnp.ones((2, 5)), jnp.ones((3, 3)), "valid"),
            ValueError,
            "correlate: one of a and v must be at least as large as the other in every dim for mode 'valid', "
            "got a (2, 5), v (3, 3)",
        ),
        (
            lambda: convolve(jnp.ones(2), jnp.ones(2), "half"),
            ValueError,
            "convolve: mode must be one of full, same, valid, got 'half'",
        ),
        (
            lambda: autocorrelate(jnp.ones(2), method="fast"),
            ValueError,
            "autocorrelate: method must be one of auto, direct, fft, got 'fast'",
        ),
        (
            lambda: match_template(jnp.ones((4, 4)), jnp.ones((2, 5))),
            ValueError,
            "match_template: template must be no larger than image (4, 4) in any dim, got (2, 5)",
        ),
        (
            lambda: match_template(jnp.ones((4, 4)), jnp.ones(3)),
            ValueError,
            "match_template: image and template must be of one rank, got image (4, 4), template (3,)",
        ),
    ],
)
def test_bad_input_names_op_argument_got_and_expected(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
