"""Nets that are not sequences: branches with one input, nets with several inputs, and shared parameters.

Each of them is a layer. Its outputs are joined by ``join``:

    "concatenate"   along the channels: the δ of each output is its part of δ
    "add"           their sum: the δ of each output is δ, unless ``rules`` is a mapping with the key `Residual`
    a function      ``join(*outputs)``, which JAX differentiates
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxcnn.arguments import bad_value, one_key
from jaxcnn.layers import Layer, Params, Shape
from jaxcnn.net import Residual, Serial, example_shape, named, rows_of
from jaxcnn.ops import linear
from jaxcnn.ops.rule import autodiff
from jaxcnn.selection import Selection, rule_of_sum
from jaxcnn.summary import Row

#: How outputs are joined.
Join = Literal["concatenate", "add"] | Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class _Joined(Serial):
    """Base class of nets that join several outputs."""

    join: Join = dataclasses.field(default="concatenate", kw_only=True)

    def __post_init__(self) -> None:
        if self.join not in ("concatenate", "add") and not callable(self.join):
            raise bad_value(self._op, "join", "'concatenate', 'add' or a function of the outputs", repr(self.join))

    @property
    def sum_keys(self) -> tuple[type, ...]:
        """`Residual` and the types of the net, if the outputs are added."""
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, _Joined) and kind is not _Joined]
        return (*kinds, Residual) if self.join == "add" else ()

    @property
    def _op(self) -> str:
        return type(self).__name__.lower()

    def _joined(self, outputs: Sequence[Array], selection: Selection) -> Array:
        if callable(self.join):
            return self.join(*outputs)
        added, shapes = self.join == "add", [y.shape for y in outputs]
        if len({shape if added else shape[:-1] for shape in shapes}) > 1:
            expected = "of one shape" if added else "of one shape except for the channels"
            raise bad_value(self._op, "the outputs", expected, ", ".join(map(str, shapes)))
        if not added:
            return jnp.concatenate(outputs, -1)
        rule = rule_of_sum(selection.rules, self)
        plain = rule is None or rule is autodiff
        return functools.reduce(operator.add if plain else functools.partial(linear.add, rule=rule), outputs)

    def _joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape of the joined output for outputs of these shapes."""
        outputs = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in shapes]
        return tuple(jax.eval_shape(lambda *outputs: self._joined(outputs, Selection(None)), *outputs).shape[1:])

    def _end_rows(self, shape: Shape, out: tuple[int, ...], path: str) -> list[Row]:
        flops = (self._count(shape) - 1) * math.prod(out) if self.join == "add" else 0
        return [Row(path.rstrip("/") or self._op, type(self).__name__, out, 0, flops)]

    def _count(self, shape: Shape) -> int:
        """Return the number of outputs for inputs of ``shape``."""
        return len(self.layers)


@dataclasses.dataclass(frozen=True)
class Branches(_Joined):
    """Layers with the same input, whose outputs are joined. Made by `branches`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise bad_value(self._op, "layers", "one layer or more", "none")

    def init(self, key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Params:
        """Make the parameters by layer name; the arguments are those of `Serial.init`."""
        key = one_key(self._op, key)
        shapes = self._shapes(example_shape(shape))
        made = [self._init_layer(i, key, each, dtype) for i, each in enumerate(shapes)]
        return {name: params for (name, _), params in zip(self.layers, made, strict=True) if params}

    def _apply(self, params: Params, x: Any, key: Array | None, selection: Selection) -> Array:
        outputs = [self._apply_layer(i, params, a, key, selection) for i, a in enumerate(self._inputs(x))]
        return self._joined(outputs, selection)

    def _inputs(self, x: Any) -> Sequence[Any]:
        """Return the input of each layer."""
        return [x] * len(self.layers)

    def _shapes(self, shape: Shape) -> Sequence[Shape]:
        """Return the shape of each layer's input."""
        return [shape] * len(self.layers)

    def _rows_of_layers(self, shape: Shape, path: str) -> list[Row]:
        shapes = self._shapes(shape)
        parts = [rows_of(name, layer, each, path) for (name, layer), each in zip(self.layers, shapes, strict=True)]
        out = self._joined_shape([out for _, out in parts])
        return [*(row for rows, _ in parts for row in rows), *self._end_rows(shape, out, path)]


@dataclasses.dataclass(frozen=True)
class Parallel(Branches):
    """One layer for each of several inputs; the outputs are joined. Made by `parallel`."""

    def _inputs(self, x: Any) -> Sequence[Any]:
        inputs = x if isinstance(x, tuple) else tuple(x[:, i] for i in range(_count_in_array(self._op, x.shape)))
        return self._checked(inputs)

    def _shapes(self, shape: Shape) -> Sequence[Shape]:
        return self._checked(_shapes_of_inputs(self._op, shape))

    def _checked(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if len(inputs) != len(self.layers):
            raise bad_value(self._op, "x", f"{len(self.layers)} inputs, one for each layer", len(inputs))
        return inputs


@dataclasses.dataclass(frozen=True)
class Siamese(_Joined):
    """A sequence of layers, applied to each of several inputs with the same parameters. Made by `siamese`."""

    def init(self, key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Params:
        """Make the parameters by layer name; the arguments are those of `Serial.init`."""
        return super().init(key, self._shapes(example_shape(shape))[0], dtype)

    def _apply(self, params: Params, x: Any, key: Array | None, selection: Selection) -> Array:
        """Apply the layers to one batch of all inputs.

        The inputs of an example are adjacent, so each half of the batch still consists of whole examples.
        """
        if isinstance(x, tuple):
            self._shapes(tuple(a.shape[1:] for a in x))
            x = jnp.stack(x, 1)
        n, count = x.shape[0], _count_in_array(self._op, x.shape)
        y = super()._apply(params, x.reshape(n * count, *x.shape[2:]), key, selection)
        y = y.reshape(n, count, *y.shape[1:])
        return self._joined([y[:, i] for i in range(count)], selection)

    def _shapes(self, shape: Shape) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the inputs, which are equal."""
        shapes = _shapes_of_inputs(self._op, shape)
        if len(set(shapes)) > 1:
            raise bad_value(self._op, "the inputs", "of one shape", ", ".join(map(str, shapes)))
        return shapes

    def _count(self, shape: Shape) -> int:
        return len(self._shapes(shape))

    def _rows_of_layers(self, shape: Shape, path: str) -> list[Row]:
        out, *others = self._shapes(shape)
        count, rows = 1 + len(others), []
        for name, layer in self.layers:
            of_layer, out = rows_of(name, layer, out, path)
            rows += [dataclasses.replace(row, flops=count * row.flops) for row in of_layer]
        return [*rows, *self._end_rows(shape, self._joined_shape([out] * count), path)]


def is_branches(layer: Layer) -> TypeGuard[Branches]:
    """Whether ``layer`` applies its layers independently of each other, each with its own parameters."""
    if not isinstance(layer, Branches) or type(layer)._apply is not Branches._apply:
        return False
    own_apply = "apply" in vars(layer) or type(layer).apply is not Serial.apply
    return not own_apply and len(dict(layer.layers)) == len(layer.layers)


def _count_in_array(op: str, shape: tuple[int, ...]) -> int:
    """Return the number of inputs in an array ``(N, inputs, …)``."""
    if len(shape) < 3:
        raise bad_value(op, "x", "a tuple of inputs (N, …), or one array (N, inputs, …)", f"shape {shape}")
    return shape[1]


def _shapes_of_inputs(op: str, shape: Shape) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each input, from a tuple of shapes or the shape ``(inputs, …)`` of one array."""
    if isinstance(shape[0], tuple):
        shapes: Any = shape
        return shapes
    return (tuple(shape[1:]),) * _count_in_array(op, (1, *shape))


def branches(*layers: Layer | Callable[..., Array], join: Join = "concatenate", name: str | None = None) -> Branches:
    """Return a layer that applies several layers to its input and joins their outputs.

    Inception blocks, dense blocks and skip connections consist of branches; ``serial()`` is the identity.

    Args:
        *layers: the layers; a `serial` for a branch of several layers.
        join: "concatenate" joins along the channels, "add" adds, and a function joins the outputs
            ``join(*outputs)``. With more than two outputs, a rule for the sum is applied to one sum after another.
        name: name in a net; None makes one from the type and a count.

    Returns:
        The net, which is itself a layer. Its `apply` raises ValueError if the outputs do not fit.

    Raises:
        TypeError: as in `serial`.
        ValueError: as in `serial`, or if join is not one of these.

    Source: Szegedy et al. 2015 (Inception); Huang et al. 2017 (DenseNet); Ronneberger et al. 2015 (U-Net).

    An Inception block:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxcnn import Conv, Dense, GlobalAvgPool, MaxPool, Relu, branches, serial
    >>> inception = branches(
    ...     Conv(4, 1),
    ...     serial(Conv(4, 1), Relu(), Conv(8, 3, padding="SAME")),
    ...     serial(MaxPool(3, stride=1, padding="SAME"), Conv(4, 1)),
    ... )
    >>> net = serial(inception, Relu(), GlobalAvgPool(), Dense(10))
    >>> print(net.summary((8, 8, 3)))
    layer                         op             output  parameters   FLOPs
    input                                        8×8×3
    branches1/conv1               Conv           8×8×4           16   1,536
    branches1/serial1/conv1       Conv           8×8×4           16   1,536
    branches1/serial1/relu1       Relu           8×8×4            0     256
    branches1/serial1/conv2       Conv           8×8×8          296  36,864
    branches1/serial2/max_pool1   MaxPool        8×8×3            0   1,536
    branches1/serial2/conv1       Conv           8×8×4           16   1,536
    branches1                     Branches       8×8×16           0       0
    relu1                         Relu           8×8×16           0   1,024
    global_avg_pool1              GlobalAvgPool  16               0   1,024
    dense1                        Dense          10             170     320
    total                                                       514  45,632

    A dense block: each layer receives the outputs of all previous ones.

    >>> def dense_block(count, growth):
    ...     new = (serial(Relu(), Conv(growth, 3, padding="SAME")) for _ in range(count))
    ...     return serial(*(branches(serial(), layers) for layers in new))
    >>> dense_block(3, growth=4).summary((8, 8, 3)).rows[-1].output_shape
    (8, 8, 15)
    """
    return Branches(named("branches", layers), join=join, name=name)


def parallel(*layers: Layer | Callable[..., Array], join: Join = "concatenate", name: str | None = None) -> Parallel:
    """Return a layer that applies one layer to each of several inputs and joins their outputs.

    The inputs are a tuple of arrays ``(N, …)``, or one array ``(N, inputs, …)``.

    Args:
        *layers: the layers, one for each input.
        join: as in `branches`.
        name: name in a net; None makes one from the type and a count.

    Returns:
        The net, which is itself a layer. Its `apply` raises ValueError if the number of inputs is another.

    Raises:
        TypeError: as in `serial`.
        ValueError: as in `branches`.

    A net of an image and a row of features:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxcnn import Conv, Dense, GlobalMaxPool, parallel, serial
    >>> net = serial(parallel(serial(Conv(8, 3), GlobalMaxPool()), Dense(4)), Dense(2))
    >>> params = net.init(jax.random.key(0), ((8, 8, 1), (5,)))
    >>> net.apply(params, (jnp.ones((3, 8, 8, 1)), jnp.ones((3, 5)))).shape
    (3, 2)
    """
    return Parallel(named("parallel", layers), join=join, name=name)


def siamese(*layers: Layer | Callable[..., Array], join: Join = "concatenate", name: str | None = None) -> Siamese:
    """Return a layer that applies the same layers, with the same parameters, to each of several inputs.

    The inputs are a tuple of arrays ``(N, …)`` of one shape, or one array ``(N, inputs, …)``. They are one batch for
    the layers: a `BatchNorm` uses the statistics of all of them, and a tap has ``N·inputs`` rows, in which the inputs
    of an example are adjacent.

    Args:
        *layers: the layers, in order.
        join: as in `branches`, such as a distance.
        name: name in a net; None makes one from the type and a count.

    Returns:
        The net, which is itself a layer. Its `apply` raises ValueError if the inputs differ in shape.

    Raises:
        TypeError: as in `serial`.
        ValueError: as in `branches`.

    Source: Bromley et al. 1993.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxcnn import Conv, Dense, GlobalMaxPool, serial, siamese
    >>> def distance(a, b):
    ...     return jnp.abs(a - b)
    >>> net = serial(siamese(Conv(8, 3), GlobalMaxPool(), Dense(4), join=distance), Dense(1))
    >>> params = net.init(jax.random.key(0), ((8, 8, 1), (8, 8, 1)))
    >>> net.apply(params, (jnp.ones((3, 8, 8, 1)), jnp.zeros((3, 8, 8, 1)))).shape
    (3, 1)
    """
    return Siamese(named("siamese", layers), join=join, name=name)
