"""The lecture's hidden layer as one op: "ReLU and pooling are one hidden layer" (§2), after a convolution.

The composed rule of §9, corrected (erratum 2):

    δ_l = up(δ) ∘ g'(x)        δ here is w ∗ δ_{l+1}, the δ_x of the next layer's rule
    ∂E/∂w = a ⋆ δ_l            ∂E/∂b = Σ δ_l            δ_a = w ∗ δ_l, for the previous layer

up and g' become one lookup. A code per pooled element (one byte for windows of up to 255 elements) records which
element of its window won, or that none was positive. The activation before pooling is never saved.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.arguments import arrays, bad_value
from jaxcnn.geometry import Correlation, Padding, PerDim, Window
from jaxcnn.kernels import windows
from jaxcnn.kernels.correlate import correlate
from jaxcnn.kernels.materialize import materialize_winner
from jaxcnn.kernels.shapes import expand_rank
from jaxcnn.ops import activation, convolution, pooling
from jaxcnn.ops.rule import Call, Rule, apply_rule, call_of, custom_vjp


def hidden_layer(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike,
    *,
    window: PerDim = 2,
    pool_stride: PerDim | None = None,
    pool_padding: Padding = "VALID",
    stride: PerDim = 1,
    padding: Padding = "VALID",
    dilation: PerDim = 1,
    groups: int = 1,
    precision: Any = None,
    rule: Rule | None = None,
) -> Array:
    """Hidden layer: ``max_pool(relu(conv(x, w, b)), window)`` as one op with one rule.

    Backward (lecture §9, erratum 2): ``δ_l = up(δ) ∘ g'(x)``, where up sends δ to the winner of each window and g' is 0
    where no element was positive; ``∂E/∂w = x ⋆ δ_l``; ``∂E/∂b = Σ δ_l``; ``δ_x = w ∗ δ_l``.

    The result equals the three ops applied in sequence, except that the maximum is taken before the bias is added.
    Elements of a window that only rounding would make equal therefore still differ.

    Args:
        x: input ``(N, *spatial, I)``, one to three spatial dims, any float dtype.
        w: kernel ``(*K, I/groups, O)``, of the same dtype.
        b: bias ``(O,)``, one number per output channel.
        window: size of a pooling window, an int or one per dim.
        pool_stride: step of the pooling window; default ``window``.
        pool_padding: padding of the pooling, as in `max_pool`.
        stride: step of the kernel, an int or one per spatial dim.
        padding: padding of the convolution, as in `conv`.
        dilation: distance between the kernel's taps.
        groups: as in `conv`.
        precision: as in `conv`.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *out, O)``.

    Raises:
        ValueError: if shapes or options do not fit.
        TypeError: if an argument has the wrong type or dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.hidden_layer(jnp.ones((1, 28, 28, 1)), jnp.ones((5, 5, 1, 32)), jnp.zeros(32)).shape
    (1, 12, 12, 32)
    """
    x, w, b = arrays("hidden_layer", x=x, w=w, b=b)
    x, c = convolution.correlation_of("hidden_layer", x, w, stride, padding, dilation, groups, None, precision, rule)
    if b.shape != w.shape[-1:]:
        raise bad_value("hidden_layer", "b", f"of shape {w.shape[-1:]}, one number for each output channel", b.shape)
    win = pooling.pool_window("hidden_layer", c.window.out, window, pool_stride, pool_padding, 1, False, "pool_")
    return apply_rule(_hidden_layer, rule, _hidden_layer_reference)(Hidden(c, win), x, w, b)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """The static part of a hidden layer's call: the convolution, and the pooling window over its result."""

    correlation: Correlation
    window: Window


@custom_vjp
def _hidden_layer(static: Hidden, x: Array, w: Array, b: Array) -> Array:
    return _forward(static, x, w, b)[0]


def _hidden_layer_fwd(static: Hidden, x: Array, w: Array, b: Array) -> Any:
    y, code = hidden_with_code(static, x, w, b)
    return y, (x, w, materialize_winner(code))


def _hidden_layer_bwd(static: Hidden, saved: Any, delta: Array) -> Any:
    """δ_l = up(δ) ∘ g'(x); δ_x = w ∗ δ_l, ∂E/∂w = x ⋆ δ_l, ∂E/∂b = Σ δ_l. Lecture §9, erratum 2."""
    x, w, code = saved
    c = static.correlation
    delta_l = pooling.scatter_to_winners(static.window, delta, code)
    # Σ δ_l before pooling equals Σ δ over the windows with a positive element.
    grad_b = convolution.sum_pixels(jnp.where(code == windows.nothing(static.window), 0, delta))
    return convolution.input_grad(c, delta_l, w), convolution.kernel_grad(c, x, delta_l), grad_b


_hidden_layer.defvjp(_hidden_layer_fwd, _hidden_layer_bwd)


@custom_vjp
def hidden_with_code(static: Hidden, x: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """The output of `hidden_layer`, and the code of each of its elements."""
    return _forward(static, x, w, b)


def _hidden_with_code_fwd(static: Hidden, x: Array, w: Array, b: Array) -> Any:
    y, code = hidden_with_code(static, x, w, b)
    return (y, code), (x, w, code)


def _hidden_with_code_bwd(static: Hidden, saved: Any, deltas: Any) -> Any:
    """The rule of the layer; the winners are integers and have no δ."""
    return _hidden_layer_bwd(static, saved, deltas[0])


hidden_with_code.defvjp(_hidden_with_code_fwd, _hidden_with_code_bwd)


def _forward(static: Hidden, x: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """Return ``y`` and its code: the winner of each window, or `nothing` where no element is positive."""
    # The bias is constant per channel, so the same element is largest before and after it.
    largest, winner = windows.max_and_winner(static.window, correlate(static.correlation, x, w))
    y = jnp.maximum(largest + expand_rank(b, largest), 0)
    return y, jnp.where(y > 0, winner, jnp.asarray(windows.nothing(static.window)))


def _hidden_layer_reference(static: Hidden, x: Array, w: Array, b: Array) -> Array:
    y = activation.relu_reference(None, convolution.conv_reference(static.correlation, x, w, b))
    return pooling.max_pool_reference(static.window, y)


def parts(call: Call) -> tuple[Call, Call, Call]:
    """Split a `hidden_layer` call into `conv`, `relu` and `max_pool` calls, for rules that treat them separately."""
    conv = call_of(convolution.conv_core, "conv", call.static.correlation, *call.inputs)
    relu = call_of(activation.relu_core, "relu", None, conv.output)
    return conv, relu, call_of(pooling.max_pool_core, "max_pool", call.static.window, relu.output)
