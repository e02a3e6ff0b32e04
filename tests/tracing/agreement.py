"""Comparison of a function with its explicit form."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxcnn
from jaxcnn.tracing import trace


def random(*shape, seed=0):
    with jax.enable_x64(True):
        return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def integers(*shape, seed=0, most=2):
    """Small integers, of which many are equal, and zeros: the edges of activations and the ties of maxima."""
    with jax.enable_x64(True):
        return jax.random.randint(jax.random.key(seed), shape, -most, most + 1).astype(jnp.float64)


def kinds(fun, *args):
    """Return the kinds of operations that are recognized, in order."""
    return [operation.form.kind for operation in trace(fun, *args).operations]


def replaced(fun, *args):
    """Return the kinds of operations that the library computes."""
    return [operation.form.kind for operation in trace(fun, *args).operations if operation.form.replaces]


def value_and_pullback(fun, *args):
    """Return a function's value and its cotangents for a random one."""
    y, pull = jax.vjp(fun, *args)
    leaves, tree = jax.tree.flatten(y)
    return y, pull(jax.tree.unflatten(tree, [random(*leaf.shape, seed=7).astype(leaf.dtype) for leaf in leaves]))


def assert_same(fun, *args, jit=True, rtol=1e-12, atol=1e-12):
    """Assert that values and gradients of a function and its explicit form are equal."""
    run = jax.jit if jit else lambda f: f
    expected = run(lambda *args: value_and_pullback(fun, *args))(*args)
    found = run(lambda *args: value_and_pullback(jaxcnn.explicit(fun), *args))(*args)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.weak_type == b.weak_type
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
