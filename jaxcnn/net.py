"""Nets: layers in a row, their parameters beside them in a plain dict, as optax likes it.

Rooms: nets import `jaxcnn.layers` and `jaxcnn.taps`.
"""

import contextlib
import dataclasses
import difflib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxcnn.layers import Layer, Params, out_shape
from jaxcnn.ops import linear
from jaxcnn.ops.rule import Rule, array, autodiff, one_key
from jaxcnn.taps import tap

#: One rule for all layers, or for each that a key matches: a layer type, a name, or a predicate (name, layer) → bool.
Rules = Rule | Mapping[Any, Rule]


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
        """The net's output for a batch ``x``.

        Args:
            params: as `init` made them.
            x: ``(N, …)``.
            key: from `jax.random.key`; its presence means training (dropout is on).
            rules: other backward halves: one for all layers, or a mapping whose keys are layer types, names
                ("conv1", "residual1/conv2", "residual1" for all in it) or predicates ``(name, layer) → bool``; the
                first that matches wins.  `Residual` stands for the sums that residual nets end in.
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
            own: Params = params.get(name, {})
            if not isinstance(own, Mapping):
                raise TypeError(f"{here}: params expected a dict as init makes it, got {type(own).__name__}")
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
                out = out_shape(layer, params, shape)
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
        """``x + layers(x)``; the arguments of `Serial.apply`.

        The sum keeps δ as it is for both terms, unless ``rules`` is a mapping with the key `Residual`.
        """
        x = jnp.asarray(x)
        y = Serial.apply(self, params, x, key=key, rules=rules, rule=rule, path=path)
        if y.shape != x.shape:
            raise ValueError(f"residual: layers expected to keep the shape {x.shape}, got {y.shape}")
        own = _rule_of_sum(rule if rules is None else rules)
        return x + y if own is None or own is autodiff else linear.add(x, y, rule=own)

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


def in_a_row(layer: Layer) -> TypeGuard[Serial]:
    """Whether this is a net that applies its layers one after the other, each to parameters of its own.

    A subclass with another ``apply`` may do anything with the layers inside, and layers of one name share parameters.
    """
    if not isinstance(layer, Serial) or "apply" in vars(layer):
        return False
    return type(layer).apply in (Serial.apply, Residual.apply) and len(dict(layer.layers)) == len(layer.layers)


def expect_net(op: str, net: Any) -> None:
    """TypeError for what is none."""
    if not isinstance(net, Serial):
        raise TypeError(f"{op}: net expected what serial returns, got {net!r}")


def expect_loss(op: str, loss: Any) -> None:
    """TypeError for what is no function."""
    if not callable(loss):
        raise TypeError(f"{op}: loss expected a function (outputs, targets), got {loss!r}")


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


def _rule_of_sum(rules: Rules | None) -> Rule | None:
    """Keys that are made for layers, such as `Layer` or a name, do not reach the sum: few rules fit two inputs."""
    keys = rules if isinstance(rules, Mapping) else {}
    return next((rule for key, rule in keys.items() if isinstance(key, type) and issubclass(key, Residual)), None)


def _check_rules(rules: Mapping[Any, Rule], names: list[str]) -> None:
    for key in rules:
        if isinstance(key, str) and key not in names:
            near = difflib.get_close_matches(key, names, n=3, cutoff=0.0)
            raise ValueError(f"rules: expected names of layers, got {key!r}; the nearest are {', '.join(near)}")
        if not isinstance(key, str) and not (issubclass(key, Layer) if isinstance(key, type) else _predicate(key)):
            raise TypeError(f"rules: expected layer types, names or predicates as keys, got {key!r}")


def _predicate(key: Any) -> bool:
    """Whether it can be asked about a name and a layer."""
    try:
        inspect.signature(key).bind("name", None)
    except (TypeError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _located(name: str, between: str = ": ") -> Iterator[None]:
    """A layer's name in front of what it raises."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # JAX's own errors cannot be made from a message.
        kind, cause = (TypeError if isinstance(error, TypeError) else ValueError), error
        raise kind(f"{name}{between}{error}") from (None if type(error) is kind else cause)


def _example_shape(shape: Any) -> tuple[int, ...]:
    expected = f"serial: shape expected a tuple of ints >= 1 such as (28, 28, 1), got {shape!r}"
    if not isinstance(shape, list | tuple) or not all(isinstance(n, int | np.integer) for n in shape):
        raise TypeError(expected)
    if not shape or min(shape) < 1:
        raise ValueError(expected)
    return tuple(map(int, shape))


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
