"""Residuals of the forward pass are in memory and not recomputed in the backward pass."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcnn
from jaxcnn.kernels.materialize import (
    above_minus_zero,
    above_zero,
    in_three_bytes,
    materialize,
    materialize_if_small,
    materialize_winner,
)
from tests.cases import compiled
from tests.compilation import lowered_for

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 3, 3)), jnp.float32)

#: A function of x, and the residual of its rule as XLA writes the type.
RESIDUALS = {
    "relu": (lambda x: jaxcnn.relu(2 * x + 1), r"pred\[2,8,8,3\]"),
    "leaky_relu": (lambda x: jaxcnn.leaky_relu(2 * x + 1), r"pred\[2,8,8,3\]"),
    "max_pool": (lambda x: jaxcnn.max_pool(2 * x + 1, 2), r"u8\[2,4,4,3\]"),
    "max_pool_with_indices": (lambda x: jaxcnn.max_pool_with_indices(2 * x + 1, 2)[0], r"u8\[2,4,4,3\]"),
    "hidden_layer": (lambda x: jaxcnn.hidden_layer(2 * x + 1, W, jnp.zeros(3, jnp.float32)), r"u8\[2,3,3,3\]"),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a no-op on other platforms")
@pytest.mark.parametrize("op", RESIDUALS)
def test_rules_read_residuals_from_memory(op):
    """XLA cannot fuse the computation of a residual into a call that is not inlined: its argument is an array."""
    f, residual = RESIDUALS[op]
    program = jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 2))).lower(X).compile().as_text()
    assert len(re.findall(rf"= {residual}\S* call\(", program)) == 1, program


@pytest.mark.parametrize("op", RESIDUALS)
def test_winners_are_in_memory_on_gpu(op):
    """XLA:GPU and XLA:TPU keep `lax.optimization_barrier`. On GPU, recomputing a mask is faster than reading it."""
    f, residual = RESIDUALS[op]
    traced = jax.jit(jax.grad(lambda x: jnp.sum(f(x) ** 2))).trace(X)
    for platform in ("cuda", "rocm", "tpu"):
        barriers = re.findall("optimization_barrier.*", traced.lower(lowering_platforms=(platform,)).as_text())
        if platform == "tpu":  # where δ and the winners as int32 are padded before they are read
            barriers = [barrier for barrier in barriers if re.search("x(ui8|i1)>", barrier)]
        assert bool(barriers) == (platform != "tpu" and residual.startswith("u8")), (platform, barriers)
        if barriers:
            assert any(re.search("xui8>", barrier) for barrier in barriers)


def test_relu_does_not_keep_its_input_on_gpu():
    """XLA simplifies ``max(x, 0) > 0`` to ``x > 0``, but not ``max(x, 0) > −0``, which is as true."""
    x = jnp.array([-1, -0.0, 0, 1e-45, 2, jnp.inf, -jnp.inf, jnp.nan])
    for is_above in (above_zero, above_minus_zero):
        np.testing.assert_array_equal(compiled(lambda x, f=is_above: f(jnp.maximum(x, 0)))(x), np.asarray(x) > 0)
    traced = jax.jit(jax.grad(lambda x: jnp.sum(jaxcnn.relu(x) ** 2))).trace(X)
    for platform in ("cuda", "rocm", "tpu", "cpu"):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("dense<-0.0" in program) is (platform in ("cuda", "rocm")), platform


def test_statistics_are_in_memory_on_gpu():
    """On GPU, a norm keeps m and r for its rule; otherwise XLA recomputes them in each fusion."""
    traced = jax.jit(jax.grad(lambda x: jnp.sum(jaxcnn.layer_norm(x) ** 2))).trace(X)
    for platform in ("cuda", "rocm", "tpu", "cpu"):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert program.count("optimization_barrier") == (2 if platform in ("cuda", "rocm") else 0), platform


def test_larger_residuals_are_left_to_xla():
    def calls(f):
        return len(re.findall(r" call\(", jax.jit(f).lower(X).compile().as_text()))

    assert calls(lambda x: materialize_if_small(jnp.sin(x)) * 2) == 0
    if jax.default_backend() == "cpu":
        assert calls(lambda x: materialize(jnp.sin(x)) * 2) == 1


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float32, np.float64, jnp.bfloat16, np.complex64])
def test_materialize_changes_nothing(dtype):
    a = (X * 3).astype(dtype)
    winner = materialize_winner(a), compiled(materialize_winner)(a), jax.vmap(materialize_winner)(a)
    for found in (materialize(a), compiled(materialize)(a), jax.vmap(materialize)(a), materialize_if_small(a), *winner):
        assert found.dtype == a.dtype
        np.testing.assert_array_equal(found, a)


def test_three_bytes():
    """The first bits of the significand remain, and 0, infinities and NaN."""
    y = np.random.default_rng(0).lognormal(0, 20, 20000).astype(np.float32)
    y = np.concatenate([y, -y, np.nextafter(np.float32(1), 2) * np.float32(2) ** np.arange(-99, 99, dtype=np.float32)])
    found = compiled(in_three_bytes)(y)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, y, rtol=2**-15)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, -np.nan], np.float32)
    np.testing.assert_array_equal(compiled(in_three_bytes)(special), special)


def test_second_derivative_of_y_in_three_bytes():
    """Gradients of gradients pass through the bits that are kept."""
    x = X.astype(jnp.bfloat16)

    def twice(x):
        def once(x):
            return jnp.sum(jaxcnn.lp_pool(x, 3, stride=1).astype(jnp.float32) ** 3)

        return jax.grad(lambda x: jnp.sum(jax.grad(once)(x).astype(jnp.float32) ** 2))(x)

    expected = jax.jit(twice)(x).astype(np.float32)
    with lowered_for("cuda"):
        found = jax.jit(lambda x: twice(x))(x).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())
