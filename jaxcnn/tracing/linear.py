"""`dot_general` as `jaxcnn.dense`, and sums of two arrays."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxcnn.ops.linear import add, dense
from jaxcnn.ops.rule import Rule
from jaxcnn.tracing.plain import call_plain
from jaxcnn.tracing.program import Equation, Form, is_float
from jaxcnn.tracing.shapes import STAY, Moves


@dataclasses.dataclass(frozen=True)
class DenseForm(Form):
    """A product of two arrays over any of their dims; ``swapped`` if the first one holds the weights."""

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]
    swapped: bool
    precision: Any
    dtype: Any
    #: Shape of the product.
    shape: tuple[int, ...] = ()
    moves: Moves = STAY

    op = staticmethod(dense)
    kind = "dense"
    replaces = False

    def prepare(self, *inputs: Any) -> tuple[Any, ...]:
        """Return x ``(…, I)``, w ``(I, O)`` and b ``(O,)``."""
        x, w, b = (*inputs, None)[:3]
        at_x, at_w = (1, 0) if self.swapped else (0, 1)
        x = jnp.transpose(x, (*self.free[at_x], *self.contracted[at_x]))
        w = jnp.transpose(w, (*self.contracted[at_w], *self.free[at_w]))
        inner = len(self.contracted[0])
        size = math.prod(w.shape[:inner])
        x = x.reshape(*x.shape[: x.ndim - inner], size)
        return x, w.reshape(size, math.prod(w.shape[inner:])), None if b is None else b.reshape(-1)

    def restore(self, y: Array) -> Array:
        """Return the result in the shape that the function has."""
        rows, columns = (len(self.free[1]), len(self.free[0])) if self.swapped else map(len, self.free)
        shape = (*self.shape[columns:], *self.shape[:columns]) if self.swapped else self.shape
        y = y.reshape(shape)
        return self.moves(jnp.transpose(y, (*range(rows, rows + columns), *range(rows))) if self.swapped else y)

    def call(self, rule: Rule | None, *arguments: Any) -> Array:
        """Return x·w + b."""
        function = _Product(self.precision, self.dtype)
        return call_plain(self.kind, function, rule, None, *arguments)

    def flops(self, inputs: Sequence[Any], output: Any) -> int:
        """Count a multiplication and an addition for each input at each output."""
        size = math.prod(inputs[1].shape[i] for i in self.contracted[0 if self.swapped else 1])
        return math.prod(output.shape) * (2 * size - 1 + (len(inputs) > 2))

    def weights(self) -> tuple[int, ...]:
        """Return the positions of weights and bias."""
        return (1, 2)


@dataclasses.dataclass(frozen=True)
class _Product:
    precision: Any
    dtype: Any

    def __call__(self, x: Array, w: Array, b: Array | None = None) -> Array:
        y = lax.dot_general(
            x, w, (((x.ndim - 1,), (0,)), ((), ())), precision=self.precision, preferred_element_type=self.dtype
        )
        return y if b is None else y + b.astype(y.dtype)


def dense_form(step: Equation, swapped: bool) -> DenseForm | str:
    """Return the form of a `dot_general`, or why it has none."""
    params = dict(step.params)
    contracted, batch = params.pop("dimension_numbers")
    precision, dtype = params.pop("precision"), params.pop("preferred_element_type")
    if any(value is not None for value in params.values()):
        return f"option {', '.join(name for name, value in params.items() if value is not None)}"
    if any(batch):
        return "a product of two batches"
    a, b = (atom.aval for atom in step.inputs)
    if (
        not all(map(is_float, (a, b)))
        or a.dtype != b.dtype
        or (dtype is not None and not jnp.issubdtype(dtype, jnp.floating))
    ):
        return f"dtypes {a.dtype}, {b.dtype}"
    free = tuple(
        tuple(i for i in range(len(aval.shape)) if i not in dims) for aval, dims in zip((a, b), contracted, strict=True)
    )
    if not contracted[0]:
        return "an outer product"
    if not free[0 if swapped else 1]:
        return "a product with a vector"
    contracted = tuple(tuple(map(int, dims)) for dims in contracted)
    return DenseForm(contracted, free, swapped, precision, dtype, step.outputs[0].shape)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class AddForm(Form):
    """A sum of two arrays of one shape, as at the end of a residual block."""

    op = staticmethod(add)
    kind = "add"
    replaces = False

    def call(self, rule: Rule | None, *arguments: Any) -> Array:
        """Return x + y."""
        x, y = arguments
        return add(x, y, rule=rule)
