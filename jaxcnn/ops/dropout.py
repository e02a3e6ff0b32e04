"""Dropout, for training (lecture §2)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.arguments import arrays, bad_value, one_key, static_float
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp


def dropout(x: ArrayLike, rate: float, key: Array, *, rule: Rule | None = None) -> Array:
    """Dropout: each element is zero with probability ``rate``; the others are scaled by ``1 / (1 − rate)``.

    Backward: ``δ_x = δ ∘ mask / (1 − rate)``. The residual is the key, from which the mask is drawn again.

    Args:
        x: array of any shape and float dtype.
        rate: probability in [0, 1] that an element is dropped; static. With 1 the output and δ_x are 0.
        key: a key from `jax.random.key`.
        rule: replacement for the backward rule; see `jaxcnn.rules`. Its cotangents are ``(delta_x, None)``.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        ValueError: if rate is outside [0, 1].
        TypeError: if x is not an array of a float dtype, rate is not a number, or key is not a typed key.

    Source: Srivastava et al. 2014, in the inverted form, which leaves evaluation unchanged.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> sorted({float(v) for v in jaxcnn.dropout(jnp.ones(100), 0.75, jax.random.key(0))})
    [0.0, 4.0]
    """
    (x,) = arrays("dropout", x=x)
    rate, key = probability("dropout", rate), one_key("dropout", key)
    if rate == 0 and rule is None:
        return x
    return apply_rule(_dropout, rule, _dropout_reference)(rate, x, key)


@custom_vjp
def _dropout(rate: float, x: Array, key: Array) -> Array:
    return _dropout_reference(rate, x, key)


def _dropout_fwd(rate: float, x: Array, key: Array) -> Any:
    return _dropout(rate, x, key), key


def _dropout_bwd(rate: float, key: Array, delta: Array) -> Any:
    """δ_x = δ ∘ mask / (1 − rate): the op is its own adjoint."""
    return _dropout(rate, delta, key), None


_dropout.defvjp(_dropout_fwd, _dropout_bwd)


def _dropout_reference(rate: float, x: Array, key: Array) -> Array:
    mask = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(mask, x / (1 - rate or 1), 0)  # at rate 1 the mask is all False; avoid x / 0


def probability(op: str, rate: Any) -> float:
    """Return the rate as a float; raise ValueError if it is outside [0, 1]."""
    p = static_float(op, "rate", rate)
    if not 0 <= p <= 1:
        raise bad_value(op, "rate", "a number in [0, 1]", rate)
    return p
