"""Layers: frozen, hashable descriptions of an op with its options, and of the parameters it needs.

`init` makes the parameters, `apply` runs the op. Layers hold no arrays, so a net can be a static argument to jit.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import batching
from jax.typing import DTypeLike

from jaxcnn.arguments import bad_value, fail, positive, static_int
from jaxcnn.geometry import Padding, PerDim
from jaxcnn.ops import activation, convolution, dropout, hidden, linear, normalization, pooling
from jaxcnn.ops.rule import Rule

Params = dict[str, Any]
Initializer = Callable[..., Array]

# The defaults are functions of this module, not closures, so that layers can be pickled.


def he_normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialize with `jax.nn.initializers.he_normal`."""
    return jax.nn.initializers.he_normal()(key, shape, dtype)


def he_normal_transposed(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialize with `jax.nn.initializers.he_normal` a kernel whose last dim is the input channels."""
    return jax.nn.initializers.he_normal(in_axis=-1, out_axis=-2)(key, shape, dtype)


def glorot_uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialize with `jax.nn.initializers.glorot_uniform`."""
    return jax.nn.initializers.glorot_uniform()(key, shape, dtype)


zeros = jax.nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Layer:
    """Base class of all layers.

    A layer has a name (assigned by `serial` if None), makes its parameters in `init`, and runs in `apply`.
    """

    name: str | None = dataclasses.field(default=None, kw_only=True)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make the parameters for inputs of ``shape``.

        Args:
            key: from `jax.random.key`.
            shape: shape of one example, without the batch.
            dtype: dtype of the parameters.

        Returns:
            The parameters by name, or ``{}`` for a layer without parameters.
        """
        return {}

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return the layer's output.

        Args:
            params: parameters as made by `init`.
            x: a batch ``(N, …)``.
            key: from `jax.random.key`; given only during training.
            rule: replaces the backward rule of the layer's op; None keeps it.

        Returns:
            The output for the batch.
        """
        raise NotImplementedError

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Return the number of additions and multiplications of the forward pass for one example.

        Args:
            shape: shape of one input, without the batch.
            out: shape of one output, without the batch.

        Returns:
            The number of FLOPs.
        """
        return 0

    def inner_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return an intermediate shape of one example that the output shape does not reveal, or None.

        Args:
            shape: shape of one input, without the batch.

        Returns:
            The intermediate shape, or None if the layer has none.
        """
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Layers with parameters


@dataclasses.dataclass(frozen=True)
class Conv(Layer):
    """`jaxcnn.conv` with ``features`` kernels of size ``patch`` (an int, or one per spatial dim).

    The fields are the options of the op, except ``dimension_numbers``: nets are always channels-last.
    """

    features: int
    kernel_size: PerDim
    stride: PerDim = 1
    padding: Padding = "VALID"
    dilation: PerDim = 1
    groups: int = 1
    bias: bool = dataclasses.field(default=True, kw_only=True)
    init_weight: Initializer = dataclasses.field(default=he_normal, kw_only=True)
    init_bias: Initializer = dataclasses.field(default=zeros, kw_only=True)
    preferred_element_type: DTypeLike | None = dataclasses.field(default=None, kw_only=True)
    precision: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _freeze(self)
        _check_count(self, "features", self.features)
        _check_count(self, "groups", self.groups)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make ``w (*kernel_size, I/groups, features)``, and ``b (features,)`` if the layer has a bias."""
        key_w, key_b = jax.random.split(key)
        size = positive("Conv", "kernel_size", self.kernel_size, len(shape) - 1)
        if shape[-1] % self.groups or self.features % self.groups:
            fail("Conv", f"groups={self.groups} must divide {shape[-1]} input and {self.features} output channels")
        params = {"weight": self.init_weight(key_w, (*size, shape[-1] // self.groups, self.features), dtype)}
        return {**params, "bias": self.init_bias(key_b, (self.features,), dtype)} if self.bias else params

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``conv(x, w, b)``."""
        return convolution.conv(
            x,
            params["weight"],
            params.get("bias"),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            preferred_element_type=self.preferred_element_type,
            precision=self.precision,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count a multiplication and an addition for each kernel element at each output."""
        entries = (
            math.prod(positive("Conv", "kernel_size", self.kernel_size, len(shape) - 1)) * shape[-1] // self.groups
        )
        return math.prod(out) * (2 * entries - 1 + self.bias)


@dataclasses.dataclass(frozen=True)
class DepthwiseConv(Layer):
    """`jaxcnn.depthwise_conv` with ``multiplier`` kernels per channel.

    The fields are the options of the op, except ``dimension_numbers``: nets are always channels-last.
    """

    kernel_size: PerDim
    multiplier: int = 1
    stride: PerDim = 1
    padding: Padding = "VALID"
    dilation: PerDim = 1
    bias: bool = dataclasses.field(default=True, kw_only=True)
    init_weight: Initializer = dataclasses.field(default=he_normal, kw_only=True)
    init_bias: Initializer = dataclasses.field(default=zeros, kw_only=True)
    preferred_element_type: DTypeLike | None = dataclasses.field(default=None, kw_only=True)
    precision: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _freeze(self)
        _check_count(self, "multiplier", self.multiplier)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make ``w (*kernel_size, 1, C·multiplier)``, and ``b (C·multiplier,)`` if the layer has a bias."""
        key_w, key_b = jax.random.split(key)
        size = positive("DepthwiseConv", "kernel_size", self.kernel_size, len(shape) - 1)
        features = shape[-1] * self.multiplier
        params = {"weight": self.init_weight(key_w, (*size, 1, features), dtype)}
        return {**params, "bias": self.init_bias(key_b, (features,), dtype)} if self.bias else params

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``depthwise_conv(x, w, b)``."""
        return convolution.depthwise_conv(
            x,
            params["weight"],
            params.get("bias"),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            preferred_element_type=self.preferred_element_type,
            precision=self.precision,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count a multiplication and an addition for each kernel element at each output."""
        entries = math.prod(positive("DepthwiseConv", "kernel_size", self.kernel_size, len(shape) - 1))
        return math.prod(out) * (2 * entries - 1 + self.bias)


@dataclasses.dataclass(frozen=True)
class ConvTranspose(Layer):
    """`jaxcnn.conv_transpose` with ``features`` output channels.

    The fields are the options of the op, except ``dimension_numbers``: nets are always channels-last.
    """

    features: int
    kernel_size: PerDim
    stride: PerDim = 1
    padding: Padding = "VALID"
    output_padding: PerDim = 0
    dilation: PerDim = 1
    groups: int = 1
    bias: bool = dataclasses.field(default=True, kw_only=True)
    init_weight: Initializer = dataclasses.field(default=he_normal_transposed, kw_only=True)
    init_bias: Initializer = dataclasses.field(default=zeros, kw_only=True)
    preferred_element_type: DTypeLike | None = dataclasses.field(default=None, kw_only=True)
    precision: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _freeze(self)
        _check_count(self, "features", self.features)
        _check_count(self, "groups", self.groups)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make ``w (*kernel_size, features/groups, I)``, and ``b (features,)`` if the layer has a bias."""
        key_w, key_b = jax.random.split(key)
        size = positive("ConvTranspose", "kernel_size", self.kernel_size, len(shape) - 1)
        if shape[-1] % self.groups or self.features % self.groups:
            channels = f"{shape[-1]} input and {self.features} output channels"
            fail("ConvTranspose", f"groups={self.groups} must divide {channels}")
        params = {"weight": self.init_weight(key_w, (*size, self.features // self.groups, shape[-1]), dtype)}
        return {**params, "bias": self.init_bias(key_b, (self.features,), dtype)} if self.bias else params

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``conv_transpose(x, w, b)``."""
        return convolution.conv_transpose(
            x,
            params["weight"],
            params.get("bias"),
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
            groups=self.groups,
            preferred_element_type=self.preferred_element_type,
            precision=self.precision,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count a multiplication and an addition for each kernel element at each input, and the bias at each output."""
        size = positive("ConvTranspose", "kernel_size", self.kernel_size, len(shape) - 1)
        return math.prod(shape) * 2 * math.prod(size) * self.features // self.groups + math.prod(out) * self.bias


@dataclasses.dataclass(frozen=True)
class HiddenLayer(Layer):
    """`jaxcnn.hidden_layer` of the lecture: convolution, ReLU and max pooling with one rule.

    The fields are the options of the op.
    """

    features: int
    kernel_size: PerDim
    window: PerDim = 2
    pool_stride: PerDim | None = None
    stride: PerDim = 1
    padding: Padding = "VALID"
    pool_padding: Padding = dataclasses.field(default="VALID", kw_only=True)
    dilation: PerDim = dataclasses.field(default=1, kw_only=True)
    groups: int = dataclasses.field(default=1, kw_only=True)
    init_weight: Initializer = dataclasses.field(default=he_normal, kw_only=True)
    init_bias: Initializer = dataclasses.field(default=zeros, kw_only=True)
    precision: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _freeze(self)
        _check_count(self, "features", self.features)
        _check_count(self, "groups", self.groups)

    def _conv(self) -> Conv:
        return Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            init_weight=self.init_weight,
            init_bias=self.init_bias,
        )

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make ``w (*kernel_size, I/groups, features)`` and ``b (features,)``."""
        return self._conv().init(key, shape, dtype)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``hidden_layer(x, w, b)``."""
        return hidden.hidden_layer(
            x,
            params["weight"],
            params["bias"],
            window=self.window,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            precision=self.precision,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count the convolution, plus 1 per element for ReLU and (window size − 1) per pooling window."""
        inner = self.inner_shape(shape)
        pooled = math.prod(out) * (math.prod(positive("HiddenLayer", "window", self.window, len(shape) - 1)) - 1)
        return self._conv().flops(shape, inner) + math.prod(inner) + pooled

    def inner_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output shape of the convolution, before pooling."""
        conv = self._conv()
        return out_shape(conv, jax.eval_shape(lambda: conv.init(jax.random.key(0), shape)), shape)


@dataclasses.dataclass(frozen=True)
class Dense(Layer):
    """`jaxcnn.dense` with ``features`` outputs."""

    features: int
    bias: bool = dataclasses.field(default=True, kw_only=True)
    init_weight: Initializer = dataclasses.field(default=glorot_uniform, kw_only=True)
    init_bias: Initializer = dataclasses.field(default=zeros, kw_only=True)

    def __post_init__(self) -> None:
        _check_count(self, "features", self.features)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make ``w (I, features)``, and ``b (features,)`` if the layer has a bias."""
        key_w, key_b = jax.random.split(key)
        params = {"weight": self.init_weight(key_w, (shape[-1], self.features), dtype)}
        return {**params, "bias": self.init_bias(key_b, (self.features,), dtype)} if self.bias else params

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``dense(x, w, b)``."""
        return linear.dense(x, params["weight"], params.get("bias"), rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count a multiplication and an addition for each input at each output."""
        return math.prod(out) * (2 * shape[-1] - 1 + self.bias)


@dataclasses.dataclass(frozen=True)
class _Normalization(Layer):
    eps: float = dataclasses.field(default=1e-5, kw_only=True)
    scale: bool = dataclasses.field(default=True, kw_only=True)
    bias: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        _freeze(self)

    def _learned(self, shape: tuple[int, ...], dtype: DTypeLike) -> Params:
        """Initialize whichever of scale (ones) and bias (zeros) the layer uses."""
        made = {"scale": jnp.ones, "bias": jnp.zeros}
        return {name: make(shape, dtype) for name, make in made.items() if getattr(self, name)}

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count per element Σ x, x − m, its square, their Σ, times r, times γ if used, plus β if used."""
        return math.prod(out) * (5 + self.scale + self.bias)


@dataclasses.dataclass(frozen=True)
class BatchNorm(_Normalization):
    """`jaxcnn.batch_norm`, with the statistics of the batch during training.

    In evaluation it uses the statistics that `jaxcnn.calibrate` adds to the parameters ("mean", "var"). Before
    `jaxcnn.calibrate` it uses those of the batch, and the output of an example then depends on the rest of the batch.

    ``axis_name`` names one or several axes of `jax.shard_map`, `jax.pmap` or `jax.vmap`. The statistics of the batch
    are then computed over all devices along these axes.
    """

    axis_name: str | tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make ``scale (C,)`` of ones and ``bias (C,)`` of zeros."""
        return self._learned(shape[-1:], dtype)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``batch_norm(x, scale, bias)``, with the statistics in ``params`` if there is no key."""
        names = ("mean", "var") if key is None else ()
        statistics = [params[name] for name in names if name in params]
        if statistics and all(jnp.shape(a) == UNKNOWN for a in statistics):
            statistics = reached_p.bind(x, *statistics)
        elif key is None and not statistics and HIDING.value:
            others = ", ".join(HIDING.value)
            raise bad_value(
                "calibrate",
                "every BatchNorm",
                "a layer of a Serial, or a field named like its parameters in a layer",
                f"one that is not, inside one of {others}",
            )
        # Statistics are not parameters: no gradient reaches them.
        statistics = [jax.lax.stop_gradient(a) for a in statistics]
        return normalization.batch_norm(
            x,
            params.get("scale"),
            params.get("bias"),
            *statistics,
            eps=self.eps,
            axis_name=self.axis_name,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count per element, in evaluation, x − m, times r, times γ if used, plus β if used."""
        return math.prod(out) * (2 + self.scale + self.bias)


@dataclasses.dataclass(frozen=True)
class LayerNorm(_Normalization):
    """`jaxcnn.layer_norm` over ``axes``, dims of a batch ``(N, …)``."""

    axes: int | tuple[int, ...] = -1

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make ``scale`` of ones and ``bias`` of zeros, with the shape along ``axes``."""
        dims = normalization.dims_of("LayerNorm", self.axes, len(shape) + 1)
        if 0 in dims:
            raise bad_value("LayerNorm", "axes", "dims of one example", f"{self.axes!r}, of which one is the batch")
        return self._learned(tuple(shape[dim - 1] for dim in dims), dtype)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``layer_norm(x, scale, bias)``."""
        return normalization.layer_norm(
            x, params.get("scale"), params.get("bias"), axes=self.axes, eps=self.eps, rule=rule
        )


@dataclasses.dataclass(frozen=True)
class GroupNorm(_Normalization):
    """`jaxcnn.group_norm`."""

    groups: int = 32

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make ``scale (C,)`` of ones and ``bias (C,)`` of zeros."""
        return self._learned(shape[-1:], dtype)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``group_norm(x, scale, bias)``."""
        return normalization.group_norm(
            x, params.get("scale"), params.get("bias"), groups=self.groups, eps=self.eps, rule=rule
        )


# ---------------------------------------------------------------------------------------------------------------------
# Layers without parameters


class _Activation(Layer):
    #: The op; its options are the fields of the layer.
    op: ClassVar[Callable[..., Array]]

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``op(x)``."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "name"}
        return self.op(x, **options, rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count 1 per element."""
        return math.prod(out)


@dataclasses.dataclass(frozen=True)
class Relu(_Activation):
    """`jaxcnn.relu`."""

    op = staticmethod(activation.relu)


@dataclasses.dataclass(frozen=True)
class LeakyRelu(_Activation):
    """`jaxcnn.leaky_relu`."""

    op = staticmethod(activation.leaky_relu)
    negative_slope: float = 0.01


@dataclasses.dataclass(frozen=True)
class Elu(_Activation):
    """`jaxcnn.elu`."""

    op = staticmethod(activation.elu)
    alpha: float = 1.0


@dataclasses.dataclass(frozen=True)
class Gelu(_Activation):
    """`jaxcnn.gelu`."""

    op = staticmethod(activation.gelu)
    approximate: bool = False


@dataclasses.dataclass(frozen=True)
class Silu(_Activation):
    """`jaxcnn.silu`."""

    op = staticmethod(activation.silu)


@dataclasses.dataclass(frozen=True)
class Softplus(_Activation):
    """`jaxcnn.softplus`."""

    op = staticmethod(activation.softplus)


@dataclasses.dataclass(frozen=True)
class Sigmoid(_Activation):
    """`jaxcnn.sigmoid`."""

    op = staticmethod(activation.sigmoid)


@dataclasses.dataclass(frozen=True)
class Tanh(_Activation):
    """`jaxcnn.tanh`."""

    op = staticmethod(activation.tanh)


@dataclasses.dataclass(frozen=True)
class Selu(_Activation):
    """`jaxcnn.selu`."""

    op = staticmethod(activation.selu)


@dataclasses.dataclass(frozen=True)
class Celu(_Activation):
    """`jaxcnn.celu`."""

    op = staticmethod(activation.celu)
    alpha: float = 1.0


@dataclasses.dataclass(frozen=True)
class Relu6(_Activation):
    """`jaxcnn.relu6`."""

    op = staticmethod(activation.relu6)


@dataclasses.dataclass(frozen=True)
class HardTanh(_Activation):
    """`jaxcnn.hard_tanh`."""

    op = staticmethod(activation.hard_tanh)


@dataclasses.dataclass(frozen=True)
class HardSigmoid(_Activation):
    """`jaxcnn.hard_sigmoid`."""

    op = staticmethod(activation.hard_sigmoid)


@dataclasses.dataclass(frozen=True)
class HardSwish(_Activation):
    """`jaxcnn.hard_swish`."""

    op = staticmethod(activation.hard_swish)


@dataclasses.dataclass(frozen=True)
class Mish(_Activation):
    """`jaxcnn.mish`."""

    op = staticmethod(activation.mish)


@dataclasses.dataclass(frozen=True)
class Softsign(_Activation):
    """`jaxcnn.softsign`."""

    op = staticmethod(activation.softsign)


@dataclasses.dataclass(frozen=True)
class Squareplus(_Activation):
    """`jaxcnn.squareplus`."""

    op = staticmethod(activation.squareplus)
    b: float = 4.0


@dataclasses.dataclass(frozen=True)
class LogSigmoid(_Activation):
    """`jaxcnn.log_sigmoid`."""

    op = staticmethod(activation.log_sigmoid)


class _Pool(Layer):
    window: PerDim

    def __post_init__(self) -> None:
        _freeze(self)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (window size − 1) comparisons or additions per window."""
        return math.prod(out) * (math.prod(positive(type(self).__name__, "window", self.window, len(shape) - 1)) - 1)


@dataclasses.dataclass(frozen=True)
class MaxPool(_Pool):
    """`jaxcnn.max_pool`."""

    window: PerDim
    stride: PerDim | None = None
    padding: Padding = "VALID"
    dilation: PerDim = dataclasses.field(default=1, kw_only=True)
    ceil_mode: bool = dataclasses.field(default=False, kw_only=True)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``max_pool(x, window)``."""
        return pooling.max_pool(
            x,
            self.window,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
            rule=rule,
        )


@dataclasses.dataclass(frozen=True)
class AvgPool(_Pool):
    """`jaxcnn.avg_pool`."""

    window: PerDim
    stride: PerDim | None = None
    padding: Padding = "VALID"
    count_include_pad: bool = True
    dilation: PerDim = dataclasses.field(default=1, kw_only=True)
    ceil_mode: bool = dataclasses.field(default=False, kw_only=True)
    divisor: float | None = dataclasses.field(default=None, kw_only=True)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``avg_pool(x, window)``."""
        return pooling.avg_pool(
            x,
            self.window,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
            divisor=self.divisor,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (window size − 1) additions and a division per window."""
        return super().flops(shape, out) + math.prod(out)


@dataclasses.dataclass(frozen=True)
class LpPool(_Pool):
    """`jaxcnn.lp_pool`."""

    window: PerDim
    p: float = 2
    stride: PerDim | None = None
    padding: Padding = "VALID"
    dilation: PerDim = dataclasses.field(default=1, kw_only=True)
    ceil_mode: bool = dataclasses.field(default=False, kw_only=True)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``lp_pool(x, window)``."""
        return pooling.lp_pool(
            x,
            self.window,
            p=self.p,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count per window a power for each element, (window size − 1) additions and a root."""
        return 2 * (super().flops(shape, out) + math.prod(out))


@dataclasses.dataclass(frozen=True)
class GlobalMaxPool(Layer):
    """`jaxcnn.global_max_pool`."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``global_max_pool(x)``."""
        return pooling.global_max_pool(x, rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (channel size − 1) comparisons per channel."""
        return math.prod(shape) - math.prod(out)


@dataclasses.dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """`jaxcnn.global_avg_pool`."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``global_avg_pool(x)``."""
        return pooling.global_avg_pool(x, rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (channel size − 1) additions and a division per channel."""
        return math.prod(shape)


@dataclasses.dataclass(frozen=True)
class AdaptiveMaxPool(Layer):
    """`jaxcnn.adaptive_max_pool`."""

    size: PerDim

    def __post_init__(self) -> None:
        _freeze(self)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``adaptive_max_pool(x, size)``."""
        return pooling.adaptive_max_pool(x, self.size, rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (window size − 1) comparisons per window."""
        return pooling.Bins(shape[:-1], out[:-1]).entries * out[-1] - math.prod(out)


@dataclasses.dataclass(frozen=True)
class AdaptiveAvgPool(Layer):
    """`jaxcnn.adaptive_avg_pool`."""

    size: PerDim

    def __post_init__(self) -> None:
        _freeze(self)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``adaptive_avg_pool(x, size)``."""
        return pooling.adaptive_avg_pool(x, self.size, rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (window size − 1) additions and a division per window."""
        return pooling.Bins(shape[:-1], out[:-1]).entries * out[-1]


@dataclasses.dataclass(frozen=True)
class Flatten(Layer):
    """Reshape ``(N, …)`` to ``(N, prod …)``."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return x, reshaped. The backward pass is the inverse reshape and takes no rule."""
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))


@dataclasses.dataclass(frozen=True)
class Dropout(Layer):
    """`jaxcnn.dropout` during training; the identity in evaluation."""

    rate: float

    def __post_init__(self) -> None:
        dropout.probability("Dropout", self.rate)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``dropout(x, rate, key)`` if there is a key, and x otherwise."""
        return x if key is None else dropout.dropout(x, self.rate, key, rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Return 0: dropout is inactive in evaluation."""
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# Shared parts


#: Shape of unknown statistics, which are in the parameters while `jaxcnn.calibrate` traces a net.
UNKNOWN = (0, 0)
#: Names of layers that may contain a batch norm `jaxcnn.calibrate` cannot see, while it traces a net.
HIDING = jax.make_user_context(())
#: (x, mean, var) → (mean, var), for statistics that are unknown: marks the input of a batch norm.
reached_p = jax.extend.core.Primitive("batch_norm_reached")
reached_p.multiple_results = True


@reached_p.def_impl
def _reached(x: Array, *unknown: Array) -> Any:
    fail("batch_norm", f"mean must have shape {x.shape[-1:]}, one number for each channel; got {UNKNOWN}")


@reached_p.def_abstract_eval
def _reached_types(x: Any, *unknown: Any) -> Any:
    """Return the types of the statistics: their own dtype, unless the unknown ones were cast."""
    own = np.promote_types(x.dtype, np.float32)
    return [jax.core.ShapedArray(x.shape[-1:], own if a.dtype == np.float32 else a.dtype) for a in unknown]


def _reached_in_batches(args: Any, dims: Any) -> Any:
    """Bind once for the whole mapped batch: everything that `jax.vmap` maps over reaches the same norm."""
    (x, *unknown), (dim, *rest) = args, dims
    if any(d is not None for d in rest):
        fail("calibrate", "the statistics of a batch norm must not be mapped by jax.vmap")
    return reached_p.bind(jnp.moveaxis(x, dim, 0), *unknown), [None] * len(unknown)


batching.primitive_batchers[reached_p] = _reached_in_batches


def out_shape(layer: Layer, params: Params, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> tuple[int, ...]:
    """Return the shape of a layer's output for one example, without computing it."""
    return shape_of(layer, layer.apply, params, shape, dtype)


def shape_of(
    layer: Layer, apply: Callable[..., Array], params: Params, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> tuple[int, ...]:
    """Return the shape of ``apply(params, x)`` for one example, even if axes that the layer names are not bound yet."""
    for name in sorted(_axis_names(layer)):
        if not normalization.is_bound(name):
            apply = _with_axis(apply, name)
    out = jax.eval_shape(apply, params, jax.ShapeDtypeStruct((1, *shape), dtype))
    return tuple(out.shape[1:])


def _with_axis(apply: Callable[..., Array], name: str) -> Callable[..., Array]:
    """Return ``apply`` inside an axis of size 1 with this name."""

    def mapped(params: Params, x: Array) -> Array:
        return jax.vmap(lambda x: apply(params, x), axis_name=name)(x[None])[0]

    return mapped


def _axis_names(value: Any) -> frozenset[str]:
    """Return the axis names of a layer and of the layers among its fields."""
    if isinstance(value, tuple):
        return frozenset().union(*map(_axis_names, value))
    if not isinstance(value, Layer):
        return frozenset()
    fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
    own = value.axis_name if isinstance(value, BatchNorm) else None
    return _axis_names(tuple(fields)) | frozenset(() if own is None else (own,) if isinstance(own, str) else own)


def _freeze(layer: Layer) -> None:
    """Replace lists and arrays among the options by tuples, so that the layer can be hashed."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list | tuple | np.ndarray) else value

    for field in dataclasses.fields(layer):
        value = frozen(getattr(layer, field.name))
        if field.name == "preferred_element_type" and value is not None:
            value = np.dtype(value)  # jnp.float32 and "float32" are the same option
        object.__setattr__(layer, field.name, value)


def _check_count(layer: Layer, name: str, value: Any) -> None:
    kind = type(layer).__name__
    if static_int(kind, name, value, value) < 1:
        raise bad_value(kind, name, "an int >= 1", value)
