"""Reductions over windows and over whole images as the library's pools."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcnn.geometry import Window
from jaxcnn.ops.pooling import Average, avg_pool, global_avg_pool, global_max_pool, max_pool
from jaxcnn.ops.rule import Rule
from jaxcnn.tracing.plain import call_plain
from jaxcnn.tracing.program import Atom, Equation, Form, Program, is_float, producer_of, scalar_of
from jaxcnn.tracing.shapes import STAY, Moves

#: Generic reductions by the primitive of their computation.
_COMPUTED = {"max": "reduce_window_max", "min": "reduce_window_min", "add": "reduce_window_sum"}


@dataclasses.dataclass(frozen=True)
class PoolForm(Form):
    """A reduction over windows along up to three dims of an array.

    The other dims become batch and channels. A minimum is the negated maximum of −x.
    """

    dims: tuple[int, ...]
    ndim: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    reduction: str
    #: For sums: the number that they are divided by; None divides by the number of elements, as counted.
    divisor: float | None = 1.0
    count_include_pad: bool = True
    moves: Moves = STAY

    @property
    def op(self) -> Any:  # type: ignore[override]
        """Return `jaxcnn.max_pool` or `jaxcnn.avg_pool`."""
        return avg_pool if self.reduction == "sum" else max_pool

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Return the name of the op."""
        return "avg_pool" if self.reduction == "sum" else "max_pool"

    @property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the op."""
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if self.reduction == "sum":
            options |= {"divisor": self.divisor, "count_include_pad": self.count_include_pad}
        return options

    @property
    def _order(self) -> tuple[int, ...]:
        """The dims of the input, those of windows before the last of the others."""
        rest = [i for i in range(self.ndim) if i not in self.dims]
        return (*rest[:-1], *self.dims, *rest[-1:])

    def prepare(self, x: Array) -> tuple[Any, ...]:
        """Return the input ``(N, *spatial, C)``."""
        x = jnp.transpose(x, self._order)
        others = self.ndim - len(self.dims)
        x = x.reshape(math.prod(x.shape[: max(others - 1, 0)]), *x.shape[max(others - 1, 0) :])
        x = x if others else x[..., None]
        return (-x if self.reduction == "min" else x,)

    def restore(self, y: Array) -> Array:
        """Return the result with its dims where the function has them."""
        return self.moves(-y if self.reduction == "min" else y)

    def __call__(self, rule: Rule | None, *inputs: Any) -> Array:
        """Return the output of the traced function."""
        (x,) = inputs
        y = self.call(rule, *self.prepare(x))
        lead = [x.shape[i] for i in self._order[: max(self.ndim - len(self.dims) - 1, 0)]]
        y = y.reshape(*lead, *y.shape[1:]) if len(self.dims) < self.ndim else y[0, ..., 0]
        return self.restore(jnp.transpose(y, np.argsort(self._order).tolist()))

    def call(self, rule: Rule | None, *arguments: Any) -> Array:
        """Return the op's result."""
        return self.op(*arguments, self.window, **self.options, rule=rule)

    def flops(self, inputs: Sequence[Any], output: Any) -> int:
        """Count (window size − 1) comparisons or additions per window, and a division in an average."""
        divided = self.reduction == "sum" and self.divisor != 1
        return math.prod(output.shape) * (math.prod(self.window) - 1 + divided)


def pool_form(program: Program, step: Equation) -> PoolForm | str:
    """Return the form of a reduction over windows, or why it has none."""
    params = step.params
    primitive, x = step.primitive, step.inputs[0]
    if primitive == "reduce_window":
        primitive, reason = _generic(program, step)
        if reason:
            return reason
    if any(d != 1 for d in params["base_dilation"]):
        return "base_dilation"
    if not is_float(x):
        return f"dtype {np.dtype(x.aval.dtype)}"
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    dims = tuple(
        i for i, (k, s, pad) in enumerate(zip(window, strides, padding, strict=True))
        if k != 1 or s != 1 or tuple(pad) != (0, 0)
    )  # fmt: skip
    if not 1 <= len(dims) <= 3:
        return f"windows along {len(dims)} dims"
    return PoolForm(
        dims,
        len(window),
        tuple(window[i] for i in dims),
        tuple(strides[i] for i in dims),
        tuple((int(padding[i][0]), int(padding[i][1])) for i in dims),
        tuple(params["window_dilation"][i] for i in dims),
        primitive.removeprefix("reduce_window_"),
    )


def _generic(program: Program, step: Equation) -> tuple[str, str]:
    """Return the primitive that a generic reduction is equal to, and why there is none."""
    computation = step.params["jaxpr"]
    eqns = getattr(computation, "jaxpr", computation).eqns
    name = eqns[0].primitive.name if len(eqns) == 1 and len(step.inputs) == 2 else ""
    if name not in _COMPUTED:
        return "", "a computation of its own"
    neutral = {"max": -np.inf, "min": np.inf, "add": 0}[name]
    if scalar_of(program, step.inputs[1]) != neutral:
        return "", "an initial value that is not neutral"
    return _COMPUTED[name], ""


def counted(program: Program, form: PoolForm, step: Equation, divisor: Atom, shape: tuple[int, ...]) -> PoolForm | None:
    """Return the form of an average: the sums of ``form``, of ``shape``, divided by ``divisor``.

    The divisor is a number, or the sums of ones over the same windows, which count the elements in the input.
    """
    number = scalar_of(program, divisor)
    if number is not None:
        return dataclasses.replace(form, divisor=float(number)) if 0 < abs(number) < math.inf else None
    counts = producer_of(program, divisor, "broadcast_in_dim")
    counts = producer_of(program, counts.inputs[0] if counts else divisor, "reduce_window_sum")
    if counts is None or form.moves.steps or scalar_of(program, counts.inputs[0]) != 1:
        return None
    of_ones = pool_form(program, counts)
    ones, x = counts.inputs[0].aval.shape, step.inputs[0].aval.shape
    if not isinstance(of_ones, PoolForm) or len(counts.outputs[0].shape) != len(shape):
        return None
    fits = all(n == x[i] if i in form.dims else n in (1, x[i]) for i, n in enumerate(ones))
    if not fits or dataclasses.replace(of_ones, dims=form.dims) != dataclasses.replace(form, divisor=1.0):
        return None
    return dataclasses.replace(form, divisor=None, count_include_pad=False)


@dataclasses.dataclass(frozen=True)
class GlobalForm(Form):
    """A mean or maximum over all spatial dims of an image."""

    #: Dims of batch, space and channels; all others have size 1.
    batch: int
    axes: tuple[int, ...]
    channels: int
    reduction: str
    #: Shape of the reduced array.
    shape: tuple[int, ...]
    moves: Moves = STAY

    replaces = False

    @property
    def op(self) -> Any:  # type: ignore[override]
        """Return `jaxcnn.global_avg_pool` or `jaxcnn.global_max_pool`."""
        return global_avg_pool if self.reduction == "mean" else global_max_pool

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Return the name of the op."""
        return "global_avg_pool" if self.reduction == "mean" else "global_max_pool"

    def prepare(self, x: Array) -> tuple[Any, ...]:
        """Return the input ``(N, *spatial, C)``."""
        order = (self.batch, *self.axes, self.channels)
        others = [i for i in range(x.ndim) if i not in order]
        return (jnp.transpose(jnp.squeeze(x, others), [sum(j < i for j in order) for i in order]),)

    def restore(self, y: Array) -> Array:
        """Return the result in the shape that the function has."""
        return self.moves(y.reshape(self.shape))

    def call(self, rule: Rule | None, *arguments: Any) -> Array:
        """Return the op's result ``(N, C)``."""
        (x,) = arguments
        win = _whole(x.shape[1:-1])
        static = Average(win, win.padding) if self.reduction == "mean" else win
        reduce = jnp.mean if self.reduction == "mean" else jnp.max
        function = _Reduced(reduce, tuple(range(1, x.ndim - 1)))
        y = call_plain(self.kind, function, rule, static, x)
        return y.reshape(x.shape[0], x.shape[-1])

    def flops(self, inputs: Sequence[Any], output: Any) -> int:
        """Count 1 per element of the input."""
        return math.prod(inputs[0].shape)


@dataclasses.dataclass(frozen=True)
class _Reduced:
    """A reduction whose result has one window in each spatial dim, as the rules for pools expect."""

    reduce: Any
    axes: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        return self.reduce(x, self.axes, keepdims=True)


@functools.cache
def _whole(spatial: tuple[int, ...]) -> Window:
    ndim = len(spatial)
    return Window(spatial, spatial, spatial, ((0, 0),) * ndim, (1,) * ndim)


def global_form(program: Program, step: Equation) -> GlobalForm | None:
    """Return the form of a sum or maximum over the spatial dims of an image, or None.

    Sums of squares, and sums from which a mean to subtract from x is made, are statistics of a normalization.
    """
    x, axes = step.inputs[0], tuple(sorted(step.params["axes"]))
    sizes = x.aval.shape
    kept = [i for i in range(len(sizes)) if i not in axes]
    if len(kept) > 2:  # dims that vmap has put around an example
        kept = [i for i in kept if sizes[i] != 1]
    if not is_float(x) or not 1 <= len(axes) <= 3 or len(kept) != 2 or 0 in sizes:
        return None
    batch, channels = kept
    adjacent = axes == tuple(range(axes[0], axes[-1] + 1))
    if not adjacent or batch > axes[0]:
        return None
    maker = producer_of(program, x, "square", "integer_pow", "mul")
    squares = maker is not None and (maker.primitive != "mul" or maker.inputs[0] is maker.inputs[1])
    if squares or _centers(program, step):
        return None
    reduction = "mean" if step.primitive == "reduce_sum" else "max"
    return GlobalForm(batch, axes, channels, reduction, step.outputs[0].shape)


def _centers(program: Program, step: Equation) -> bool:
    """Whether the result of a reduction of x leads to a term that is subtracted from x."""
    todo = [step.outputs[0]]
    while todo:
        for user in program.users.get(todo.pop(), ()):
            if user.primitive == "sub" and user.inputs[0] is step.inputs[0]:
                return True
            if user.primitive in ("broadcast_in_dim", "reshape", "div", "mul", "transpose", "squeeze"):
                todo.extend(user.outputs)
    return False
