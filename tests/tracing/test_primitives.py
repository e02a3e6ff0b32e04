"""Every form of each primitive: values and gradients equal those of JAX, and the expected op is recognized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcnn
from tests.tracing.agreement import assert_same, random, replaced

# ---------------------------------------------------------------------------------------------------------------------
# Convolutions: (x, w, options)

NHWC = ("NHWC", "HWIO", "NHWC")

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
    "depthwise": ((2, 4, 6, 5), (8, 1, 3, 3), {"feature_group_count": 4, "padding": "SAME"}),
    "batch groups": ((4, 3, 6, 5), (6, 3, 3, 2), {"batch_group_count": 2}),
    "1x1": ((2, 3, 4, 5), (4, 3, 1, 1), {}),
    "everything": (
        (2, 9, 8, 4),
        (3, 2, 2, 6),
        {"dimension_numbers": NHWC, "window_strides": (2, 1), "padding": ((2, -1), (1, 0)), "rhs_dilation": (1, 2),
         "feature_group_count": 2, "precision": "highest", "preferred_element_type": "float64"},
    ),
}  # fmt: skip

DILATED = {
    "transposed": ((2, 3, 4, 5), (4, 3, 3, 3), {"lhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))}),
    "cropped": ((2, 3, 4, 5), (4, 3, 3, 4), {"lhs_dilation": (2, 3), "padding": ((1, 0), (2, 1))}),
    "with output padding": ((2, 3, 4, 5), (4, 3, 2, 3), {"lhs_dilation": (3, 2), "padding": ((1, 3), (2, 3))}),
    "one dim": ((2, 3, 4, 5), (4, 3, 3, 3), {"lhs_dilation": (1, 2), "padding": ((1, 1), (2, 2))}),
    "with kernel dilation": ((2, 3, 4, 5), (4, 3, 2, 2), {"lhs_dilation": (2, 2), "rhs_dilation": (2, 1)}),
    "in groups": ((2, 4, 4, 5), (6, 2, 3, 3), {"lhs_dilation": (2, 2), "feature_group_count": 2}),
    "NHWC": ((2, 4, 5, 3), (3, 3, 3, 4), {"lhs_dilation": (2, 2), "dimension_numbers": NHWC}),
    "negative padding": ((2, 3, 4, 5), (4, 3, 2, 2), {"lhs_dilation": (2, 2), "padding": ((-1, 1), (1, -2))}),
    "1-D": ((2, 3, 6), (4, 3, 4), {"lhs_dilation": (2,), "padding": ((3, 3),)}),
}
EXACTLY_DILATED = {
    "stride": ((2, 3, 4, 5), (4, 3, 2, 2), {"lhs_dilation": (2, 3), "window_strides": (3, 2)}),
    "padding beyond the kernel": ((2, 3, 4, 5), (4, 3, 2, 2), {"lhs_dilation": (2, 2), "padding": ((3, 1), (1, 4))}),
    "batch groups": ((4, 3, 4, 5), (6, 3, 3, 2), {"lhs_dilation": (2, 2), "batch_group_count": 2}),
}


def convolution(options, x, w):
    options = {"window_strides": (1,) * (x.ndim - 2), "padding": ((0, 0),) * (x.ndim - 2), **options}
    return lax.conv_general_dilated(x, w, **options)


def rows(*tables):
    return [pytest.param(*row, id=name) for table in tables for name, row in table.items()]


@pytest.mark.parametrize(("x", "w", "options"), rows(CONVOLUTIONS, EXACTLY_DILATED))
def test_convolution(x, w, options):
    fun, x, w = functools.partial(convolution, options), random(*x), random(*w, seed=1)
    assert replaced(fun, x, w) == ["conv"]
    assert_same(fun, x, w)


@pytest.mark.parametrize(("x", "w", "options"), rows(DILATED))
def test_dilated_input_is_a_transposed_convolution(x, w, options):
    fun, x, w = functools.partial(convolution, options), random(*x), random(*w, seed=1)
    assert replaced(fun, x, w) == ["conv_transpose"]
    assert_same(fun, x, w)


def test_float32_in_64_bit_mode():
    """Patterns are traced for the dtype of the input, whatever the default dtype is."""
    x = np.linspace(-2, 8, 41, dtype=np.float32)

    def clamped(x):
        return lax.clamp(np.float32(0), jnp.tanh(jax.nn.relu(x)), np.float32(6))

    assert {row.op for row in jaxcnn.operations(clamped)(x).rows} == {"relu", "tanh", "relu6"}
    np.testing.assert_array_equal(jaxcnn.explicit(clamped)(x), clamped(x))
    assert jaxcnn.explicit(clamped)(x).dtype == np.float32
