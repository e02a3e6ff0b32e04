"""Every form of each primitive: values and gradients equal those of JAX, and the expected op is recognized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcnn
from jaxcnn.tracing import trace
from tests.tracing.agreement import assert_same, integers, kinds, random, replaced

NHWC = ("NHWC", "HWIO", "NHWC")


def rows(table):
    return [pytest.param(*row, id=name) for name, row in table.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions: shapes of x and w, options

CONVOLUTIONS = {
    "1-D": ((2, 3, 9), (4, 3, 3), {}),
    "3-D": ((1, 2, 4, 5, 4), (3, 2, 2, 3, 2), {}),
    "NHWC": ((2, 6, 5, 3), (3, 2, 3, 4), {"dimension_numbers": NHWC}),
    "CHWN": ((3, 6, 5, 2), (4, 3, 2, 3), {"dimension_numbers": ("CHWN", "OHWI", "HNWC")}),
    "stride": ((2, 3, 7, 6), (4, 3, 3, 2), {"window_strides": (2, 3)}),
    "padding": ((2, 3, 4, 5), (4, 3, 3, 2), {"padding": ((2, 1), (0, 3))}),
    "SAME": ((2, 3, 5, 6), (4, 3, 3, 3), {"padding": "SAME", "window_strides": (2, 2)}),
    "SAME_LOWER": ((2, 3, 5, 6), (4, 3, 2, 2), {"padding": "SAME_LOWER"}),
    "negative padding": ((2, 3, 7, 6), (4, 3, 2, 2), {"padding": ((-1, 2), (1, -2))}),
    "dilation": ((2, 3, 8, 9), (4, 3, 3, 2), {"rhs_dilation": (2, 3)}),
    "groups": ((2, 4, 6, 5), (6, 2, 3, 2), {"feature_group_count": 2}),
    "batch groups": ((4, 3, 6, 5), (6, 3, 3, 2), {"batch_group_count": 2}),
    "1x1": ((2, 3, 4, 5), (4, 3, 1, 1), {}),
    "everything": (
        (2, 9, 8, 4),
        (3, 2, 2, 6),
        {"dimension_numbers": NHWC, "window_strides": (2, 1), "padding": ((2, -1), (1, 0)), "rhs_dilation": (1, 2),
         "feature_group_count": 2, "precision": "highest", "preferred_element_type": "float64"},
    ),
    "dilated input with a stride": ((2, 3, 4, 5), (4, 3, 2, 2), {"lhs_dilation": (2, 3), "window_strides": (3, 2)}),
    "dilated input with padding beyond the kernel": (
        (2, 3, 4, 5), (4, 3, 2, 2), {"lhs_dilation": (2, 2), "padding": ((3, 1), (1, 4))},
    ),
    "dilated input in batch groups": ((4, 3, 4, 5), (6, 3, 3, 2), {"lhs_dilation": (2, 2), "batch_group_count": 2}),
}  # fmt: skip

TRANSPOSED = {
    "padded": ((2, 3, 4, 5), (4, 3, 3, 3), {"lhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))}),
    "cropped": ((2, 3, 4, 5), (4, 3, 3, 4), {"lhs_dilation": (2, 3), "padding": ((1, 0), (2, 1))}),
    "output padding": ((2, 3, 4, 5), (4, 3, 2, 3), {"lhs_dilation": (3, 2), "padding": ((1, 3), (2, 3))}),
    "one dim": ((2, 3, 4, 5), (4, 3, 3, 3), {"lhs_dilation": (1, 2), "padding": ((1, 1), (2, 2))}),
    "kernel dilation": ((2, 3, 4, 5), (4, 3, 2, 2), {"lhs_dilation": (2, 2), "rhs_dilation": (2, 1)}),
    "groups": ((2, 4, 4, 5), (6, 2, 3, 3), {"lhs_dilation": (2, 2), "feature_group_count": 2}),
    "depthwise": ((2, 4, 4, 5), (8, 1, 3, 3), {"lhs_dilation": (2, 2), "feature_group_count": 4}),
    "NHWC": ((2, 4, 5, 3), (3, 3, 3, 4), {"lhs_dilation": (2, 2), "dimension_numbers": NHWC}),
    "negative padding": ((2, 3, 4, 5), (4, 3, 2, 2), {"lhs_dilation": (2, 2), "padding": ((-1, 1), (1, -2))}),
    "1-D": ((2, 3, 6), (4, 3, 4), {"lhs_dilation": (2,), "padding": ((3, 3),)}),
}

DEPTHWISE = {
    "one kernel per channel": ((2, 4, 6, 5), (4, 1, 3, 3), {"feature_group_count": 4, "padding": "SAME"}),
    "two": ((2, 4, 6, 5), (8, 1, 3, 3), {"feature_group_count": 4, "window_strides": (2, 1)}),
}


def convolution(options, x, w):
    options = {"window_strides": (1,) * (x.ndim - 2), "padding": ((0, 0),) * (x.ndim - 2), **options}
    return lax.conv_general_dilated(x, w, **options)


@pytest.mark.parametrize(("x", "w", "options"), rows(CONVOLUTIONS))
def test_convolution(x, w, options):
    fun, x, w = functools.partial(convolution, options), random(*x), random(*w, seed=1)
    assert replaced(fun, x, w) == ["conv"]
    assert_same(fun, x, w)


@pytest.mark.parametrize(("x", "w", "options"), rows(TRANSPOSED))
def test_dilated_input_is_a_transposed_convolution(x, w, options):
    fun, x, w = functools.partial(convolution, options), random(*x), random(*w, seed=1)
    assert replaced(fun, x, w) == ["conv_transpose"]
    assert_same(fun, x, w)


@pytest.mark.parametrize(("x", "w", "options"), rows(DEPTHWISE))
def test_depthwise_convolution(x, w, options):
    fun, x, w = functools.partial(convolution, options), random(*x), random(*w, seed=1)
    assert replaced(fun, x, w) == ["depthwise_conv"]
    assert_same(fun, x, w)


def test_gradient_that_is_wrong_in_jax_is_right():
    """For such a padding, JAX's own δ_x reads out of bounds on CPU (openxla/xla#48713)."""
    fun = functools.partial(convolution, {"padding": ((4, 0),)})
    x, w, y = random(2, 3, 6), random(4, 3, 3, seed=1), random(2, 4, 8, seed=2)
    (found,) = jax.vjp(lambda x: jaxcnn.explicit(fun)(x, w), x)[1](y)
    shifts = [jnp.pad(jnp.einsum("nos,oi->nis", y, w[:, :, k]), ((0, 0), (0, 0), (k, 2 - k))) for k in range(3)]
    np.testing.assert_allclose(found, sum(shifts)[:, :, 4:10], rtol=1e-12)


#: Convolutions that stay, and why.
LEFT = {
    "integers": (jnp.ones((1, 1, 4), int), jnp.ones((1, 1, 2), int), {}, "dtype int64"),
    "complex": (jnp.ones((1, 1, 4), complex), jnp.ones((1, 1, 2), complex), {}, "dtype complex128"),
    "no spatial dim": (jnp.ones((2, 3)), jnp.ones((4, 3)), {}, "0 spatial dims"),
    "four spatial dims": (jnp.ones((1, 1, 2, 2, 2, 2)), jnp.ones((1, 1, 1, 1, 1, 1)), {}, "4 spatial dims"),
    "kernel larger than the input": (
        jnp.ones((1, 1, 2)), jnp.ones((1, 1, 3)), {},
        "conv: kernel size must be at most the padded input",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("x", "w", "options", "reason"), rows(LEFT))
def test_what_cannot_be_expressed_stays(x, w, options, reason):
    fun = functools.partial(convolution, options)
    (row,) = jaxcnn.operations(fun)(x, w).rows
    assert (row.op, row.recognized) == ("conv_general_dilated", False)
    assert row.reason
    np.testing.assert_array_equal(jaxcnn.explicit(fun)(x, w), fun(x, w))


def test_16_bit_floats():
    fun = functools.partial(convolution, {"padding": "SAME", "preferred_element_type": jnp.float32})
    x, w = random(2, 3, 6).astype(jnp.bfloat16), random(4, 3, 3, seed=1).astype(jnp.bfloat16)
    found, expected = jaxcnn.explicit(fun)(x, w), fun(x, w)
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Pools


def window(reduction, initial, x, size, strides, padding="VALID", **options):
    return lax.reduce_window(x, initial, reduction, size, strides, padding, **options)


MAX, MIN, SUM = (functools.partial(window, *each) for each in ((lax.max, -jnp.inf), (lax.min, jnp.inf), (lax.add, 0.0)))
SAME_SUM = functools.partial(SUM, size=(1, 3, 2, 1), strides=(1, 2, 1, 1), padding="SAME")

POOLS = {
    "max": (lambda x: MAX(x, (1, 2, 2, 1), (1, 2, 2, 1)), (2, 4, 6, 3), "max_pool"),
    "max NCHW": (lambda x: MAX(x, (1, 1, 2, 2), (1, 1, 2, 2)), (2, 3, 4, 6), "max_pool"),
    "max of overlapping windows": (
        lambda x: MAX(x, (1, 3, 2, 1), (1, 1, 2, 1), ((0, 0), (1, 2), (0, 1), (0, 0))), (2, 5, 5, 2), "max_pool",
    ),
    "max along batch and channels": (lambda x: MAX(x, (2, 1, 2), (2, 1, 2)), (4, 3, 6), "max_pool"),
    "max along all dims": (lambda x: MAX(x, (2, 3), (1, 1)), (4, 5), "max_pool"),
    "max of a vector": (lambda x: MAX(x, (2,), (2,)), (6,), "max_pool"),
    "max of five dims": (lambda x: MAX(x, (1, 1, 2, 1, 2), (1, 1, 2, 1, 1)), (2, 3, 4, 2, 4), "max_pool"),
    "min": (lambda x: MIN(x, (1, 2, 2, 1), (1, 2, 1, 1), "SAME"), (2, 5, 4, 3), "max_pool"),
    "sum": (lambda x: SUM(x, (1, 2, 3, 1), (1, 2, 1, 1), "SAME"), (2, 5, 4, 3), "avg_pool"),
    "sum of a dilated window": (
        lambda x: SUM(x, (1, 2, 1), (1, 1, 1), window_dilation=(1, 2, 1)), (2, 6, 3), "avg_pool",
    ),
    "average": (lambda x: SUM(x, (1, 2, 2, 1), (1, 2, 2, 1)) / 4, (2, 4, 6, 3), "avg_pool"),
    "average without padding": (
        lambda x: SAME_SUM(x) / SAME_SUM(jnp.ones((1, 5, 4, 1))), (2, 5, 4, 3), "avg_pool",
    ),
    "average, transposed before the division": (
        lambda x: jnp.transpose(SUM(x, (1, 2, 1), (1, 2, 1)), (0, 2, 1)) / 2, (2, 6, 3), "avg_pool",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fun", "shape", "op"), rows(POOLS))
def test_pool(fun, shape, op):
    assert replaced(fun, random(*shape)) == [op]
    assert_same(fun, random(*shape))
    if op == "max_pool":
        assert_same(fun, integers(*shape))  # ties: the same element wins


def test_average_with_the_counts_of_other_windows_stays_a_sum():
    def fun(x):
        return SUM(x, (1, 2, 1), (1, 1, 1), "SAME") / SUM(jnp.ones((1, 5, 1)), (1, 3, 1), (1, 1, 1), "SAME")

    (operation, *_) = trace(fun, random(2, 5, 3)).operations
    assert operation.form.divisor == 1
    assert_same(fun, random(2, 5, 3))


LEFT_POOLS = {
    "dilated input": (lambda x: MAX(x, (1, 2, 1), (1, 1, 1), base_dilation=(1, 2, 1)), "base_dilation"),
    "an initial value": (
        lambda x: window(lax.max, 0.5, x, (1, 2, 1), (1, 1, 1)),
        "an initial value that is not neutral",
    ),
    "a product": (lambda x: window(lax.mul, 1.0, x, (1, 2, 1), (1, 1, 1)), "a computation of its own"),
    "a window of one element": (lambda x: MAX(x, (1, 1, 1), (1, 1, 1)), "windows along 0 dims"),
    "a window in the padding": (lambda x: MAX(x, (1, 2, 1), (1, 1, 1), ((0, 0), (3, 0), (0, 0))), "max_pool: "),
}  # fmt: skip


@pytest.mark.parametrize(("fun", "reason"), rows(LEFT_POOLS))
def test_pool_that_cannot_be_expressed_stays(fun, reason):
    x = random(2, 5, 3)
    (row,) = (row for row in jaxcnn.operations(fun)(x).rows if row.op.startswith("reduce_window"))
    assert row.reason.startswith(reason)
    np.testing.assert_array_equal(jaxcnn.explicit(fun)(x), fun(x))


GLOBAL = {
    "mean": (lambda x: x.mean((1, 2)), ["global_avg_pool"]),
    "mean with dims kept": (lambda x: x.mean((1, 2), keepdims=True), ["global_avg_pool"]),
    "mean of NCHW": (lambda x: x.mean((2, 3)), ["global_avg_pool"]),
    "mean of vmapped examples": (lambda x: jax.vmap(lambda x: x[None].mean((1, 2))[0])(x), ["global_avg_pool"]),
    "max": (lambda x: x.max((1, 2)), ["global_max_pool"]),
    "sum": (lambda x: x.sum((1, 2)), []),
    "mean over the batch": (lambda x: x.mean((0, 1, 2)), []),
    "mean of squares": (lambda x: jnp.square(x).mean((1, 2)), []),
    "instance norm": (lambda x: (x - x.mean((1, 2), keepdims=True)) / jnp.sqrt(1 + x.var((1, 2), keepdims=True)), []),
}


@pytest.mark.parametrize(("fun", "expected"), rows(GLOBAL))
def test_reduction_over_the_image(fun, expected):
    assert kinds(fun, random(2, 3, 4, 5)) == expected
    assert_same(fun, random(2, 3, 4, 5))
    assert_same(fun, integers(2, 3, 4, 5))  # the maximum of ties divides δ among them, as JAX does


# ---------------------------------------------------------------------------------------------------------------------
# Products, biases and sums

DENSE = {
    "matmul": (lambda x, w: x @ w, (2, 3), (3, 4), 0),
    "rows of rows": (lambda x, w: x @ w, (2, 5, 3), (3, 4), 0),
    "weights first": (lambda x, w: (w @ x.T).T, (2, 3), (4, 3), 1),
    "vmap of weights first": (lambda x, w: jax.vmap(lambda x: w @ x)(x), (2, 3), (4, 3), 1),
    "transposed weights": (lambda x, w: x @ w.T, (2, 3), (4, 3), 0),
    "two contracted dims": (lambda x, w: jnp.einsum("nabi,bio->nao", x, w), (2, 3, 4, 5), (4, 5, 6), 0),
    "two output dims": (lambda x, w: jnp.einsum("ni,ihd->nhd", x, w), (2, 3), (3, 4, 5), 0),
}


@pytest.mark.parametrize(("fun", "x", "w", "swapped"), rows(DENSE))
def test_product(fun, x, w, swapped):
    x, w = random(*x), random(*w, seed=1)
    (operation,) = trace(fun, x, w).operations
    assert (operation.form.kind, operation.form.swapped) == ("dense", bool(swapped))
    assert_same(fun, x, w)
    straight = jaxcnn.explicit(fun, rules={jaxcnn.dense: lambda call, delta: call.exact(delta)})
    np.testing.assert_allclose(
        jax.grad(lambda w: (straight(x, w) ** 2).sum())(w), jax.grad(lambda w: (fun(x, w) ** 2).sum())(w), rtol=1e-12
    )


def test_products_that_are_not_dense():
    def reasons(fun, *args):
        return [row.reason for row in jaxcnn.operations(fun)(*args).rows]

    assert reasons(lambda a, b: jnp.einsum("nij,njk->nik", a, b), random(2, 3, 4), random(2, 4, 5)) == [
        "a product of two batches"
    ]
    assert reasons(lambda a, b: a @ b, random(3, 4), random(4)) == ["a product with a vector"]
    assert reasons(lambda a, b: a @ b, jnp.ones((2, 3), int), jnp.ones((3, 2), int)) == ["dtypes int64, int64"]


BIASES = {
    "of a convolution": (lambda x, w, b: convolution({}, x, w) + b[:, None], (2, 3, 6), (4, 3, 3), (4,), True),
    "reshaped": (lambda x, w, b: convolution({}, x, w) + b.reshape(1, 4, 1), (2, 3, 6), (4, 3, 3), (4,), True),
    "first": (lambda x, w, b: b[:, None] + convolution({}, x, w), (2, 3, 6), (4, 3, 3), (4,), True),
    "broadcast": (
        lambda x, w, b: convolution({}, x, w) + jnp.broadcast_to(b[:, None], (2, 4, 4)),
        (2, 3, 6), (4, 3, 3), (4,), True,
    ),
    "after a squeeze": (lambda x, w, b: convolution({}, x, w)[0] + b[:, None], (1, 3, 6), (4, 3, 3), (4,), True),
    "after a transpose": (
        lambda x, w, b: convolution({}, x, w).transpose(0, 2, 1) + b, (2, 3, 6), (4, 3, 3), (4,), True,
    ),
    "of a product": (lambda x, w, b: x @ w + b, (2, 3), (3, 4), (4,), True),
    "of a product with the weights first": (lambda x, w, b: (w @ x.T).T + b, (2, 3), (4, 3), (4,), True),
    "along another dim": (lambda x, w, b: convolution({}, x, w) + b, (2, 3, 6), (5, 3, 3), (4,), False),
    "of the batch": (lambda x, w, b: convolution({}, x, w) + b[:, None, None], (2, 3, 6), (5, 3, 3), (2,), False),
    "a number": (lambda x, w, b: convolution({}, x, w) + b, (2, 3, 6), (4, 3, 3), (), False),
    "of a result that is used twice": (
        lambda x, w, b: (y := convolution({}, x, w)) * (y + b[:, None]), (2, 3, 6), (4, 3, 3), (4,), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fun", "x", "w", "b", "joined"), rows(BIASES))
def test_bias(fun, x, w, b, joined):
    args = random(*x), random(*w, seed=1), random(*b, seed=2)
    (operation,) = (o for o in trace(fun, *args).operations if o.form.kind in ("conv", "dense"))
    assert len(operation.inputs) == 2 + joined
    assert_same(fun, *args)


def test_sums_of_two_branches():
    def fun(x, y):
        return x + y, x + y[:1], x + 1, x + jnp.zeros_like(x)

    assert kinds(fun, random(2, 3), random(2, 3)) == ["add"]
    assert_same(fun, random(2, 3), random(2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Activations: spelling, op, whether the library computes it

ACTIVATIONS = {
    "relu": (jax.nn.relu, "relu", True),
    "maximum": (lambda x: jnp.maximum(x, 0), "relu", False),
    "maximum, 0 first": (lambda x: jnp.maximum(0.0, x), "relu", False),
    "where >": (lambda x: jnp.where(x > 0, x, 0), "relu", False),
    "where >=": (lambda x: jnp.where(x >= 0, x, 0.0), "relu", False),
    "where <": (lambda x: jnp.where(x < 0, jnp.zeros_like(x), x), "relu", False),
    "mask": (lambda x: x * (x > 0), "relu", False),
    "clip below": (lambda x: jnp.clip(x, 0), "relu", False),
    "clip to an infinite bound": (lambda x: x.clip(min=0), "relu", False),
    "relu6": (jax.nn.relu6, "relu6", True),
    "clip": (lambda x: jnp.clip(x, 0, 6), "relu6", False),
    "clamp": (lambda x: lax.clamp(0.0, x, 6.0), "relu6", False),
    "minimum of relu": (lambda x: jnp.minimum(jax.nn.relu(x), 6.0), "relu6", False),
    "leaky_relu": (jax.nn.leaky_relu, "leaky_relu", False),
    "where with a slope": (lambda x: jnp.where(x > 0, x, 0.2 * x), "leaky_relu", False),
    "where with a slope, swapped": (lambda x: jnp.where(x > 0, x, x * 0.2), "leaky_relu", False),
    "maximum with a slope": (lambda x: jnp.maximum(0.1 * x, x), "leaky_relu", False),
    "sigmoid": (jax.nn.sigmoid, "sigmoid", False),
    "sigmoid by hand": (lambda x: 1 / (1 + jnp.exp(-x)), "sigmoid", False),
    "tanh": (jnp.tanh, "tanh", False),
    "silu": (jax.nn.silu, "silu", False),
    "swish by hand": (lambda x: x * jax.nn.sigmoid(x), "silu", False),
    "gelu": (jax.nn.gelu, "gelu", False),
    "exact gelu": (functools.partial(jax.nn.gelu, approximate=False), "gelu", False),
    "softplus": (jax.nn.softplus, "softplus", False),
    "log_sigmoid": (jax.nn.log_sigmoid, "log_sigmoid", False),
    "elu": (functools.partial(jax.nn.elu, alpha=0.3), "elu", False),
    "selu": (jax.nn.selu, "selu", False),
    "celu": (functools.partial(jax.nn.celu, alpha=0.3), "celu", False),
    "hard_tanh": (jax.nn.hard_tanh, "hard_tanh", False),
    "hard_sigmoid": (jax.nn.hard_sigmoid, "hard_sigmoid", False),
    "hard_swish": (jax.nn.hard_swish, "hard_swish", False),
    "mish": (jax.nn.mish, "mish", False),
    "soft_sign": (jax.nn.soft_sign, "softsign", False),
    "squareplus": (jax.nn.squareplus, "squareplus", False),
}


@pytest.mark.parametrize(("fun", "op", "computed"), rows(ACTIVATIONS))
def test_activation(fun, op, computed):
    """The integers are on all edges; each spelling keeps its own derivative there."""
    x = jnp.concatenate([integers(3, 8, most=7), random(1, 8)])
    (operation,) = trace(fun, x).operations
    assert (operation.form.kind, operation.form.replaces) == (op, computed)
    assert operation.op is getattr(jaxcnn, op)
    assert kinds(jax.vmap(fun), x) == [op]
    assert_same(fun, x)
    if not computed:  # with a rule, the exact one is that of the spelling
        given = jaxcnn.explicit(fun, rules={op + "1": lambda call, delta: call.exact(delta)})
        found, expected = (jax.grad(lambda x, f=f: f(x).sum())(x) for f in (given, fun))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=5e-14)  # 42(1 − tanh²) of gelu at −7 cancels


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: jnp.clip(x, -2, 3), lambda x: jnp.maximum(x, 1), lambda x: jnp.where(x > 1, x, 0),
        lambda x: jnp.where(x > 0, x, 1), lambda x: jnp.maximum(x.mean(0), 0) + x.max(), lambda x: jnp.exp(x) / 2,
    ],
)  # fmt: skip
def test_functions_that_only_look_like_activations(fun):
    assert [kind for kind in kinds(fun, random(2, 3)) if kind != "relu"] == []
    assert_same(fun, integers(2, 3))


def test_a_user_function_of_the_same_name_and_value_keeps_its_derivative():
    @jax.custom_jvp
    @jax.jit
    def relu(x):
        return jnp.maximum(x, 0)

    relu.defjvps(lambda t, y, x: t)  # straight through
    assert kinds(relu, random(2, 3)) == []
    assert_same(relu, random(2, 3))
    relu.defjvps(lambda t, y, x: lax.select(x > 0, t, lax.full_like(t, 0)))
    assert kinds(relu, random(2, 3)) == ["relu"]


def test_weakly_typed_scalars():
    assert_same(jax.nn.relu, jax.jit(lambda x: x * 2.0)(1.5))
    assert jax.grad(jaxcnn.explicit(jax.nn.relu))(2.0).weak_type
