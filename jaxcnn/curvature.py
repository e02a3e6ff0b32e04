"""Products of a loss's curvature with a vector, without forming the matrix.

H = ∂²E/∂p² has one row per parameter, so only H·v is practical. Hand-written rules do not support forward mode, but
they are built from ops that have rules themselves, so reverse-over-reverse works:

    H·v = Hᵀ·v, the reverse of p ↦ ∂E/∂p        J·v = (Jᵀ)ᵀ·v, the reverse of u ↦ Jᵀ·u
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcnn.arguments import bad_type, bad_value, expect_function, expect_scalar


def hvp(loss: Callable[[Any], Array], params: Any, v: Any) -> Any:
    """Return ``H·v``, the Hessian of a loss applied to v, by reverse mode over reverse mode.

    This costs about two gradients. It is exact through max pooling and ReLU as well: both are piecewise linear, and H
    is the Hessian of the active piece. Errors of ``loss`` propagate.

    Args:
        loss: params → a scalar E.
        params: any tree of floating-point arrays.
        v: a tree like ``params``.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: if v is not a tree like ``params``.
        TypeError: if loss is not callable or does not return a floating-point scalar, or params has leaves that are not
            floating-point.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian", in reverse mode.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> def loss(p):
    ...     return jnp.sum(jaxcnn.squared_error(p["weight"], 0.0 * p["weight"])) + p["weight"][0] * p["weight"][1]
    >>> jaxcnn.hvp(loss, {"weight": jnp.zeros(2)}, {"weight": jnp.array([1.0, 0.0])})["weight"]  # H = [[2, 1], [1, 2]]
    Array([2., 1.], dtype=float32)
    """
    expect_function("hvp", "loss", loss)
    v = _validate_vector("hvp", params, v)
    expect_scalar("hvp", "the result of loss", jax.eval_shape(loss, params))
    return jax.vjp(jax.grad(loss), params)[1](v)[0]


def gauss_newton_vp(model: Callable[[Any], Any], loss: Callable[[Any], Array], params: Any, v: Any) -> Any:
    """Return ``Jᵀ·H_y·J·v``, the Gauss–Newton approximation to the Hessian of E = loss(model(params)), applied to v.

    J = ∂y/∂p, H_y = ∂²E/∂y². This is H without the curvature of the model. If the loss is convex in y, as are squared
    error and cross-entropy, it is positive semi-definite. For cross-entropy it is the Fisher matrix of the output
    distribution. The cost is about three gradients. Errors of ``model`` and ``loss`` propagate.

    Args:
        model: params → outputs y, any tree of floating-point arrays.
        loss: y → a scalar E.
        params: any tree of floating-point arrays.
        v: a tree like ``params``.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: if v is not a tree like ``params``.
        TypeError: if model or loss is not callable, the model or params have leaves that are not floating-point, or the
            loss does not return a floating-point scalar.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products", with J·v by two reverse passes.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> x, labels = jnp.eye(3), jnp.arange(3)
    >>> loss = lambda y: jaxcnn.softmax_cross_entropy_with_integer_labels(y, labels).mean()
    >>> jaxcnn.gauss_newton_vp(lambda w: jaxcnn.dense(x, w), loss, jnp.zeros((3, 3)), jnp.eye(3)).round(3)[0]
    Array([ 0.074, -0.037, -0.037], dtype=float32)
    """
    op = "gauss_newton_vp"
    expect_function(op, "model", model)
    expect_function(op, "loss", loss)
    v = _validate_vector(op, params, v)
    y, pull = jax.vjp(model, params)
    for path, a in jax.tree_util.tree_leaves_with_path(y):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            got = f"{a.dtype} at {jax.tree_util.keystr(path)}" if path else a.dtype
            raise bad_type(op, "the result of model", "a tree of floating arrays", got)
    expect_scalar(op, "the result of loss", jax.eval_shape(loss, y))
    (jv,) = jax.vjp(lambda u: pull(u)[0], jax.tree.map(jnp.zeros_like, y))[1](v)
    return pull(jax.vjp(jax.grad(loss), y)[1](jv)[0])[0]


def _validate_vector(op: str, params: Any, v: Any) -> Any:
    """Return v with the dtypes of ``params``; raise an error unless it has the same structure and shapes."""
    expected, got = str(jax.tree.structure(params)), str(jax.tree.structure(v))
    if expected != got:
        raise bad_value(op, "v", f"a tree like params, {expected}", got)

    def leaf(path: Any, p: Any, a: Any) -> Array:
        at = jax.tree_util.keystr(path)
        if not hasattr(p, "dtype") and not isinstance(p, int | float | complex):
            raise bad_type(op, f"params{at}", "a floating array", type(p).__name__)
        if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
            raise bad_type(op, f"params{at}", "a floating array", jnp.result_type(p))
        if jnp.shape(p) != jnp.shape(a):
            raise bad_value(op, f"v{at}", f"of the shape of params{at}, {jnp.shape(p)}", jnp.shape(a))
        return jnp.asarray(a, jnp.result_type(p))

    return jax.tree_util.tree_map_with_path(leaf, params, v)
