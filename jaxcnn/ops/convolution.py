"""Convolution layers: a kernel slides over an input.

The family is closed under differentiation: the rule of each of its three products is the other two.

    conv_core     x, w → y     δ_x = input_grad(δ, w)     ∂E/∂w = kernel_grad(x, δ)     ∂E/∂b = Σ δ
    input_grad    δ, w → x     its rule: conv_core, kernel_grad
    kernel_grad   x, δ → w     its rule: input_grad, conv_core

`conv_transpose` is `input_grad` as a layer. `depthwise_conv` is `conv` with as many groups as channels. As usual in
deep learning, "convolution" here does not flip the kernel: it is cross-correlation (lecture §11, with erratum 4). The
kernel *is* flipped in the backward pass (lecture §15).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxcnn.arguments import arrays, bad_type, bad_value, ints, positive, spatial_dims, static_int, static_ints
from jaxcnn.geometry import (
    PADDING_MODES,
    PADDINGS,
    Correlation,
    Padding,
    PerDim,
    Window,
    not_too_many,
    pad_widths,
    window,
)
from jaxcnn.kernels import lowering
from jaxcnn.kernels.correlate import correlate
from jaxcnn.kernels.dtypes import to_accumulator, wider
from jaxcnn.kernels.input_grad import flip, padding_that_xla_accepts
from jaxcnn.kernels.input_grad import input_grad as run_input_grad
from jaxcnn.kernels.kernel_grad import kernel_grad as run_kernel_grad
from jaxcnn.kernels.shapes import expand_rank
from jaxcnn.kernels.split import run_whole
from jaxcnn.kernels.windows import pad_axis
from jaxcnn.ops.adjoint import adjoint_pair
from jaxcnn.ops.mesh import on_any_mesh
from jaxcnn.ops.rule import Rule, apply_rule, autodiff, custom_vjp


def conv(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    *,
    stride: PerDim = 1,
    padding: Padding = "VALID",
    dilation: PerDim = 1,
    groups: int = 1,
    dimension_numbers: Sequence[str] | None = None,
    preferred_element_type: DTypeLike | None = None,
    precision: Any = None,
    rule: Rule | None = None,
) -> Array:
    """Convolution layer: ``y[n, o, f] = b[f] + Σ_{k, i} x[n, o·stride + k·dilation − lo, i] · w[k, i, f]``.

    Backward (lecture §6, §9, §15): δ_x = w ∗ δ, the full correlation of δ with the kernel flipped by 180°;
    ∂E/∂w = x ⋆ δ, a valid correlation summed over the batch; ∂E/∂b = Σ δ over batch and space.

    Args:
        x: input ``(N, *spatial, I)``, one to three spatial dims, any float dtype.
        w: kernel ``(*K, I/groups, O)``, of the same dtype.
        b: bias ``(O,)``, one number per output channel; None for no bias.
        stride: step of the kernel, an int or one per spatial dim.
        padding: "VALID", "SAME" (extra at the end), "SAME_LOWER", "CAUSAL" (1-D), an int, or an int or a pair per dim.
            "REFLECT", "REPLICATE" and "CIRCULAR" repeat the input instead of adding zeros and keep its size.
        dilation: distance between the kernel's taps.
        groups: number of channel groups. Output channels ``g·O/groups …`` depend only on input channels
            ``g·I/groups …``.
        dimension_numbers: the layouts of x, w and y, such as ``("NCHW", "OIHW", "NCHW")``; default channels last.
        preferred_element_type: dtype of the result; default that of x. 16-bit inputs accumulate in float32 in any case.
        precision: as in `jax.lax`. With "fastest" (`jax.lax.Precision.DEFAULT`), or "default" as JAX's
            ``jax_default_matmul_precision``, large float32 convolutions with 3 × 3 and 5 × 5 kernels use Winograd's
            algorithm on CPU. Relative errors are then up to 2.5e-6 (3 × 3) and 9e-6 (5 × 5) instead of 6e-7, and an
            element that is not finite, or is large, affects up to 3 positions beyond its windows. With None every sum
            is computed directly.
        rule: replacement for the backward rule, over channels-last arrays; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *out, O)``.

    Raises:
        ValueError: if shapes or options do not fit.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> x = jnp.ones((1, 28, 28, 1))
    >>> jaxcnn.conv(x, jnp.ones((5, 5, 1, 32))).shape
    (1, 24, 24, 32)
    """
    x, w = arrays("conv", x=x, w=w)
    x, w, back = _channels_last("conv", x, w, dimension_numbers)
    x, c = correlation_of("conv", x, w, stride, padding, dilation, groups, preferred_element_type, precision, rule)
    y = apply_rule(conv_core, rule, conv_reference, "conv")(c, x, w, _bias("conv", w, b, w.shape[-1]))
    return y if back is None else jnp.transpose(y, back)


def depthwise_conv(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    *,
    stride: PerDim = 1,
    padding: Padding = "VALID",
    dilation: PerDim = 1,
    dimension_numbers: Sequence[str] | None = None,
    preferred_element_type: DTypeLike | None = None,
    precision: Any = None,
    rule: Rule | None = None,
) -> Array:
    """Depthwise convolution: each channel has its own kernels; ``y[…, c·M + m]`` is channel c with its kernel m.

    This is `conv` with ``groups`` = channels, and has the same rule.

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        w: kernels ``(*K, 1, C·M)``, of the same dtype; the multiplier M is the number of kernels per channel.
        b: bias ``(C·M,)``, one number per output channel; None for no bias.
        stride: step of the kernel, an int or one per spatial dim.
        padding: as in `conv`.
        dilation: distance between the kernel's taps.
        dimension_numbers: as in `conv`.
        preferred_element_type: as in `conv`.
        precision: as in `conv`.
        rule: replacement for the backward rule, over channels-last arrays; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *out, C·M)``.

    Raises:
        ValueError: if shapes or options do not fit.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.depthwise_conv(jnp.ones((1, 28, 28, 3)), jnp.ones((5, 5, 1, 6))).shape
    (1, 24, 24, 6)
    """
    op = "depthwise_conv"
    x, w = arrays(op, x=x, w=w)
    x, w, back = _channels_last(op, x, w, dimension_numbers)
    spatial = spatial_dims(op, x)
    if w.ndim != x.ndim or w.shape[-2] != 1 or w.shape[-1] % max(x.shape[-1], 1):
        expected = f"(*K, 1, C·M) with {len(spatial)} spatial dims and C = {x.shape[-1]}, like x"
        raise bad_value(op, "w", expected, f"x {x.shape}, w {w.shape}")
    x, c = correlation_of(op, x, w, stride, padding, dilation, x.shape[-1], preferred_element_type, precision, rule)
    y = apply_rule(conv_core, rule, conv_reference, op)(c, x, w, _bias(op, w, b, w.shape[-1]))
    return y if back is None else jnp.transpose(y, back)


@custom_vjp
def conv_core(c: Correlation, x: Array, w: Array, b: Array | None) -> Array:
    """The core of `conv`, also for the rules of its products and of other ops."""
    return _add_bias(correlate(c, x, w), b)


def _conv_fwd(c: Correlation, x: Array, w: Array, b: Array | None) -> Any:
    return conv_core(c, x, w, b), (x, w, b)


def _conv_bwd(c: Correlation, saved: Any, delta: Array) -> Any:
    """δ_x = w ∗ δ (full, the kernel flipped); ∂E/∂w = x ⋆ δ; ∂E/∂b = Σ δ. Lecture §9 and §15."""
    x, w, b = saved
    delta_x = input_grad(c, delta, w).astype(x.dtype)
    grad_w = kernel_grad(c, x, delta).astype(w.dtype)
    grad_b = None if b is None else sum_pixels(delta).astype(b.dtype)
    return delta_x, grad_w, grad_b


conv_core.defvjp(_conv_fwd, _conv_bwd)


def conv_reference(c: Correlation, x: Array, w: Array, b: Array | None) -> Array:
    """`conv` in stock JAX."""
    win = c.window
    product = functools.partial(
        lowering.convolve, c, stride=win.stride, padding=win.padding, w_dilation=win.dilation, groups=c.groups
    )
    return _add_bias(_run_reference(c, product, x, w), b)


def _run_reference(c: Correlation, product: Callable[[Array, Array], Array], x: Array, w: Array) -> Array:
    """Run a product of stock JAX in the dtype of the result, with the dims whole that XLA cannot shard."""
    image_dims, kernel_dims = lowering.unsharded_image_dims(c), lowering.unsharded_kernel_dims(c)
    return run_whole(product, (x.astype(c.dtype), w.astype(c.dtype)), (image_dims, kernel_dims), image_dims)


@custom_vjp
def input_grad(c: Correlation, delta: Array, w: Array) -> Array:
    """``w ∗ δ``: the full correlation of δ with the kernel flipped by 180°."""
    return run_input_grad(c, delta, w)


def _input_grad_fwd(c: Correlation, delta: Array, w: Array) -> Any:
    return input_grad(c, delta, w), (delta, w)


def _input_grad_bwd(c: Correlation, saved: Any, xi: Array) -> Any:
    """⟨input_grad(δ, w), ξ⟩ = ⟨δ, conv(ξ, w)⟩ = ⟨w, kernel_grad(ξ, δ)⟩."""
    delta, w = saved
    return conv_core(c, xi, w, None).astype(delta.dtype), kernel_grad(c, xi, delta).astype(w.dtype)


input_grad.defvjp(_input_grad_fwd, _input_grad_bwd)


@custom_vjp
def kernel_grad(c: Correlation, x: Array, delta: Array) -> Array:
    """``x ⋆ δ``: the valid correlation of the input with δ, summed over the batch."""
    return run_kernel_grad(c, x, delta)


def _kernel_grad_fwd(c: Correlation, x: Array, delta: Array) -> Any:
    return kernel_grad(c, x, delta), (x, delta)


def _kernel_grad_bwd(c: Correlation, saved: Any, omega: Array) -> Any:
    """⟨kernel_grad(x, δ), ω⟩ = ⟨x, input_grad(δ, ω)⟩ = ⟨δ, conv(x, ω)⟩."""
    x, delta = saved
    return input_grad(c, delta, omega).astype(x.dtype), conv_core(c, x, omega, None).astype(delta.dtype)


kernel_grad.defvjp(_kernel_grad_fwd, _kernel_grad_bwd)


# ---------------------------------------------------------------------------------------------------------------------
# input_grad as a layer


def conv_transpose(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    *,
    stride: PerDim = 1,
    padding: Padding = "VALID",
    output_padding: PerDim = 0,
    dilation: PerDim = 1,
    groups: int = 1,
    dimension_numbers: Sequence[str] | None = None,
    preferred_element_type: DTypeLike | None = None,
    precision: Any = None,
    rule: Rule | None = None,
) -> Array:
    """Transposed convolution, the adjoint of `conv`: ``y[i] = b + Σ_{o·stride + k·dilation − lo = i} x[o]·w[k]ᵀ``.

    With the same w and options it maps `conv`'s output shape back to its input shape:
    ⟨conv(y, w), x⟩ = ⟨y, conv_transpose(x, w)⟩.

    Backward: ``δ_x = conv(δ, w)``; ``∂E/∂w = δ ⋆ x``, the valid correlation of δ with x; ``∂E/∂b = Σ δ``.

    Args:
        x: input ``(N, *spatial, I)``, one to three spatial dims, any float dtype.
        w: kernel of the `conv` that is transposed, ``(*K, O/groups, I)``, of the same dtype. Its input channels are the
            output channels here.
        b: bias ``(O,)``, one number per output channel; None for no bias.
        stride: step of the kernel per element of x, an int or one per spatial dim.
        padding: padding of the `conv` that is transposed, cropped from the result here: an int, an int or a pair per
            dim, "VALID", "CAUSAL" (1-D), or "SAME" or "SAME_LOWER", with which the result is ``stride`` times as large
            as x.
        output_padding: extra size at the end of each dim, less than ``stride`` or ``dilation``. If less than
            ``stride``, it selects among the output sizes that `conv` maps to the same input size. Beyond that, the
            result is as if x continued with zeros.
        dilation: distance between the kernel's taps.
        groups: number of channel groups. Input channels ``g·I/groups …`` contribute only to output channels
            ``g·O/groups …``.
        dimension_numbers: the layouts of x, w and y, such as ``("NCHW", "OIHW", "NCHW")``; w's is that of a `conv`.
        preferred_element_type: as in `conv`.
        precision: as in `conv`.
        rule: replacement for the backward rule, over channels-last arrays; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *out, O)``, out = (spatial − 1)·stride + (K − 1)·dilation + 1 − padding + output_padding.

    Raises:
        ValueError: if shapes or options do not fit.
        TypeError: if an argument has the wrong type or dtype.

    Source: Zeiler et al. 2010.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.conv_transpose(jnp.array([1.0, 10.0])[None, :, None], jnp.array([1.0, 2.0, 3.0])[:, None, None]).ravel()
    Array([ 1., 12., 23., 30.], dtype=float32)
    """
    op = "conv_transpose"
    x, w = arrays(op, x=x, w=w)
    x, w, back = _channels_last(op, x, w, dimension_numbers)
    c = transposed_correlation_of(
        op, x, w, stride, padding, output_padding, dilation, groups, preferred_element_type, precision
    )
    if x.shape[1:-1] != c.window.out:
        x = on_any_mesh(_append_zeros, c.window.out, x)
    y = apply_rule(_conv_transpose, rule, _conv_transpose_reference)(c, x, w, _bias(op, w, b, w.shape[-2] * c.groups))
    return y if back is None else jnp.transpose(y, back)


def _append_zeros(out: tuple[int, ...], x: Array) -> Array:
    """Extend ``x`` to spatial dims ``out`` with zeros; not by `lax.pad`, whose transpose uses negative padding."""
    for axis, (n, length) in enumerate(zip(x.shape[1:-1], out, strict=True), start=1):
        if length > n:
            rest = jnp.zeros((*x.shape[:axis], length - n, *x.shape[axis + 1 :]), x.dtype)
            x = jnp.concatenate([x, rest], axis)
    return x


@custom_vjp
def _conv_transpose(c: Correlation, x: Array, w: Array, b: Array | None) -> Array:
    wide = wider(x.dtype, c.dtype)
    return _add_bias(run_input_grad(c, x.astype(wide), w).astype(c.dtype), b)


def _conv_transpose_fwd(c: Correlation, x: Array, w: Array, b: Array | None) -> Any:
    return _conv_transpose(c, x, w, b), (x, w, b)


def _conv_transpose_bwd(c: Correlation, saved: Any, delta: Array) -> Any:
    """δ_x = conv(δ, w); ∂E/∂w = δ ⋆ x; ∂E/∂b = Σ δ."""
    x, w, b = saved
    delta_x = conv_core(c, delta, w, None).astype(x.dtype)
    grad_w = kernel_grad(c, delta, x).astype(w.dtype)
    grad_b = None if b is None else sum_pixels(delta).astype(b.dtype)
    return delta_x, grad_w, grad_b


_conv_transpose.defvjp(_conv_transpose_fwd, _conv_transpose_bwd)


def _conv_transpose_reference(c: Correlation, x: Array, w: Array, b: Array | None) -> Array:
    """`conv_transpose` in stock JAX: a convolution of x, dilated by the stride, with the flipped kernel."""
    win = c.window
    # Pad to the full result as far as needed. If `conv` pads more than the kernel's reach, crop the rest.
    starts = [extent - 1 - lo for extent, (lo, _) in zip(win.extent, win.padding, strict=True)]
    full = [(n - 1) * s + e for n, s, e in zip(x.shape[1:-1], win.stride, win.extent, strict=True)]
    ends = [n + lo - f + e - 1 for n, (lo, _), f, e in zip(win.shape, win.padding, full, win.extent, strict=True)]
    pads = tuple((max(start, 0), max(end, 0)) for start, end in zip(starts, ends, strict=True))
    product = functools.partial(
        lowering.convolve,
        c,
        padding=padding_that_xla_accepts(win, pads),
        x_dilation=win.stride,
        w_dilation=win.dilation,
        groups=c.groups,
    )
    y = _run_reference(c, product, x, flip(w, c.groups))
    for dim, (start, n) in enumerate(zip(starts, win.shape, strict=True)):
        y = lax.slice_in_dim(y, max(-start, 0), max(-start, 0) + n, axis=dim + 1)
    return _add_bias(y, b)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def sum_pixels(delta: Array) -> Array:
    """Σ over batch and space, one number per channel; 16-bit floats are summed in float32."""
    return jnp.sum(delta, range(delta.ndim - 1))


def _add_bias(y: Array, b: Array | None) -> Array:
    """Return y + b in y's dtype, or y if b is None."""
    return y if b is None else y + expand_rank(b.astype(y.dtype), y)


# ---------------------------------------------------------------------------------------------------------------------
# Padding that repeats the input instead of adding zeros


def _extend_plain(mode: str, widths: tuple[tuple[int, int], ...], x: Array) -> Array:
    """Extend the input past its borders by its mirror image, its last element or its periodic repetition."""
    modes = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}
    return jnp.pad(x, ((0, 0), *widths, (0, 0)), mode=modes[mode])


def _fold_plain(mode: str, widths: tuple[tuple[int, int], ...], delta: Array) -> Array:
    """δ_x[i] = Σ δ over every position that shows element i, the adjoint of `_extend_plain`.

    16-bit δ are summed in float32, although each summand has already been rounded.
    """
    dtype, delta = delta.dtype, to_accumulator(delta)
    for axis, (lo, hi) in enumerate(widths, start=1):
        n = delta.shape[axis] - lo - hi
        part = functools.partial(lax.slice_in_dim, delta, axis=axis)
        before, inner, after = part(0, lo), part(lo, lo + n), part(lo + n, lo + n + hi)
        if mode == "REFLECT":
            before = pad_axis(lax.rev(before, (axis,)), axis, 1, n - 1 - lo)
            after = pad_axis(lax.rev(after, (axis,)), axis, n - 1 - hi, 1)
        elif mode == "CIRCULAR":
            before, after = pad_axis(before, axis, n - lo, 0), pad_axis(after, axis, 0, n - hi)
        else:
            before = pad_axis(before.sum(axis, keepdims=True), axis, 0, n - 1)
            after = pad_axis(after.sum(axis, keepdims=True), axis, n - 1, 0)
        delta = inner + before + after
    return delta.astype(dtype)


_extend, _fold = adjoint_pair(_extend_plain, _fold_plain, static=2)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def correlation_of(
    op: str,
    x: Array,
    w: Array,
    stride: PerDim,
    padding: Padding,
    dilation: PerDim,
    groups: int,
    dtype: DTypeLike | None,
    precision: Any,
    rule: Rule | None = None,
) -> tuple[Array, Correlation]:
    """Return the input, extended if the padding repeats it, and the static part of the call."""
    spatial = spatial_dims(op, x)
    shapes = f"x {x.shape}, w {w.shape}"
    if w.ndim != x.ndim:
        raise bad_value(op, "w", f"(*K, I/groups, O) with {len(spatial)} spatial dims, like x", shapes)
    groups = static_int(op, "groups", groups, least=1)
    inputs, outputs = x.shape[-1], w.shape[-1]
    if inputs % groups or outputs % groups:
        raise bad_value(op, "groups", f"a divisor of the {inputs} input and {outputs} output channels", groups)
    if w.shape[-2] * groups != inputs:
        expected = f"(*K, {inputs // groups}, O) for an x with {inputs} channels and groups={groups}"
        raise bad_value(op, "w", expected, shapes)
    slide = functools.partial(
        window,
        op,
        size=w.shape[:-2],
        stride=stride,
        dilation=dilation,
        noun="kernel size",
        accepts=PADDINGS + PADDING_MODES,
    )
    result, precision = _result_dtype(op, x.dtype if dtype is None else dtype), _precision(op, precision)
    if isinstance(padding, str) and padding.upper() in PADDING_MODES:
        mode, extend = padding.upper(), _extend_plain if rule is autodiff else _extend
        widths = _repeat_widths(op, mode, slide(spatial, padding="SAME"))
        x, padding = on_any_mesh(functools.partial(extend, mode), widths, x), "VALID"
    return x, Correlation(slide(x.shape[1:-1], padding=padding), groups, result, precision)


def transposed_correlation_of(
    op: str,
    x: Array,
    w: Array,
    stride: PerDim,
    padding: Padding,
    output_padding: PerDim,
    dilation: PerDim,
    groups: int,
    dtype: DTypeLike | None,
    precision: Any,
) -> Correlation:
    """Return the static part of the `conv` that maps the output to x."""
    spatial = spatial_dims(op, x)
    ndim, inputs, shapes = len(spatial), x.shape[-1], f"x {x.shape}, w {w.shape}"
    if w.ndim != x.ndim:
        raise bad_value(op, "w", f"(*K, O/groups, I) with {ndim} spatial dims, like x", shapes)
    groups = static_int(op, "groups", groups, least=1)
    if w.shape[-1] != inputs:
        raise bad_value(op, "w", f"(*K, O/groups, {inputs}) for an x with {inputs} channels", shapes)
    if inputs % groups:
        raise bad_value(op, "groups", f"a divisor of the {inputs} input channels", groups)
    s, k = positive(op, "stride", stride, ndim), positive(op, "kernel size", w.shape[:-2], ndim)
    d = positive(op, "dilation", dilation, ndim)
    extra = static_ints(op, "output_padding", output_padding, ndim)
    if any(not 0 <= e < max(pair) for e, *pair in zip(extra, s, d, strict=True)):
        expected = f"{ints(output_padding, '>= 0')} and less than the stride {s} or the dilation {d}"
        raise bad_value(op, "output_padding", expected, repr(output_padding))
    # The sizes for "SAME"; the other paddings ignore them.
    sizes = tuple(n * step for n, step in zip(spatial, s, strict=True))
    unpadded = Window(sizes, k, s, ((0, 0),) * ndim, d)
    pads = pad_widths(op, padding, unpadded)
    if isinstance(padding, str) and padding.upper() in ("SAME", "SAME_LOWER"):
        if any(extra):
            raise bad_value(op, "output_padding", f"0 with padding {padding!r}", repr(output_padding))
    else:
        sizes = tuple(
            (n - 1) * step + extent - lo - hi + more
            for n, step, extent, (lo, hi), more in zip(spatial, s, unpadded.extent, pads, extra, strict=True)
        )
    if min(sizes) < 1:
        expected, got = "small enough that the result has spatial dims >= 1", f"{pads} with spatial dims {sizes}"
        raise bad_value(op, "padding", expected, got)
    not_too_many(op, "the result", sizes)
    result, precision = _result_dtype(op, x.dtype if dtype is None else dtype), _precision(op, precision)
    return Correlation(Window(sizes, k, s, pads, d), groups, result, precision)


def _bias(op: str, w: Array, b: ArrayLike | None, outputs: int) -> Array | None:
    if b is None:
        return None
    _, b = arrays(op, w=w, b=b)
    if b.shape != (outputs,):
        raise bad_value(op, "b", f"of shape {(outputs,)}, one number for each output channel", b.shape)
    return b


def _result_dtype(op: str, dtype: DTypeLike) -> np.dtype:
    argument, expected = "preferred_element_type", "a floating dtype"
    try:
        result = np.dtype(dtype)
    except TypeError:
        raise bad_type(op, argument, expected, repr(dtype)) from None
    if not jnp.issubdtype(result, jnp.floating):
        raise bad_type(op, argument, expected, result)
    return result


def _repeat_widths(op: str, mode: str, same: Window) -> tuple[tuple[int, int], ...]:
    """Return the widths by which the input is extended; raise ValueError if it would have to be repeated twice."""
    widths, spatial = same.padding, same.shape
    most = tuple(n if mode != "REFLECT" else n - 1 for n in spatial)
    if mode != "REPLICATE" and any(max(pair) > m for pair, m in zip(widths, most, strict=True)):
        raise bad_value(op, f"padding {mode!r}", f"at most {most} for spatial dims {spatial}", widths)
    return widths


def _precision(op: str, precision: Any) -> Any:
    """Return the precision as a hashable value that `jax.lax` accepts."""
    try:
        if precision is None or isinstance(precision, lax.Precision | lax.DotAlgorithm | lax.DotAlgorithmPreset):
            return precision
        if isinstance(precision, str):
            return lax.Precision(precision)
        for_x, for_w = precision
        return lax.Precision(for_x), lax.Precision(for_w)
    except (TypeError, ValueError):
        raise bad_value(
            op, "precision", "None, 'default', 'high', 'highest' or a jax.lax.Precision", repr(precision)
        ) from None


def _channels_last(
    op: str, x: Array, w: Array, layouts: Sequence[str] | None
) -> tuple[Array, Array, tuple[int, ...] | None]:
    """Return ``x`` and ``w`` in the channels-last layout, and the permutation back to the caller's layout for y."""
    if layouts is None:
        return x, w, None
    listed = isinstance(layouts, list | tuple)
    if not listed or len(layouts) != 3 or not all(isinstance(layout, str) for layout in layouts):
        raise bad_value(op, "dimension_numbers", "three strings such as ('NCHW', 'OIHW', 'NCHW')", repr(layouts))
    x_layout, w_layout, y_layout = layouts
    space = "".join(d for d in w_layout if d not in "OI")
    for name, layout, array, letters in (("x", x_layout, x, "NC"), ("w", w_layout, w, "OI"), ("y", y_layout, x, "NC")):
        if sorted(layout) != sorted(letters + space) or len(set(layout)) != len(layout):
            expected = f"the {len(letters + space)} letters {letters + space!r}"
            raise bad_value(op, "dimension_numbers", f"{expected} for {name}", f"{layout!r} of {tuple(layouts)!r}")
        if len(layout) != array.ndim:
            raise bad_value(op, name, f"{len(layout)} dims, as dimension_numbers {tuple(layouts)!r}", array.shape)
    x = jnp.transpose(x, [x_layout.index(d) for d in f"N{space}C"])
    w = jnp.transpose(w, [w_layout.index(d) for d in f"{space}IO"])
    return x, w, tuple(f"N{space}C".index(d) for d in y_layout)
