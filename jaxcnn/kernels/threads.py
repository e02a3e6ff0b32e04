"""Products on all threads, where jaxlib 0.10 would run them on one.

Its library for convolutions and matrix products (YNN) divides a product between threads if one matrix is large; many
small ones, or a convolution, run on one thread.  Not so where the same program has a reduction beside the product: then
it divides their common result.  `on_all_threads` adds such a reduction's result to the product, a zero that XLA cannot
foresee.  Later jaxlibs divide all products.
"""

import math

import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import Array, lax

#: Whether jaxlib is one of those.
ONE_THREAD = tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 11)

#: Entries of the smallest reduction that XLA:CPU hands to that library.
ENTRIES = 8192

#: Multiplications of a matrix product from which threads pay, and entries of its left side that are divided anyhow.
WORTH, LARGE = 1 << 18, 1 << 17


def on_all_threads(product: Array, a: Array, b: Array) -> Array:
    """``product`` of a and b, in float32 divided between threads: −0, which changes nothing, is added to it.

    The zero is made of an entry of a and of b, so that neither another product nor the turns of a loop share it: XLA
    would take it out, and add it afterwards.
    """
    if not ONE_THREAD or product.dtype != np.float32 or 0 in (a.size, b.size):
        return product

    def on_cpu(product: Array, some: Array, other: Array) -> Array:
        numbers = jnp.arange(ENTRIES, dtype=product.dtype) + some
        return product + jnp.max(jnp.where(numbers > jnp.maximum(other, np.inf), numbers, -0.0))

    some, other = (lax.stop_gradient(_first(a).astype(product.dtype)) for a in (a, b))
    return lax.platform_dependent(product, some, other, cpu=on_cpu, default=lambda product, *_: product)


def batched_product(a: Array, b: Array, over_a: int, over_b: int, precision: lax.PrecisionLike) -> Array:
    """``(B, M, N)``: a product for each entry of the first dim of both, summed over one of the other dims of each."""
    product = lax.dot_general(a, b, (((over_a,), (over_b,)), ((0,), (0,))), precision=precision)
    left = math.prod(a.shape[1:])
    if left < LARGE and left * b.shape[3 - over_b] >= WORTH:
        return on_all_threads(product, a, b)
    return product


def _first(a: Array) -> Array:
    return lax.slice(a, (0,) * a.ndim, (1,) * a.ndim).reshape(())
