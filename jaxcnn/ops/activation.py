"""Activations: entry by entry, y = g(x), so that δ_x = δ ∘ g'(x) (lecture §3 and §6).

`relu` is written out.  The others are rows of one table of (g, g'), and share its rule.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.geometry import fail, static_float
from jaxcnn.ops.rule import Rule, arrays, with_rule


def relu(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Rectified linear unit: ``y = max(x, 0)``.

    Backward: ``δ_x = δ ∘ g'(x)`` with g'(x) = 1 where x > 0 and 0 elsewhere, also at 0 (lecture §6, erratum 7).

    Args:
        x: any shape and float dtype.
        rule: another backward half; see `jaxcnn.rules`.

    Returns: the shape and dtype of x.

    Raises: TypeError for dtypes.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.relu(jnp.array([-1.0, 0.0, 2.0]))
    Array([0., 0., 2.], dtype=float32)
    """
    (x,) = arrays("relu", x=x)
    return with_rule(_relu, rule, relu_plain)(None, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _relu(geometry: None, x: Array) -> Array:
    return jnp.maximum(x, 0)


def _relu_fwd(geometry: None, x: Array) -> Any:  # the residual is the one bit that the rule reads
    y = _relu(None, x)
    return y, y > 0


def _relu_bwd(geometry: None, positive: Array, delta: Array) -> Any:
    """δ_x = δ ∘ g'(x), with g'(x) = 1 where x > 0 and 0 elsewhere."""
    return (jnp.where(positive, delta, 0),)


_relu.defvjp(_relu_fwd, _relu_bwd)


def relu_plain(geometry: None, x: Array) -> Array:
    """ReLU in stock JAX."""
    return jax.nn.relu(x)


# ---------------------------------------------------------------------------------------------------------------------
# The table: g, then g' of what the residual keeps (x, or y where g' is shorter in y).  c is the op's constant.


@dataclasses.dataclass(frozen=True)
class Activation:
    """A row of the table with its constant, the static half of a call."""

    name: str
    constant: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Row:
    g: Callable[[Array, float], Array]
    slope: Callable[[Array, float], Array]
    keeps: str


_INV_SQRT_2PI = 0.3989422804014327
_INV_SQRT_2 = 0.7071067811865476


def _gelu_slope(x: Array, c: float) -> Array:
    """g'(x) = Φ(x) + x·φ(x), with φ and Φ the normal density and distribution."""
    return _normal(x) + x * _INV_SQRT_2PI * jnp.exp(-x * x / 2)


def _normal(x: Array) -> Array:
    """Φ(x), by erfc, which keeps its digits where Φ is small."""
    return 0.5 * jax.lax.erfc(-x * _INV_SQRT_2)


def _of(c: float, x: Array) -> Array:
    return jnp.asarray(c, x.dtype)


def _silu_slope(x: Array, c: float) -> Array:
    """g'(x) = s + x·s·(1 − s), with s = sigmoid(x)."""
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


_TABLE = {
    # name:        g(x)                                     g'                                              of
    "leaky_relu": _Row(lambda x, c: jnp.where(x > 0, x, c * x), lambda x, c: jnp.where(x > 0, 1, _of(c, x)), "x"),
    "elu": _Row(lambda x, c: jnp.where(x > 0, x, c * jnp.expm1(jnp.minimum(x, 0))),
                lambda x, c: jnp.where(x > 0, 1, c * jnp.exp(jnp.minimum(x, 0))), "x"),
    "gelu": _Row(lambda x, c: x * _normal(x), _gelu_slope, "x"),
    "silu": _Row(lambda x, c: x * jax.nn.sigmoid(x), _silu_slope, "x"),
    "softplus": _Row(lambda x, c: jnp.logaddexp(x, 0), lambda x, c: jax.nn.sigmoid(x), "x"),
    "sigmoid": _Row(lambda x, c: jax.nn.sigmoid(x), lambda y, c: y * (1 - y), "y"),
    "tanh": _Row(lambda x, c: jnp.tanh(x), lambda y, c: (1 - y) * (1 + y), "y"),
}  # fmt: skip


def _activate(op: str, x: ArrayLike, rule: Rule | None, constant: float = 0.0) -> Array:
    (x,) = arrays(op, x=x)
    return with_rule(_activation, rule, _activation_plain, op)(Activation(op, constant), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activation(activation: Activation, x: Array) -> Array:
    return _activation_plain(activation, x)


def _activation_fwd(activation: Activation, x: Array) -> Any:
    y = _activation(activation, x)
    return y, {"x": x, "y": y}[_TABLE[activation.name].keeps]


def _activation_bwd(activation: Activation, saved: Array, delta: Array) -> Any:
    """δ_x = δ ∘ g'(x)."""
    return (delta * _TABLE[activation.name].slope(saved, activation.constant),)


_activation.defvjp(_activation_fwd, _activation_bwd)


def _activation_plain(activation: Activation, x: Array) -> Array:
    return _TABLE[activation.name].g(x, activation.constant)


def leaky_relu(x: ArrayLike, *, negative_slope: float = 0.01, rule: Rule | None = None) -> Array:
    """Leaky ReLU: ``y = x`` where x > 0, else ``negative_slope·x``.  ``δ_x = δ ∘ (1 or negative_slope)``.

    x: any shape and float dtype → same.  Raises: TypeError for dtypes, ValueError for a slope that is not finite.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.leaky_relu(jnp.array([-1.0, 2.0]), negative_slope=0.5)
    Array([-0.5,  2. ], dtype=float32)
    """
    return _activate("leaky_relu", x, rule, _constant("leaky_relu", "negative_slope", negative_slope))


def elu(x: ArrayLike, *, alpha: float = 1.0, rule: Rule | None = None) -> Array:
    """Exponential linear unit: ``y = x`` where x > 0, else ``α(eˣ − 1)``.  ``δ_x = δ ∘ (1 or α·eˣ)``.

    x: any shape and float dtype → same.  Raises: TypeError for dtypes, ValueError for an alpha that is not finite.
    Source: Clevert et al. 2015.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.elu(jnp.array([0.0, 2.0]))
    Array([0., 2.], dtype=float32)
    """
    return _activate("elu", x, rule, _constant("elu", "alpha", alpha))


def gelu(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Gaussian error linear unit, exact: ``y = x·Φ(x)``.  ``δ_x = δ ∘ (Φ(x) + x·φ(x))``.

    x: any shape and float dtype → same.  Raises: TypeError for dtypes.  Source: Hendrycks & Gimpel 2016.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.gelu(jnp.array([0.0]))
    Array([0.], dtype=float32)
    """
    return _activate("gelu", x, rule)


def silu(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Sigmoid linear unit (swish): ``y = x·s``, s = sigmoid(x).  ``δ_x = δ ∘ s(1 + x(1 − s))``.

    x: any shape and float dtype → same.  Raises: TypeError for dtypes.  Source: Elfwing et al. 2017.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.silu(jnp.array([0.0]))
    Array([0.], dtype=float32)
    """
    return _activate("silu", x, rule)


def softplus(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Softplus: ``y = log(1 + eˣ)``.  ``δ_x = δ ∘ sigmoid(x)``.

    x: any shape and float dtype → same.  Raises: TypeError for dtypes.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.softplus(jnp.array([100.0]))
    Array([100.], dtype=float32)
    """
    return _activate("softplus", x, rule)


def sigmoid(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Logistic sigmoid: ``y = 1 / (1 + e⁻ˣ)``.  ``δ_x = δ ∘ y(1 − y)``, the lecture's g' = g(1 − g) (§3).

    x: any shape and float dtype → same.  Raises: TypeError for dtypes.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.sigmoid(jnp.array([0.0]))
    Array([0.5], dtype=float32)
    """
    return _activate("sigmoid", x, rule)


def tanh(x: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Hyperbolic tangent: ``y = tanh x``.  ``δ_x = δ ∘ (1 − y²)``.

    x: any shape and float dtype → same.  Raises: TypeError for dtypes.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.tanh(jnp.array([0.0]))
    Array([0.], dtype=float32)
    """
    return _activate("tanh", x, rule)


def _constant(op: str, argument: str, value: Any) -> float:
    constant = static_float(op, argument, value)
    if not abs(constant) < float("inf"):
        fail(op, f"{argument} expected a finite number, got {value}")
    return constant
