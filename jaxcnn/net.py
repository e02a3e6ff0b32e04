"""Nets: sequences of layers. Parameters are stored outside the net, in a plain dict that optax accepts."""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxcnn import layers as layer_module
from jaxcnn.arguments import array, bad_type, bad_value, floating_dtype, one_key
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.layers import (
    BatchNorm,
    Flatten,
    Function,
    Layer,
    Net,
    OpLayer,
    Params,
    Shape,
    as_layer,
    out_shape,
    shape_of,
)
from jaxcnn.ops import linear
from jaxcnn.ops.kinds import names_of
from jaxcnn.ops.rule import autodiff
from jaxcnn.selection import Rules, Selection, rule_of_sum, select
from jaxcnn.summary import Row, Summary
from jaxcnn.taps import tap


class Loss(Protocol):
    """The loss of each example, such as `jaxcnn.softmax_cross_entropy_with_integer_labels`."""

    def __call__(self, outputs: Any, targets: Any, /) -> Array:
        """Return the losses.

        Args:
            outputs: outputs of the net, ``(N, …)``.
            targets: targets, ``(N, …)``.

        Returns:
            ``(N, …)``; the loss of an example is the mean over the dims after N.
        """


@dataclasses.dataclass(frozen=True)
class Serial(Net):
    """A sequence of layers, which is itself a layer. Made by `serial`.

    A subclass may override `apply`. It hands ``rules`` on, to ``super().apply`` or to `apply_layer`:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> class Halved(jaxcnn.Serial):
    ...     def apply(self, params, x, *, key=None, rules=None):
    ...         return super().apply(params, x, key=key, rules=rules) / 2
    >>> net = jaxcnn.serial(Halved(jaxcnn.serial(jaxcnn.Dense(3)).layers), jaxcnn.Dense(2))
    >>> net.apply(net.init(jax.random.key(0), (5,)), jnp.ones((4, 5))).shape
    (4, 2)
    """

    layers: tuple[tuple[str, Layer], ...] = ()

    def init(self, key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Params:
        """Make the parameters for inputs of ``shape``.

        Args:
            key: from `jax.random.key`.
            shape: shape of one example, without the batch; a tuple of shapes for a net with several inputs.
            dtype: dtype of the parameters.

        Returns:
            The parameters by layer name; layers without parameters are omitted.

        Raises:
            TypeError: if key is not a key or shape is not a tuple of ints.
            ValueError: if a layer does not fit the output of the previous one.
        """
        key, shape = one_key("serial", key), example_shape(shape)
        params: Params = {}
        for i, (name, layer) in enumerate(self.layers):
            made = self._init_layer(i, key, shape, dtype)
            if made:
                params[name] = made
            with located(name):
                shape = out_shape(layer, made, shape, dtype)
        return params

    def apply(  # type: ignore[override]  # a net has rules, a layer one rule
        self,
        params: Params,
        x: ArrayLike | tuple[ArrayLike, ...],
        *,
        key: Array | None = None,
        rules: Rules | Selection | None = None,
        dtype: DTypeLike | None = None,
    ) -> Array:
        """Return the net's output for a batch ``x``.

        With ``dtype``, the layers compute in it: parameters and floating-point inputs are cast, except for the
        statistics of a `BatchNorm`. The output is cast back, to float32 if ``dtype`` has 16 bits. The gradient of the
        parameters has their dtype.

        Args:
            params: parameters as made by `init`.
            x: ``(N, …)``; a tuple of arrays for a net with several inputs.
            key: from `jax.random.key`; if given, the net is in training mode (dropout is active).
            rules: replacement backward rules: one rule for all layers, or a mapping. Its keys are layer types, names
                ("conv1", "residual1/conv2", or "residual1" for all layers in it) or predicates
                ``(name, layer) → bool``; the first that matches wins. The key `Residual` is for the sums at the end of
                residual nets and of branches. An inner net receives a `Selection` of the rules of the outermost net.
            dtype: dtype of the layers, such as ``jnp.bfloat16``; None for that of ``params`` and ``x``.

        Returns:
            The output of the last layer.

        Raises:
            ValueError: if parameters are missing, if a key in ``rules`` matches no layer, or if it matches only layers
                that take no rule, such as `Flatten`.
            TypeError: if params is not a dict, x is not an array, key is not a key, rules has the wrong type, or dtype
                is not a floating dtype.
        """
        if dtype is not None:
            return in_dtype(self, floating_dtype("serial", "dtype", dtype)).apply(params, x, key=key, rules=rules)
        selection = select(rules, self)
        if not isinstance(params, Mapping):
            raise bad_type("serial", "params", "a dict as init makes it", type(params).__name__)
        if key is not None:
            one_key("serial", key)
        y = self._apply(params, _inputs(x), key, selection)
        if selection is not rules:
            selection.check_all_requested(self)
        return y

    def apply_layer(
        self,
        name: str,
        params: Params,
        x: ArrayLike | tuple[ArrayLike, ...],
        *,
        key: Array | None = None,
        rules: Rules | Selection | None = None,
    ) -> Array:
        """Apply one layer with its parameters, its rule and its tap; for nets with their own `apply`.

        Args:
            name: name of the layer.
            params: parameters of the net.
            x: input of the layer.
            key: key of the net; the layer receives it folded with the index of the layer.
            rules: ``rules`` of the net.

        Returns:
            The output of the layer.

        Raises:
            ValueError: if the net has no layer of this name, or parameters are missing.
            TypeError: if the parameters of the layer are not a dict, or x is not an array.
        """
        names = [each for each, _ in self.layers]
        if name not in names:
            raise bad_value("apply_layer", "name", f"one of {', '.join(names)}", repr(name))
        return self._apply_layer(names.index(name), params, _inputs(x), key, select(rules, self))

    def _init_layer(self, i: int, key: Array, shape: Shape, dtype: DTypeLike) -> Params:
        """Make the parameters of layer i."""
        name, layer = self.layers[i]
        with located(name, "/" if isinstance(layer, Net) else ": "):
            return layer.init(jax.random.fold_in(key, i), shape, dtype)  # type: ignore[arg-type]

    def _apply(self, params: Params, x: Any, key: Array | None, selection: Selection) -> Array:
        """Apply the layers in sequence."""
        for i in range(len(self.layers)):
            x = self._apply_layer(i, params, x, key, selection)
        return x

    def _apply_layer(self, i: int, params: Params, x: Any, key: Array | None, selection: Selection) -> Array:
        """Apply layer i."""
        name, layer = self.layers[i]
        path = f"{selection.path}{name}"
        layer_params: Params = params.get(name, {})
        if not isinstance(layer_params, Mapping):
            raise bad_type(path, "params", "a dict as init makes it", type(layer_params).__name__)
        if isinstance(x, tuple) and isinstance(layer, OpLayer | Flatten) and not is_custom(layer):
            raise bad_type(path, "x", "one array", f"a tuple of {len(x)}")
        layer_key = None if key is None else jax.random.fold_in(key, i)
        with jax.named_scope(name):
            if isinstance(layer, Serial):
                return tap(path, layer.apply(layer_params, x, key=layer_key, rules=selection.inside(name)))
            try:
                y = layer.apply(layer_params, x, key=layer_key, rule=selection.rule_for(name, layer))
            except KeyError as error:
                expected, got = f"a dict with the key {error.args[0]!r}", f"one with the keys {list(layer_params)}"
                raise bad_value(path, "params", expected, got) from None
            return tap(path, y)

    def flops(self, shape: Shape, out: tuple[int, ...]) -> int:
        """Return the total FLOPs of all layers.

        Args:
            shape: shape of one input, without the batch.
            out: shape of one output, without the batch.

        Returns:
            The number of FLOPs.
        """
        return self.summary(shape).flops

    def summary(self, shape: Shape) -> Summary:
        """Summarize the net layer by layer.

        For a subclass with its own `apply`, the rows are the calls of its layers, in order. Parameters that it makes
        and that belong to none of its layers are one more row, whose FLOPs are unknown and count as 0.

        Args:
            shape: shape of one input, without the batch; a tuple of shapes for a net with several inputs.

        Returns:
            A `Summary`; ``str()`` of it is a table.
        """
        shape = example_shape(shape)
        return Summary(shape, tuple(self._rows(shape, "")))

    def _rows(self, shape: Shape, path: str) -> list[Row]:
        own_apply = not _in_library(type(self).apply)
        rows = _recorded_rows(self, shape, path) if own_apply else self._rows_of_layers(shape, path)
        if own_apply or not _in_library(type(self).init):
            rows += _remaining_row(self, shape, path, rows)
        return rows

    def _rows_of_layers(self, shape: Shape, path: str) -> list[Row]:
        rows: list[Row] = []
        out: Any = shape
        for name, layer in self.layers:
            of_layer, out = rows_of(name, layer, out, path)
            rows += of_layer
        return [*rows, *self._end_rows(shape, out, path)]

    def _end_rows(self, shape: Shape, out: tuple[int, ...], path: str) -> list[Row]:
        """Return the row of the operation that follows the layers, or ``[]`` if there is none."""
        return []


@dataclasses.dataclass(frozen=True)
class Residual(Serial):
    """``x + layers(x)``, made by `residual`.

    The sum passes δ unchanged to both terms, unless ``rules`` is a mapping with the key `Residual`.
    """

    def _apply(self, params: Params, x: Any, key: Array | None, selection: Selection) -> Array:
        y = super()._apply(params, x, key, selection)
        if y.shape != x.shape:
            raise bad_value("residual", "the output of the layers", f"of shape {x.shape}", y.shape)
        rule = rule_of_sum(selection.rules, self)
        return x + y if rule is None or rule is autodiff else linear.add(x, y, rule=rule)

    @property
    def sum_keys(self) -> tuple[type, ...]:
        """`Residual`, and the subclasses that the net belongs to."""
        return tuple(kind for kind in type(self).__mro__ if issubclass(kind, Residual))

    def _end_rows(self, shape: Shape, out: tuple[int, ...], path: str) -> list[Row]:
        return [Row(path.rstrip("/") or "residual", "Residual", out, 0, math.prod(out))]


@dataclasses.dataclass(frozen=True)
class InDtype(Serial):
    """A net whose layers compute in another dtype than that of its parameters. Made by `in_dtype`.

    All casts of mixed precision are in `_apply`.
    """

    net: Serial = dataclasses.field(kw_only=True)
    dtype: np.dtype = dataclasses.field(kw_only=True)

    def init(self, key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Params:
        """Make the parameters of the net; the arguments are those of `Serial.init`."""
        return self.net.init(key, shape, dtype)

    def _apply(self, params: Params, x: Any, key: Array | None, selection: Selection) -> Array:
        """Cast parameters and inputs to the dtype, apply the net, and cast its output to the dtype of sums."""
        params = self._cast_params(params, frozenset(batch_norms(self.net)[0]), "")
        y = self.net.apply(params, _cast(x, self.dtype), key=key, rules=selection)
        return _cast(y, accumulator(self.dtype))

    def _cast_params(self, params: Any, norms: frozenset[str], path: str) -> Any:
        """Cast parameters, except for the statistics of the batch norms with these full names."""
        if not isinstance(params, Mapping):
            return _cast(params, self.dtype)
        return {
            name: value
            if path in norms and name in ("mean", "var")
            else self._cast_params(value, norms, f"{path}/{name}" if path else name)
            for name, value in params.items()
        }

    @property
    def sum_keys(self) -> tuple[type, ...]:
        """Return the keys for the sum at the end of the net."""
        return self.net.sum_keys

    def _rows(self, shape: Shape, path: str) -> list[Row]:
        return self.net._rows(shape, path)


def in_dtype(net: Serial, dtype: np.dtype) -> InDtype:
    """Return a net that computes in ``dtype``, and that has the layers and the parameters of ``net``."""
    return InDtype(net.layers, name=net.name, net=net, dtype=dtype)


def _cast(tree: Any, dtype: np.dtype) -> Any:
    """Cast the floating-point arrays of a tree."""

    def cast(a: Any) -> Any:
        return jnp.asarray(a, dtype) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a

    return jax.tree.map(cast, tree)


def batch_norms(net: Net) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the full names of the batch norms of a net, and of the layers that may contain others.

    A layer with its own `apply` may contain others. Those among its fields are found, if their parameters have the name
    of the field.
    """
    norms: list[str] = []
    opaque: list[str] = []

    def visit(path: str, layer: Layer) -> None:
        if isinstance(layer, BatchNorm):
            norms.append(path)
            return
        inside = list(layer.layers) if isinstance(layer, Net) else []
        if is_custom(layer):
            opaque.append(path or type(layer).__name__)
            fields = ((field.name, getattr(layer, field.name)) for field in dataclasses.fields(layer))
            inside += [(name, value) for name, value in fields if isinstance(value, Layer)]
        for name, value in inside:
            visit(f"{path}/{name}" if path else name, value)

    visit("", net)
    return tuple(norms), tuple(opaque)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of the summary


def rows_of(name: str, layer: Layer, shape: Shape, path: str) -> tuple[list[Row], tuple[int, ...]]:
    """Return the rows of one layer of a net, and the shape of its output."""
    with located(name, "/" if isinstance(layer, Net) else ": "):
        params = jax.eval_shape(lambda: layer.init(jax.random.key(0), shape))  # type: ignore[arg-type]
    with located(name):
        out = out_shape(layer, params, shape)
    if isinstance(layer, Serial):
        return layer._rows(shape, f"{path}{name}/"), out
    return [_row(f"{path}{name}", layer, shape, out, _count(params))], out


def _row(name: str, layer: Layer, shape: Shape, out: tuple[int, ...], parameters: int) -> Row:
    flops, inner = layer.flops(shape, out), layer.inner_shape(shape)  # type: ignore[arg-type]
    return Row(name, type(layer).__name__, out, parameters, flops, inner)


def _recorded_rows(net: Serial, shape: Shape, path: str) -> list[Row]:
    """Return the rows of a net with its own `apply`: its layers in the order in which it calls them.

    These are the layers that `Serial` holds and those among its other fields. They are replaced by copies that record
    their calls. FLOPs count at every call, and parameters once.
    """
    rows: list[Row] = []
    counted: list[Any] = []

    def recording(name: str, layer: Layer) -> Layer:
        inner = (
            _with_layers(layer, lambda at, value: recording(f"{name}/{at}", value))
            if isinstance(layer, Serial)
            else layer
        )

        def apply(params: Params, x: Any, **options: Any) -> Array:
            y = inner.apply(params, x, **options)
            given, out = jax.tree.map(lambda a: tuple(a.shape[1:]), x), tuple(y.shape[1:])
            if isinstance(layer, Serial):
                rows.extend(layer._end_rows(given, out, f"{name}/") if _in_library(type(layer).apply) else [])
                return y
            new = [leaf for leaf in jax.tree.leaves(params) if not any(leaf is other for other in counted)]
            counted.extend(new)
            rows.append(_row(name, layer, given, out, _count(new)))
            return y

        copied = copy.copy(inner)
        object.__setattr__(copied, "apply", apply)
        return copied

    recorded = _with_layers(net, lambda name, layer: recording(f"{path}{name}", layer))
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    shape_of(net, type(net).apply.__get__(recorded), params, shape)
    return rows


def _with_layers(net: Serial, change: Callable[[str, Layer], Layer]) -> Serial:
    """Return a copy of a net in which ``change`` has replaced all layers, including those among its other fields."""
    copied = copy.copy(net)
    for field in dataclasses.fields(net):
        value = getattr(net, field.name)
        if isinstance(value, Layer):
            object.__setattr__(copied, field.name, change(field.name, value))
    object.__setattr__(copied, "layers", tuple((name, change(name, layer)) for name, layer in net.layers))
    return copied


def _remaining_row(net: Serial, shape: Shape, path: str, rows: list[Row]) -> list[Row]:
    """Return a row for the parameters that belong to no layer of a net, or ``[]`` if there are none."""
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    parameters = _count(params) - sum(row.parameters for row in rows)
    if rows and not parameters:
        return []
    name = path.rstrip("/") or type(net).__name__.lower()
    return [Row(name, type(net).__name__, out_shape(net, params, shape), parameters, 0)]


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


# ---------------------------------------------------------------------------------------------------------------------
# Construction


def serial(*layers: Layer | Callable[..., Array], name: str | None = None) -> Serial:
    """Return a net of layers in sequence.

    Layers without a name are named by their type and a count: conv1, relu1, conv2 … Without layers, the net is the
    identity.

    Args:
        *layers: the layers, in order. A callable is a layer without parameters (`Function`); the activations and
            global poolings of jaxcnn become the layer of that op.
        name: name of the net inside another net; None makes one from its type and a count.

    Returns:
        The net, which is itself a layer.

    Raises:
        TypeError: if an argument is neither a layer nor a function, or a name is not a str.
        ValueError: if a name is used twice or contains a "/".

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Conv(32, 5), jaxcnn.relu, jaxcnn.MaxPool(2), jaxcnn.Flatten(), jaxcnn.Dense(10))
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
    return Serial(named("serial", layers), name=name)


def residual(*layers: Layer | Callable[..., Array], name: str | None = None) -> Residual:
    """Return ``x + serial(*layers)(x)``, a layer whose inner layers keep the shape (He et al. 2015).

    Args:
        *layers: the layers, in order.
        name: name of the net inside another net; None makes one from its type and a count.

    Returns:
        The net, which is itself a layer. Its `apply` raises ValueError if the layers change the shape.

    Raises:
        TypeError: as in `serial`.
        ValueError: as in `serial`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.residual(jaxcnn.Conv(3, 3, padding="SAME"), jaxcnn.Relu()))
    >>> net.apply(net.init(jax.random.key(0), (8, 8, 3)), jnp.ones((2, 8, 8, 3))).shape
    (2, 8, 8, 3)
    """
    return Residual(named("residual", layers), name=name)


def named(op: str, layers: tuple[Any, ...]) -> tuple[tuple[str, Layer], ...]:
    """Return the layers with their names; callables become layers."""
    counts: dict[str, int] = {}
    result: dict[str, Layer] = {}
    for value in layers:
        layer = as_layer(value)
        if layer is None:
            raise bad_type(op, "each layer", "a layer such as Conv(32, 5) or a function of x", repr(value))
        kind = _kind(layer)
        counts[kind] = counts.get(kind, 0) + 1
        name = f"{kind}{counts[kind]}" if layer.name is None else layer.name
        if not isinstance(name, str):
            raise bad_type(op, "name", "a str", repr(name))
        if name in result or "/" in name:
            raise bad_value(op, "names", "different and without '/'", repr(name))
        result[name] = layer
    return tuple(result.items())


def _kind(layer: Layer) -> str:
    """Return the name of a layer's type in snake case; for a function, the name of the function."""
    name = type(layer).__name__
    if isinstance(layer, Function):
        function: Any = layer.function
        while isinstance(function, functools.partial):
            function = function.func
        name = getattr(function, "__name__", name)
        name = name if name.isidentifier() else "function"  # a lambda
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def in_a_row(layer: Layer) -> TypeGuard[Serial]:
    """Whether ``layer`` is a net that applies its layers in sequence, each with its own parameters.

    A subclass with another ``apply`` may do anything with its layers, and layers with the same name share parameters.
    """
    if not isinstance(layer, Serial) or is_custom(layer):
        return False
    return type(layer)._apply in (Serial._apply, Residual._apply) and len(dict(layer.layers)) == len(layer.layers)


def is_custom(layer: Layer) -> bool:
    """Whether a layer runs code from outside this library: its own ``apply``, a function, or a function as join."""
    own_apply = "apply" in vars(layer) or not _in_library(type(layer).apply)
    return own_apply or isinstance(layer, Function) or callable(getattr(layer, "join", None))


def _in_library(method: Any) -> bool:
    return str(getattr(method, "__module__", "")).startswith("jaxcnn.")


def layers_of(*kinds: str) -> tuple[type[Layer], ...]:
    """Return the layer types of this library whose op is of one of these kinds, in the order of the ops."""
    types = _layer_types()
    return tuple(types[op] for op in names_of(*kinds) if op in types)


def ops_of(*types: type) -> tuple[str, ...]:
    """Return the names of the ops that layers of these types apply; the sum of a net is "add"."""
    ops = [op for op, layer in _layer_types().items() if issubclass(layer, types)]
    return (*ops, "add") if issubclass(Residual, types) else tuple(ops)


def _layer_types() -> dict[str, type[Layer]]:
    """Map the name of each op to the layer type that applies it."""
    classes = [kind for kind in vars(layer_module).values() if isinstance(kind, type) and issubclass(kind, OpLayer)]
    return {kind.op.__name__: kind for kind in classes if hasattr(kind, "op")}


#: A net, or a function of parameters and x.
Model = Serial | Callable[[Any, Any], Any]


def expect_net(op: str, net: Any) -> None:
    """Raise TypeError unless ``net`` is a `Serial`."""
    if not isinstance(net, Serial):
        raise bad_type(op, "net", "a net from serial", repr(net))


def expect_model(op: str, net: Any) -> None:
    """Raise TypeError unless ``net`` is a `Serial` or a function."""
    if not isinstance(net, Serial) and (isinstance(net, Layer | type) or not callable(net)):
        raise bad_type(op, "net", "a net from serial or a function (params, x)", repr(net))


def expect_loss(op: str, loss: Any) -> None:
    """Raise TypeError unless ``loss`` is callable."""
    if not callable(loss):
        raise bad_type(op, "loss", "a function (outputs, targets)", repr(loss))


@contextlib.contextmanager
def located(name: str, between: str = ": ") -> Iterator[None]:
    """Put a layer's name in front of its error messages."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # JAX's own errors cannot be constructed from a message.
        kind, cause = (TypeError if isinstance(error, TypeError) else ValueError), error
        op, colon, _ = str(error).partition(": ")
        about_net = bool(colon) and op in _NET_OPS
        raise kind(f"{name}{': ' if about_net else between}{error}") from (None if type(error) is kind else cause)


#: Beginnings of messages that are about a net itself and not about one of its layers.
_NET_OPS = ("serial", "residual", "branches", "parallel", "siamese")


def example_shape(shape: Any) -> Shape:
    """Return the shape of one example as a tuple of ints, or of such tuples for several inputs."""
    expected, got = "a tuple of ints >= 1 such as (28, 28, 1)", repr(shape)
    if not isinstance(shape, list | tuple):
        raise bad_type("serial", "shape", expected, got)
    if shape and all(isinstance(each, list | tuple) for each in shape):
        shapes: Any = tuple(map(example_shape, shape))
        return shapes
    if not all(isinstance(n, int | np.integer) for n in shape):
        raise bad_type("serial", "shape", expected, got)
    if not shape or min(shape) < 1:
        raise bad_value("serial", "shape", expected, got)
    return tuple(map(int, shape))


def _inputs(x: Any) -> Any:
    """Return an array, or a tuple of arrays for several inputs."""
    if isinstance(x, tuple):
        return tuple(array("serial", f"x[{i}]", each) for i, each in enumerate(x))
    return array("serial", "x", x)
