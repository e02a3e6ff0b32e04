"""Functions with transformed functions inside, and transformations of the explicit form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcnn
from tests.tracing.agreement import assert_same, ops, random


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def layer(x, w):
    return jax.nn.relu(conv(x, w))


def X(n=2):
    return random(n, 4, 5, 3)


def W():
    return random(3, 3, 3, 3, seed=1)


def in_jit(x, w):
    return jax.jit(layer)(x, w)


def in_two_jits(x, w):
    return jax.jit(lambda x, w: jax.jit(layer)(x, w) + 1)(x, w)


def in_scan(x, w):
    def body(carry, w):
        carry = layer(carry, w)
        return carry, carry.sum()

    return lax.scan(body, x, jnp.stack([w, 2 * w]), unroll=2, reverse=True)


def in_scan_with_constants(x, w):
    return lax.scan(lambda carry, _: (layer(carry, w), None), x, length=2)[0]


def in_while(x, w):
    return lax.fori_loop(0, 2, lambda i, x: layer(x, w), x)


def in_cond(x, w):
    return lax.cond(x[0, 0, 0, 0] > 0, layer, lambda x, w: conv(x, w) * 2, x, w)


def in_switch(x, w):
    return lax.switch(1, [lambda x: x, lambda x: layer(x, w), lambda x: x * 2], x)


def in_checkpoint(x, w):
    return jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)(x, w)


def in_vmap(x, w):
    return jax.vmap(lambda x: layer(x[None], w)[0])(x)


def in_named_scope(x, w):
    with jax.named_scope("outer"):
        return layer(x, w)


def in_a_scan_in_a_jit(x, w):
    return jax.jit(in_scan)(x, w)


def in_checkpoint_in_scan(x, w):
    return lax.scan(lambda c, _: (jax.checkpoint(layer)(c, w), None), x, length=2)[0]


def with_gradient(x, w):
    """A function in which a derivative has already been taken: its equations stay."""
    return jax.grad(lambda x: layer(x, w).sum())(x)


NESTED = [
    in_jit, in_two_jits, in_scan, in_scan_with_constants, in_cond, in_switch, in_checkpoint, in_vmap, in_named_scope,
    in_a_scan_in_a_jit, in_checkpoint_in_scan, with_gradient,
]  # fmt: skip


@pytest.mark.parametrize("fun", NESTED)
def test_nested(fun):
    found = ops(fun, X(), W())
    assert "conv" in found
    assert "relu" in found or fun is with_gradient
    assert_same(fun, X(), W())


def test_while():
    """Loops without a known length have no reverse mode, neither in JAX nor here."""
    expected = in_while(X(), W())
    np.testing.assert_allclose(jaxcnn.explicit(in_while)(X(), W()), expected, rtol=1e-12)
    assert ops(in_while, X(), W()) == ["conv", "relu"]
