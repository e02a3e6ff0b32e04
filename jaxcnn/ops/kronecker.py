"""The Kronecker product and *up* (lecture §7–8), which upsamples δ to the size before pooling.

``kron_up`` and ``block_sum`` are adjoint: the rule of each is the other.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.arguments import arrays, bad_value, positive, spatial_dims
from jaxcnn.geometry import PerDim, Window, not_too_many
from jaxcnn.ops.adjoint import adjoint_pair
from jaxcnn.ops.pooling import window_sum, window_sum_adjoint
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp


def kron(a: ArrayLike, b: ArrayLike, *, rule: Rule | None = None) -> Array:
    """Kronecker product, as `numpy.kron`: block ``(i, j)`` of the result is ``a[i, j]·b``.

    Backward: ``δ_a[i] = Σ_j δ[i·q + j]·b[j]`` (every block against b) and ``δ_b[j] = Σ_i δ[i·q + j]·a[i]``. The
    lecture's §7 example prints ``kron(b, a)``; its §8 example has the standard order (erratum 1).

    Args:
        a: array ``(p₁, p₂, …)``, any float dtype.
        b: array ``(q₁, q₂, …)``, of the same rank and dtype.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The product ``(p₁·q₁, p₂·q₂, …)``.

    Raises:
        ValueError: if the ranks differ.
        TypeError: if a or b is not an array of a float dtype, or the dtypes differ.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.kron(jnp.array([[4.0, 5.0], [6.0, 7.0]]), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    Array([[ 4.,  8.,  5., 10.],
           [12., 16., 15., 20.],
           [ 6., 12.,  7., 14.],
           [18., 24., 21., 28.]], dtype=float32)
    """
    a, b = arrays("kron", a=a, b=b)
    if a.ndim != b.ndim:
        raise bad_value("kron", "a and b", "of one rank", f"a {a.shape}, b {b.shape}")
    return apply_rule(_kron, rule, _kron_reference)(None, a, b)


@custom_vjp
def _kron(static: None, a: Array, b: Array) -> Array:
    return _kron_reference(None, a, b)


def _kron_fwd(static: None, a: Array, b: Array) -> Any:
    return _kron(None, a, b), (a, b)


def _kron_bwd(static: None, saved: Any, delta: Array) -> Any:
    """δ_a[i] = Σ_j δ[i, j]·b[j]; δ_b[j] = Σ_i δ[i, j]·a[i], where δ[i, j] is element j of block i."""
    a, b = saved
    blocks = delta.reshape([n for pair in zip(a.shape, b.shape, strict=True) for n in pair])
    i, j = tuple(range(0, 2 * a.ndim, 2)), tuple(range(1, 2 * a.ndim, 2))
    return jnp.einsum(blocks, [*range(2 * a.ndim)], b, j, i), jnp.einsum(blocks, [*range(2 * a.ndim)], a, i, j)


_kron.defvjp(_kron_fwd, _kron_bwd)


def _kron_reference(static: None, a: Array, b: Array) -> Array:
    outer = jnp.expand_dims(a, tuple(range(1, 2 * a.ndim, 2))) * jnp.expand_dims(b, tuple(range(0, 2 * b.ndim, 2)))
    return outer.reshape([p * q for p, q in zip(a.shape, b.shape, strict=True)])


# ---------------------------------------------------------------------------------------------------------------------

# Each is the backward rule of the other: δ_x = block_sum(δ) and δ_x = up(δ).
_kron_up, _block_sum = adjoint_pair(window_sum_adjoint, window_sum)


def kron_up(x: ArrayLike, factor: PerDim, *, rule: Rule | None = None) -> Array:
    """The lecture's *up*: the spatial dims of ``x`` ⊗ 1, every element repeated over a block (§8).

    Backward: ``δ_x = block_sum(δ, factor)``. Up is the backward rule of sum pooling. For average pooling, divide by the
    block's size; for max pooling, mask all but the winner (erratum 3).

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        factor: the size of a block, an int or one per dim.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *(spatial · factor), C)``.

    Raises:
        ValueError: if the rank of x or the factor does not fit.
        TypeError: if x is not an array of a float dtype, or factor is not made of ints.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.kron_up(jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None], 2)[0, :, :, 0]
    Array([[1., 1., 2., 2.],
           [1., 1., 2., 2.],
           [3., 3., 4., 4.],
           [3., 3., 4., 4.]], dtype=float32)
    """
    (x,) = arrays("kron_up", x=x)
    spatial = spatial_dims("kron_up", x)
    k = positive("kron_up", "factor", factor, len(spatial))
    out = tuple(n * f for n, f in zip(spatial, k, strict=True))
    not_too_many("kron_up", "the result", out)
    return apply_rule(_kron_up, rule, _kron_up_reference, "kron_up")(_blocks(out, k), x)


def _kron_up_reference(blocks: Window, x: Array) -> Array:
    for dim, factor in enumerate(blocks.size):
        x = jnp.repeat(x, factor, dim + 1)
    return x


def block_sum(x: ArrayLike, factor: PerDim, *, rule: Rule | None = None) -> Array:
    """The sum of every block of ``factor`` elements, the adjoint of `kron_up`.

    Backward: ``δ_x = kron_up(δ, factor)``, up(δ) (lecture §8).

    Args:
        x: input ``(N, *spatial, C)``, one to three spatial dims, any float dtype.
        factor: the size of a block, an int or one per dim; it must divide the spatial dims.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        The output ``(N, *(spatial / factor), C)``.

    Raises:
        ValueError: if the rank of x or the factor does not fit.
        TypeError: if x is not an array of a float dtype, or factor is not made of ints.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.block_sum(jnp.ones((1, 4, 4, 1)), 2)[0, :, :, 0]
    Array([[4., 4.],
           [4., 4.]], dtype=float32)
    """
    (x,) = arrays("block_sum", x=x)
    spatial = spatial_dims("block_sum", x)
    k = positive("block_sum", "factor", factor, len(spatial))
    if any(n % f for n, f in zip(spatial, k, strict=True)):
        raise bad_value("block_sum", "factor", f"a divisor of the spatial dims {spatial}", k)
    return apply_rule(_block_sum, rule, _block_sum_reference, "block_sum")(_blocks(spatial, k), x)


def _block_sum_reference(blocks: Window, x: Array) -> Array:
    pairs = [n for pair in zip(blocks.out, blocks.size, strict=True) for n in pair]
    tiles = x.reshape(x.shape[0], *pairs, x.shape[-1])
    return tiles.sum(tuple(range(2, 2 * blocks.ndim + 1, 2)))


def _blocks(spatial: tuple[int, ...], factor: tuple[int, ...]) -> Window:
    ndim = len(spatial)
    return Window(spatial, factor, factor, ((0, 0),) * ndim, (1,) * ndim)
