"""Force XLA to materialize an array that it would otherwise fuse into every consumer and recompute.

A mask or a winner that a forward pass saves for its rule has one byte per element. Recomputing it in the backward pass
takes longer than reading that byte, and keeps its inputs in memory instead. On GPU this holds for winners, which have
one byte per window, but not for masks, which have one byte per element: they are computed again from y.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxcnn.platforms import UNCHANGED, Fixed, platform_dependent


@functools.partial(jax.jit, inline=True)
def materialize(a: Array) -> Array:
    """Return ``a``, materialized at this point on XLA:CPU; a no-op on other platforms."""
    return platform_dependent(a, default=UNCHANGED, cpu=_CALL)


@functools.partial(jax.jit, inline=True)
def materialize_winner(a: Array) -> Array:
    """Return ``a``, materialized at this point on XLA:CPU and XLA:GPU; a no-op on other platforms."""
    return platform_dependent(a, default=UNCHANGED, cpu=_CALL, cuda=_BARRIER, rocm=_BARRIER)


@functools.partial(jax.jit, inline=True)
def materialize_on_gpu(a: Array) -> Array:
    """Return ``a``, materialized at this point on XLA:GPU; a no-op on other platforms."""
    return platform_dependent(a, default=UNCHANGED, cuda=_BARRIER, rocm=_BARRIER)


@functools.partial(jax.jit, inline=True)
def together_on_tpu(a: Array, b: Array) -> tuple[Array, Array]:
    """Return both arrays, for computations that XLA:TPU starts once both are known; a no-op on other platforms."""
    return platform_dependent(a, b, default=UNCHANGED, tpu=_BARRIER)


@functools.partial(jax.jit, inline=True)
def materialize_next_bits(y: Array) -> Array:
    """Return y, in float32, with the first 16 bits of its significand on XLA:GPU; a no-op on other platforms.

    If y is also an output in bfloat16, XLA:GPU keeps one more byte per element.
    """
    return platform_dependent(y, default=UNCHANGED, cuda=_IN_THREE_BYTES, rocm=_IN_THREE_BYTES)


@functools.partial(jax.jit, inline=True)
def is_positive(y: Array) -> Array:
    """Return ``y > 0``, the residual of ``y = max(x, 0)``.

    On GPU, y is compared with −0. XLA would otherwise turn the comparison into x > 0, and keep x in memory with y.
    """
    return platform_dependent(y, default=_ABOVE_ZERO, cuda=_ABOVE_MINUS_ZERO, rocm=_ABOVE_MINUS_ZERO)


def materialize_if_small(a: Array) -> Array:
    """Return `materialize` of ``a`` if it has one byte per element; materializing more may cost more than it saves."""
    return materialize(a) if a.dtype.itemsize == 1 else a


def _call_not_inlined(a: Array) -> Array:
    """Return ``a`` through a call: XLA:CPU drops `lax.optimization_barrier`, but does not fuse into such a call."""
    with set_xla_metadata(inlineable="false"):
        return _identity(a)


@jax.jit
def _identity(a: Array) -> Array:
    return lax.optimization_barrier(a)  # JAX would drop a call that does nothing


def _barrier(*arrays: Array) -> Any:
    return lax.optimization_barrier(UNCHANGED(*arrays))


def in_three_bytes(y: Array) -> Array:
    """Return y from its bfloat16 and the next 8 bits, both materialized; the relative error is at most 2⁻¹⁵."""
    rounded = y.astype(jnp.bfloat16)
    rest = (lax.bitcast_convert_type(y, jnp.int32) - _bits(rounded) + 128) >> 8
    rounded, byte = lax.optimization_barrier((rounded, jnp.minimum(rest, 127).astype(jnp.int8)))
    return lax.bitcast_convert_type(_bits(rounded) + (byte.astype(jnp.int32) << 8), jnp.float32)


def _bits(a: Array) -> Array:
    """Return the bits of a bfloat16 as the upper half of an int32, which are those of the equal float32."""
    return lax.bitcast_convert_type(a, jnp.uint16).astype(jnp.int32) << 16


def above_zero(y: Array) -> Array:
    """Return ``y > 0``."""
    return y > 0


def above_minus_zero(y: Array) -> Array:
    """Return ``y > −0``, which is the same."""
    return y > -0.0


_CALL, _BARRIER = Fixed(_call_not_inlined, ()), Fixed(_barrier, ())
_IN_THREE_BYTES = Fixed(in_three_bytes, ())
_ABOVE_ZERO, _ABOVE_MINUS_ZERO = (Fixed(f, ()) for f in (above_zero, above_minus_zero))
