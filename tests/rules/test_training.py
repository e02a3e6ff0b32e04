"""Training rules compared with their formulas in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxcnn
from jaxcnn import rules
from tests.compare_torch import CLOSE, pulled, random_delta

RNG = np.random.default_rng(0)
CALLS = {
    # name: (op of (x, w, b), the arrays)
    "conv": (
        lambda x, w, b, **rule: jaxcnn.conv(x, w, b, stride=2, padding=1, **rule),
        (RNG.standard_normal((2, 7, 6, 3)), RNG.standard_normal((3, 2, 3, 4)), RNG.standard_normal(4)),
    ),
    "conv, groups, no bias": (
        lambda x, w, **rule: jaxcnn.conv(x, w, groups=2, **rule),
        (RNG.standard_normal((2, 5, 6, 4)), RNG.standard_normal((3, 2, 2, 6))),
    ),
    "depthwise_conv": (
        jaxcnn.depthwise_conv,
        (RNG.standard_normal((2, 5, 6, 3)), RNG.standard_normal((3, 2, 1, 6)), RNG.standard_normal(6)),
    ),
    "conv_transpose": (
        lambda x, w, b, **rule: jaxcnn.conv_transpose(x, w, b, stride=2, **rule),
        (RNG.standard_normal((2, 5, 4, 3)), RNG.standard_normal((3, 2, 4, 3)), RNG.standard_normal(4)),
    ),
    "dense": (jaxcnn.dense, (RNG.standard_normal((3, 5)), RNG.standard_normal((5, 4)), RNG.standard_normal(4))),
    "hidden_layer": (
        jaxcnn.hidden_layer,
        (RNG.standard_normal((2, 7, 6, 3)), RNG.standard_normal((2, 3, 3, 4)), RNG.standard_normal(4)),
    ),
}  # fmt: skip


def back(name, rule, *args, delta=None):
    op, arrays = CALLS[name]
    args = args or arrays
    delta = random_delta(jax.eval_shape(op, *args)) if delta is None else delta
    return pulled(lambda *args: op(*args, rule=rule), args, delta)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Another kernel


@pytest.mark.parametrize(
    "rule", [rules.FeedbackAlignment(3), rules.sign_symmetric], ids=lambda r: getattr(r, "__name__", repr(r))
)
@pytest.mark.parametrize("name", ["conv", "conv, groups, no bias", "depthwise_conv", "conv_transpose", "dense"])
def test_delta_x_uses_the_other_kernel(rule, name):
    """δ_x is that of the exact rule with kernel B, and the other gradients are the exact ones with kernel w."""
    _, (x, w, *b) = CALLS[name]
    other = np.sign(w) * np.abs(w).mean() if rule is rules.sign_symmetric else np.asarray(rule.kernel(w))
    delta_x, *of_parameters = back(name, rule)
    np.testing.assert_allclose(delta_x, back(name, None, x, other, *b)[0], **CLOSE)
    for result, expected in zip(of_parameters, back(name, None)[1:], strict=True):
        np.testing.assert_allclose(result, expected, **CLOSE)


def test_another_kernel_in_a_hidden_layer():
    rule = rules.FeedbackAlignment(3)
    x, w, b = CALLS["hidden_layer"][1]

    def in_turn(x, w, b):
        return jaxcnn.max_pool(jaxcnn.relu(jaxcnn.conv(x, w, b, rule=rule)), 2)

    delta = random_delta(jax.eval_shape(in_turn, x, w, b))
    expected = pulled(in_turn, (x, w, b), delta)[1]
    for result, want in zip(back("hidden_layer", rule, delta=delta), expected, strict=True):
        np.testing.assert_allclose(result, want, **CLOSE)
    assert np.abs(expected[0] - back("hidden_layer", None, delta=delta)[0]).max() > 0.1


def test_the_random_kernel():
    """It is distributed like an initial kernel, with mean 0 and variance 2 / fan-in.

    It depends only on seed and shape, and is the same in every dtype and program.
    """
    w = np.zeros((5, 5, 32, 64))
    kernel = np.asarray(rules.FeedbackAlignment(1).kernel(w))
    n = kernel.size
    assert abs(kernel.mean()) < 5 * kernel.std() / np.sqrt(n)
    np.testing.assert_allclose(kernel.var() * 800 / 2, 1, atol=5 * np.sqrt(2 / n))
    assert abs(kernel).max() <= np.sqrt(6 / 800)
    np.testing.assert_array_equal(kernel, jax.jit(rules.FeedbackAlignment(1).kernel)(w))
    np.testing.assert_array_equal(kernel, rules.FeedbackAlignment(1).kernel(w.astype(np.float32)))
    assert np.abs(kernel - rules.FeedbackAlignment(2).kernel(w)).max() > 0.1
    flipped = np.asarray(rules.FeedbackAlignment(1).kernel(np.zeros((5, 5, 64, 32))))
    assert abs(np.corrcoef(kernel.ravel(), flipped.ravel())[0, 1]) < 0.05


def test_training_aligns_w_with_b():
    """The rule is named after this effect: with B fixed, training aligns w with B."""
    rng = np.random.default_rng(0)
    teacher, x = rng.standard_normal((10, 4)), rng.standard_normal((256, 10))
    net = jaxcnn.serial(jaxcnn.Dense(20), jaxcnn.Dense(4))
    params = jax.tree.map(
        lambda a: rng.normal(0, 0.1, a.shape), jax.eval_shape(lambda: net.init(jax.random.key(0), (10,)))
    )  # fmt: skip
    rule = rules.FeedbackAlignment(0)
    kernel = rule.kernel(params["dense2"]["weight"])

    def error(params):
        return jaxcnn.squared_error(net.apply(params, x, rules=rule), x @ teacher).mean()

    def angle(params):
        w = params["dense2"]["weight"]
        return np.degrees(np.arccos(jnp.vdot(w, kernel) / jnp.linalg.norm(w) / jnp.linalg.norm(kernel)))

    before = angle(params), error(params)
    step = jax.jit(lambda params: jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(error)(params)))
    for _ in range(300):
        params = step(params)
    assert before[0] > 75
    assert angle(params) < 45
    assert error(params) < before[1] / 10


# ---------------------------------------------------------------------------------------------------------------------
# Another δ


def clipped(delta, norm):
    size = np.sqrt((delta**2).sum(tuple(range(1, delta.ndim)), keepdims=True))
    return delta * np.minimum(1, norm / size)


@pytest.mark.parametrize("name", CALLS)
def test_clipped(name):
    op, args = CALLS[name]
    delta = random_delta(jax.eval_shape(op, *args)) * np.array([0.01, 10, 1])[: len(args[0])].reshape(
        -1, *(1,) * (args[0].ndim - 1)
    )  # fmt: skip
    short = clipped(delta, 0.7)
    assert [bool((a == b).all()) for a, b in zip(short, delta, strict=True)][:2] == [True, False]
    result, expected = back(name, rules.ClipDelta(0.7), delta=delta), back(name, None, delta=short)
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_nothing_to_clip():
    rule = rules.ClipDelta(1.0)
    np.testing.assert_array_equal(rule.clipped(jnp.zeros((2, 3))), 0)
    assert rule.clipped(jnp.full((2, 300), 100, jnp.float16)).dtype == jnp.float16
    np.testing.assert_allclose(rule.clipped(jnp.full((2, 300), 1000, jnp.float16)), 300**-0.5, rtol=1e-3)
    assert jnp.isnan(rule.clipped(jnp.array([[jnp.nan, 1.0]]))).any()


DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
}


def scale(delta, dtype):
    largest = {"bfloat16": None, "float8_e4m3fn": 448, "int8": 127}[dtype]
    return 1 if largest is None else 2.0 ** np.ceil(np.log2(np.abs(delta).max() / largest))


def of_many_magnitudes(seed=0, n=4000, least=-4):
    """Draw values of many magnitudes and both signs."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * np.exp(rng.uniform(least, 1, n))).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_to_nearest(dtype):
    """Rounding agrees with ml_dtypes, including small values and values near zero."""
    delta = of_many_magnitudes(least=-20)
    s = scale(delta, dtype)
    short = np.rint(delta / s) if dtype == "int8" else (delta / s).astype(DTYPES[dtype])
    result = rules.QuantizedDelta(dtype, stochastic=False).quantized(jnp.asarray(delta))
    np.testing.assert_array_equal(result, short.astype(np.float32) * s)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_gives_a_neighbor(dtype):
    """Every result is the nearest number of the dtype above or below."""
    delta = of_many_magnitudes()
    result = np.asarray(rules.QuantizedDelta(dtype).quantized(jnp.asarray(delta)))
    s = scale(delta, dtype)
    scaled = (result / s).astype(np.float32)
    exact = np.rint(scaled) if dtype == "int8" else scaled.astype(DTYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(scaled, exact)
    up = np.nextafter(exact.astype(DTYPES[dtype]), DTYPES[dtype](448)) if dtype != "int8" else exact + 1
    down = np.nextafter(exact.astype(DTYPES[dtype]), DTYPES[dtype](-448)) if dtype != "int8" else exact - 1
    assert ((delta / s <= up.astype(np.float32)) | (delta <= 0)).all()
    assert ((delta / s >= down.astype(np.float32)) | (delta <= 0)).all()
    nearest = np.asarray(rules.QuantizedDelta(dtype, stochastic=False).quantized(jnp.asarray(delta)))
    assert 0.1 < (result != nearest).mean() < 0.5  # it would be a quarter if all distances were equally likely


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_is_unbiased(dtype):
    """The mean of 10,000 rounded copies of each element is that element, to within five standard errors."""
    delta, copies = of_many_magnitudes(1, 50).astype(float), 10_000
    result = rules.QuantizedDelta(dtype).quantized(jnp.tile(jnp.asarray(delta, jnp.float32), (copies, 1)))
    s = scale(delta, dtype)
    bits, lowest = {"bfloat16": (7, -126), "float8_e4m3fn": (3, -6), "int8": (0, 0)}[dtype]
    exponent = 0 if dtype == "int8" else np.maximum(np.floor(np.log2(np.abs(delta) / s)), lowest)
    step = s * 2.0 ** (exponent - bits)
    # The standard deviation of a value rounded to one of two numbers a step apart is at most half a step.
    assert (np.abs(np.asarray(result, float).mean(0) - delta) <= 5 * step / 2 / np.sqrt(copies) + 1e-6 * delta**2).all()
    assert (np.asarray(result).std(0) > step / 20).mean() > 0.9


def test_seed_and_delta_determine_the_rounding():
    delta = jnp.asarray(of_many_magnitudes())
    rule = rules.QuantizedDelta("int8")
    np.testing.assert_array_equal(rule.quantized(delta), rule.quantized(delta))
    assert (rule.quantized(delta) != rules.QuantizedDelta("int8", seed=1).quantized(delta)).any()
    other = delta.at[0].add(1e-3)
    assert (rule.quantized(delta)[1:] != rule.quantized(other)[1:]).any()


@pytest.mark.slow("compiles many programs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_deltas(dtype):
    rule = rules.QuantizedDelta(dtype)
    np.testing.assert_array_equal(rule.quantized(jnp.zeros((3, 2))), 0)
    result = rule.quantized(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0, -2.0], jnp.float32))
    np.testing.assert_array_equal(result[:3], [np.nan, np.inf, -np.inf])
    assert jnp.isfinite(result[3:]).all()
    largest = jnp.full(1000, np.finfo(np.float32).max)
    assert jnp.isfinite(rule.quantized(largest)).all()
    assert rule.quantized(jnp.zeros((0, 4))).shape == (0, 4)
    for kind in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
        assert rule.quantized(jnp.ones(3, kind)).dtype == kind


@pytest.mark.parametrize("name", CALLS)
def test_the_exact_rule_reads_the_quantized_delta(name):
    op, args = CALLS[name]
    rule = rules.QuantizedDelta("int8")
    delta = random_delta(jax.eval_shape(op, *args))
    short = np.asarray(rule.quantized(jnp.asarray(delta)))
    assert 0 < np.abs(short - delta).max() <= scale(delta, "int8")
    for a, b in zip(back(name, rule, delta=delta), back(name, None, delta=short), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: rules.FeedbackAlignment(-1), ValueError, "FeedbackAlignment: seed must be 0 … 4294967295, got -1"),
        (lambda: rules.FeedbackAlignment(0.5), TypeError, "FeedbackAlignment: seed must be an int, got 0.5"),
        (lambda: rules.ClipDelta(0), ValueError, "ClipDelta: norm must be a finite number > 0, got 0"),
        (lambda: rules.ClipDelta(jnp.ones(())), TypeError, "ClipDelta: norm must be a Python float, got ArrayImpl"),
        (
            lambda: rules.QuantizedDelta("int4"), ValueError,
            "QuantizedDelta: dtype must be one of bfloat16, float8_e4m3fn, int8, got 'int4'",
        ),
        (lambda: rules.QuantizedDelta(stochastic=1), TypeError, "QuantizedDelta: stochastic must be a bool, got 1"),
        (lambda: rules.QuantizedDelta(seed="0"), TypeError, "QuantizedDelta: seed must be an int, got '0'"),
    ],
)  # fmt: skip
def test_options(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
