"""Nets: sequences of layers. Parameters are stored outside the net, in a plain dict that optax accepts."""

import contextlib
import copy
import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxcnn.arguments import array, bad_type, one_key
from jaxcnn.layers import Conv, Flatten, HiddenLayer, Layer, MaxPool, Params, Relu, out_shape, shape_of
from jaxcnn.ops import linear
from jaxcnn.ops.rule import Rule, autodiff
from jaxcnn.taps import tap

#: One rule for all layers, or a mapping from layer types, names or predicates (name, layer) → bool to rules.
Rules = Rule | Mapping[Any, Rule]


@dataclasses.dataclass(frozen=True)
class Serial(Layer):
    """A sequence of layers, which is itself a layer. Made by `serial`."""

    layers: tuple[tuple[str, Layer], ...] = ()

    def init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Params:
        """Make the parameters for inputs of ``shape``.

        Args:
            key: from `jax.random.key`.
            shape: shape of one example, without the batch.
            dtype: dtype of the parameters.

        Returns:
            The parameters by layer name; layers without parameters are omitted.

        Raises:
            TypeError: if key is not a key or shape is not a tuple of ints.
            ValueError: if a layer does not fit the output of the previous one.
        """
        key, shape = one_key("serial", key), _example_shape(shape)
        params: Params = {}
        for i, (name, layer) in enumerate(self.layers):
            with _located(name, "/" if isinstance(layer, Serial) else ": "):
                made = layer.init(jax.random.fold_in(key, i), shape, dtype)
            if made:
                params[name] = made
            with _located(name):
                shape = out_shape(layer, made, shape, dtype)
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
        """Return the net's output for a batch ``x``.

        Args:
            params: parameters as made by `init`.
            x: ``(N, …)``.
            key: from `jax.random.key`; if given, the net is in training mode (dropout is active).
            rules: replacement backward rules: one rule for all layers, or a mapping. Its keys are layer types, names
                ("conv1", "residual1/conv2", or "residual1" for all layers in it) or predicates
                ``(name, layer) → bool``; the first that matches wins. The key `Residual` is for the sums at the end of
                residual nets.
            rule: same as ``rules``, for a net inside a net.
            path: the names of the enclosing nets.

        Returns:
            The output of the last layer.

        Raises:
            ValueError: if parameters are missing, if a key in ``rules`` matches no layer, or if it matches only layers
                that take no rule, such as `Flatten`.
            TypeError: if params is not a dict, x is not an array, key is not a key, or rules has the wrong type.
        """
        rules = rule if rules is None else rules
        outermost = isinstance(rules, Mapping) and not path
        if isinstance(rules, Mapping) and not path:
            _check_rules(rules, [name for name, _ in self.walk()])
            _check_matches(rules, self)
            rules = _Followed(rules)
        if not isinstance(params, Mapping):
            raise bad_type("serial", "params", "a dict as init makes it", type(params).__name__)
        x = array("serial", "x", x)
        if key is not None:
            one_key("serial", key)
        for i, (name, layer) in enumerate(self.layers):
            here = f"{path}{name}"
            own: Params = params.get(name, {})
            if not isinstance(own, Mapping):
                raise bad_type(here, "params", "a dict as init makes it", type(own).__name__)
            part = None if key is None else jax.random.fold_in(key, i)
            if isinstance(layer, Serial):
                x = layer.apply(own, x, key=part, rules=rules, path=f"{here}/")
            else:
                try:
                    x = layer.apply(own, x, key=part, rule=_rule_for(rules, here, layer))
                except KeyError as error:
                    expected = f"expected params[{name!r}][{error.args[0]!r}]"
                    raise ValueError(f"{here}: {expected}, got params with {sorted(params)}") from None
            x = tap(here, x)
        if outermost and isinstance(rules, _Followed):
            _check_handed_on(rules, self)
        return x

    def walk(self, path: str = "") -> Iterator[tuple[str, Layer]]:
        """Yield every layer with its full name, including the layers of inner nets.

        Args:
            path: prefix of the names.

        Yields:
            ``(name, layer)`` pairs.
        """
        for name, layer in self.layers:
            yield f"{path}{name}", layer
            if isinstance(layer, Serial):
                yield from layer.walk(f"{path}{name}/")

    def flops(self, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
        """Return the total FLOPs of all layers.

        Args:
            shape: shape of one input, without the batch.
            out: shape of one output, without the batch.

        Returns:
            The number of FLOPs.
        """
        return self.summary(shape).flops

    def summary(self, shape: tuple[int, ...]) -> "Summary":
        """Summarize the net layer by layer.

        For a subclass with its own `apply`, the rows are the calls of its layers, in order. Parameters that it makes
        and that belong to none of its layers are one more row, whose FLOPs are unknown and count as 0.

        Args:
            shape: shape of one input, without the batch.

        Returns:
            A `Summary`; ``str()`` of it is a table.
        """
        shape = _example_shape(shape)
        return Summary(shape, tuple(self._rows(shape, "")))

    def _rows(self, shape: tuple[int, ...], path: str) -> Iterator["Row"]:
        if type(self).apply in (Serial.apply, Residual.apply):
            rows = list(self._rows_in_a_row(shape, path))
        else:
            rows = _recorded_rows(self, shape, path)
        yield from rows
        if type(self).init is not Serial.init or type(self).apply not in (Serial.apply, Residual.apply):
            yield from _rest(self, shape, path, rows)

    def _rows_in_a_row(self, shape: tuple[int, ...], path: str) -> Iterator["Row"]:
        for name, layer in self.layers:
            with _located(name, "/" if isinstance(layer, Serial) else ": "):
                params = jax.eval_shape(lambda layer=layer, shape=shape: layer.init(jax.random.key(0), shape))
            with _located(name):
                out = out_shape(layer, params, shape)
            if isinstance(layer, Serial):
                yield from layer._rows(shape, f"{path}{name}/")
            else:
                count, flops, inner = _count(params), layer.flops(shape, out), layer.inner_shape(shape)
                yield Row(f"{path}{name}", type(layer).__name__, out, count, flops, inner)
            shape = out


@dataclasses.dataclass(frozen=True)
class Residual(Serial):
    """``x + layers(x)``, made by `residual`."""

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
        """Return ``x + layers(x)``; the arguments are those of `Serial.apply`.

        The sum passes δ unchanged to both terms, unless ``rules`` is a mapping with the key `Residual`.

        Args:
            params: parameters as made by `init`.
            x: ``(N, …)``.
            key: from `jax.random.key`; if given, the net is in training mode.
            rules: replacement backward rules.
            rule: same as ``rules``, for a net inside a net.
            path: the names of the enclosing nets.

        Returns:
            The sum, with the shape of ``x``.

        Raises:
            ValueError: if the layers change the shape, or as in `Serial.apply`.
            TypeError: as in `Serial.apply`.
        """
        x = jnp.asarray(x)
        y = Serial.apply(self, params, x, key=key, rules=rules, rule=rule, path=path)
        if y.shape != x.shape:
            raise ValueError(f"residual: layers expected to keep the shape {x.shape}, got {y.shape}")
        own = _rule_of_sum(rule if rules is None else rules, self)
        return x + y if own is None or own is autodiff else linear.add(x, y, rule=own)

    def _rows(self, shape: tuple[int, ...], path: str) -> Iterator["Row"]:
        """Yield the rows of the layers, then a row for the sum."""
        yield from super()._rows(shape, path)
        if type(self).apply is not Residual.apply:
            return
        yield Row(path.rstrip("/") or "residual", "Residual", shape, 0, math.prod(shape))


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of a net. The shape is that of one example, and FLOPs are those of its forward pass."""

    name: str
    op: str
    output_shape: tuple[int, ...]
    parameters: int
    flops: int
    #: Shape before pooling, for a fused `HiddenLayer`; otherwise None.
    inner_shape: tuple[int, ...] | None = None

    @property
    def shapes(self) -> str:
        """Return the shapes as text, such as ``24×24×32 → 12×12×32``."""
        return " → ".join(_by(shape) for shape in (self.inner_shape, self.output_shape) if shape is not None)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A net, layer by layer. ``str()`` is a table."""

    input_shape: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Return the number of parameters of all layers."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        """Return the FLOPs of the forward pass of all layers, for one example."""
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


def _recorded_rows(net: Serial, shape: tuple[int, ...], path: str) -> list[Row]:
    """Return the rows of a net with its own `apply`: its layers in the order in which it calls them.

    These are the layers that `Serial` holds and those among its other fields. They are replaced by copies that record
    their calls. FLOPs count at every call, and parameters once.
    """
    rows: list[Row] = []
    counted: list[Any] = []

    def noting(name: str, layer: Layer) -> Layer:
        if isinstance(layer, Serial):
            return _replaced(layer, lambda inner, value: noting(f"{name}/{inner}", value))

        def apply(params: Params, x: Array, **options: Any) -> Array:
            y = layer.apply(params, x, **options)
            given, out = tuple(x.shape[1:]), tuple(y.shape[1:])
            new = [leaf for leaf in jax.tree.leaves(params) if not any(leaf is other for other in counted)]
            counted.extend(new)
            rows.append(
                Row(name, type(layer).__name__, out, _count(new), layer.flops(given, out), layer.inner_shape(given))
            )
            return y

        copied = copy.copy(layer)
        object.__setattr__(copied, "apply", apply)
        return copied

    noted = _replaced(net, lambda name, layer: noting(f"{path}{name}", layer))
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    shape_of(net, type(net).apply.__get__(noted), params, shape)
    return rows


def _replaced(net: Serial, change: Callable[[str, Layer], Layer]) -> Serial:
    """Return a copy of a net in which ``change`` has replaced all layers, including those among its other fields."""
    copied = copy.copy(net)
    for field in dataclasses.fields(net):
        value = getattr(net, field.name)
        if isinstance(value, Layer):
            object.__setattr__(copied, field.name, change(field.name, value))
    object.__setattr__(copied, "layers", tuple((name, change(name, layer)) for name, layer in net.layers))
    return copied


def _rest(net: Serial, shape: tuple[int, ...], path: str, rows: list[Row]) -> Iterator[Row]:
    """Yield a row for the parameters that belong to no layer of a net, if there are any."""
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    parameters = _count(params) - sum(row.parameters for row in rows)
    if parameters or not rows:
        name = path.rstrip("/") or type(net).__name__.lower()
        yield Row(name, type(net).__name__, out_shape(net, params, shape), parameters, 0)


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def serial(*layers: Layer, name: str | None = None) -> Serial:
    """Return a net of layers in sequence.

    Layers without a name are named by their type and a count: conv1, relu1, conv2 …

    Args:
        *layers: the layers, in order.
        name: name of the net inside another net; None makes one from its type and a count.

    Returns:
        The net, which is itself a layer.

    Raises:
        TypeError: if an argument is not a layer, or a name is not a str.
        ValueError: if a name is used twice or contains a "/".

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
            raise bad_type(op, "name", "a str", repr(name))
        if name in named or "/" in name:
            raise ValueError(f"{op}: expected names that differ and hold no '/', got {name!r}")
        named[name] = layer
    return tuple(named.items())


def in_a_row(layer: Layer) -> TypeGuard[Serial]:
    """Whether ``layer`` is a net that applies its layers in sequence, each with its own parameters.

    A subclass with another ``apply`` may do anything with its layers, and layers with the same name share parameters.
    """
    if not isinstance(layer, Serial) or "apply" in vars(layer):
        return False
    return type(layer).apply in (Serial.apply, Residual.apply) and len(dict(layer.layers)) == len(layer.layers)


def expect_net(op: str, net: Any) -> None:
    """Raise TypeError unless ``net`` is a `Serial`."""
    if not isinstance(net, Serial):
        raise bad_type(op, "net", "what serial returns", repr(net))


def expect_loss(op: str, loss: Any) -> None:
    """Raise TypeError unless ``loss`` is callable."""
    if not callable(loss):
        raise bad_type(op, "loss", "a function (outputs, targets)", repr(loss))


def _rule_for(rules: Rules | None, name: str, layer: Layer) -> Rule | None:
    if not isinstance(rules, Mapping):
        return rules
    if isinstance(rules, _Followed):
        rules.asked.add(name)
    return next((rule for key, rule in rules.items() if _key_matches(key, name, layer)), None)


def _key_matches(key: Any, name: str, layer: Layer) -> bool:
    kind = _type_of(key)
    if kind is not None:
        return isinstance(layer, kind)
    if isinstance(key, str):
        return f"{name}/".startswith(f"{key}/")
    return bool(key(name, layer))


@dataclasses.dataclass(frozen=True, eq=False)
class IfThere:
    """A layer type as a key of ``rules=`` that may match nothing, for mappings that fit every net.

    It equals the type itself, so a mapping can be read and merged as if the type were the key.
    """

    kind: type

    def __eq__(self, other: object) -> bool:
        return (other.kind if isinstance(other, IfThere) else other) == self.kind

    def __hash__(self) -> int:
        return hash(self.kind)

    def __repr__(self) -> str:
        return repr(self.kind)


class Checked(dict[Any, Any]):
    """Rules whose keys have been checked against their net."""


class _Followed(Checked):
    """Rules that record which layers have looked them up while a net is applied."""

    def __init__(self, rules: Mapping[Any, Rule]) -> None:
        super().__init__(rules)
        self.asked: set[str] = set()


def _check_handed_on(rules: _Followed, net: Serial) -> None:
    """Raise ValueError for a key that only matches layers in nets whose own `apply` does not pass rules on."""
    layers = [(name, layer) for name, layer in net.walk() if not isinstance(layer, Serial)]
    missed = [(name, layer) for name, layer in layers if name not in rules.asked]
    for key, rule in rules.items() if missed else ():
        if rule is None or isinstance(key, IfThere):
            continue
        found = [name for name, layer in layers if _key_matches(key, name, layer)]
        if found and not rules.asked.intersection(found):
            raise ValueError(
                f"rules: an apply of one's own must hand on rules= and path=, or rule= to its layers; got one that "
                f"calls {', '.join(found)} without"
            )


def _type_of(key: Any) -> type | None:
    """Return the layer type of a key, or None if it is not one."""
    return key.kind if isinstance(key, IfThere) else key if isinstance(key, type) else None


def _rule_of_sum(rules: Rules | None, net: Layer | None = None) -> Rule | None:
    """Return the rule of a sum. Only the key `Residual` selects it, because few rules accept two inputs."""
    for key, rule in rules.items() if isinstance(rules, Mapping) else ():
        kind = _type_of(key)
        if kind is not None and issubclass(kind, Residual) and (net is None or isinstance(net, kind)):
            return rule
    return None


#: The layers that a hidden layer contains, and the argument of `jaxcnn.rules.HiddenLayerRules` for each.
_IN_HIDDEN_LAYER = {Conv: "conv", Relu: "relu", MaxPool: "pool"}


def _check_matches(rules: Mapping[Any, Rule], net: Serial) -> None:
    """Raise ValueError for a key that no layer takes a rule from; `IfThere` may match nothing."""
    if isinstance(rules, Checked):
        return
    layers = [(name, layer) for name, layer in net.walk() if not isinstance(layer, Serial)]
    sums = [layer for layer in (net, *(layer for _, layer in net.walk())) if isinstance(layer, Residual)]
    for key in rules:
        kind = _type_of(key)
        if isinstance(key, IfThere):
            continue
        if kind is not None and issubclass(kind, Residual) and any(isinstance(layer, kind) for layer in sums):
            continue
        found = [layer for name, layer in layers if _key_matches(key, name, layer)]
        if found and not all(type(layer) is Flatten for layer in found):
            continue
        said = key if isinstance(key, str) else getattr(key if kind is None else kind, "__name__", repr(key))
        if found:
            raise ValueError(f"rules: a key must match a layer that takes a rule, got {said!r}, which matches Flatten")
        if isinstance(key, str) and not any(name.startswith(f"{key}/") for name, _ in layers):
            continue  # a net without layers
        there = ", ".join(sorted({type(layer).__name__ for _, layer in layers})) or "none"
        raise ValueError(
            f"rules: a key must match a layer of the net, got {said!r}; the layers are {there}{_instead(kind, layers)}"
        )


def _instead(kind: type | None, layers: list[tuple[str, Layer]]) -> str:
    """Return a hint at the key that takes a rule for this type, or ""."""
    if kind is not None and issubclass(kind, Serial) and not issubclass(kind, Residual):
        return ". A net takes rules by its name, or by the types of its layers"
    inside = next((part for of, part in _IN_HIDDEN_LAYER.items() if kind is not None and issubclass(of, kind)), None)
    if inside is None or not any(isinstance(layer, HiddenLayer) for _, layer in layers):
        return ""
    return f". A HiddenLayer contains one: {{HiddenLayer: rules.HiddenLayerRules({inside}=...)}}"


def _check_rules(rules: Mapping[Any, Rule], names: list[str]) -> None:
    for key in rules:
        if isinstance(key, str) and key not in names:
            near = difflib.get_close_matches(key, names, n=3, cutoff=0.0)
            raise ValueError(f"rules: expected names of layers, got {key!r}; the nearest are {', '.join(near)}")
        kind = _type_of(key)
        if not isinstance(key, str) and not (_predicate(key) if kind is None else issubclass(kind, Layer)):
            raise TypeError(f"rules: expected layer types, names or predicates as keys, got {key!r}")


def _predicate(key: Any) -> bool:
    """Whether ``key`` can be called as ``key(name, layer)``."""
    try:
        inspect.signature(key).bind("name", None)
    except (TypeError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _located(name: str, between: str = ": ") -> Iterator[None]:
    """Put a layer's name in front of its error messages."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # JAX's own errors cannot be constructed from a message.
        kind, cause = (TypeError if isinstance(error, TypeError) else ValueError), error
        raise kind(f"{name}{between}{error}") from (None if type(error) is kind else cause)


def _example_shape(shape: Any) -> tuple[int, ...]:
    expected = f"serial: shape must be a tuple of ints >= 1 such as (28, 28, 1), got {shape!r}"
    if not isinstance(shape, list | tuple) or not all(isinstance(n, int | np.integer) for n in shape):
        raise TypeError(expected)
    if not shape or min(shape) < 1:
        raise ValueError(expected)
    return tuple(map(int, shape))


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
