"""Elementwise functions that have another form on TPU or GPU.

A TPU divides by computing a reciprocal, and two divisions by the same array share it. In bfloat16, some activations
take longer to compute than to read and write.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.platforms import UNCHANGED, Fixed, platform_dependent


@functools.partial(jax.jit, inline=True)
def erfc(z: Array) -> Array:
    """Return 1 − erf(z), with a small relative error wherever it is representable."""
    if z.dtype != jnp.float32:
        return lax.erfc(z)
    return platform_dependent(z, default=Fixed(lax.erfc, ()), tpu=Fixed(erfc_of_one_polynomial, ()))


#: Minimax polynomial of exp(z²)·erfc(z)/t for t from 0.17 to 1, in ascending order; its relative error is 4·10⁻⁸.
_COEFFICIENTS = (
    0.282087386, 0.282358527, 0.243224815, 0.202211484, -0.0255093556, 0.27645579, -0.485798329, 0.283901006,
    -0.0589313582,
)  # fmt: skip


def erfc_of_one_polynomial(z: Array) -> Array:
    """Return t·P(t)·exp(−z²) with t = 1/(1 + |z|/2), and 2 minus that where z < 0; z is in float32.

    `lax.erfc` computes three polynomials and selects one. XLA:TPU then computes y and δ of gelu in two kernels.
    """
    t = 1 / (1 + jnp.where(z < 0, -z, z) / 2)
    p = jnp.zeros_like(z)
    for coefficient in reversed(_COEFFICIENTS):
        p = p * t + coefficient
    e = t * p * jnp.exp(-(z * z))
    return jnp.where(z < 0, 2 - e, e)


@functools.partial(jax.jit, inline=True)
def over_square(a: Array, d: Array) -> Array:
    """Return ``a/d²``."""
    return platform_dependent(a, d, default=Fixed(over_product, ()), tpu=Fixed(times_square_of_reciprocal, ()))


def over_product(a: Array, d: Array) -> Array:
    """Return ``a/(d·d)``."""
    return a / (d * d)


def times_square_of_reciprocal(a: Array, d: Array) -> Array:
    """Return ``a·(1/d)²``."""
    reciprocal = 1 / d
    return a * (reciprocal * reciprocal)


@functools.partial(jax.jit, inline=True)
def over_sqrt(a: Array, t: Array) -> Array:
    """Return ``a/√t``."""
    return platform_dependent(a, t, default=Fixed(over_root, ()), tpu=Fixed(times_reciprocal_root, ()))


def over_root(a: Array, t: Array) -> Array:
    """Return ``a/√t``, by a division."""
    return a / jnp.sqrt(t)


def times_reciprocal_root(a: Array, t: Array) -> Array:
    """Return ``a·t^(−1/2)``."""
    return a * lax.rsqrt(t)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def divided_and_multiplied(n: int, a: Array) -> Array:
    """Return ``a/n·n``, and on GPU ``a``: XLA:GPU repeats a computation for each of its uses only if it is short."""
    return platform_dependent(a, default=Fixed(_over_and_times, (n,)), cuda=UNCHANGED, rocm=UNCHANGED)


def _over_and_times(n: int, a: Array) -> Array:
    return a / np.asarray(n, a.dtype) * n


@functools.partial(jax.jit, static_argnames=("dtype", "negative"), inline=True)
def weighted(weight: Array, value: Array, dtype: np.dtype, negative: bool = False) -> Array:
    """Return ``weight·value``, or minus that, in a dtype; 0 where the weight is 0, even if the value is ±∞ or NaN.

    A loss that is masked out has no gradient, and a target of 0 contributes nothing where log p = −∞. The value is
    replaced, not the product, so that a finite value is also the derivative with respect to a weight of 0.
    """
    if value.dtype != jnp.float32:
        return weighted_by_comparison(dtype, negative, weight, value)
    other = Fixed(weighted_by_exponent, (dtype, negative))
    default = Fixed(weighted_by_comparison, (dtype, negative))
    return platform_dependent(weight, value, default=default, tpu=other, cuda=other, rocm=other)


def weighted_by_comparison(dtype: np.dtype, negative: bool, weight: Array, value: Array) -> Array:
    """Return `weighted`, with the infinities and NaN found by a comparison."""
    weight = -weight if negative else weight
    return (weight * jnp.where((weight == 0) & ~(jnp.abs(value) < jnp.inf), 0, value)).astype(dtype)


#: Bits of the exponent of a float32. All of them are 1 in ±∞ and NaN, but not in any number.
_EXPONENT = 0x7F800000


def weighted_by_exponent(dtype: np.dtype, negative: bool, weight: Array, value: Array) -> Array:
    """Return `weighted`, with the infinities and NaN found by one comparison with a number per weight.

    XLA:TPU needs half as many instructions. If the weight were negated and not the result, its kernels would be
    others, and slower. XLA:GPU may write the result of the other comparison to memory, to read it in two kernels.
    """
    exponent = lax.bitcast_convert_type(value, jnp.int32) & _EXPONENT
    replaced = jnp.where(weight == 0, jnp.int32(_EXPONENT), jnp.int32(-1))
    product = (weight * jnp.where(exponent == replaced, 0, value)).astype(dtype)
    return -product if negative else product
