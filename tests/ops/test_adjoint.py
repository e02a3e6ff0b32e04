"""Pairs of adjoint functions: ⟨f(x), δ⟩ = ⟨x, adjoint(δ)⟩, and the rule of each is the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxcnn.geometry import Window
from jaxcnn.ops import adaptive, pooling
from jaxcnn.ops.adjoint import adjoint_pair

WIN = Window((5, 6), (3, 2), (2, 1), ((1, 0), (0, 1)), (1, 2))
BINS = adaptive.Bins((5, 7), (3, 9))
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape)


WINNERS = RNG.integers(0, WIN.entries, (2, *WIN.out, 3), np.uint8)
INDICES = RNG.integers(0, 30, (2, 2, 4, 3), np.int32)

PAIRS = {
    # name: (f, adjoint, static argument, x, δ, integer arrays)
    "winners": (
        pooling.gather_winners, pooling.scatter_to_winners, WIN, normal(2, 5, 6, 3), normal(*WINNERS.shape), [WINNERS],
    ),
    "indices": (
        pooling.gather_indices, pooling.scatter_to_indices, (5, 6), normal(2, 5, 6, 3), normal(*INDICES.shape),
        [INDICES],
    ),
    "sums": (
        pooling.window_sum, pooling.window_sum_adjoint, WIN, normal(2, 5, 6, 3), normal(2, *WIN.out, 3), [],
    ),
    "bins": (adaptive.bin_sum, adaptive.bin_sum_adjoint, BINS, normal(2, 5, 7, 3), normal(2, 3, 9, 3), []),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_each_is_the_adjoint_and_the_rule_of_the_other(name):
    f, adjoint, static, x, delta, integers = PAIRS[name]

    def cotangents(x, delta):
        y, rule = jax.vjp(lambda x: f(static, x, *integers), x)
        delta_x, rule_of_adjoint = jax.vjp(lambda delta: adjoint(static, delta, *integers), delta)
        return y, rule(delta)[0], delta_x, rule_of_adjoint(x)[0]

    y, of_f, delta_x, of_adjoint = jax.jit(cotangents)(x, delta)
    np.testing.assert_allclose(jnp.vdot(y, delta), jnp.vdot(x, delta_x), rtol=1e-12)
    np.testing.assert_array_equal(of_f, delta_x)
    np.testing.assert_array_equal(of_adjoint, y)


@pytest.mark.parametrize("name", PAIRS)
def test_derivatives_of_every_order_are_those_of_a_linear_function(name):
    f, _, static, x, _, integers = PAIRS[name]
    check_grads(jax.jit(lambda x: f(static, x, *integers) ** 3), (x,), order=3, modes=["rev"], rtol=1e-4, atol=1e-5)


def test_integer_arrays_have_no_cotangent():
    f, _, static, x, delta, integers = PAIRS["winners"]
    rule = jax.vjp(lambda x, winner: f(static, x, winner), x, *integers)[1]
    assert rule(delta)[1].dtype == jax.dtypes.float0


def test_several_static_arguments():
    """The shift along an axis, whose adjoint is the shift back."""
    shift, back = adjoint_pair(
        lambda by, axis, x: jnp.roll(x, by, axis), lambda by, axis, delta: jnp.roll(delta, -by, axis), static=2
    )
    x, delta = normal(3, 4), normal(3, 4)
    np.testing.assert_array_equal(jax.vjp(lambda x: shift(1, 1, x), x)[1](delta)[0], jnp.roll(delta, -1, 1))
    np.testing.assert_array_equal(jax.vjp(lambda x: back(1, 1, x), x)[1](delta)[0], jnp.roll(delta, 1, 1))
