"""Pairs of adjoint functions, which are closed under differentiation."""

from collections.abc import Callable
from typing import Any

from jaxcnn.ops.rule import custom_vjp


def adjoint_pair(f: Callable[..., Any], adjoint: Callable[..., Any], static: int = 1) -> tuple[Any, Any]:
    """Return two linear functions as `custom_vjp` functions, each with the other as its backward rule.

    A linear function's cotangent is its adjoint applied to δ, and the adjoint of the adjoint is the function itself.
    Derivatives of every order are therefore calls of these two functions.

    Args:
        f: function of ``static`` hashable arguments, an array x, and any number of integer arrays; linear in x.
        adjoint: function of the same arguments with δ in place of x, such that ⟨f(x), δ⟩ = ⟨x, adjoint(δ)⟩.
        static: number of leading arguments that are not arrays.

    Returns:
        ``f`` and ``adjoint``. The integer arrays have no cotangent.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxcnn.ops.adjoint import adjoint_pair
    >>> scale, scale_adjoint = adjoint_pair(lambda factor, x: factor * x, lambda factor, delta: factor * delta)
    >>> jax.grad(lambda x: scale(3.0, x).sum())(jnp.ones(2))
    Array([3., 3.], dtype=float32)
    """
    pair = custom_vjp(f, static), custom_vjp(adjoint, static)
    _define_rule(pair[0], pair[1], static)
    _define_rule(pair[1], pair[0], static)
    return pair


def _define_rule(f: Any, adjoint: Any, static: int) -> None:
    def fwd(*args: Any) -> Any:
        return f(*args), args[static + 1 :]

    def bwd(*args: Any) -> Any:
        """δ_x = adjoint(δ)."""
        *statics, indices, delta = args
        return adjoint(*statics, delta, *indices), *(None for _ in indices)

    f.defvjp(fwd, bwd)
