"""Bad input raises a one-line error with op, argument, actual and expected value, before anything is computed.

`CALLS` is a table of bad calls of ops. Each call is made in three ways: directly, under tracing (where nothing can have
been computed), and under differentiation. The tables after it contain calls that cannot be made in three ways.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcnn
from jaxcnn import (
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DepthwiseConv,
    Dropout,
    Flatten,
    GroupNorm,
    HiddenLayer,
    LayerNorm,
    LeakyRelu,
    LpPool,
    MaxPool,
    Relu,
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    batch_norm,
    block_sum,
    branches,
    conv,
    conv_transpose,
    dense,
    depthwise_conv,
    dropout,
    elu,
    global_avg_pool,
    global_max_pool,
    group_norm,
    hidden_layer,
    kron,
    kron_up,
    layer_norm,
    leaky_relu,
    lp_pool,
    max_pool,
    max_pool_with_indices,
    max_unpool,
    parallel,
    residual,
    serial,
    siamese,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    squared_error,
)
from jaxcnn.ops.linear import add
from jaxcnn.ops.pooling import pool_window

NAN, INF = float("nan"), float("inf")
X, W, B = np.ones((2, 6, 6, 4), np.float32), np.ones((3, 3, 4, 8), np.float32), np.zeros(8, np.float32)
ROW = np.ones((2, 6, 4), np.float32)
BACK = np.ones((3, 3, 8, 4), np.float32)  # kernels for a conv_transpose of X
PLACES = np.zeros(X.shape, np.int32)
LOGITS = np.zeros((3, 5), np.float32)
KEY = jax.random.key(0)
labelled = softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True)
class Bad:
    """A call, and the error that it must raise."""

    error: type[Exception]
    message: str
    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.message[:70]


def bad(error: type[Exception], message: str, call: Callable[..., Any], *args: Any, **options: Any) -> Bad:
    return Bad(error, message, call, args, options)


value, kind = functools.partial(bad, ValueError), functools.partial(bad, TypeError)

NAMES = "VALID, SAME, SAME_LOWER, CAUSAL"
MODES = f"{NAMES}, REFLECT, REPLICATE, CIRCULAR"
PRECISIONS = "None, 'default', 'high', 'highest' or a jax.lax.Precision"
LAYOUTS = "three strings such as ('NCHW', 'OIHW', 'NCHW')"
ONE_KEY = "one typed key from jax.random.key(seed)"
COUNTABLE = "of at most 2**31 - 1 spatial elements"

CALLS = [
    # ceil_mode adds no padding where no window fits
    value("max_pool: window must be at most the padded spatial dims (2, 2), got (5, 5)",
          max_pool, X[:, :2, :2], 5, stride=2, ceil_mode=True),
    # conv: ranks and channels
    value("conv: x must be (N, *spatial, C) with 1, 2 or 3 spatial dims, got shape (6, 4)", conv, X[0, 0], W),
    value("conv: x must be (N, *spatial, C) with 1, 2 or 3 spatial dims, got shape (1, 1, 2, 6, 6, 4)", conv,
          X[None, None], W),
    value("conv: w must be (*K, I/groups, O) with 2 spatial dims, like x, got x (2, 6, 6, 4), w (3, 4, 8)", conv, X,
          W[0]),
    value("conv: w must be (*K, 4, O) for an x with 4 channels and groups=1, got x (2, 6, 6, 4), w (3, 3, 3, 8)", conv,
          X, W[:, :, :3]),
    value("conv: w must be (*K, 2, O) for an x with 4 channels and groups=2, got x (2, 6, 6, 4), w (3, 3, 4, 8)", conv,
          X, W, groups=2),
    value("conv: groups must be a divisor of the 4 input and 8 output channels, got 3", conv, X, W, groups=3),
    value("conv: groups must be a divisor of the 4 input and 7 output channels, got 4", conv, X, W[:, :, :1, :7],
          groups=4),
    value("conv: groups must be an int >= 1, got 0", conv, X, W, groups=0),
    value("conv: groups must be an int >= 1, got -1", conv, X, W, groups=-1),
    kind("conv: groups must be an int >= 1, got 2.0", conv, X, W, groups=2.0),
    kind("conv: groups must be an int >= 1, got True", conv, X, W, groups=True),
    kind("conv: groups must be an int >= 1, got None", conv, X, W, groups=None),
    # conv: a bias that would broadcast silently
    value("conv: b must be of shape (8,), one number for each output channel, got (1,)", conv, X, W, B[:1]),
    value("conv: b must be of shape (8,), one number for each output channel, got (1, 8)", conv, X, W, B[None]),
    value("conv: b must be of shape (8,), one number for each output channel, got ()", conv, X, W, B[0]),
    # conv: windows
    value("conv: stride must be an int >= 1, got 0", conv, X, W, stride=0),
    value("conv: stride must be ints >= 1, got (1, -2)", conv, X, W, stride=(1, -2)),
    value("conv: stride must be one int or 2 of them, got (1, 1, 1)", conv, X, W, stride=(1, 1, 1)),
    kind("conv: stride must be an int, got 1.5", conv, X, W, stride=1.5),
    kind("conv: stride must be an int, got True", conv, X, W, stride=True),
    kind("conv: stride must be an int, got '2'", conv, X, W, stride="2"),
    kind("conv: stride must be ints, got [1, (1, 2)]", conv, X, W, stride=[1, (1, 2)]),
    kind("conv: stride must be ints, got array([1., 2.])", conv, X, W, stride=np.array([1.0, 2.0])),
    kind("conv: stride must be an int, got Array(1.5, dtype=float32)", conv, X, W, stride=jnp.float32(1.5)),
    value("conv: dilation must be an int >= 1, got 0", conv, X, W, dilation=0),
    kind("conv: dilation must be ints, got (1, None)", conv, X, W, dilation=(1, None)),
    value("conv: kernel size must be ints >= 1, got (0, 3)", conv, X, W[:0]),
    value("conv: kernel size must be at most the padded spatial dims (2, 6), got (3, 3)", conv, X[:, :2], W),
    value("conv: kernel size must be at most the padded spatial dims (8, 8), got (3, 3) with dilation (5, 5)", conv,
          X, W, dilation=5, padding=1),
    # conv: padding
    value(f"conv: padding must be one of {MODES}, an int, or an int or pair per dim, got 'SAMEISH'", conv, X, W,
          padding="SAMEISH"),
    value("conv: the number of spatial dims with padding 'CAUSAL' must be 1, got 2", conv, X, W, padding="CAUSAL"),
    value("conv: padding 'REFLECT' must be at most (5, 5) for spatial dims (6, 6), got ((6, 6), (6, 6))", conv, X, W,
          padding="REFLECT", dilation=6),
    value("conv: padding 'CIRCULAR' must be at most (6, 6) for spatial dims (6, 6), got ((7, 7), (7, 7))", conv, X, W,
          padding="CIRCULAR", dilation=7),
    value("conv: padding must be an int >= 0, got -1", conv, X, W, padding=-1),
    value("conv: padding must be ints >= 0, got [(0, -1), (0, 0)]", conv, X, W, padding=[(0, -1), (0, 0)]),
    value("conv: padding must be pairs (before, after), got [(1, 1, 1), (0, 0)]", conv, X, W,
          padding=[(1, 1, 1), (0, 0)]),
    value("conv: padding must be one int or pair for each of 2 dims, got [(1, 1)]", conv, X, W, padding=[(1, 1)]),
    kind("conv: padding must be ints, got [1, 'a']", conv, X, W, padding=[1, "a"]),
    kind("conv: padding must be an int, got 1.5", conv, X, W, padding=1.5),
    kind("conv: padding must be an int, got None", conv, X, W, padding=None),
    # conv: other options
    kind("conv: preferred_element_type must be a floating dtype, got int32", conv, X, W,
         preferred_element_type=jnp.int32),
    kind("conv: preferred_element_type must be a floating dtype, got 'foo'", conv, X, W, preferred_element_type="foo"),
    value(f"conv: precision must be {PRECISIONS}, got 'unknown'", conv, X, W, precision="unknown"),
    value(f"conv: precision must be {PRECISIONS}, got 3", conv, X, W, precision=3),
    value(f"conv: precision must be {PRECISIONS}, got ('high', 'high', 'high')", conv, X, W, precision=("high",) * 3),
    value(f"conv: dimension_numbers must be {LAYOUTS}, got 'NHWC'", conv, X, W, dimension_numbers="NHWC"),
    value(f"conv: dimension_numbers must be {LAYOUTS}, got ('NHWC', 'HWIO')", conv, X, W,
          dimension_numbers=("NHWC", "HWIO")),
    value(f"conv: dimension_numbers must be {LAYOUTS}, got 3", conv, X, W, dimension_numbers=3),
    value("conv: dimension_numbers must be the 4 letters 'NCHW' for y, got 'NHWX' of ('NHWC', 'HWIO', 'NHWX')", conv,
          X, W, dimension_numbers=("NHWC", "HWIO", "NHWX")),
    value(f"conv: x must be 3 dims, as dimension_numbers ('NHC', 'HIO', 'NHC'), got {X.shape}", conv, X, W,
          dimension_numbers=("NHC", "HIO", "NHC")),
    # Sizes that would overflow in XLA, which aborts the process
    value("conv: padding must be an int < 2**31, got 2147483648", conv, X, W, padding=2**31),
    value("conv: stride must be an int < 2**31, got 18446744073709551616", conv, X, W, stride=2**64),
    value(f"conv: the padded input must be {COUNTABLE}, got spatial dims (2000006, 2000006)", conv, X, W,
          padding=10**6),
    value("max_pool: window must be an int < 2**31, got 1099511627776", max_pool, X, 2**40, padding="SAME"),
    value(f"max_pool: the padded input must be {COUNTABLE}, got spatial dims (65536, 65536)", pool_window, "max_pool",
          (2**16, 2**16), 2**16, None, 0, 1, False),
    value(f"conv_transpose: the result must be {COUNTABLE}, got spatial dims (5000003, 5000003)", conv_transpose, X,
          BACK, stride=10**6),
    value(f"kron_up: the result must be {COUNTABLE}, got spatial dims (6000000, 6000000)", kron_up, X, 10**6),
    value(f"max_unpool: the result must be {COUNTABLE}, got spatial dims (100000, 100000)", max_unpool, X,
          np.zeros(X.shape, np.int32), 10**5),
    value(f"adaptive_max_pool: the result must be {COUNTABLE}, got spatial dims (100000, 100000)", adaptive_max_pool, X,
          10**5),
    # conv_transpose
    value("conv_transpose: x must be (N, *spatial, C) with 1, 2 or 3 spatial dims, got shape (6, 4)", conv_transpose,
          X[0, 0], BACK),
    value("conv_transpose: w must be (*K, O/groups, I) with 2 spatial dims, like x, got x (2, 6, 6, 4), w (3, 8, 4)",
          conv_transpose, X, BACK[0]),
    value("conv_transpose: w must be (*K, O/groups, 4) for an x with 4 channels, got x (2, 6, 6, 4), w (3, 3, 4, 8)",
          conv_transpose, X, W),
    value("conv_transpose: groups must be a divisor of the 4 input channels, got 3", conv_transpose, X, BACK,
          groups=3),
    value("conv_transpose: groups must be an int >= 1, got 0", conv_transpose, X, BACK, groups=0),
    kind("conv_transpose: groups must be an int >= 1, got None", conv_transpose, X, BACK, groups=None),
    kind("conv_transpose: groups must be an int >= 1, got 1.5", conv_transpose, X, BACK, groups=1.5),
    value("conv_transpose: b must be of shape (8,), one number for each output channel, got (4,)", conv_transpose, X,
          BACK, B[:4]),
    value("conv_transpose: b must be of shape (16,), one number for each output channel, got (8,)", conv_transpose, X,
          BACK, B, groups=2),
    value("conv_transpose: stride must be an int >= 1, got 0", conv_transpose, X, BACK, stride=0),
    value("conv_transpose: dilation must be ints >= 1, got (1, 0)", conv_transpose, X, BACK, dilation=(1, 0)),
    value("conv_transpose: kernel size must be ints >= 1, got (0, 3)", conv_transpose, X, BACK[:0]),
    value("conv_transpose: output_padding must be an int >= 0 and less than the stride (1, 1) or the dilation (1, 1), "
          "got 1", conv_transpose, X, BACK, output_padding=1),
    value("conv_transpose: output_padding must be ints >= 0 and less than the stride (2, 3) or the dilation (1, 2), "
          "got (1, -1)", conv_transpose, X, BACK, stride=(2, 3), dilation=(1, 2), output_padding=(1, -1)),
    value("conv_transpose: output_padding must be ints >= 0 and less than the stride (2, 2) or the dilation (4, 1), "
          "got (3, 2)", conv_transpose, X, BACK, stride=2, dilation=(4, 1), output_padding=(3, 2)),
    value("conv_transpose: output_padding must be one int or 2 of them, got (1, 1, 1)", conv_transpose, X, BACK,
          stride=2, output_padding=(1, 1, 1)),
    kind("conv_transpose: output_padding must be an int, got 0.5", conv_transpose, X, BACK, output_padding=0.5),
    value("conv_transpose: output_padding must be 0 with padding 'SAME', got 1", conv_transpose, X, BACK, stride=2,
          padding="SAME", output_padding=1),
    value("conv_transpose: output_padding must be 0 with padding 'same_lower', got (0, 1)", conv_transpose, X, BACK,
          stride=2, padding="same_lower", output_padding=(0, 1)),
    value("conv_transpose: padding must be small enough that the result has spatial dims >= 1, got ((4, 4), (0, 0)) "
          "with spatial dims (0, 8)", conv_transpose, X, BACK, padding=((4, 4), (0, 0))),
    value(f"conv_transpose: padding must be one of {NAMES}, an int, or an int or pair per dim, got 'REFLECT'",
          conv_transpose, X, BACK, padding="REFLECT"),
    value("conv_transpose: the number of spatial dims with padding 'CAUSAL' must be 1, got 2", conv_transpose, X, BACK,
          padding="CAUSAL"),
    value("conv_transpose: padding must be an int >= 0, got -1", conv_transpose, X, BACK, padding=-1),
    kind("conv_transpose: preferred_element_type must be a floating dtype, got int8", conv_transpose, X, BACK,
         preferred_element_type=jnp.int8),
    value(f"conv_transpose: precision must be {PRECISIONS}, got 3", conv_transpose, X, BACK, precision=3),
    value(f"conv_transpose: dimension_numbers must be {LAYOUTS}, got 3", conv_transpose, X, BACK, dimension_numbers=3),
    # depthwise_conv
    value("depthwise_conv: w must be (*K, 1, C·M) with 2 spatial dims and C = 4, like x, got x (2, 6, 6, 4), "
          "w (3, 3, 4, 8)", depthwise_conv, X, W),
    value("depthwise_conv: w must be (*K, 1, C·M) with 2 spatial dims and C = 4, like x, got x (2, 6, 6, 4), "
          "w (3, 3, 1, 7)", depthwise_conv, X, W[:, :, :1, :7]),
    value("depthwise_conv: w must be (*K, 1, C·M) with 2 spatial dims and C = 4, like x, got x (2, 6, 6, 4), "
          "w (3, 1, 8)", depthwise_conv, X, W[0, :, :1]),
    value("depthwise_conv: b must be of shape (8,), one number for each output channel, got (4,)", depthwise_conv, X,
          W[:, :, :1], B[:4]),
    value("depthwise_conv: kernel size must be at most the padded spatial dims (2, 6), got (3, 3)", depthwise_conv,
          X[:, :2], W[:, :, :1]),
    value("depthwise_conv: stride must be an int >= 1, got 0", depthwise_conv, X, W[:, :, :1], stride=0),
    value(f"depthwise_conv: dimension_numbers must be {LAYOUTS}, got 3", depthwise_conv, X, W[:, :, :1],
          dimension_numbers=3),
    # hidden_layer: its additional options
    value("hidden_layer: b must be of shape (8,), one number for each output channel, got (1,)", hidden_layer, X, W,
          B[:1]),
    kind("hidden_layer: b must be an array, got None", hidden_layer, X, W, None),
    value("hidden_layer: w must be (*K, I/groups, O) with 2 spatial dims, like x, got x (2, 6, 6, 4), w ()",
          hidden_layer, X, W[0, 0, 0, 0], B),
    value("hidden_layer: window must be an int >= 1, got 0", hidden_layer, X, W, B, window=0),
    value("hidden_layer: window must be at most the padded spatial dims (4, 4), got (5, 5)", hidden_layer, X, W, B,
          window=5),
    value("hidden_layer: pool_stride must be an int >= 1, got 0", hidden_layer, X, W, B, pool_stride=0),
    value("hidden_layer: pool_padding must be an int >= 0, got -2", hidden_layer, X, W, B, pool_padding=-2),
    value(f"hidden_layer: pool_padding must be one of {NAMES}, an int, or an int or pair per dim, got 'REFLECT'",
          hidden_layer, X, W, B, pool_padding="REFLECT"),
    value("hidden_layer: a window is entirely in the padding: window (2, 2), padding ((2, 2), (2, 2)), "
          "spatial dims (4, 4)", hidden_layer, X, W, B, pool_padding=2, pool_stride=1),
    # pooling
    *(row for pool in (max_pool, avg_pool, max_pool_with_indices, lp_pool) for name in [pool.__name__] for row in [
        value(f"{name}: x must be (N, *spatial, C) with 1, 2 or 3 spatial dims, got shape (6, 4)", pool, X[0, 0], 2),
        value(f"{name}: window must be an int >= 1, got 0", pool, X, 0),
        value(f"{name}: window must be one int or 2 of them, got (2, 2, 2)", pool, X, (2, 2, 2)),
        kind(f"{name}: window must be an int, got 2.0", pool, X, 2.0),
        kind(f"{name}: window must be an int, got None", pool, X, None),
        value(f"{name}: window must be at most the padded spatial dims (6, 6), got (7, 7)", pool, X, 7),
        value(f"{name}: stride must be an int >= 1, got -1", pool, X, 2, stride=-1),
        value(f"{name}: dilation must be an int >= 1, got 0", pool, X, 2, dilation=0),
        value(f"{name}: padding must be one of {NAMES}, an int, or an int or pair per dim, got 'REFLECT'", pool, X, 2,
              padding="REFLECT"),
        value(f"{name}: a window is entirely in the padding: window (2, 2), padding ((3, 0), (0, 0)), "
              "spatial dims (6, 6)", pool, X, 2, padding=((3, 0), (0, 0))),
        kind(f"{name}: ceil_mode must be a bool, got 'yes'", pool, X, 2, ceil_mode="yes"),
    ]),
    kind("avg_pool: count_include_pad must be a bool, got 'no'", avg_pool, X, 2, count_include_pad="no"),
    value("avg_pool: divisor must be a finite number other than 0, got 0", avg_pool, X, 2, divisor=0),
    value("avg_pool: divisor must be a finite number other than 0, got nan", avg_pool, X, 2, divisor=NAN),
    kind("avg_pool: divisor must be a Python float, got str", avg_pool, X, 2, divisor="4"),
    value("lp_pool: p must be a finite number >= 1, got 0.5", lp_pool, X, 2, p=0.5),
    value("lp_pool: p must be a finite number >= 1, got inf", lp_pool, X, 2, p=INF),
    value("lp_pool: p must be a finite number >= 1, got nan", lp_pool, X, 2, p=NAN),
    kind("lp_pool: p must be a Python float, got str", lp_pool, X, 2, p="2"),
    value("max_unpool: y must be (N, *out, C) with 1, 2 or 3 spatial dims, got shape (6, 4)",
          max_unpool, X[0, 0], PLACES[0, 0], 9),
    value("max_unpool: y and indices must be of one shape, got y (2, 6, 6, 4), indices (6, 6, 4)",
          max_unpool, X, PLACES[0], 9),
    kind("max_unpool: indices must be of an integer dtype, got float32", max_unpool, X, X, 9),
    kind("max_unpool: indices must be an array, got None", max_unpool, X, None, 9),
    value("max_unpool: spatial_shape must be ints >= 1, got (6, 0)", max_unpool, X, PLACES, (6, 0)),
    value("max_unpool: spatial_shape must be one int or 2 of them, got (6,)", max_unpool, X, PLACES, (6,)),
    kind("max_unpool: spatial_shape must be an int, got None", max_unpool, X, PLACES, None),
    value("max_unpool: indices must be in 0 … 3 for spatial_shape (2, 2), got 4 … 4", max_unpool, X, PLACES + 4, 2),
    value("max_unpool: indices must be in 0 … 35 for spatial_shape (6, 6), got -1 … -1", max_unpool, X, PLACES - 1, 6),
    *(row for pool in (global_max_pool, global_avg_pool) for name in [pool.__name__] for row in [
        value(f"{name}: x must be (N, *spatial, C) with 1, 2 or 3 spatial dims, got shape (6, 4)", pool, X[0, 0]),
        value(f"{name}: x must be (N, *spatial, C) with spatial dims >= 1, got shape (2, 0, 6, 4)", pool, X[:, :0]),
    ]),
    *(row for pool in (adaptive_max_pool, adaptive_avg_pool) for name in [pool.__name__] for row in [
        value(f"{name}: x must be (N, *spatial, C) with 1, 2 or 3 spatial dims, got shape (6, 4)", pool, X[0, 0], 2),
        value(f"{name}: x must be (N, *spatial, C) with spatial dims >= 1, got shape (2, 0, 6, 4)", pool, X[:, :0], 2),
        value(f"{name}: x must be (N, *spatial, C) with spatial dims >= 1, got shape (2, 6, 0, 4)", pool,
              X[:, :, :0], 4),
        value(f"{name}: output_size must be an int >= 1, got 0", pool, X, 0),
        value(f"{name}: output_size must be one int or 2 of them, got (2, 2, 2)", pool, X, (2, 2, 2)),
        kind(f"{name}: output_size must be an int, got None", pool, X, None),
    ]),
    # Kronecker
    value("kron: a and b must be of one rank, got a (2, 6, 6, 4), b (2, 6, 4)", kron, X, ROW),
    value("kron_up: x must be (N, *spatial, C) with 1, 2 or 3 spatial dims, got shape (6, 4)", kron_up, X[0, 0], 2),
    value("kron_up: factor must be an int >= 1, got 0", kron_up, X, 0),
    value("kron_up: factor must be one int or 2 of them, got (2,)", kron_up, X, (2,)),
    kind("kron_up: factor must be an int, got 1.5", kron_up, X, 1.5),
    value("block_sum: factor must be a divisor of the spatial dims (6, 6), got (4, 4)", block_sum, X, 4),
    value("block_sum: factor must be ints >= 1, got (2, -1)", block_sum, X, (2, -1)),
    # activations
    value("leaky_relu: negative_slope must be a finite number, got nan", leaky_relu, X, negative_slope=NAN),
    value("leaky_relu: negative_slope must be a finite number, got inf", leaky_relu, X, negative_slope=INF),
    kind("leaky_relu: negative_slope must be a Python float, got str", leaky_relu, X, negative_slope="0.1"),
    value("elu: alpha must be a finite number, got -inf", elu, X, alpha=-INF),
    kind("elu: alpha must be a Python float, got bool", elu, X, alpha=True),
    value("celu: alpha must be a finite number, got nan", jaxcnn.celu, X, alpha=NAN),
    value("celu: alpha must be a finite number other than 0, got 0.0", jaxcnn.celu, X, alpha=0.0),
    value("leaky_relu: negative_slope must be a number that a float can hold, got an int of 3322 bits",
          jaxcnn.leaky_relu, X, negative_slope=10**1000),
    kind("relu: x must be an array, got list", jaxcnn.relu, [10**400]),
    kind("gelu: x must be of a floating dtype of 16 bits or more, got float8_e4m3fn", jaxcnn.gelu,
         X.astype("float8_e4m3fn")),
    kind("dropout: rule must be None, autodiff or a hashable function (call, delta), got 3", dropout, X, 0.0, KEY,
         rule=3),
    value("squareplus: b must be a finite number, got inf", jaxcnn.squareplus, X, b=INF),
    value("squareplus: b must be a finite number > 0, got 0", jaxcnn.squareplus, X, b=0),
    kind("squareplus: b must be a Python float, got ndarray", jaxcnn.squareplus, X, b=B),
    kind("gelu: approximate must be a bool, got 'tanh'", jaxcnn.gelu, X, approximate="tanh"),
    # dense, add
    kind("add: arrays must be of one dtype, got x float32, y float64", add, X, X.astype(np.float64)),
    kind("add: y must be an array, got 'one'", add, X, "one"),
    value("add: x and y must be of one shape, got x (2, 6, 6, 4), y (2, 6, 4)", add, X, ROW),
    value("dense: x and w must be (…, I) and (I, O), got x (2, 6, 6, 4), w (3, 8)", dense, X, W[0, 0, :3]),
    value("dense: x and w must be (…, I) and (I, O), got x (2, 6, 6, 4), w (3, 3, 4, 8)", dense, X, W),
    value("dense: x and w must be (…, I) and (I, O), got x (), w (4, 8)", dense, B[0], W[0, 0]),
    value("dense: b must be of shape (8,), one number for each output, got (1,)", dense, X, W[0, 0], B[:1]),
    value("dense: b must be of shape (8,), one number for each output, got (1, 8)", dense, X, W[0, 0], B[None]),
    # dropout
    value("dropout: rate must be a number in [0, 1], got -0.1", dropout, X, -0.1, KEY),
    value("dropout: rate must be a number in [0, 1], got 1.1", dropout, X, 1.1, KEY),
    value("dropout: rate must be a number in [0, 1], got nan", dropout, X, NAN, KEY),
    kind("dropout: rate must be a Python float, got bool", dropout, X, True, KEY),
    kind("dropout: rate must be a Python float, got NoneType", dropout, X, None, KEY),
    kind(f"dropout: key must be {ONE_KEY}, got None", dropout, X, 0.5, None),
    kind(f"dropout: key must be {ONE_KEY}, got 0", dropout, X, 0.5, 0),
    kind(f"dropout: key must be {ONE_KEY}, got uint32[2]", dropout, X, 0.5, np.zeros(2, np.uint32)),
    kind(f"dropout: key must be {ONE_KEY}, got key<fry>[2]", dropout, X, 0.5, jax.random.split(KEY)),
    kind(f"dropout: key must be {ONE_KEY}, got None", dropout, X, 0, None),  # even where it is not used
    # normalization: the channels, silent broadcasting, incomplete statistics
    value("batch_norm: x must be (N, …, C), got shape (4,)", batch_norm, X[0, 0, 0]),
    value("group_norm: x must be (N, …, C), got shape (4,)", group_norm, X[0, 0, 0]),
    *(value(f"{op}: {name} must be of shape (4,), one number for each channel, got {got}", call, X, *arrays)
      for op, call in (("batch_norm", batch_norm), ("group_norm", functools.partial(group_norm, groups=2)))
      for name, got, arrays in (
          ("scale", (1,), (B[:1],)), ("scale", (8,), (B,)), ("bias", (1, 4), (None, B[None, :4])))),
    value("batch_norm: mean must be of shape (4,), one number for each channel, got ()", batch_norm,
          X, None, None, B[0],
          B[:4]),
    value("batch_norm: var must be of shape (4,), one number for each channel, got (8,)", batch_norm, X, None, None,
          B[:4], B),
    value("batch_norm: mean and var must be given together, got only mean", batch_norm, X, None, None, B[:4]),
    value("batch_norm: mean and var must be given together, got only var", batch_norm, X, None, None, None, B[:4]),
    kind("batch_norm: var must be of dtype float32 for x of dtype float32, got float64", batch_norm, X, None, None,
         B[:4], B[:4].astype(np.float64)),
    kind("batch_norm: mean must be of dtype bfloat16 or float32 for x of dtype bfloat16, got float16", batch_norm,
         X.astype(jnp.bfloat16), None, None, B[:4].astype(np.float16), B[:4]),
    value("batch_norm: eps must be a finite number >= 0, got -1e-05", batch_norm, X, eps=-1e-5),
    value("layer_norm: eps must be a finite number >= 0, got nan", layer_norm, X, eps=NAN),
    value("group_norm: eps must be a finite number >= 0, got inf", group_norm, X, groups=2, eps=INF),
    kind("group_norm: eps must be a Python float, got str", group_norm, X, groups=2, eps="small"),
    value("layer_norm: scale must be of shape (4,), that of x along axes (3,), got (8,)", layer_norm, X, B),
    value("layer_norm: bias must be of shape (6, 4), that of x along axes (2, 3), got (4,)", layer_norm, X, None, B[:4],
          axes=(-1, 2)),
    *(value(f"layer_norm: axes must be one or more distinct axes of an array with 4 dims, got {axes}", layer_norm, X,
            axes=axes)
      for axes in ((), 4, (1, 1), (3, -1), (-5,))),
    kind("layer_norm: axes must be an int, got 1.0", layer_norm, X, axes=1.0),
    value("group_norm: groups must be a divisor of the 4 channels of x (2, 6, 6, 4), got 3", group_norm, X, groups=3),
    value("group_norm: groups must be a divisor of the 4 channels of x (2, 6, 6, 4), got 32", group_norm, X),
    value("group_norm: groups must be an int >= 1, got 0", group_norm, X, groups=0),
    kind("group_norm: groups must be an int >= 1, got 2.0", group_norm, X, groups=2.0),
    # losses
    value("squared_error: y and target must be of one shape, got y (3, 5), target (3, 1)", squared_error, LOGITS,
          LOGITS[:, :1]),
    value("softmax_cross_entropy: logits and targets must be of one shape (…, C), got logits (3, 5), "
          "targets (1, 5)", softmax_cross_entropy, LOGITS, LOGITS[:1]),
    value("softmax_cross_entropy: logits and targets must be of one shape (…, C), got logits (), targets ()",
          softmax_cross_entropy, B[0], B[0]),
    value("softmax_cross_entropy_with_integer_labels: logits and labels must be (…, C) and (…), got logits (3, 5), "
          "labels (3, 1)", labelled, LOGITS, np.zeros((3, 1), int)),
    value("softmax_cross_entropy_with_integer_labels: logits and labels must be (…, C) and (…), got logits (3, 5), "
          "labels (4,)", labelled, LOGITS, np.zeros(4, int)),
    kind("softmax_cross_entropy_with_integer_labels: labels must be of an integer dtype, got float32", labelled, LOGITS,
         LOGITS[:, 0]),
    kind("softmax_cross_entropy_with_integer_labels: labels must be of an integer dtype, got bool", labelled, LOGITS,
         LOGITS[:, 0] > 0),
    kind("softmax_cross_entropy_with_integer_labels: labels must be an array, got None", labelled, LOGITS, None),
    kind("softmax_cross_entropy_with_integer_labels: labels must be an array, got list", labelled, LOGITS,
         [[1], [1, 2]]),
    value("softmax_cross_entropy_with_integer_labels: labels must be in 0 … 4, got -1 … 1", labelled, LOGITS,
          [0, 1, -1]),
    value("softmax_cross_entropy_with_integer_labels: labels must be in 0 … 4, got 0 … 5", labelled, LOGITS, [0, 1, 5]),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Every op: an invalid rule, and each array in turn with a non-differentiable dtype or not as an array

ACTIVATIONS = (
    "relu", "leaky_relu", "elu", "selu", "celu", "relu6", "hard_tanh", "hard_sigmoid", "hard_swish", "gelu", "mish",
    "softsign", "squareplus", "log_sigmoid", "silu", "softplus", "sigmoid", "tanh",
)  # fmt: skip
ARRAYS = {
    # name: (op as a function of arrays only, their names, valid arrays)
    "conv": (conv, "xwb", (X, W, B)),
    "conv_transpose": (conv_transpose, "xwb", (X, BACK, B)),
    "depthwise_conv": (depthwise_conv, "xwb", (X, W[:, :, :1], B)),
    "hidden_layer": (hidden_layer, "xwb", (X, W, B)),
    "dense": (dense, "xwb", (X, W[0, 0], B)),
    "max_pool": (functools.partial(max_pool, window=2), "x", (X,)),
    "avg_pool": (functools.partial(avg_pool, window=2), "x", (X,)),
    "max_pool_with_indices": (lambda x, **o: max_pool_with_indices(x, 2, **o)[0], "x", (X,)),
    "max_unpool": (lambda y, **o: max_unpool(y, PLACES, 6, **o), "y", (X,)),
    "lp_pool": (functools.partial(lp_pool, window=2), "x", (X,)),
    "global_max_pool": (global_max_pool, "x", (X,)),
    "global_avg_pool": (global_avg_pool, "x", (X,)),
    "adaptive_max_pool": (functools.partial(adaptive_max_pool, output_size=4), "x", (X,)),
    "adaptive_avg_pool": (functools.partial(adaptive_avg_pool, output_size=2), "x", (X,)),
    "kron": (kron, "ab", (X, X)),
    "kron_up": (functools.partial(kron_up, factor=2), "x", (X,)),
    "block_sum": (functools.partial(block_sum, factor=2), "x", (X,)),
    "dropout": (functools.partial(dropout, rate=0.5, key=KEY), "x", (X,)),
    "batch_norm": (batch_norm, ("x", "scale", "bias"), (X, B[:4], B[:4])),
    "layer_norm": (layer_norm, ("x", "scale", "bias"), (X, B[:4], B[:4])),
    "group_norm": (functools.partial(group_norm, groups=2), ("x", "scale", "bias"), (X, B[:4], B[:4])),
    "squared_error": (squared_error, ("y", "target"), (LOGITS, LOGITS)),
    "softmax_cross_entropy": (softmax_cross_entropy, ("logits", "targets"), (LOGITS, LOGITS)),
    "softmax_cross_entropy_with_integer_labels": (
        functools.partial(labelled, labels=np.zeros(3, int)), ("logits",), (LOGITS,)
    ),
    **{
        name: (getattr(jaxcnn, name), "x", (X,))
        for name in ACTIVATIONS
    },
}  # fmt: skip


class Unhashable(list):
    """Callable like a rule, but not usable as a static argument."""

    def __call__(self, call, delta):
        return call.exact(delta)


@dataclasses.dataclass(frozen=True)
class Holding:
    """A rule that holds an array, so that only its type is hashable; the class itself is not a rule."""

    scale: np.ndarray

    def __call__(self, call, delta):
        return call.exact(self.scale * delta)


def rows_of_every_op():
    for op, (call, names, arrays) in ARRAYS.items():
        for rule in (3, "autodiff", Unhashable(), Holding(np.ones(2)), Holding):
            message = f"rule must be None, autodiff or a hashable function (call, delta), got {rule!r}"
            yield kind(f"{op}: {message}", call, *arrays, rule=rule)
        for i, name in enumerate(names):

            def called(wrong, call=call, arrays=arrays, i=i):
                return call(*arrays[:i], wrong, *arrays[i + 1 :])

            for dtype in ("int32", "uint8", "bool", "complex64"):
                yield kind(f"{op}: {name} must be of a floating dtype, got {dtype}", called, arrays[i].astype(dtype))
            yield kind(f"{op}: {name} must be an array, got object", called, object())
            yield kind(f"{op}: {name} must be an array, got 'one'", called, "one")
            yield kind(f"{op}: {name} must be an array, got list", called, [[1.0], [1.0, 2.0]])
            if name not in ("b", "scale", "bias"):  # these are optional
                yield kind(f"{op}: {name} must be an array, got None", called, None)
            if i:  # mixed with float32; conv and dense compare x with w, then w with b
                compared = names[i - 1 : i + 1] if op == "dense" or "conv" in op else names
                got = ", ".join(f"{n} {'float64' if n == name else 'float32'}" for n in compared)
                yield kind(f"{op}: arrays must be of one dtype, got {got}", called, arrays[i].astype(np.float64))


# ---------------------------------------------------------------------------------------------------------------------


def raised(row: Bad, call: Callable[[], Any]) -> None:
    with pytest.raises(row.error) as caught:
        call()
    assert type(caught.value) is row.error  # not a JAX-specific subclass
    assert str(caught.value) == row.message


def traceable(a: Any) -> bool:
    return isinstance(a, np.ndarray | np.generic) and (a.dtype == np.float32 or a.dtype == np.float64)


@pytest.mark.parametrize("row", [*CALLS, *rows_of_every_op()], ids=str)
def test_bad_calls_of_ops(row):
    raised(row, lambda: row.call(*row.args, **row.options))
    traced = tuple(a for a in row.args if traceable(a))

    def call(*arrays: Any) -> Any:
        rest = iter(arrays)
        return row.call(*(next(rest) if traceable(a) else a for a in row.args), **row.options)

    raised(row, lambda: jax.eval_shape(call, *traced))
    if traced:
        raised(row, lambda: jax.vjp(call, *traced))


def test_the_arrays_that_fit_do_fit():
    """Otherwise the rows about dtypes would fail for another reason."""
    for call, _, arrays in ARRAYS.values():
        assert jax.eval_shape(call, *arrays).dtype == np.float32


TRACED = "must be an int, got a value traced by jax; it must be static"
SOME_TRACED = TRACED.replace("an int", "ints")
TRACED_OPTIONS = [
    # with one int that jit traces
    kind(f"conv: stride {TRACED}", lambda n: conv(X, W, stride=n)),
    kind(f"conv: stride {SOME_TRACED}", lambda n: conv(X, W, stride=(1, n))),
    kind(f"conv: stride {TRACED}", lambda n: conv(X, W, stride=jnp.stack([n, n]))),
    kind(f"conv: dilation {TRACED}", lambda n: conv(X, W, dilation=n)),
    kind("conv: groups must be an int >= 1, got a value traced by jax; it must be static",
         lambda n: conv(X, W, groups=n)),
    kind(f"conv: padding {TRACED}", lambda n: conv(X, W, padding=n)),
    kind(f"conv: padding {SOME_TRACED}", lambda n: conv(X, W, padding=((n, 1), (0, 0)))),
    kind(f"conv_transpose: output_padding {TRACED}", lambda n: conv_transpose(X, BACK, stride=3, output_padding=n)),
    kind(f"max_unpool: spatial_shape {TRACED}", lambda n: max_unpool(X, PLACES, n)),
    kind(f"adaptive_avg_pool: output_size {TRACED}", lambda n: adaptive_avg_pool(X, n)),
    kind("lp_pool: p must be a Python float, got a value traced by jax; it must be static",
         lambda n: lp_pool(X, 2, p=n)),
    kind("group_norm: groups must be an int >= 1, got a value traced by jax; it must be static",
         lambda n: group_norm(X, groups=n)),
    kind(f"layer_norm: axes {TRACED}", lambda n: layer_norm(X, axes=n)),
    kind(f"max_pool: window {TRACED}", lambda n: max_pool(X, n)),
    kind(f"avg_pool: stride {TRACED}", lambda n: avg_pool(X, 2, stride=n)),
    kind(f"hidden_layer: pool_stride {TRACED}", lambda n: hidden_layer(X, W, B, pool_stride=n)),
    kind(f"kron_up: factor {TRACED}", lambda n: kron_up(X, n)),
    kind(f"block_sum: factor {TRACED}", lambda n: block_sum(X, n)),
    kind("max_pool: ceil_mode must be a bool, got a value traced by jax; it must be static",
         lambda n: max_pool(X, 2, ceil_mode=n > 0)),
    kind("avg_pool: count_include_pad must be a bool, got a value traced by jax; it must be static",
         lambda n: avg_pool(X, 2, count_include_pad=n > 0)),
    kind("dropout: rate must be a Python float, got a value traced by jax; it must be static",
         lambda n: dropout(X, n / 10, KEY)),
    kind("leaky_relu: negative_slope must be a Python float, got a value traced by jax; it must be static",
         lambda n: leaky_relu(X, negative_slope=n / 10)),
]  # fmt: skip


@pytest.mark.parametrize("row", TRACED_OPTIONS, ids=str)
def test_static_options_that_are_traced(row):
    raised(row, lambda: jax.jit(row.call)(2))


# ---------------------------------------------------------------------------------------------------------------------
# Rules: their results are checked when δ arrives


def too_few(call, delta):
    return call.exact(delta)[:1]


def a_list(call, delta):
    return list(call.exact(delta))


def no_tuple(call, delta):
    return None


def delta_itself(call, delta):
    return (delta, None, None)


@dataclasses.dataclass(frozen=True)
class First:
    """A rule that returns the first ``count`` cotangents, and whose only name is its repr."""

    count: int

    def __call__(self, call, delta):
        return call.exact(delta)[: self.count]

    def __repr__(self):
        return "<the first>"


RULES = [
    # with one input
    value("conv: the result of rule too_few must be a tuple of length 3, one cotangent per input, got length 1",
          lambda x: conv(x, W, rule=too_few)),
    value("conv: the result of rule a_list must be a tuple of length 3, one cotangent per input, got list",
          lambda x: conv(x, W, rule=a_list)),
    value("max_pool: the result of rule no_tuple must be a tuple of length 1, one cotangent per input, got NoneType",
          lambda x: max_pool(x, 2, rule=no_tuple)),
    value("conv: cotangent 0 of rule delta_itself must be of shape (2, 6, 6, 4), got (2, 4, 4, 8)",
          lambda x: conv(x, W, rule=delta_itself)),
    value("gelu: the result of rule a_list must be a tuple of length 1, one cotangent per input, got list",
          lambda x: jaxcnn.gelu(x, rule=a_list)),
    value("gelu: the result of rule <the first> must be a tuple of length 1, one cotangent per input, got length 0",
          lambda x: jaxcnn.gelu(x, rule=First(0))),
    value("dropout: the result of rule delta_itself must be a tuple of length 2, one cotangent per input, got length 3",
          lambda x: dropout(x, 0.5, KEY, rule=delta_itself)),
    value("conv: the result of rule too_few must be a tuple of length 3, one cotangent per input, got length 1",
          lambda x: serial(Conv(8, 3)).apply({"conv1": {"weight": W, "bias": B}}, x, rules=too_few)),
]  # fmt: skip


@pytest.mark.parametrize("row", RULES, ids=str)
def test_what_wrong_rules_return(row):
    def gradient(x):
        y, pull = jax.vjp(row.call, x)
        return pull(y)

    raised(row, lambda: gradient(X))
    raised(row, lambda: jax.eval_shape(gradient, X))


def test_autodiff_is_a_marker():
    raised(
        kind("autodiff: it must be passed as rule= of an op, and cannot be called", lambda: None),
        lambda: jaxcnn.rules.autodiff(None, X),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Nets and training

SHAPE = (8, 8, 3)
SHAPES = "shape must be a tuple of ints >= 1 such as (28, 28, 1)"
EACH_LAYER = "each layer must be a layer such as Conv(32, 5) or a function of x"
A_KEY = "rules: a key must be a layer type, a name or a predicate, got"


def built(*layers, shape=SHAPE, key=KEY):
    return serial(*layers).init(key, shape)


def applied(params=None, x=np.ones((2, *SHAPE), np.float32), **options):  # noqa: B008
    return NET.apply(NET.init(KEY, SHAPE) if params is None else params, x, **options)


SGD = optax.sgd(0.1)
NET = serial(Conv(4, 3), residual(Conv(4, 3, padding="SAME"), Relu()), Flatten(), Dropout(0.5), Dense(10))
AUTO = jaxcnn.rules.autodiff


def calibrated(batches):
    net = serial(BatchNorm())
    return jaxcnn.calibrate(net, net.init(KEY, SHAPE), batches)


def pair(x):
    return x, x


class DependsOnValues(jaxcnn.Layer):
    """A user-defined layer that branches on traced values."""

    def apply(self, params, x, *, key=None, rule=None):
        return x if x.sum() > 0 else -x


NETS = [
    # construction
    kind(f"serial: {EACH_LAYER}, got 3", serial, Relu(), 3),
    kind(f"serial: {EACH_LAYER}, got <class 'jaxcnn.layers.Relu'>", serial, Relu),
    kind(f"residual: {EACH_LAYER}, got 'relu'", residual, "relu"),
    kind(f"branches: {EACH_LAYER}, got None", branches, Relu(), None),
    value("serial: names must be different and without '/', got 'a'", serial, Relu(name="a"), MaxPool(2, name="a")),
    value("serial: names must be different and without '/', got 'relu2'", serial, Relu(name="relu2"), Relu()),
    value("serial: names must be different and without '/', got 'a/b'", serial, Relu(name="a/b")),
    kind("serial: name must be a str, got 3", serial, Relu(name=3)),
    value("Conv: features must be an int >= 1, got 0", Conv, 0, 3),
    value("HiddenLayer: features must be an int >= 1, got -1", HiddenLayer, -1, 3),
    kind("Conv: features must be an int >= 1, got 1.5", Conv, 1.5, 3),
    kind("Dense: features must be an int >= 1, got True", Dense, True),
    value("Conv: groups must be an int >= 1, got 0", Conv, 4, 3, groups=0),
    kind("Conv: groups must be an int >= 1, got 2.0", Conv, 4, 3, groups=2.0),
    value("HiddenLayer: groups must be an int >= 1, got 0", HiddenLayer, 4, 3, groups=0),
    value("ConvTranspose: features must be an int >= 1, got 0", ConvTranspose, 0, 3),
    kind("DepthwiseConv: multiplier must be an int >= 1, got 1.5", DepthwiseConv, 3, 1.5),
    kind("Conv: preferred_element_type must be a floating dtype, got 'foo'", Conv, 4, 3, preferred_element_type="foo"),
    value("conv_transpose1: ConvTranspose: groups must be a divisor of 3 input and 4 output channels, got 2", built,
          ConvTranspose(4, 3, groups=2)),
    value("conv_transpose1: conv_transpose: stride must be an int >= 1, got 0", built, ConvTranspose(4, 3, stride=0)),
    value("depthwise_conv1: depthwise_conv: kernel size must be at most the padded spatial dims (8, 8), got (9, 9)",
          built, DepthwiseConv(9)),
    value("lp_pool1: lp_pool: p must be a finite number >= 1, got 0", built, LpPool(2, p=0)),
    value("Dropout: rate must be a number in [0, 1], got 1.5", Dropout, 1.5),
    kind("Dropout: rate must be a Python float, got str", Dropout, "0.5"),
    # shapes: errors start with the layer's name
    value("conv1: conv: kernel size must be at most the padded spatial dims (8, 8), got (9, 9)", built, Conv(4, 9)),
    value("conv2: conv: kernel size must be at most the padded spatial dims (6, 6), got (7, 7)", built, Conv(4, 3),
          Conv(4, 7)),
    value("conv1: conv: stride must be an int >= 1, got 0", built, Conv(4, 3, stride=0)),
    value("conv1: Conv: groups must be a divisor of 3 input and 4 output channels, got 2", built, Conv(4, 3, groups=2)),
    value("conv1: Conv: groups must be a divisor of 3 input and 5 output channels, got 5", built, Conv(5, 3, groups=5)),
    value("hidden_layer1: HiddenLayer: groups must be a divisor of 3 input and 4 output channels, got 2", built,
          HiddenLayer(4, 3, groups=2)),
    value("conv1: Conv: kernel_size must be one int or 2 of them, got (3, 3, 3)", built, Conv(4, (3, 3, 3))),
    value("conv1: Conv: kernel_size must be an int >= 1, got 0", built, Conv(4, 0)),
    value("conv1: conv: x must be (N, *spatial, C) with 1, 2 or 3 spatial dims, got shape (1, 192)", built, Flatten(),
          Conv(4, 3, name="conv1")),
    value("mine: max_pool: window must be at most the padded spatial dims (8, 8), got (9, 9)", built,
          MaxPool(9, name="mine")),
    value("avg_pool1: avg_pool: stride must be an int >= 1, got 0", built, AvgPool(2, stride=0)),
    value("hidden_layer1: hidden_layer: pool_stride must be an int >= 1, got 0", built,
          HiddenLayer(4, 3, pool_stride=0)),
    value("leaky_relu1: leaky_relu: negative_slope must be a finite number, got nan", built, LeakyRelu(NAN)),
    value("residual1/in/conv1: conv: kernel size must be at most the padded spatial dims (8, 8), got (9, 9)", built,
          residual(Relu(), serial(Conv(4, 9), name="in"))),
    value("residual1: residual: the output of the layers must be of shape (1, 8, 8, 3), got (1, 8, 8, 4)", built,
          residual(Conv(4, 3, padding="SAME"))),
    # branches, several inputs, functions
    value("branches: join must be 'concatenate', 'add' or a function of the outputs, got 'concat'", branches, Relu(),
          join="concat"),
    value("branches: layers must be one layer or more, got none", branches),
    value("parallel: layers must be one layer or more, got none", parallel),
    value("siamese: names must be different and without '/', got 'a'", siamese, Relu(name="a"), Relu(name="a")),
    value("branches1: branches: the outputs must be of one shape except for the channels, got (1, 6, 6, 2), "
          "(1, 8, 8, 3)", built, branches(Conv(2, 3), Relu())),
    value("branches1: branches: the outputs must be of one shape, got (1, 8, 8, 2), (1, 8, 8, 3)", built,
          branches(Conv(2, 1), Relu(), join="add")),
    value("branches1/serial1/conv1: conv: kernel size must be at most the padded spatial dims (8, 8), got (9, 9)",
          built, branches(Relu(), serial(Relu(), Conv(4, 9)))),
    value("parallel1: parallel: x must be 2 inputs, one for each layer, got 8", built, parallel(Relu(), Relu())),
    value("parallel1: parallel: x must be 2 inputs, one for each layer, got 3", built, parallel(Relu(), Relu()),
          shape=((3,), (3,), (3,))),
    value("parallel: x must be a tuple of inputs (N, …), or one array (N, inputs, …), got shape (2, 3)",
          parallel(Relu()).apply, {}, np.ones((2, 3), np.float32)),
    value("siamese1: siamese: the inputs must be of one shape, got (3,), (4,)", built, siamese(Dense(3)),
          shape=((3,), (4,))),
    value("siamese: the inputs must be of one shape, got (3,), (4,)", siamese(Relu()).apply, {},
          (np.ones((2, 3), np.float32), np.ones((2, 4), np.float32))),
    kind("relu1: x must be one array, got a tuple of 2", serial(Relu()).apply, {},
         (np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))),
    kind("serial: x[1] must be an array, got None", serial(Relu()).apply, {}, (np.ones(3), None)),
    kind("pair1: Function: output must be an array, got tuple", built, pair),
    value("apply_layer: name must be one of relu1, relu2, got 'relu3'", serial(Relu(), Relu()).apply_layer, "relu3", {},
          np.ones((2, 3), np.float32)),
    value("serial1/parallel1: parallel: x must be 2 inputs, one for each layer, got 8", built,
          serial(parallel(Relu(), Relu()))),
    # shapes of examples
    kind(f"serial: {SHAPES}, got 784", built, Dense(3), shape=784),
    value(f"serial: {SHAPES}, got (0,)", built, parallel(Relu(), Relu()), shape=((3,), (0,))),
    kind(f"serial: {SHAPES}, got (4.0,)", built, Dense(3), shape=(4.0,)),
    value(f"serial: {SHAPES}, got (-4,)", built, Dense(3), shape=(-4,)),
    kind(f"serial: {SHAPES}, got 784", lambda: serial(Dense(3)).summary(784)),
    kind(f"serial: {SHAPES}, got 784", lambda: jaxcnn.TrainState.create(serial(Dense(3)), optax.sgd(0.1), KEY, 784)),
    # keys
    kind(f"serial: key must be {ONE_KEY}, got 0", built, Dense(3), key=0),
    kind(f"serial: key must be {ONE_KEY}, got None", built, Dense(3), key=None),
    kind(f"serial: key must be {ONE_KEY}, got uint32[2]", built, Dense(3), key=np.zeros(2, np.uint32)),
    kind(f"serial: key must be {ONE_KEY}, got key<fry>[2]", built, Dense(3), key=jax.random.split(KEY)),
    kind(f"serial: key must be {ONE_KEY}, got 3", applied, key=3),
    kind(f"serial: key must be {ONE_KEY}, got uint32[2]", applied, key=np.zeros(2, np.uint32)),
    # parameters and inputs
    value("conv1: params must be a dict with the key 'weight', got one with the keys []", applied, {}),
    value("residual1/conv1: params must be a dict with the key 'weight', got one with the keys ['bias']", applied,
          {"conv1": {"weight": np.ones((3, 3, 3, 4), np.float32)}, "residual1": {"conv1": {"bias": np.zeros(4)}}}),
    kind("serial: params must be a dict as init makes it, got list", applied, []),
    value("conv: w must be (*K, 2, O) for an x with 2 channels and groups=1, got x (2, 8, 8, 2), w (3, 3, 3, 4)",
          applied, x=np.ones((2, 8, 8, 2), np.float32)),
    kind("conv: x must be of a floating dtype, got uint8", applied, x=np.ones((2, *SHAPE), np.uint8)),
    kind("conv: arrays must be of one dtype, got x float64, w float32", applied, x=np.ones((2, *SHAPE))),
    kind("serial: x must be an array, got None", applied, x=None),
    kind("conv1: params must be a dict as init makes it, got NoneType", applied, {"conv1": None}),
    kind("residual1/conv1: params must be a dict as init makes it, got list", applied,
         {"conv1": NET.init(KEY, SHAPE)["conv1"], "residual1": {"conv1": [1, 2]}}),
    # not nets, functions or optimizers
    kind("make_train_step: net must be a net from serial, got 3", jaxcnn.make_train_step, 3, labelled, SGD),
    kind("make_train_step: loss must be a function (outputs, targets), got None", jaxcnn.make_train_step, NET, None,
         SGD),
    kind("make_train_step: optimizer must be an optimizer from optax, got 0.1", jaxcnn.make_train_step, NET, labelled,
         0.1),
    kind("TrainState.create: net must be a net from serial, got Relu(name=None)", jaxcnn.TrainState.create, Relu(),
         SGD, KEY, SHAPE),
    kind("TrainState.create: optimizer must be an optimizer from optax, got 'adam'", jaxcnn.TrainState.create, NET,
         "adam", KEY, SHAPE),
    kind("TrainState.create: dtype must be a floating dtype, got int32", jaxcnn.TrainState.create, NET, SGD, KEY, SHAPE,
         dtype=jnp.int32),
    kind("TrainState.create: dtype must be a floating dtype, got 'wide'", jaxcnn.TrainState.create, NET, SGD, KEY,
         SHAPE, dtype="wide"),
    kind("explicit: fun must be a function, got 3", jaxcnn.explicit, 3),
    kind("operations: fun must be a function, got 3", jaxcnn.operations, 3),
    kind("evaluate: net must be a net from serial, got None", jaxcnn.evaluate, None, labelled, {}, []),
    kind("evaluate: loss must be a function (outputs, targets), got 3", jaxcnn.evaluate, NET, 3, {}, []),
    kind("calibrate: net must be a net from serial, got None", jaxcnn.calibrate, None, {}, []),
    kind("calibrate: batches must be (x, targets) pairs, got 3", calibrated, 3),
    kind("backprop: net must be a net from serial or a function (params, x), got 3", jaxcnn.backprop, 3,
         labelled, {}, X, X),
    kind("backprop: loss must be a function (outputs, targets), got 3", jaxcnn.backprop, NET, 3, {}, X, X),
    kind("per_example_gradients: fun must be a function, got 3", jaxcnn.per_example_gradients, 3, labelled, {}, X, X),
    kind("per_example_norms: loss must be a function (outputs, targets), got 3", jaxcnn.per_example_norms, NET, 3,
         {}, X, X),
    kind("fold_batch_norm: net must be a net from serial, got 3", jaxcnn.fold_batch_norm, 3, {}),
    kind("attribute: net must be a net from serial or a function (params, x), got 3", jaxcnn.attribute, 3, {}, X, 0),
    # rules
    value("rules: a key must be the name of a layer, got 'conv2'; the nearest are conv1, residual1/conv1, dense1",
          applied, rules={"conv2": AUTO}),
    kind(f"{A_KEY} 3", applied, rules={3: AUTO}),
    kind(f"{A_KEY} Relu(name=None)", applied, rules={Relu(): AUTO}),
    kind(f"{A_KEY} <class 'int'>", applied, rules={int: AUTO}),
    kind(f"{A_KEY} {jaxcnn.relu!r}", applied, rules={jaxcnn.relu: AUTO}),
    kind("conv: rule must be None, autodiff or a hashable function (call, delta), got 'autodiff'", applied,
         rules="autodiff"),
    kind("conv: rule must be None, autodiff or a hashable function (call, delta), got 3", applied, rules={Conv: 3}),
    # normalization and calibration
    value("layer_norm1: LayerNorm: axes must be one or more distinct axes of an array with 4 dims, got 4", built,
          LayerNorm(4)),
    value("layer_norm1: LayerNorm: axes must be dims of one example, got 0, which includes the batch", built,
          LayerNorm(0)),
    value("group_norm1: group_norm: groups must be a divisor of the 3 channels of x (1, 8, 8, 3), got 32", built,
          GroupNorm()),
    value("batch_norm1: batch_norm: eps must be a finite number >= 0, got -1.0", built, BatchNorm(eps=-1.0)),
    value("calibrate: batches must have at least one example, got none", calibrated, []),
    value("calibrate: batches must have at least one example, got none", calibrated,
          [(np.ones((0, *SHAPE), np.float32), None)]),
    kind("calibrate: batches must be an iterable that can be iterated once per BatchNorm (1), such as a list, got "
         "list_iterator", calibrated, iter([])),
    value("calibrate: keep_bytes must be an int >= 0, got -1", lambda: jaxcnn.calibrate(NET, {}, [], keep_bytes=-1)),
    # training
    value("make_train_step: microbatch must be an int >= 1, got 0", jaxcnn.make_train_step, NET, labelled,
          optax.sgd(0.1), microbatch=0),
    kind("make_train_step: microbatch must be an int >= 1, got 2.0", jaxcnn.make_train_step, NET, labelled, SGD,
         microbatch=2.0),
    kind("make_train_step: microbatch must be an int >= 1, got True", jaxcnn.make_train_step, NET, labelled, SGD,
         microbatch=True),
    kind("make_train_step: measure must be a function, got 3", jaxcnn.make_train_step, NET, labelled, SGD, measure=3),
    value("make_train_step: measure must not be given together with gradient", jaxcnn.make_train_step,
          NET, labelled, SGD, measure=print, gradient=print),
    kind("value_grad_and_deltas: has_aux must be a bool, got 1", jaxcnn.value_grad_and_deltas, print, has_aux=1),
    kind("make_train_step: compute_dtype must be a floating dtype, got int32", jaxcnn.make_train_step, NET, labelled,
         SGD, compute_dtype=jnp.int32),
    kind("make_train_step: compute_dtype must be a floating dtype, got 'half '", jaxcnn.make_train_step, NET, labelled,
         SGD, compute_dtype="half "),
    kind("make_train_step: compute_dtype must be a floating dtype of 16 bits or more, got float8_e4m3fn",
         jaxcnn.make_train_step, NET, labelled, SGD, compute_dtype=jnp.float8_e4m3fn),
    kind("serial: dtype must be a floating dtype, got int8", applied, dtype=np.int8),
    # evaluation
    value("evaluate: batches must have at least one example, got none",
          lambda: jaxcnn.evaluate(NET, labelled, NET.init(KEY, SHAPE), [])),
    value("evaluate: batches must have at least one example, got none",
          lambda: jaxcnn.evaluate(NET, labelled, NET.init(KEY, SHAPE),
                                  [(np.ones((0, *SHAPE), np.float32), np.zeros(0, int))])),
]  # fmt: skip


@pytest.mark.parametrize("row", NETS, ids=str)
def test_bad_calls_of_nets_and_training(row):
    raised(row, lambda: row.call(*row.args, **row.options))


def test_a_layer_that_jax_refuses_is_named():
    """JAX's error types cannot be constructed from a message."""
    with pytest.raises(TypeError, match=r"^depends_on_values1: .*traced array"):
        built(DependsOnValues())


@pytest.mark.parametrize("microbatch", [None, 1])
def test_the_training_step_refuses_before_it_computes(microbatch):
    """A label out of range is refused while the step is traced."""
    optimizer = optax.sgd(0.1)
    state = jaxcnn.TrainState.create(NET, optimizer, KEY, SHAPE)
    step = jaxcnn.make_train_step(NET, labelled, optimizer, microbatch=microbatch)
    row = value(
        "softmax_cross_entropy_with_integer_labels: logits and labels must be (…, C) and (…), got logits (2, 10), "
        "labels (3,)", lambda: step(state, (np.ones((2, *SHAPE), np.float32), np.zeros(3, int)))
    )  # fmt: skip
    raised(row, row.call)
    assert not any(a.is_deleted() for a in jax.tree.leaves(state)), "the state was not donated"


# ---------------------------------------------------------------------------------------------------------------------
# The tables themselves


def test_every_message_is_one_line_and_begins_with_its_op():
    rows = [*CALLS, *rows_of_every_op(), *TRACED_OPTIONS, *RULES]
    for row in [*rows, *NETS]:
        assert "\n" not in row.message
    ops = {name for name in dir(jaxcnn) if callable(getattr(jaxcnn, name)) and name[0].islower()}
    nets = {
        "explicit", "operations", "serial", "residual", "branches", "parallel", "siamese", "calibrate", "evaluate",
        "make_train_step",
    }  # fmt: skip
    elsewhere = {  # tests/ops/test_signal.py, tests/test_{attribution, backprop, examples, curvature, folding}.py
        "convolve", "correlate", "autocorrelate", "match_template", "attribute", "backprop", "tap",
        "value_grad_and_deltas", "per_example_gradients", "per_example_norms", "clipped_gradient", "hvp",
        "gauss_newton_vp", "fold_batch_norm",
    }  # fmt: skip
    of_layers = {"add"}
    assert {row.message.split(":")[0] for row in rows} == (ops | of_layers) - nets - elsewhere
