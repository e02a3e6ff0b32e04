"""`conv_general_dilated`, whole, as `jaxcnn.conv` or `jaxcnn.conv_transpose`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.ops.convolution import conv, conv_transpose, depthwise_conv
from jaxcnn.ops.rule import Rule
from jaxcnn.tracing.program import Equation, Form
from jaxcnn.tracing.shapes import STAY, Moves

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class ConvForm(Form):
    """A convolution of an input whose dims are anywhere, dilated, padded or cropped.

    The input is transposed to channels last, dilated, and cropped where the padding is negative. Groups of the batch
    become groups of channels.
    """

    x_dims: tuple[int, ...]
    w_dims: tuple[int, ...]
    y_dims: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Pairs
    dilation: tuple[int, ...]
    groups: int
    batch_groups: int
    x_dilation: tuple[int, ...]
    precision: Any
    dtype: Any
    #: Whether each channel has its own kernels.
    depthwise: bool = False
    moves: Moves = STAY

    @property
    def op(self) -> Any:  # type: ignore[override]
        """Return `jaxcnn.conv` or `jaxcnn.depthwise_conv`."""
        return depthwise_conv if self.depthwise else conv

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Return the name of the op."""
        return "depthwise_conv" if self.depthwise else "conv"

    @property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the op."""
        options = {
            "stride": self.stride,
            "padding": tuple((max(lo, 0), max(hi, 0)) for lo, hi in self.padding),
            "dilation": self.dilation,
            "precision": self.precision,
            "preferred_element_type": self.dtype,
        }
        return options if self.depthwise else {**options, "groups": self.groups * self.batch_groups}

    def prepare(self, x: Array, w: Array, b: Array | None = None) -> tuple[Any, ...]:
        """Return input, kernel and bias with channels last."""
        x, w = jnp.transpose(x, self.x_dims), jnp.transpose(w, self.w_dims)
        for dim, d in enumerate(self.x_dilation, start=1):
            x = _dilated(x, dim, d)
        for dim, (lo, hi) in enumerate(self.padding, start=1):
            if min(lo, hi) < 0:
                x = lax.slice_in_dim(x, max(-lo, 0), x.shape[dim] - max(-hi, 0), axis=dim)
        if self.batch_groups > 1:
            x = x.reshape(self.batch_groups, -1, *x.shape[1:])
            x = jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)
        return x, w, None if b is None else b.reshape(-1)

    def restore(self, y: Array) -> Array:
        """Return the result with its dims where the function has them."""
        return self.moves(jnp.transpose(y, self.y_dims))

    def call(self, rule: Rule | None, x: Array, w: Array, b: Array | None = None) -> Array:
        """Return the op's result."""
        return self.op(x, w, b, **self.options, rule=rule)

    def flops(self, inputs: Sequence[Any], output: Any) -> int:
        """Count a multiplication and an addition for each kernel element at each output."""
        w = [inputs[1].shape[i] for i in self.w_dims]
        return math.prod(output.shape) * (2 * math.prod(w[:-1]) - 1 + (len(inputs) > 2))

    def weights(self) -> tuple[int, ...]:
        """Return the positions of kernel and bias."""
        return (1, 2)


@dataclasses.dataclass(frozen=True)
class TransposedForm(ConvForm):
    """A convolution of a dilated input with stride 1: the adjoint of a convolution with that stride."""

    #: Zeros after the end of the result.
    output_padding: tuple[int, ...] = ()

    @property
    def op(self) -> Any:  # type: ignore[override]
        """Return `jaxcnn.conv_transpose`."""
        return conv_transpose

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Return the name of the op."""
        return "conv_transpose"

    @property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the op."""
        return {
            "stride": self.x_dilation,
            "padding": self.padding,
            "output_padding": self.output_padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "precision": self.precision,
            "preferred_element_type": self.dtype,
        }

    def prepare(self, x: Array, w: Array, b: Array | None = None) -> tuple[Any, ...]:
        """Return input, kernel and bias with channels last; the kernel flipped, its channels swapped within groups."""
        x, w = jnp.transpose(x, self.x_dims), jnp.transpose(w, self.w_dims)
        *size, inputs, outputs = w.shape
        w = lax.rev(w, range(len(size))).reshape(*size, inputs, self.groups, outputs // self.groups)
        w = jnp.moveaxis(w, -3, -1).swapaxes(-3, -2).reshape(*size, outputs // self.groups, self.groups * inputs)
        return x, w, None if b is None else b.reshape(-1)

    def flops(self, inputs: Sequence[Any], output: Any) -> int:
        """Count a multiplication and an addition for each kernel element at each input, and the bias at each output."""
        products = math.prod(inputs[0].shape) * 2 * math.prod(inputs[1].shape[i] for i in self.w_dims[:-2])
        outputs = inputs[1].shape[self.w_dims[-1]] // self.groups
        return products * outputs + math.prod(output.shape) * (len(inputs) > 2)


def _dilated(x: Array, dim: int, by: int) -> Array:
    """Insert ``by`` − 1 zeros between the elements along a dim."""
    n = x.shape[dim]
    if by == 1 or n < 1:
        return x
    x = jnp.expand_dims(x, dim + 1)
    zeros = jnp.zeros((*x.shape[: dim + 1], by - 1, *x.shape[dim + 2 :]), x.dtype)
    x = jnp.concatenate([x, zeros], dim + 1).reshape(*x.shape[:dim], n * by, *x.shape[dim + 2 :])
    return lax.slice_in_dim(x, 0, (n - 1) * by + 1, axis=dim)


def conv_form(step: Equation) -> ConvForm | str:
    """Return the form of a `conv_general_dilated`, or why it has none."""
    params = dict(step.params)
    x, w = (a.aval for a in step.inputs)
    lhs, rhs, out = params.pop("dimension_numbers")
    stride, padding, groups = params.pop("window_strides"), params.pop("padding"), params.pop("feature_group_count")
    x_dilation, dilation = params.pop("lhs_dilation"), params.pop("rhs_dilation")
    batch_groups, precision = params.pop("batch_group_count"), params.pop("precision")
    dtype = params.pop("preferred_element_type")
    if any(value is not None for value in params.values()):
        return f"option {', '.join(name for name, value in params.items() if value is not None)}"
    if not 3 <= len(x.shape) <= 5:
        return f"{len(x.shape) - 2} spatial dims"
    for a in (x.dtype, w.dtype, x.dtype if dtype is None else dtype):
        if not jnp.issubdtype(a, np.floating) or np.dtype(a).itemsize < 2:
            return f"dtype {np.dtype(a)}"
    form = ConvForm(
        x_dims=_channels_last(lhs),
        w_dims=(*rhs[2:], rhs[1], rhs[0]),
        y_dims=tuple(map(int, np.argsort(_channels_last(out)))),
        stride=tuple(stride),
        padding=tuple((int(lo), int(hi)) for lo, hi in padding),
        dilation=tuple(dilation),
        groups=groups,
        batch_groups=batch_groups,
        x_dilation=tuple(x_dilation),
        precision=precision,
        dtype=None if dtype is None else np.dtype(dtype),
        depthwise=groups == x.shape[lhs[1]] > 1,
    )
    return _transposed(form, w.shape) or form


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    return (spec[0], *spec[2:], spec[1])


def _transposed(form: ConvForm, w: tuple[int, ...]) -> TransposedForm | None:
    """Return a dilated convolution as a transposed one, or None if it is none, or not exactly."""
    if set(form.stride) != {1} or set(form.x_dilation) == {1} or form.batch_groups > 1:
        return None
    extents = [(w[dim] - 1) * d + 1 for dim, d in zip(form.w_dims, form.dilation, strict=False)]
    pads = [(e - 1 - lo, e - 1 - hi) for e, (lo, hi) in zip(extents, form.padding, strict=True)]
    extra = tuple(max(-hi, 0) for _, hi in pads)
    limits = map(max, form.x_dilation, form.dilation)
    if any(lo < 0 for lo, _ in pads) or any(e >= limit for e, limit in zip(extra, limits, strict=True)):
        return None
    fields = {f.name: getattr(form, f.name) for f in dataclasses.fields(ConvForm)}
    fields["depthwise"] = False
    fields["padding"] = tuple((lo, max(hi, 0)) for lo, hi in pads)
    return TransposedForm(**fields, output_padding=extra)
