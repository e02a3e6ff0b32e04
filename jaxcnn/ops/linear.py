"""The fully connected layer: δ_l = w δ_{l+1}, and ∂E/∂w is the product of δ with the layer's input (lecture §3).

Also `add`, the sum at the end of a residual block, as an op so that its backward rule can be replaced.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.arguments import arrays, bad_value
from jaxcnn.kernels.reductions import sum_of_products
from jaxcnn.kernels.shapes import expand_rank
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp


def dense(x: ArrayLike, w: ArrayLike, b: ArrayLike | None = None, *, rule: Rule | None = None) -> Array:
    """Fully connected layer: ``y = x·w + b``.

    Backward: ``δ_x = δ·wᵀ``, ``∂E/∂w = xᵀ·δ``, ``∂E/∂b = Σ δ`` (lecture §3).

    Args:
        x: input ``(…, I)``, any float dtype.
        w: weights ``(I, O)``, of the same dtype.
        b: bias ``(O,)``; None for no bias.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(…, O)``.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if an argument is not an array of a float dtype, or the dtypes differ.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.dense(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(4)).shape
    (2, 4)
    """
    x, w = arrays("dense", x=x, w=w)
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise bad_value("dense", "x and w", "(…, I) and (I, O)", f"x {x.shape}, w {w.shape}")
    if b is not None:
        _, b = arrays("dense", w=w, b=b)
        if b.shape != w.shape[1:]:
            raise bad_value("dense", "b", f"of shape {w.shape[1:]}, one number for each output", b.shape)
    return apply_rule(_dense, rule, _dense_reference)(None, x, w, b)


@custom_vjp
def _dense(static: None, x: Array, w: Array, b: Array | None) -> Array:
    return _dense_reference(None, x, w, b)


def _dense_fwd(static: None, x: Array, w: Array, b: Array | None) -> Any:
    return _dense(None, x, w, b), (x, w, b)


def _dense_bwd(static: None, saved: Any, delta: Array) -> Any:
    """δ_x = δ·wᵀ; ∂E/∂w = xᵀ·δ; ∂E/∂b = Σ δ."""
    x, w, b = saved
    rows = delta.reshape(-1, delta.shape[-1])
    delta_x = delta @ w.T
    grad_w = sum_of_products(x.reshape(-1, x.shape[-1]), rows)
    grad_b = None if b is None else rows.sum(0)
    return delta_x, grad_w, grad_b


_dense.defvjp(_dense_fwd, _dense_bwd)


def _dense_reference(static: None, x: Array, w: Array, b: Array | None) -> Array:
    y = jnp.matmul(x, w)
    return y if b is None else y + expand_rank(b, y)


def add(x: ArrayLike, y: ArrayLike, *, rule: Rule | None = None) -> Array:
    """The sum ``z = x + y`` of two arrays.

    Backward: ``δ_x = δ_y = δ``. A replacement rule determines how δ is divided between the two.

    Args:
        x: array of any shape and float dtype.
        y: array of the same shape and dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if x or y is not an array of a float dtype, or the dtypes differ.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxcnn import rules
    >>> from jaxcnn.ops.linear import add
    >>> z, pull = jax.vjp(lambda x, y: add(x, y, rule=rules.Epsilon()), jnp.array([1.0]), jnp.array([3.0]))
    >>> [round(float(share[0]), 3) for share in pull(z)]  # of z = 1 + 3
    [1.0, 3.0]
    """
    x, y = arrays("add", x=x, y=y)
    if x.shape != y.shape:
        raise bad_value("add", "x and y", "of one shape", f"x {x.shape}, y {y.shape}")
    return apply_rule(_add, rule, _add_reference)(None, x, y)


@custom_vjp
def _add(static: None, x: Array, y: Array) -> Array:
    return x + y


def _add_fwd(static: None, x: Array, y: Array) -> Any:
    return _add(None, x, y), None


def _add_bwd(static: None, saved: None, delta: Array) -> Any:
    """δ_x = δ_y = δ."""
    return delta, delta


_add.defvjp(_add_fwd, _add_bwd)


def _add_reference(static: None, x: Array, y: Array) -> Array:
    return x + y
