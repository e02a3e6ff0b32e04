"""Arrays that XLA may split over devices (automatic axes of a mesh), kept whole along some of their dims.

XLA's partitioner is wrong along spatial dims (jaxlib 0.10).  Of convolutions, ∂E/∂w of split rows has wrong entries,
and some strides and groups abort the process; of `lax.reduce_window`, large windows do not compile.  Convolutions of
one group are right along batch and channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def run_whole(f: Callable[..., Array], arrays: Sequence[Array], dims: Sequence[slice], of_result: slice) -> Array:
    """``f(*arrays)``, where XLA splits neither the arrays along ``dims`` nor the result along ``of_result``.

    XLA gathers what is split there, and chooses along the other dims.  Arrays that no mesh is known of are left alone:
    so are those that only ``in_shardings`` of `jax.jit` splits, since JAX does not show that to the traced function.
    """
    mesh = mesh_of(arrays)
    if mesh is None:
        return f(*arrays)
    y = f(*(_whole(mesh, a, kept) for a, kept in zip(arrays, dims, strict=True)))
    return _whole(mesh, y, of_result)


def mesh_of(arrays: Sequence[Array]) -> AbstractMesh | None:
    """The mesh that an array's type or the context names, if it has automatic axes."""
    known = (*(jax.typeof(a).sharding.mesh for a in arrays), jax.sharding.get_abstract_mesh())
    return next((mesh for mesh in known if mesh.auto_axes), None)


def _whole(mesh: AbstractMesh, a: Array, kept: slice) -> Array:
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * a.ndim
    spec[kept] = [None] * len(spec[kept])
    return lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*spec)))
