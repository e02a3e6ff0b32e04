"""Products on all threads, where jaxlib 0.10 would run them on one.

Its library for convolutions and matrix products (YNN) divides a product between threads if one matrix is large. Many
small products, or a convolution, run on one thread. If the same program has a reduction next to the product, the
library divides their common result between threads. `on_all_threads` therefore adds the result of such a reduction to
the product: a zero that XLA cannot predict. Later versions of jaxlib divide all products.
"""

import math

import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import Array, lax

from jaxcnn.platforms import Fixed, platform_dependent

#: Whether this jaxlib needs `on_all_threads`.
ONE_THREAD = tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 11)

#: Number of elements of the smallest reduction that XLA:CPU hands to that library.
REDUCTION_ELEMENTS = 8192

#: Number of multiplications from which threads pay for a matrix product.
MIN_MULTIPLICATIONS = 1 << 18

#: Number of elements of the left matrix from which XLA divides a product without help.
DIVIDED_ELEMENTS = 1 << 17


def on_all_threads(product: Array, a: Array, b: Array) -> Array:
    """Return ``product`` of a and b, computed on all threads (float32). It adds −0.0, which leaves the value unchanged.

    The zero depends on an element of a and of b, so that neither another product nor the iterations of a loop share it:
    XLA would hoist a shared one and add it afterwards.
    """
    if not ONE_THREAD or product.dtype != np.float32 or 0 in (a.size, b.size):
        return product

    a0, b0 = (lax.stop_gradient(_first_element(a).astype(product.dtype)) for a in (a, b))
    return platform_dependent(product, a0, b0, default=Fixed(_product_alone, ()), cpu=Fixed(_with_reduction, ()))


def _with_reduction(product: Array, a0: Array, b0: Array) -> Array:
    numbers = jnp.arange(REDUCTION_ELEMENTS, dtype=product.dtype) + a0
    return product + jnp.max(jnp.where(numbers > jnp.maximum(b0, np.inf), numbers, -0.0))


def _product_alone(product: Array, a0: Array, b0: Array) -> Array:
    return product


def batched_product(a: Array, b: Array, over_a: int, over_b: int, precision: lax.PrecisionLike) -> Array:
    """Return ``(B, M, N)`` products, one per index of the first dim, summed over one of the other dims of each."""
    product = lax.dot_general(a, b, (((over_a,), (over_b,)), ((0,), (0,))), precision=precision)
    left = math.prod(a.shape[1:])
    if left < DIVIDED_ELEMENTS and left * b.shape[3 - over_b] >= MIN_MULTIPLICATIONS:
        return on_all_threads(product, a, b)
    return product


def _first_element(a: Array) -> Array:
    return lax.slice(a, (0,) * a.ndim, (1,) * a.ndim).reshape(())
