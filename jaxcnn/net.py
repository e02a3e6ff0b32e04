"""Nets: layers in a row, their parameters beside them.

A layer is a frozen, hashable description; `init` makes its parameters, `apply` runs it.  Nothing is stored in a layer,
so that a net can be a static argument of jit, and its parameters are a plain dict for optax.

Rooms: nets import `jaxcnn.ops`.
"""

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxcnn.geometry import Padding, PerDim, fail, positive, static_int
from jaxcnn.ops import activation, convolution, dropout, hidden, linear, pooling
from jaxcnn.ops.rule import Rule, array, one_key

Params = dict[str, Any]
Initializer = Callable[..., Array]
#: One rule for all layers, or for each that a key matches: a layer type, a name, or a predicate (name, layer) → bool.
Rules = Rule | Mapping[Any, Rule]

he_normal = jax.nn.initializers.he_normal()
glorot_uniform = jax.nn.initializers.glorot_uniform()
zeros = jax.nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Layer:
    """What every layer is: a name (given by `serial` if None), parameters to make, and a function to apply."""

    name: str | None = dataclasses.field(default=None, kw_only=True)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Parameters for inputs of ``shape`` (without the batch); ``{}`` for a layer that has none."""
        return {}

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """The layer's output.  ``key`` is given while training only."""
        raise NotImplementedError

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Additions and multiplications of the forward half for one example."""
        return 0

    def inner_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """For one example, the shape on the way where a layer has one that its output hides."""
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Layers with parameters


@dataclasses.dataclass(frozen=True)
class Conv(Layer):
    """`jaxcnn.conv` with ``features`` patches of ``patch`` entries (an int, or one for each spatial dim)."""

    features: int
    patch: PerDim
    stride: PerDim = 1
    padding: Padding = "VALID"
    dilation: PerDim = 1
    groups: int = 1
    bias: bool = dataclasses.field(default=True, kw_only=True)
    init_w: Initializer = dataclasses.field(default=he_normal, kw_only=True)
    init_b: Initializer = dataclasses.field(default=zeros, kw_only=True)

    def __post_init__(self) -> None:
        _freeze(self)
        _check_features(self, self.features)
        if static_int("Conv", "groups", self.groups, self.groups) < 1:
            fail("Conv", f"groups expected an int >= 1, got {self.groups}")

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """``w (*patch, I/groups, features)``, and ``b (features,)``."""
        key_w, key_b = jax.random.split(key)
        size = positive("Conv", "patch", self.patch, len(shape) - 1)
        if shape[-1] % self.groups or self.features % self.groups:
            fail("Conv", f"groups={self.groups} must divide {shape[-1]} input and {self.features} output channels")
        params = {"w": self.init_w(key_w, (*size, shape[-1] // self.groups, self.features), dtype)}
        return {**params, "b": self.init_b(key_b, (self.features,), dtype)} if self.bias else params

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``conv(x, w, b)``."""
        return convolution.conv(
            x,
            params["w"],
            params.get("b"),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """A multiplication and an addition for each entry of the patch at each output."""
        entries = math.prod(positive("Conv", "patch", self.patch, len(shape) - 1)) * shape[-1] // self.groups
        return math.prod(out) * (2 * entries - 1 + self.bias)


@dataclasses.dataclass(frozen=True)
class HiddenLayer(Layer):
    """`jaxcnn.hidden_layer`, the lecture's: convolution, ReLU and max pooling with one rule."""

    features: int
    patch: PerDim
    window: PerDim = 2
    pool_stride: PerDim | None = None
    stride: PerDim = 1
    padding: Padding = "VALID"
    init_w: Initializer = dataclasses.field(default=he_normal, kw_only=True)
    init_b: Initializer = dataclasses.field(default=zeros, kw_only=True)

    def __post_init__(self) -> None:
        _freeze(self)
        _check_features(self, self.features)

    def _conv(self) -> Conv:
        return Conv(self.features, self.patch, self.stride, self.padding, init_w=self.init_w, init_b=self.init_b)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """``w (*patch, I, features)`` and ``b (features,)``."""
        return self._conv().init(key, shape, dtype)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``hidden_layer(x, w, b)``."""
        return hidden.hidden_layer(
            x,
            params["w"],
            params["b"],
            window=self.window,
            pool_stride=self.pool_stride,
            stride=self.stride,
            padding=self.padding,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Those of its convolution; the ReLU counts 1 for each entry, a window its entries less 1."""
        inner = self.inner_shape(shape)
        pooled = math.prod(out) * (math.prod(positive("HiddenLayer", "window", self.window, len(shape) - 1)) - 1)
        return self._conv().flops(shape, inner) + math.prod(inner) + pooled

    def inner_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of the convolution, before pooling."""
        conv = self._conv()
        return _out_shape(conv, conv.init, shape)


@dataclasses.dataclass(frozen=True)
class Dense(Layer):
    """`jaxcnn.dense` with ``features`` outputs."""

    features: int
    bias: bool = dataclasses.field(default=True, kw_only=True)
    init_w: Initializer = dataclasses.field(default=glorot_uniform, kw_only=True)
    init_b: Initializer = dataclasses.field(default=zeros, kw_only=True)

    def __post_init__(self) -> None:
        _check_features(self, self.features)

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """``w (I, features)``, and ``b (features,)``."""
        key_w, key_b = jax.random.split(key)
        params = {"w": self.init_w(key_w, (shape[-1], self.features), dtype)}
        return {**params, "b": self.init_b(key_b, (self.features,), dtype)} if self.bias else params

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``dense(x, w, b)``."""
        return linear.dense(x, params["w"], params.get("b"), rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """A multiplication and an addition for each input at each output."""
        return math.prod(out) * (2 * shape[-1] - 1 + self.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Layers without


class _Activation(Layer):
    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """1 for each entry."""
        return math.prod(out)


@dataclasses.dataclass(frozen=True)
class Relu(_Activation):
    """`jaxcnn.relu`."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``relu(x)``."""
        return activation.relu(x, rule=rule)


@dataclasses.dataclass(frozen=True)
class LeakyRelu(_Activation):
    """`jaxcnn.leaky_relu`."""

    negative_slope: float = 0.01

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``leaky_relu(x)``."""
        return activation.leaky_relu(x, negative_slope=self.negative_slope, rule=rule)


@dataclasses.dataclass(frozen=True)
class Elu(_Activation):
    """`jaxcnn.elu`."""

    alpha: float = 1.0

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``elu(x)``."""
        return activation.elu(x, alpha=self.alpha, rule=rule)


@dataclasses.dataclass(frozen=True)
class Gelu(_Activation):
    """`jaxcnn.gelu`."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``gelu(x)``."""
        return activation.gelu(x, rule=rule)


@dataclasses.dataclass(frozen=True)
class Silu(_Activation):
    """`jaxcnn.silu`."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``silu(x)``."""
        return activation.silu(x, rule=rule)


@dataclasses.dataclass(frozen=True)
class Softplus(_Activation):
    """`jaxcnn.softplus`."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``softplus(x)``."""
        return activation.softplus(x, rule=rule)


@dataclasses.dataclass(frozen=True)
class Sigmoid(_Activation):
    """`jaxcnn.sigmoid`."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``sigmoid(x)``."""
        return activation.sigmoid(x, rule=rule)


@dataclasses.dataclass(frozen=True)
class Tanh(_Activation):
    """`jaxcnn.tanh`."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``tanh(x)``."""
        return activation.tanh(x, rule=rule)


@dataclasses.dataclass(frozen=True)
class MaxPool(Layer):
    """`jaxcnn.max_pool`."""

    window: PerDim
    stride: PerDim | None = None
    padding: Padding = "VALID"

    def __post_init__(self) -> None:
        _freeze(self)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``max_pool(x, window)``."""
        return pooling.max_pool(x, self.window, stride=self.stride, padding=self.padding, rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """A comparison for each entry of a window but one."""
        return math.prod(out) * (math.prod(positive("MaxPool", "window", self.window, len(shape) - 1)) - 1)


@dataclasses.dataclass(frozen=True)
class AvgPool(Layer):
    """`jaxcnn.avg_pool`."""

    window: PerDim
    stride: PerDim | None = None
    padding: Padding = "VALID"
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        _freeze(self)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``avg_pool(x, window)``."""
        return pooling.avg_pool(
            x,
            self.window,
            stride=self.stride,
            padding=self.padding,
            count_include_pad=self.count_include_pad,
            rule=rule,
        )

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """An addition for each entry of a window but one, and a division."""
        return math.prod(out) * math.prod(positive("AvgPool", "window", self.window, len(shape) - 1))


@dataclasses.dataclass(frozen=True)
class Flatten(Layer):
    """``(N, …)`` → ``(N, prod …)``."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """A reshape, whose backward half is the reshape back: it takes no rule."""
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))


@dataclasses.dataclass(frozen=True)
class Dropout(Layer):
    """`jaxcnn.dropout` while training, nothing at evaluation."""

    rate: float

    def __post_init__(self) -> None:
        dropout.probability("Dropout", self.rate)

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        """``dropout(x, rate, key)`` if there is a key."""
        return x if key is None else dropout.dropout(x, self.rate, key, rule=rule)

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """None: at evaluation it is not there."""
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# Nets


@dataclasses.dataclass(frozen=True)
class Serial(Layer):
    """Layers one after the other; itself a layer.  Made by `serial`."""

    layers: tuple[tuple[str, Layer], ...] = ()

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Parameters by layer name, for inputs of ``shape`` (without the batch); layers that have none are left out.

        Raises: ValueError if a layer does not fit what comes before it.
        """
        key, shape = one_key("serial", key), _example_shape(shape)
        params: Params = {}
        for i, (name, layer) in enumerate(self.layers):
            with _located(name, "/" if isinstance(layer, Serial) else ": "):
                made = layer.init(jax.random.fold_in(key, i), shape, dtype)
            if made:
                params[name] = made
            with _located(name):
                shape = _out_shape(layer, lambda *_, made=made: made, shape, dtype)
        return params

    def apply(
        self,
        params: Params,
        x: ArrayLike,
        *,
        key: Array | None = None,
        rules: Rules | None = None,
        rule: Rule | None = None,
        path: str = "",
    ) -> Array:
        """The net's output for a batch ``x``.

        Args:
            params: as `init` made them.
            x: ``(N, …)``.
            key: from `jax.random.key`; its presence means training (dropout is on).
            rules: other backward halves: one for all layers, or a mapping whose keys are layer types, names
                ("conv1", "residual1/conv2", "residual1" for all in it) or predicates ``(name, layer) → bool``; the
                first that matches wins.
            rule: for a net inside a net: the same as ``rules``.
            path: the names of the nets around this one.

        Raises: ValueError for parameters that are missing and for names in ``rules`` that match no layer; TypeError for
            what is no dict of parameters, no array, no key or no rules.
        """
        rules = rule if rules is None else rules
        if isinstance(rules, Mapping) and not path:
            _check_rules(rules, [name for name, _ in self.walk()])
        if not isinstance(params, Mapping):
            raise TypeError(f"serial: params expected a dict as init makes it, got {type(params).__name__}")
        x = array("serial", "x", x)
        if key is not None:
            one_key("serial", key)
        for i, (name, layer) in enumerate(self.layers):
            here = f"{path}{name}"
            own = params.get(name, {})
            part = None if key is None else jax.random.fold_in(key, i)
            if isinstance(layer, Serial):
                x = layer.apply(own, x, key=part, rules=rules, path=f"{here}/")
            else:
                try:
                    x = layer.apply(own, x, key=part, rule=_rule_for(rules, here, layer))
                except KeyError as error:
                    expected = f"expected params[{name!r}][{error.args[0]!r}]"
                    raise ValueError(f"{here}: {expected}, got params with {sorted(params)}") from None
        return x

    def walk(self, path: str = "") -> Iterator[tuple[str, Layer]]:
        """Every layer with its full name, nets inside included."""
        for name, layer in self.layers:
            yield f"{path}{name}", layer
            if isinstance(layer, Serial):
                yield from layer.walk(f"{path}{name}/")

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Those of its layers."""
        return self.summary(shape).flops

    def summary(self, shape: tuple[int, ...]) -> "Summary":
        """What the net is, layer by layer, for inputs of ``shape`` (without the batch)."""
        shape = _example_shape(shape)
        return Summary(shape, tuple(self._rows(shape, "")))

    def _rows(self, shape: tuple[int, ...], path: str) -> Iterator["Row"]:
        for name, layer in self.layers:
            with _located(name, "/" if isinstance(layer, Serial) else ": "):
                params = jax.eval_shape(lambda layer=layer, shape=shape: layer.init(jax.random.key(0), shape))
            with _located(name):
                out = _out_shape(layer, lambda *_, params=params: params, shape)
            if isinstance(layer, Serial):
                yield from layer._rows(shape, f"{path}{name}/")
            else:
                count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
                yield Row(
                    f"{path}{name}", type(layer).__name__, out, count, layer.flops(shape, out), layer.inner_shape(shape)
                )
            shape = out


@dataclasses.dataclass(frozen=True)
class Residual(Serial):
    """``x + layers(x)``; made by `residual`."""

    def apply(
        self,
        params: Params,
        x: ArrayLike,
        *,
        key: Array | None = None,
        rules: Rules | None = None,
        rule: Rule | None = None,
        path: str = "",
    ) -> Array:
        """``x + layers(x)``; the arguments of `Serial.apply`."""
        x = jnp.asarray(x)
        y = Serial.apply(self, params, x, key=key, rules=rules, rule=rule, path=path)
        if y.shape != x.shape:
            raise ValueError(f"residual: layers expected to keep the shape {x.shape}, got {y.shape}")
        return x + y

    def _rows(self, shape: tuple[int, ...], path: str) -> Iterator["Row"]:
        """Its layers, and the sum."""
        yield from super()._rows(shape, path)
        yield Row(path.rstrip("/") or "residual", "Residual", shape, 0, math.prod(shape))


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of a net; the shape is one example's, FLOPs are the forward half's for one example."""

    name: str
    op: str
    output_shape: tuple[int, ...]
    parameters: int
    flops: int
    #: On the way to the output, in a hidden layer: before pooling.
    inner_shape: tuple[int, ...] | None = None

    @property
    def shapes(self) -> str:
        """``24×24×32 → 12×12×32``."""
        return " → ".join(_by(shape) for shape in (self.inner_shape, self.output_shape) if shape is not None)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A net, layer by layer.  ``str()`` is a table."""

    input_shape: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Of all layers."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        """Of the forward half of all layers, for one example."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        table = [("layer", "op", "output", "parameters", "FLOPs"), ("input", "", _by(self.input_shape), "", "")]
        table += [(r.name, r.op, r.shapes, f"{r.parameters:,}", f"{r.flops:,}") for r in self.rows]
        table += [("total", "", "", f"{self.parameters:,}", f"{self.flops:,}")]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines = (
            "  ".join(c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        )
        return "\n".join(line.rstrip() for line in lines)


def serial(*layers: Layer, name: str | None = None) -> Serial:
    """A net of layers in a row.  Layers without a name are called by their type and a count: conv1, relu1, conv2 ….

    Raises: TypeError for what is no layer, ValueError for a name that is used twice or holds a "/".

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Conv(32, 5), jaxcnn.Relu(), jaxcnn.MaxPool(2), jaxcnn.Flatten(), jaxcnn.Dense(10))
    >>> params = net.init(jax.random.key(0), (28, 28, 1))
    >>> net.apply(params, jnp.ones((2, 28, 28, 1))).shape
    (2, 10)
    >>> print(net.summary((28, 28, 1)))
    layer       op       output      parameters    FLOPs
    input                28×28×1
    conv1       Conv     24×24×32           832  921,600
    relu1       Relu     24×24×32             0   18,432
    max_pool1   MaxPool  12×12×32             0   13,824
    flatten1    Flatten  4608                 0        0
    dense1      Dense    10              46,090   92,160
    total                                46,922  1,046,016
    """
    return Serial(_named("serial", layers), name=name)


def residual(*layers: Layer, name: str | None = None) -> Residual:
    """``x + serial(*layers)(x)``, a layer; the layers keep the shape (He et al. 2015).

    Raises: as `serial`; ValueError, when it is applied, if the layers change the shape.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.residual(jaxcnn.Conv(3, 3, padding="SAME"), jaxcnn.Relu()))
    >>> net.apply(net.init(jax.random.key(0), (8, 8, 3)), jnp.ones((2, 8, 8, 3))).shape
    (2, 8, 8, 3)
    """
    return Residual(_named("residual", layers), name=name)


def _named(op: str, layers: tuple[Layer, ...]) -> tuple[tuple[str, Layer], ...]:
    counts: dict[str, int] = {}
    named: dict[str, Layer] = {}
    for layer in layers:
        if not isinstance(layer, Layer):
            raise TypeError(f"{op}: expected layers such as Conv(32, 5), got {layer!r}")
        kind = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(layer).__name__).lstrip("_")
        counts[kind] = counts.get(kind, 0) + 1
        name = f"{kind}{counts[kind]}" if layer.name is None else layer.name
        if not isinstance(name, str):
            raise TypeError(f"{op}: name expected a str, got {name!r}")
        if name in named or "/" in name:
            raise ValueError(f"{op}: expected names that differ and hold no '/', got {name!r}")
        named[name] = layer
    return tuple(named.items())


def _rule_for(rules: Rules | None, name: str, layer: Layer) -> Rule | None:
    if not isinstance(rules, Mapping):
        return rules
    for key, rule in rules.items():
        if isinstance(key, type):
            matches = isinstance(layer, key)
        elif isinstance(key, str):
            matches = f"{name}/".startswith(f"{key}/")
        else:
            matches = key(name, layer)
        if matches:
            return rule
    return None


def _check_rules(rules: Mapping[Any, Rule], names: list[str]) -> None:
    for key in rules:
        if isinstance(key, str) and key not in names:
            near = difflib.get_close_matches(key, names, n=3, cutoff=0.0)
            raise ValueError(f"rules: expected names of layers, got {key!r}; the nearest are {', '.join(near)}")
        if not isinstance(key, str) and not (issubclass(key, Layer) if isinstance(key, type) else callable(key)):
            raise TypeError(f"rules: expected layer types, names or predicates as keys, got {key!r}")


@contextlib.contextmanager
def _located(name: str, between: str = ": ") -> Iterator[None]:
    """A layer's name in front of what it raises."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # JAX's own errors cannot be made from a message.
        kind, cause = (TypeError if isinstance(error, TypeError) else ValueError), error
        raise kind(f"{name}{between}{error}") from (None if type(error) is kind else cause)


def _out_shape(
    layer: Layer, init: Callable[..., Any], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> tuple[int, ...]:
    params = jax.eval_shape(lambda: init(jax.random.key(0), shape, dtype))
    out = jax.eval_shape(layer.apply, params, jax.ShapeDtypeStruct((1, *shape), dtype))
    return tuple(out.shape[1:])


def _example_shape(shape: Any) -> tuple[int, ...]:
    expected = f"serial: shape expected a tuple of ints >= 1 such as (28, 28, 1), got {shape!r}"
    if not isinstance(shape, list | tuple) or not all(isinstance(n, int | np.integer) for n in shape):
        raise TypeError(expected)
    if not shape or min(shape) < 1:
        raise ValueError(expected)
    return tuple(map(int, shape))


def _freeze(layer: Layer) -> None:
    """Lists and arrays among the options become tuples, so that the layer can be hashed."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list | tuple | np.ndarray) else value

    for field in dataclasses.fields(layer):
        object.__setattr__(layer, field.name, frozen(getattr(layer, field.name)))


def _check_features(layer: Layer, features: Any) -> None:
    if static_int(type(layer).__name__, "features", features, features) < 1:
        raise ValueError(f"{type(layer).__name__}: features expected an int >= 1, got {features}")


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
