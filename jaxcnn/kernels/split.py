"""Arrays that XLA may shard (automatic axes of a mesh), kept whole along some of their dims.

XLA's partitioner is incorrect along spatial dims (jaxlib 0.10). For convolutions with split rows, ∂E/∂w has wrong
elements, and some strides and groups abort the process. For `lax.reduce_window`, large windows do not compile.
Convolutions with one group are correct along batch and channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def run_whole(f: Callable[..., Array], arrays: Sequence[Array], dims: Sequence[slice], result_dims: slice) -> Array:
    """Return ``f(*arrays)``, with neither the arrays sharded along ``dims`` nor the result along ``result_dims``.

    XLA gathers dims that are split there, and chooses the sharding of the other dims. Arrays without a known mesh are
    left alone. These include arrays that only ``in_shardings`` of `jax.jit` shards, because JAX does not show that to
    the traced function.
    """
    mesh = mesh_of(arrays)
    if mesh is None:
        return f(*arrays)
    y = f(*(_gather_dims(mesh, a, whole) for a, whole in zip(arrays, dims, strict=True)))
    return _gather_dims(mesh, y, result_dims)


def mesh_of(arrays: Sequence[Array]) -> AbstractMesh | None:
    """Return the mesh that an array's type or the context names, if it has automatic axes."""
    meshes = (*(jax.typeof(a).sharding.mesh for a in arrays), jax.sharding.get_abstract_mesh())
    return next((mesh for mesh in meshes if mesh.auto_axes), None)


def _gather_dims(mesh: AbstractMesh, a: Array, dims: slice) -> Array:
    """Constrain ``a`` to be whole along ``dims``."""
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * a.ndim
    spec[dims] = [None] * len(spec[dims])
    return lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*spec)))
