"""Elementwise activations: y = g(x), so that δ_x = δ ∘ g'(x) (lecture §3 and §6).

`relu` is written out. The others share one rule and a table of g and g'. The forward pass saves the factor that
multiplies δ, so nothing is recomputed in the backward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.arguments import arrays, bad_value, static_bool, static_float
from jaxcnn.kernels.dtypes import accumulator, to_accumulator, widened_on_tpu
from jaxcnn.kernels.elementwise import erfc, over_sqrt, over_square
from jaxcnn.kernels.materialize import is_positive, materialize, materialize_if_small
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp


def relu(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Rectified linear unit: ``y = max(x, 0)``.

    Backward: ``δ_x = δ ∘ g'(x)`` with g'(x) = 1 where x > 0 and 0 elsewhere, including at 0 (lecture §6, erratum 7).

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.relu(jnp.array([-1.0, 0.0, 2.0]))
    Array([0., 0., 2.], dtype=float32)
    """
    (x,) = arrays("relu", x=x)
    return apply_rule(relu_core, rule, relu_reference, "relu")(None, x)


@custom_vjp
def relu_core(static: None, x: Array) -> Array:
    """`relu`, with its rule."""
    return jnp.maximum(x, 0)


def _relu_fwd(static: None, x: Array) -> Any:  # the residual is the one bit that the rule needs
    y = materialize(relu_core(None, x))  # otherwise XLA:CPU computes x again for the bit
    return y, materialize(is_positive(y))


def _relu_bwd(static: None, positive: Array, delta: Array) -> Any:
    """δ_x = δ ∘ g'(x), with g'(x) = 1 where x > 0 and 0 elsewhere."""
    return (jnp.where(positive, delta, 0),)


relu_core.defvjp(_relu_fwd, _relu_bwd)


def relu_reference(static: None, x: Array) -> Array:
    """`relu` in stock JAX."""
    return jax.nn.relu(x)


# ---------------------------------------------------------------------------------------------------------------------
# The table: g, the residual (g' itself, unless something smaller determines it), and δ_x as a function of the residual.
# c is the op's constant.


@dataclasses.dataclass(frozen=True)
class Activation:
    """A row of the table with its constant: the static part of a call."""

    name: str
    constant: float = 0.0


def _multiply(slope: Array, delta: Array, c: Array) -> Array:
    return delta * slope


def _mask(inside: Array, delta: Array, c: Array) -> Array:
    return jnp.where(inside, delta, 0)


@dataclasses.dataclass(frozen=True)
class _Row:
    g: Callable[[Array, float], Array]
    residual: Callable[[Array, Array, float], Array]
    delta_x: Callable[[Array, Array, Array], Array] = _multiply
    #: Whether x is not widened to float32 before g and the residual, which then compare and select in 16 bits: XLA:TPU
    #: joins both in one kernel only if they do not convert x.
    takes_16_bits: bool = False


_INV_SQRT_2PI = 0.3989422804014327
_INV_SQRT_2 = 0.7071067811865476
_SQRT_2_PI = 0.7978845608028654
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def _gelu_slope(x: Array, y: Array, c: float) -> Array:
    """g'(x) = Φ(x) + x·φ(x), with φ and Φ the normal density and distribution."""
    z = -x * _INV_SQRT_2
    return _normal(x) + x * _INV_SQRT_2PI * jnp.exp(-(z * z))  # written as in erfc, so that XLA computes it once


def _normal(x: Array) -> Array:
    """Φ(x), by erfc, which stays accurate where Φ is small."""
    return 0.5 * erfc(-x * _INV_SQRT_2)


def _clip(x: Array, low: float, high: float) -> Array:
    """Clip x to [low, high] and keep NaN. Autodiff of this gives `_between` as well."""
    return jnp.where(x <= low, _constant_like(low, x), jnp.where(x >= high, _constant_like(high, x), x))


def _between(x: Array, low: float, high: float) -> Array:
    """Whether low < x < high, both ends excluded."""
    return (x > low) & (x < high)


def _constant_like(c: float, x: Array) -> Array:
    return jnp.asarray(c, x.dtype)


def _silu_slope(x: Array, y: Array, c: float) -> Array:
    """g'(x) = s + x·s·(1 − s), with s = sigmoid(x)."""
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_tanh(x: Array, c: float) -> Array:
    return x * (1 + jnp.tanh(_SQRT_2_PI * (x + 0.044715 * x**3))) / 2


def _gelu_tanh_slope(x: Array, y: Array, c: float) -> Array:
    """g'(x) = (1 + t)/2 + x·(1 − t²)·u'/2, with t = tanh u, u = √(2/π)·(x + 0.044715·x³)."""
    t = jnp.tanh(_SQRT_2_PI * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x * (1 - t * t) * _SQRT_2_PI * (1 + 3 * 0.044715 * x * x) / 2


def _hard_swish_delta(x: Array, delta: Array) -> Array:
    """δ∘g'(x) with g'(x) = 0 up to −3, x/3 + ½ between, 1 from 3 on.

    The two constant cases select rather than multiply, so that δ may be infinite.
    """
    slope = _cast_like(x, _widen(_clip(x, -3, 3)) / 3 + 0.5)
    return jnp.where(x >= 3, delta, jnp.where(x > -3, delta * slope, 0))


def _mish(x: Array, c: float) -> Array:
    """x·t, with t = n/d."""
    _, _, n, d = _mish_parts(x)
    return x * (n / d)


def _mish_slope(x: Array, y: Array, c: float) -> Array:
    """g'(x) = t + x·(1 − t²)·sigmoid(x), with t = n/d and (1 − t²)·sigmoid(x) = 4e(1 + e)w/d²."""
    e, w, n, d = _mish_parts(x)
    return over_square(n * d + 4 * x * e * (1 + e) * w, d)


def _mish_parts(x: Array) -> tuple[Array, Array, Array, Array]:
    """e, w, n, d with e = exp(−|x|) and tanh(log(1 + eˣ)) = n/d: a single exponential, which cannot overflow.

    With E = eˣ the quotient is (E² + 2E)/(E² + 2E + 2). Where x > 0, both are divided by E², and w is e instead of 1.
    """
    e = jnp.exp(jnp.where(x > 0, -x, x))
    w = jnp.where(x > 0, e, 1)  # XLA rewrites e·e as a second exponential, but not w·w
    n = jnp.where(x > 0, 1 + 2 * e, e * (2 + e))
    return e, w, n, n + 2 * w * w


def _squareplus(x: Array, c: float) -> Array:
    """(x + r)/2 with r = √(x² + c); where x < 0 as c/(2(r − x)), which avoids cancellation."""
    r = jnp.sqrt(x * x + c)
    return jnp.where(x > 0, (x + r) / 2, c / (2 * (r - jnp.minimum(x, 0))))


TABLE = {
    # name:        g(x)                                     residual from x and y,    δ_x from residual and δ
    "leaky_relu": _Row(lambda x, c: jnp.where(x > 0, x, _cast_like(x, c * _widen(x))),
                       lambda x, y, c: x > 0, lambda positive, delta, c: jnp.where(positive, delta, c * delta),
                       takes_16_bits=True),
    "relu6": _Row(lambda x, c: _clip(x, 0, 6), lambda x, y, c: _between(y, 0, 6), _mask, takes_16_bits=True),
    "hard_tanh": _Row(lambda x, c: _clip(x, -1, 1), lambda x, y, c: _between(y, -1, 1), _mask, takes_16_bits=True),
    "hard_sigmoid": _Row(lambda x, c: _clip(x + 3, 0, 6) / 6,
                         lambda x, y, c: _between(x, -3, 3), lambda inside, delta, c: jnp.where(inside, delta / 6, 0)),
    "sigmoid": _Row(lambda x, c: jax.nn.sigmoid(x), lambda x, y, c: y, lambda y, delta, c: delta * (y * (1 - y))),
    "tanh": _Row(lambda x, c: jnp.tanh(x), lambda x, y, c: y, lambda y, delta, c: delta * ((1 - y) * (1 + y))),
    "elu": _Row(lambda x, c: jnp.where(x > 0, x, c * jnp.expm1(jnp.minimum(x, 0))),
                lambda x, y, c: jnp.where(x > 0, 1, c * jnp.exp(jnp.minimum(x, 0)))),
    "selu": _Row(lambda x, c: _SELU_SCALE * jnp.where(x > 0, x, _SELU_ALPHA * jnp.expm1(jnp.minimum(x, 0))),
                 lambda x, y, c: _SELU_SCALE * jnp.where(x > 0, 1, _SELU_ALPHA * jnp.exp(jnp.minimum(x, 0)))),
    "celu": _Row(lambda x, c: jnp.where(x > 0, x, c * jnp.expm1(jnp.minimum(x, 0) / c)),
                 lambda x, y, c: jnp.where(x > 0, 1, jnp.exp(jnp.minimum(x, 0) / c))),
    "hard_swish": _Row(lambda x, c: x * (_clip(x + 3, 0, 6) / 6),
                       lambda x, y, c: x, lambda x, delta, c: _hard_swish_delta(x, delta)),
    "gelu": _Row(lambda x, c: x * _normal(x), _gelu_slope),
    "gelu_tanh": _Row(_gelu_tanh, _gelu_tanh_slope),
    "mish": _Row(_mish, _mish_slope),
    "softsign": _Row(lambda x, c: x / (1 + jnp.abs(x)), lambda x, y, c: 1 / jnp.square(1 + jnp.abs(x))),
    "squareplus": _Row(_squareplus, lambda x, y, c: over_sqrt(y, x * x + c)),
    "log_sigmoid": _Row(lambda x, c: -jnp.logaddexp(-x, 0), lambda x, y, c: jax.nn.sigmoid(-x)),
    "silu": _Row(lambda x, c: x * jax.nn.sigmoid(x), _silu_slope),
    "softplus": _Row(lambda x, c: jnp.logaddexp(x, 0), lambda x, y, c: jax.nn.sigmoid(x)),
}  # fmt: skip


def _activate(op: str, x: ArrayLike, rule: Rule | None, constant: float = 0.0, form: str | None = None) -> Array:
    (x,) = arrays(op, x=x)
    return apply_rule(_activation, rule, _activation_reference, op)(Activation(form or op, constant), x)


@custom_vjp
def _activation(activation: Activation, x: Array) -> Array:
    return _activation_reference(activation, x)


def _activation_fwd(activation: Activation, x: Array) -> Any:
    y = _activation(activation, x)
    row = TABLE[activation.name]
    if row.delta_x is _mask:
        y = materialize(y)  # as in `relu`
    seen, result = (x, y) if row.takes_16_bits else (_widen(x), _widen(y))
    residual = row.residual(seen, result, activation.constant)
    return y, materialize_if_small(residual if residual.dtype == bool else _cast_like(x, residual))


def _activation_bwd(activation: Activation, residual: Array, delta: Array) -> Any:
    """δ_x = δ ∘ g'(x)."""
    if TABLE[activation.name].takes_16_bits:
        return (_delta_x(activation, residual, delta),)
    return (widened_on_tpu(_delta_x, activation, residual, delta),)


_activation.defvjp(_activation_fwd, _activation_bwd)


def _delta_x(activation: Activation, residual: Array, delta: Array) -> Array:
    return TABLE[activation.name].delta_x(residual, delta, _constant_like(activation.constant, delta))


def _activation_reference(activation: Activation, x: Array) -> Array:
    row = TABLE[activation.name]
    return _cast_like(x, row.g(x if row.takes_16_bits else _widen(x), activation.constant))


def _widen(x: Array) -> Array:
    """Return 16-bit floats in float32, where x² and eˣ do not overflow; others unchanged, including weak types."""
    return x if accumulator(x.dtype) == x.dtype else to_accumulator(x)


def _cast_like(x: Array, y: Array) -> Array:
    return y if y.dtype == x.dtype else y.astype(x.dtype)


def leaky_relu(x: ArrayLike, *, negative_slope: float = 0.01, rule: Rule | None = None) -> Array:
    """Leaky ReLU: ``y = x`` where x > 0, else ``negative_slope·x``.

    Backward: ``δ_x = δ ∘ (1 or negative_slope)``.

    Args:
        x: array of any shape and float dtype.
        negative_slope: slope for x <= 0, a finite number; static.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype, or negative_slope is not a number.
        ValueError: if negative_slope is not finite.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.leaky_relu(jnp.array([-1.0, 2.0]), negative_slope=0.5)
    Array([-0.5,  2. ], dtype=float32)
    """
    return _activate("leaky_relu", x, rule, _finite("leaky_relu", "negative_slope", negative_slope))


def elu(x: ArrayLike, *, alpha: float = 1.0, rule: Rule | None = None) -> Array:
    """Exponential linear unit: ``y = x`` where x > 0, else ``α(eˣ − 1)``.

    Backward: ``δ_x = δ ∘ (1 or α·eˣ)``.

    Args:
        x: array of any shape and float dtype.
        alpha: α, a finite number; static.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype, or alpha is not a number.
        ValueError: if alpha is not finite.

    Source: Clevert et al. 2015.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.elu(jnp.array([0.0, 2.0]))
    Array([0., 2.], dtype=float32)
    """
    return _activate("elu", x, rule, _finite("elu", "alpha", alpha))


def gelu(x: ArrayLike, *, approximate: bool = False, rule: Rule | None = None) -> Array:
    """Gaussian error linear unit: ``y = x·Φ(x)``.

    If ``approximate``, Φ(x) is replaced by (1 + t)/2 with t = tanh u, u = √(2/π)·(x + 0.044715·x³), and the derivative
    is that of this approximation.

    Backward: ``δ_x = δ ∘ (Φ(x) + x·φ(x))``, or ``δ_x = δ ∘ ((1 + t)/2 + x(1 − t²)u'/2)`` if ``approximate``.

    Args:
        x: array of any shape and float dtype.
        approximate: whether to use the tanh approximation; static.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype, or approximate is not a bool.

    Source: Hendrycks & Gimpel 2016.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.gelu(jnp.array([0.0]))
    Array([0.], dtype=float32)
    """
    form = "gelu_tanh" if static_bool("gelu", "approximate", approximate) else None
    return _activate("gelu", x, rule, form=form)


def selu(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Scaled ELU: ``y = λx`` where x > 0, else ``λα(eˣ − 1)``.

    λ ≈ 1.0507 and α ≈ 1.6733 preserve mean 0 and variance 1 from layer to layer.

    Backward: ``δ_x = δ ∘ (λ or λα·eˣ)``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    Source: Klambauer et al. 2017.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.selu(jnp.array([0.0, 1.0]))
    Array([0.      , 1.050701], dtype=float32)
    """
    return _activate("selu", x, rule)


def celu(x: ArrayLike, *, alpha: float = 1.0, rule: Rule | None = None) -> Array:
    """Continuously differentiable ELU: ``y = x`` where x > 0, else ``α(e^(x/α) − 1)``.

    Backward: ``δ_x = δ ∘ (1 or e^(x/α))``.

    Args:
        x: array of any shape and float dtype.
        alpha: α, a finite number other than 0; static.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype, or alpha is not a number.
        ValueError: if alpha is 0 or not finite.

    Source: Barron 2017.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.celu(jnp.array([0.0, 2.0]))
    Array([0., 2.], dtype=float32)
    """
    constant = _finite("celu", "alpha", alpha)
    if constant == 0:
        raise bad_value("celu", "alpha", "a finite number other than 0", alpha)
    return _activate("celu", x, rule, constant)


def relu6(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """ReLU clipped at 6: ``y = min(max(x, 0), 6)``.

    Backward: ``δ_x = δ ∘ [0 < x < 6]``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    Source: Howard et al. 2017.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.relu6(jnp.array([-1.0, 2.0, 8.0]))
    Array([0., 2., 6.], dtype=float32)
    """
    return _activate("relu6", x, rule)


def hard_tanh(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Piecewise-linear approximation of tanh: ``y = min(max(x, −1), 1)``.

    Backward: ``δ_x = δ ∘ [−1 < x < 1]``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.hard_tanh(jnp.array([-3.0, 0.5, 3.0]))
    Array([-1. ,  0.5,  1. ], dtype=float32)
    """
    return _activate("hard_tanh", x, rule)


def hard_sigmoid(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Piecewise-linear approximation of the sigmoid: ``y = min(max(x + 3, 0), 6)/6``.

    Backward: ``δ_x = δ ∘ [−3 < x < 3]/6``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.hard_sigmoid(jnp.array([-4.0, 0.0, 4.0]))
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    return _activate("hard_sigmoid", x, rule)


def hard_swish(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """SiLU with a piecewise-linear sigmoid: ``y = x·hard_sigmoid(x)``.

    Backward: ``δ_x = δ ∘ (0 up to x = −3, x/3 + ½, 1 from x = 3 on)``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    Source: Howard et al. 2019.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.hard_swish(jnp.array([-4.0, 0.0, 4.0]))
    Array([-0.,  0.,  4.], dtype=float32)
    """
    return _activate("hard_swish", x, rule)


def mish(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Mish: ``y = x·t, t = tanh(log(1 + eˣ))``.

    Backward: ``δ_x = δ ∘ (t + x(1 − t²)·sigmoid(x))``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    Source: Misra 2019.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.mish(jnp.array([0.0]))
    Array([0.], dtype=float32)
    """
    return _activate("mish", x, rule)


def softsign(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Softsign: ``y = x/(1 + |x|)``.

    Backward: ``δ_x = δ ∘ 1/(1 + |x|)²``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.softsign(jnp.array([-1.0, 3.0]))
    Array([-0.5 ,  0.75], dtype=float32)
    """
    return _activate("softsign", x, rule)


def squareplus(x: ArrayLike, *, b: float = 4.0, rule: Rule | None = None) -> Array:
    """Squareplus, a softplus without an exponential: ``y = (x + √(x² + b))/2``.

    Backward: ``δ_x = δ ∘ y/√(x² + b)``.

    Args:
        x: array of any shape and float dtype.
        b: a finite number > 0; static.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype, or b is not a number.
        ValueError: if b is not finite or not > 0.

    Source: Barron 2021.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.squareplus(jnp.array([0.0]))
    Array([1.], dtype=float32)
    """
    constant = _finite("squareplus", "b", b)
    if constant <= 0:
        raise bad_value("squareplus", "b", "a finite number > 0", b)
    return _activate("squareplus", x, rule, constant)


def log_sigmoid(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Logarithm of the sigmoid: ``y = −log(1 + e⁻ˣ)``.

    Backward: ``δ_x = δ ∘ sigmoid(−x)``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.log_sigmoid(jnp.array([100.0, -100.0]))
    Array([  -0., -100.], dtype=float32)
    """
    return _activate("log_sigmoid", x, rule)


def silu(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Sigmoid linear unit (swish): ``y = x·s`` with s = sigmoid(x).

    Backward: ``δ_x = δ ∘ s(1 + x(1 − s))``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    Source: Elfwing et al. 2017.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.silu(jnp.array([0.0]))
    Array([0.], dtype=float32)
    """
    return _activate("silu", x, rule)


def softplus(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Softplus: ``y = log(1 + eˣ)``.

    Backward: ``δ_x = δ ∘ sigmoid(x)``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.softplus(jnp.array([100.0]))
    Array([100.], dtype=float32)
    """
    return _activate("softplus", x, rule)


def sigmoid(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Logistic sigmoid: ``y = 1 / (1 + e⁻ˣ)``.

    Backward: ``δ_x = δ ∘ y(1 − y)``, the lecture's g' = g(1 − g) (§3).

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.sigmoid(jnp.array([0.0]))
    Array([0.5], dtype=float32)
    """
    return _activate("sigmoid", x, rule)


def tanh(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Hyperbolic tangent: ``y = tanh x``.

    Backward: ``δ_x = δ ∘ (1 − y²)``.

    Args:
        x: array of any shape and float dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        TypeError: if x is not an array of a float dtype.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.tanh(jnp.array([0.0]))
    Array([0.], dtype=float32)
    """
    return _activate("tanh", x, rule)


def _finite(op: str, argument: str, value: Any) -> float:
    number = static_float(op, argument, value)
    if not abs(number) < float("inf"):
        raise bad_value(op, argument, "a finite number", value)
    return number
