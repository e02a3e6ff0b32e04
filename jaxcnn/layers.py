"""Layers: frozen, hashable descriptions of an op with its options, and of the parameters it needs.

`init` makes the parameters, `apply` runs the op. Layers hold no arrays, so a net can be a static argument to jit.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxcnn.arguments import bad_type, bad_value, positive, static_int
from jaxcnn.geometry import Padding, PerDim
from jaxcnn.ops import activation, adaptive, convolution, dropout, hidden, linear, normalization, pooling
from jaxcnn.ops.rule import Rule
from jaxcnn.statistics import evaluation_statistics

Params = dict[str, Any]
Initializer = Callable[..., Array]
#: The shape of an example without the batch, or one shape for each input of a net with several inputs.
Shape = tuple[int, ...] | tuple[tuple[int, ...], ...]

# The default initializers are functions of this module, not closures, so that layers can be pickled.


def he_normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialize with `jax.nn.initializers.he_normal`."""
    return _draw(_HE_NORMAL, key, shape, dtype)


def he_normal_transposed(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialize with `jax.nn.initializers.he_normal` a kernel whose last dim is the input channels."""
    return _draw(_HE_NORMAL_TRANSPOSED, key, shape, dtype)


def glorot_uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Initialize with `jax.nn.initializers.glorot_uniform`."""
    return _draw(_GLOROT_UNIFORM, key, shape, dtype)


_HE_NORMAL = jax.nn.initializers.he_normal()
_HE_NORMAL_TRANSPOSED = jax.nn.initializers.he_normal(in_axis=-1, out_axis=-2)
_GLOROT_UNIFORM = jax.nn.initializers.glorot_uniform()


def _draw(initializer: Initializer, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Run an initializer of JAX, compiled with few optimizations unless it is part of another program.

    At its default level, LLVM takes 1 to 2 s on a CPU to optimize the random bits of one layer, which run once. The
    numbers are equal, bit for bit.
    """
    # A clone is a tracer inside of another program even if the key is a constant there.
    if isinstance(jax.random.clone(key), jax.core.Tracer):
        return initializer(key, shape, dtype)
    return _compiled_draw(initializer, key, tuple(shape), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 2, 3), compiler_options={"xla_backend_optimization_level": 1})
def _compiled_draw(initializer: Initializer, key: Array, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    return initializer(key, shape, dtype)


zeros = jax.nn.initializers.zeros


# ---------------------------------------------------------------------------------------------------------------------
# Base classes


@dataclasses.dataclass(frozen=True)
class Layer:
    """Base class of all layers.

    A layer has a name (assigned by `serial` if None), makes its parameters in `init`, and runs in `apply`. A subclass
    overrides `apply`, and `init` if it has parameters:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> class Scale(jaxcnn.Layer):
    ...     def init(self, key, shape, dtype=jnp.float32):
    ...         return {"factor": jnp.ones(shape[-1:], dtype)}
    ...
    ...     def apply(self, params, x, *, key=None, rule=None):
    ...         return x * params["factor"]
    >>> net = jaxcnn.serial(jaxcnn.Dense(3), Scale())
    >>> net.apply(net.init(jax.random.key(0), (2,)), jnp.ones((4, 2))).shape
    (4, 3)
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
            rule: replaces the backward rule of the layer's op; None keeps it. A layer that runs several ops passes it
                to each of them, and to a net as ``rules=rule``.

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


class Net(Layer):
    """Base class of layers that consist of layers."""

    #: The layers with their names.
    layers: tuple[tuple[str, Layer], ...]

    def walk(self, path: str = "") -> Iterator[tuple[str, Layer]]:
        """Yield every layer with its full name, including the layers of inner nets.

        Args:
            path: prefix of the names.

        Yields:
            ``(name, layer)`` pairs.
        """
        for name, layer in self.layers:
            yield f"{path}{name}", layer
            if isinstance(layer, Net):
                yield from layer.walk(f"{path}{name}/")

    @property
    def sum_keys(self) -> tuple[type, ...]:
        """Keys of ``rules=`` that select the rule of the sum at the end of the net; ``()`` if it has no sum."""
        return ()


class OpLayer(Layer):
    """Base class of layers that apply one op. Their fields named like options of the op are passed to it."""

    #: The op.
    op: ClassVar[Callable[..., Array]]
    #: Names of the options, which are fields of the layer.
    options: ClassVar[tuple[str, ...]] = ()
    #: Names of the parameters in the order of the op's arrays: those that the op requires, and those it does not.
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _hashable(getattr(self, field.name))
            if field.name == "preferred_element_type" and value is not None:
                value = self._dtype(value)  # jnp.float32 and "float32" are the same option
            object.__setattr__(self, field.name, value)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return the op of ``x`` and the parameters, with the layer's options."""
        return self.op(x, *self._arrays(params), **self._options(), rule=rule)

    def _dtype(self, value: Any) -> np.dtype:
        try:
            return np.dtype(value)
        except TypeError:
            raise bad_type(type(self).__name__, "preferred_element_type", "a floating dtype", repr(value)) from None

    def _arrays(self, params: Params) -> list[Any]:
        return [params[name] for name in self.required] + [params.get(name) for name in self.optional]

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.options}


def _hashable(value: Any) -> Any:
    """Return tuples in place of lists and arrays."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


L = TypeVar("L", bound=OpLayer)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def applies(op: Callable[..., Array]) -> Callable[[type[L]], type[L]]:
    """Return a decorator that makes an `OpLayer` a frozen dataclass whose `apply` runs ``op``."""

    def decorated(cls: type[L]) -> type[L]:
        made = dataclasses.dataclass(frozen=True)(cls)
        made.op = staticmethod(op)
        names = {field.name for field in dataclasses.fields(made)} - {*made.required, *made.optional}
        made.options = tuple(name for name in inspect.signature(op).parameters if name in names)
        return made

    return decorated


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions and dense layers


class _Affine(OpLayer):
    """Base class of layers with a weight and an optional bias."""

    required: ClassVar[tuple[str, ...]] = ("weight",)
    optional: ClassVar[tuple[str, ...]] = ("bias",)

    bias: bool
    init_weight: Initializer
    init_bias: Initializer

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("features", "groups", "multiplier"):
            if hasattr(self, name):
                static_int(type(self).__name__, name, getattr(self, name), least=1)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make "weight", and "bias" if the layer has one."""
        key_weight, key_bias = jax.random.split(key)
        weight = self.weight_shape(shape)
        params = {"weight": self.init_weight(key_weight, weight, dtype)}
        if self.bias:
            params["bias"] = self.init_bias(key_bias, (self.outputs(weight),), dtype)
        return params

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the weight for inputs of ``shape``."""
        raise NotImplementedError

    def outputs(self, weight: tuple[int, ...]) -> int:
        """Return the number of output channels for a weight of this shape."""
        return weight[-1]

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count a multiplication and an addition for each element of the weight that an output depends on."""
        return math.prod(out) * (2 * math.prod(self.weight_shape(shape)[:-1]) - 1 + self.bias)


class _Convolution(_Affine):
    """Base class of the convolutions."""

    kernel_size: PerDim

    def _kernel(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return positive(type(self).__name__, "kernel_size", self.kernel_size, len(shape) - 1)

    def _check_groups(self, inputs: int, outputs: int, groups: int) -> None:
        if inputs % groups or outputs % groups:
            expected = f"a divisor of {inputs} input and {outputs} output channels"
            raise bad_value(type(self).__name__, "groups", expected, groups)


@applies(convolution.conv)
class Conv(_Convolution):
    """`jaxcnn.conv`, channels last. Parameters: ``weight (*kernel_size, I/groups, features)``, ``bias (features,)``.

    Args:
        features: number of output channels.
        kernel_size: an int, or one per spatial dim.
        bias: whether the layer has a bias.
        init_weight: initializer ``(key, shape, dtype)`` of the weight.
        init_bias: initializer of the bias.
        stride, padding, dilation, groups, preferred_element_type, precision: options of the op.
        name: name in a net.

    Raises:
        ValueError: if features or groups is less than 1.
        TypeError: if features or groups is not an int.
    """

    features: int
    kernel_size: PerDim
    stride: PerDim = 1
    padding: Padding = "VALID"
    dilation: PerDim = 1
    groups: int = 1
    _: dataclasses.KW_ONLY
    bias: bool = True
    init_weight: Initializer = he_normal
    init_bias: Initializer = zeros
    preferred_element_type: DTypeLike | None = None
    precision: Any = None

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(*kernel_size, I/groups, features)``."""
        kernel = self._kernel(shape)
        self._check_groups(shape[-1], self.features, self.groups)
        return (*kernel, shape[-1] // self.groups, self.features)


@applies(convolution.depthwise_conv)
class DepthwiseConv(_Convolution):
    """`jaxcnn.depthwise_conv`, channels last. Parameters: ``weight (*kernel_size, 1, C·multiplier)``, ``bias``.

    Args:
        kernel_size: an int, or one per spatial dim.
        multiplier: number of kernels per channel.
        bias: whether the layer has a bias ``(C·multiplier,)``.
        init_weight: initializer of the weight.
        init_bias: initializer of the bias.
        stride, padding, dilation, preferred_element_type, precision: options of the op.
        name: name in a net.

    Raises:
        ValueError: if multiplier is less than 1.
        TypeError: if multiplier is not an int.
    """

    kernel_size: PerDim
    multiplier: int = 1
    stride: PerDim = 1
    padding: Padding = "VALID"
    dilation: PerDim = 1
    _: dataclasses.KW_ONLY
    bias: bool = True
    init_weight: Initializer = he_normal
    init_bias: Initializer = zeros
    preferred_element_type: DTypeLike | None = None
    precision: Any = None

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(*kernel_size, 1, C·multiplier)``."""
        return (*self._kernel(shape), 1, shape[-1] * self.multiplier)


@applies(convolution.conv_transpose)
class ConvTranspose(_Convolution):
    """`jaxcnn.conv_transpose`, channels last. Parameters: ``weight (*kernel_size, features/groups, I)``, ``bias``.

    Args:
        features: number of output channels.
        kernel_size: an int, or one per spatial dim.
        bias: whether the layer has a bias ``(features,)``.
        init_weight: initializer of the weight.
        init_bias: initializer of the bias.
        stride, padding, output_padding, dilation, groups, preferred_element_type, precision: options of the op.
        name: name in a net.

    Raises:
        ValueError: if features or groups is less than 1.
        TypeError: if features or groups is not an int.
    """

    features: int
    kernel_size: PerDim
    stride: PerDim = 1
    padding: Padding = "VALID"
    output_padding: PerDim = 0
    dilation: PerDim = 1
    groups: int = 1
    _: dataclasses.KW_ONLY
    bias: bool = True
    init_weight: Initializer = he_normal_transposed
    init_bias: Initializer = zeros
    preferred_element_type: DTypeLike | None = None
    precision: Any = None

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(*kernel_size, features/groups, I)``."""
        kernel = self._kernel(shape)
        self._check_groups(shape[-1], self.features, self.groups)
        return (*kernel, self.features // self.groups, shape[-1])

    def outputs(self, weight: tuple[int, ...]) -> int:
        """Return ``features``."""
        return self.features

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count a multiplication and an addition for each kernel element at each input, and the bias at each output."""
        return math.prod(shape) * 2 * math.prod(self.weight_shape(shape)[:-1]) + math.prod(out) * self.bias


@applies(hidden.hidden_layer)
class HiddenLayer(_Convolution):
    """`jaxcnn.hidden_layer` of the lecture: convolution, ReLU and max pooling with one rule.

    Its parameters are ``weight (*kernel_size, I/groups, features)`` and ``bias (features,)``.

    Args:
        features: number of output channels.
        kernel_size: an int, or one per spatial dim.
        init_weight: initializer of the weight.
        init_bias: initializer of the bias.
        window, pool_stride, stride, padding, pool_padding, dilation, groups, precision: options of the op.
        name: name in a net.

    Raises:
        ValueError: if features or groups is less than 1.
        TypeError: if features or groups is not an int.
    """

    required = ("weight", "bias")
    optional = ()
    bias = True

    features: int
    kernel_size: PerDim
    window: PerDim = 2
    pool_stride: PerDim | None = None
    stride: PerDim = 1
    padding: Padding = "VALID"
    _: dataclasses.KW_ONLY
    pool_padding: Padding = "VALID"
    dilation: PerDim = 1
    groups: int = 1
    init_weight: Initializer = he_normal
    init_bias: Initializer = zeros
    precision: Any = None

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(*kernel_size, I/groups, features)``."""
        kernel = self._kernel(shape)
        self._check_groups(shape[-1], self.features, self.groups)
        return (*kernel, shape[-1] // self.groups, self.features)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count the convolution, plus 1 per element for ReLU and (window size − 1) per pooling window."""
        inner = self.inner_shape(shape)
        return super().flops(shape, inner) + math.prod(inner) + _comparisons(self, self.window, out)

    def inner_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output shape of the convolution, before pooling."""
        conv = Conv(self.features, self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        return out_shape(conv, jax.eval_shape(lambda: conv.init(jax.random.key(0), shape)), shape)


@applies(linear.dense)
class Dense(_Affine):
    """`jaxcnn.dense`. Parameters: ``weight (I, features)``, ``bias (features,)``.

    Args:
        features: number of outputs.
        bias: whether the layer has a bias.
        init_weight: initializer of the weight.
        init_bias: initializer of the bias.
        name: name in a net.

    Raises:
        ValueError: if features is less than 1.
        TypeError: if features is not an int.
    """

    features: int
    _: dataclasses.KW_ONLY
    bias: bool = True
    init_weight: Initializer = glorot_uniform
    init_bias: Initializer = zeros

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(I, features)``."""
        return (shape[-1], self.features)


# ---------------------------------------------------------------------------------------------------------------------
# Normalization


@dataclasses.dataclass(frozen=True)
class _Normalization(OpLayer):
    """Base class of the norms."""

    optional = ("scale", "bias")

    eps: float = dataclasses.field(default=1e-5, kw_only=True)
    scale: bool = dataclasses.field(default=True, kw_only=True)
    bias: bool = dataclasses.field(default=True, kw_only=True)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make ``scale`` of ones and ``bias`` of zeros, each unless its field is False."""
        shape = self._shape(shape)
        made = {"scale": jnp.ones, "bias": jnp.zeros}
        return {name: make(shape, dtype) for name, make in made.items() if getattr(self, name)}

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the parameters."""
        return shape[-1:]

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count per element Σ x, x − m, its square, their Σ, times r, times γ if used, plus β if used."""
        return math.prod(out) * (5 + self.scale + self.bias)


@applies(normalization.batch_norm)
class BatchNorm(_Normalization):
    """`jaxcnn.batch_norm`, with the statistics of the batch during training.

    In evaluation it uses the statistics that `jaxcnn.calibrate` adds to the parameters ("mean", "var"). Before
    `jaxcnn.calibrate` it uses those of the batch, and the output of an example then depends on the rest of the batch.

    Args:
        eps: option of the op.
        scale: whether the layer has a parameter ``scale (C,)``.
        bias: whether the layer has a parameter ``bias (C,)``.
        axis_name: one or several axes of `jax.shard_map`, `jax.pmap` or `jax.vmap`. The statistics of the batch are
            then computed over all devices along these axes.
        name: name in a net.
    """

    axis_name: str | tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``batch_norm(x, scale, bias)``, in evaluation with the statistics in ``params``."""
        statistics = [] if key is not None else evaluation_statistics(params, x)
        # Statistics are not trained: they get no gradient.
        statistics = [jax.lax.stop_gradient(a) for a in statistics]
        return self.op(x, *self._arrays(params), *statistics, **self._options(), rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count per element, in evaluation, x − m, times r, times γ if used, plus β if used."""
        return math.prod(out) * (2 + self.scale + self.bias)


@applies(normalization.layer_norm)
class LayerNorm(_Normalization):
    """`jaxcnn.layer_norm`.

    Args:
        axes: the dims to normalize over, as dims of a batch ``(N, …)``.
        eps: option of the op.
        scale: whether the layer has a parameter ``scale``, of x's shape along ``axes``.
        bias: whether the layer has a parameter ``bias``, of the same shape.
        name: name in a net.
    """

    axes: int | tuple[int, ...] = -1

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        dims = normalization.dims_of("LayerNorm", self.axes, len(shape) + 1)
        if 0 in dims:
            raise bad_value("LayerNorm", "axes", "dims of one example", f"{self.axes!r}, which includes the batch")
        return tuple(shape[dim - 1] for dim in dims)


@applies(normalization.group_norm)
class GroupNorm(_Normalization):
    """`jaxcnn.group_norm`.

    Args:
        groups: number of groups of channels.
        eps: option of the op.
        scale: whether the layer has a parameter ``scale (C,)``.
        bias: whether the layer has a parameter ``bias (C,)``.
        name: name in a net.
    """

    groups: int = 32


# ---------------------------------------------------------------------------------------------------------------------
# Activations; their fields are the options of the op


class Activation(OpLayer):
    """Base class of the activations."""

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count 1 per element."""
        return math.prod(out)


@applies(activation.relu)
class Relu(Activation):
    """`jaxcnn.relu`."""


@applies(activation.leaky_relu)
class LeakyRelu(Activation):
    """`jaxcnn.leaky_relu`."""

    negative_slope: float = 0.01


@applies(activation.elu)
class Elu(Activation):
    """`jaxcnn.elu`."""

    alpha: float = 1.0


@applies(activation.gelu)
class Gelu(Activation):
    """`jaxcnn.gelu`."""

    approximate: bool = False


@applies(activation.silu)
class Silu(Activation):
    """`jaxcnn.silu`."""


@applies(activation.softplus)
class Softplus(Activation):
    """`jaxcnn.softplus`."""


@applies(activation.sigmoid)
class Sigmoid(Activation):
    """`jaxcnn.sigmoid`."""


@applies(activation.tanh)
class Tanh(Activation):
    """`jaxcnn.tanh`."""


@applies(activation.selu)
class Selu(Activation):
    """`jaxcnn.selu`."""


@applies(activation.celu)
class Celu(Activation):
    """`jaxcnn.celu`."""

    alpha: float = 1.0


@applies(activation.relu6)
class Relu6(Activation):
    """`jaxcnn.relu6`."""


@applies(activation.hard_tanh)
class HardTanh(Activation):
    """`jaxcnn.hard_tanh`."""


@applies(activation.hard_sigmoid)
class HardSigmoid(Activation):
    """`jaxcnn.hard_sigmoid`."""


@applies(activation.hard_swish)
class HardSwish(Activation):
    """`jaxcnn.hard_swish`."""


@applies(activation.mish)
class Mish(Activation):
    """`jaxcnn.mish`."""


@applies(activation.softsign)
class Softsign(Activation):
    """`jaxcnn.softsign`."""


@applies(activation.squareplus)
class Squareplus(Activation):
    """`jaxcnn.squareplus`."""

    b: float = 4.0


@applies(activation.log_sigmoid)
class LogSigmoid(Activation):
    """`jaxcnn.log_sigmoid`."""


# ---------------------------------------------------------------------------------------------------------------------
# Pooling; the fields are the options of the op


def _comparisons(layer: Layer, window: PerDim, out: tuple[int, ...]) -> int:
    """Return the number of operations of a pooling: (window size − 1) per window."""
    return math.prod(out) * (math.prod(positive(type(layer).__name__, "window", window, len(out) - 1)) - 1)


class _Pool(OpLayer):
    """Base class of the poolings by windows."""

    window: PerDim

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (window size − 1) comparisons or additions per window."""
        return _comparisons(self, self.window, out)


@applies(pooling.max_pool)
class MaxPool(_Pool):
    """`jaxcnn.max_pool`."""

    window: PerDim
    stride: PerDim | None = None
    padding: Padding = "VALID"
    _: dataclasses.KW_ONLY
    dilation: PerDim = 1
    ceil_mode: bool = False


@applies(pooling.avg_pool)
class AvgPool(_Pool):
    """`jaxcnn.avg_pool`."""

    window: PerDim
    stride: PerDim | None = None
    padding: Padding = "VALID"
    count_include_pad: bool = True
    _: dataclasses.KW_ONLY
    dilation: PerDim = 1
    ceil_mode: bool = False
    divisor: float | None = None

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (window size − 1) additions and a division per window."""
        return super().flops(shape, out) + math.prod(out)


@applies(pooling.lp_pool)
class LpPool(_Pool):
    """`jaxcnn.lp_pool`."""

    window: PerDim
    p: float = 2
    stride: PerDim | None = None
    padding: Padding = "VALID"
    _: dataclasses.KW_ONLY
    dilation: PerDim = 1
    ceil_mode: bool = False

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count per window a power for each element, (window size − 1) additions and a root."""
        return 2 * (super().flops(shape, out) + math.prod(out))


@applies(pooling.global_max_pool)
class GlobalMaxPool(OpLayer):
    """`jaxcnn.global_max_pool`."""

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (channel size − 1) comparisons per channel."""
        return math.prod(shape) - math.prod(out)


@applies(pooling.global_avg_pool)
class GlobalAvgPool(OpLayer):
    """`jaxcnn.global_avg_pool`."""

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (channel size − 1) additions and a division per channel."""
        return math.prod(shape)


class _AdaptivePool(OpLayer):
    """Base class of the poolings by an output size."""

    output_size: PerDim

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return the op of ``x`` and ``output_size``."""
        return self.op(x, self.output_size, rule=rule)

    def _elements(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Return the total number of elements of all windows."""
        return adaptive.Bins(shape[:-1], out[:-1]).entries * out[-1]


@applies(adaptive.adaptive_max_pool)
class AdaptiveMaxPool(_AdaptivePool):
    """`jaxcnn.adaptive_max_pool`."""

    output_size: PerDim

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (window size − 1) comparisons per window."""
        return self._elements(shape, out) - math.prod(out)


@applies(adaptive.adaptive_avg_pool)
class AdaptiveAvgPool(_AdaptivePool):
    """`jaxcnn.adaptive_avg_pool`."""

    output_size: PerDim

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Count (window size − 1) additions and a division per window."""
        return self._elements(shape, out)


# ---------------------------------------------------------------------------------------------------------------------
# Other layers


@dataclasses.dataclass(frozen=True)
class Flatten(Layer):
    """Reshape ``(N, …)`` to ``(N, prod …)``."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return x, reshaped. The backward pass is the inverse reshape and takes no rule."""
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))


@applies(dropout.dropout)
class Dropout(OpLayer):
    """`jaxcnn.dropout` during training; the identity in evaluation, which counts as 0 FLOPs.

    Args:
        rate: probability that an element is dropped.
        name: name in a net.

    Raises:
        ValueError: if the rate is outside [0, 1].
        TypeError: if the rate is not a Python float.
    """

    rate: float

    def __post_init__(self) -> None:
        dropout.probability("Dropout", self.rate)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``dropout(x, rate, key)`` if there is a key, and x otherwise."""
        return x if key is None else self.op(x, self.rate, key, rule=rule)


@dataclasses.dataclass(frozen=True)
class Function(Layer):
    """A function ``f(x)`` of the batch as a layer without parameters. `serial` makes it from any callable.

    If the function has an argument ``rule``, as the ops of jaxcnn have, it receives the rule of the layer. Otherwise
    the layer takes no rule: JAX differentiates the function. Its FLOPs are unknown and count as 0.

    Args:
        function: maps an array ``(N, …)`` to an array with the same N, and treats examples independently.
        name: name in a net; None makes one from the name of the function and a count.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.Function(jnp.square).apply({}, jnp.array([[2.0, 3.0]]))
    Array([[4., 9.]], dtype=float32)
    """

    function: Callable[..., Array]

    @property
    def takes_rule(self) -> bool:
        """Whether the function has an argument ``rule``."""
        try:
            return "rule" in inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # a callable without a signature
            return False

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """Return ``function(x)``."""
        return self.function(x, rule=rule) if self.takes_rule else self.function(x)


#: Layers of the ops that need neither parameters nor options.
_PLAIN: list[type[OpLayer]] = [*Activation.__subclasses__(), GlobalMaxPool, GlobalAvgPool]


def as_layer(value: Any) -> Layer | None:
    """Return a layer unchanged, a callable as a layer, and None for anything else."""
    if isinstance(value, Layer):
        return value
    if not callable(value) or isinstance(value, type):
        return None
    return next((kind() for kind in _PLAIN if kind.op is value), None) or Function(value)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def out_shape(layer: Layer, params: Params, shape: Shape, dtype: DTypeLike = jnp.float32) -> tuple[int, ...]:
    """Return the shape of a layer's output for one example, without computing it."""
    return shape_of(layer, layer.apply, params, shape, dtype)


def shape_of(
    layer: Layer, apply: Callable[..., Array], params: Params, shape: Shape, dtype: DTypeLike = jnp.float32
) -> tuple[int, ...]:
    """Return the shape of ``apply(params, x)`` for one example, even if axes that the layer names are not bound yet."""
    for name in sorted(_axis_names(layer)):
        if not normalization.is_bound(name):
            apply = _with_axis(apply, name)
    out = jax.eval_shape(apply, params, _one_example(shape, dtype))
    if not hasattr(out, "shape"):
        raise bad_type(type(layer).__name__, "output", "an array", type(out).__name__)
    return tuple(out.shape[1:])


def _one_example(shape: Shape, dtype: DTypeLike) -> Any:
    """Return the types of a batch of one example, which has several arrays if ``shape`` is a tuple of shapes."""
    if shape and isinstance(shape[0], tuple):
        return tuple(jax.ShapeDtypeStruct((1, *each), dtype) for each in shape)
    return jax.ShapeDtypeStruct((1, *shape), dtype)


def _with_axis(apply: Callable[..., Array], name: str) -> Callable[..., Array]:
    """Return ``apply`` inside an axis of size 1 with this name."""

    def mapped(params: Params, x: Any) -> Array:
        in_axis = jax.tree.map(lambda a: a[None], x)
        return jax.vmap(lambda x: apply(params, x), axis_name=name)(in_axis)[0]

    return mapped


def _axis_names(value: Any) -> frozenset[str]:
    """Return the axis names of a layer and of the layers among its fields."""
    if isinstance(value, tuple):
        return frozenset().union(*map(_axis_names, value))
    if not isinstance(value, Layer):
        return frozenset()
    fields = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    names = value.axis_name if isinstance(value, BatchNorm) and value.axis_name is not None else ()
    return _axis_names(fields) | frozenset((names,) if isinstance(names, str) else names)
