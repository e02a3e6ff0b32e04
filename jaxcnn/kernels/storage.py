"""Arrays that are written to memory where XLA:CPU would rather compute them again, once for each entry they meet.

A mask or a winner, kept by a forward half for its rule, is one byte an entry; computing it again in the backward half
takes longer than reading that byte, and what it was made of stays in memory instead.
"""

import jax
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata


@jax.jit
def stored(a: Array) -> Array:
    """``a``, which XLA:CPU writes to memory at this point.  No other platform is told anything."""
    return lax.platform_dependent(a, cpu=_behind_a_call, default=lambda a: a)


def stored_if_small(a: Array) -> Array:
    """`stored` if ``a`` is one byte an entry; writing more may cost more than it saves."""
    return stored(a) if a.dtype.itemsize == 1 else a


def _behind_a_call(a: Array) -> Array:
    """XLA:CPU drops `lax.optimization_barrier` before it fuses, but fuses nothing into a call it may not inline."""
    with set_xla_metadata(inlineable="false"):
        return _passed_through(a)


@jax.jit
def _passed_through(a: Array) -> Array:
    return lax.optimization_barrier(a)  # JAX itself would drop a call that does nothing
