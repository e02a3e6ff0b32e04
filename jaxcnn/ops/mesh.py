"""Sharded arrays: manual mesh axes inside `jax.shard_map`, and explicit axes, which are part of array types.

Automatic axes need nothing here: `jaxcnn.kernels.split` keeps XLA from partitioning ops that it miscompiles.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

#: Parameters of public functions that hold no arrays. Mappings of rules may have keys that JAX cannot sort.
STATIC = frozenset({"fun", "net", "rules", "loss"})

F = TypeVar("F", bound=Callable[..., Any])


def varying_alike(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inside `jax.shard_map`, mark replicated inputs as varying over the axes that the other inputs vary over.

    The transpose of this mark is the sum over devices. The cotangent of a shared kernel needs that sum, and a rule
    cannot compute it.
    """
    varying = [frozenset() if a is None else jax.typeof(a).manual_axis_type.varying for a in inputs]
    all_axes = frozenset().union(*varying)
    return tuple(
        a if a is None or axes == all_axes else lax.pcast(a, tuple(all_axes - axes), to="varying")
        for a, axes in zip(inputs, varying, strict=True)
    )


def on_any_mesh(f: Callable[..., Any], static: Any, *inputs: Any) -> Any:
    """Call ``f(static, *inputs)``, allowing arrays that are sharded over explicit axes of a mesh.

    With explicit axes every reshape and product would have to specify how its result is sharded. Inside the op, XLA
    chooses instead. The op's result is sharded like its first input if it has the same shape, otherwise along its first
    dim, the batch.
    """
    mesh = _explicit_mesh(inputs)
    if mesh is None:
        return f(static, *inputs)
    x = inputs[0]
    x_spec = _spec(x)

    def spec_of(y: Any) -> PartitionSpec:
        if y.shape == x.shape:
            return x_spec
        same_batch = y.ndim and x.ndim and y.shape[0] == x.shape[0]
        return PartitionSpec(x_spec[0]) if same_batch else PartitionSpec()

    return _run_automatic(mesh, functools.partial(f, static), inputs, lambda y: jax.tree.map(spec_of, y))


def automatic_inside(*, like: str | None = None) -> Callable[[F], F]:
    """Decorate a function so that it accepts arrays that are sharded over explicit axes of a mesh.

    Inside the function XLA chooses the shardings. Without explicit axes the function is called unchanged.

    Args:
        like: name of the parameter whose tree determines the shardings of the results. By default the results are
            sharded along their first dim, like the first dim of the parameter ``x``.

    Returns:
        A decorator that preserves the function's signature.
    """

    def decorate(f: F) -> F:
        signature = inspect.signature(f)

        @functools.wraps(f)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            leaves, tree = jax.tree.flatten({name: a for name, a in arguments.items() if name not in STATIC})
            positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Array)]
            arrays = tuple(leaves[i] for i in positions)
            mesh = _explicit_mesh(arrays)
            if mesh is None:
                return f(*args, **kwargs)

            def specs_of(result: Any) -> Any:
                if like is not None:
                    specs = [_spec(leaf) for leaf in jax.tree.leaves(arguments[like])]
                    return jax.tree.unflatten(jax.tree.structure(result), specs)
                return jax.tree.map(lambda _: PartitionSpec(*_spec(arguments["x"])[:1]), result)

            def run(*arrays: Array) -> Any:
                inner = list(leaves)
                for i, a in zip(positions, arrays, strict=True):
                    inner[i] = a
                bound = signature.bind(*args, **kwargs)
                bound.arguments |= jax.tree.unflatten(tree, inner)
                return f(*bound.args, **bound.kwargs)

            return _run_automatic(mesh, run, arrays, specs_of)

        return wrapper  # type: ignore[return-value]

    return decorate


def _run_automatic(
    mesh: AbstractMesh, f: Callable[..., Any], inputs: tuple[Any, ...], specs_of: Callable[[Any], Any]
) -> Any:
    """Return ``f(*inputs)`` with all axes automatic inside; ``specs_of`` maps result types to `PartitionSpec`s."""
    with jax.sharding.use_abstract_mesh(mesh):
        shapes = [a if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]
        specs = specs_of(jax.eval_shape(f, *shapes))
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        return jax.sharding.auto_axes(f, out_sharding=shardings)(*inputs)


def _explicit_mesh(inputs: tuple[Any, ...]) -> AbstractMesh | None:
    """Return the mesh of the first input that is sharded over an explicit axis, or None."""
    for a in inputs:
        if a is not None:
            sharding = jax.typeof(a).sharding
            if any(axis in sharding.mesh.explicit_axes for axis in jax.tree.leaves(tuple(sharding.spec))):
                return sharding.mesh
    return None


def _spec(a: Any) -> PartitionSpec:
    return jax.typeof(a).sharding.spec
