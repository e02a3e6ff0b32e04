"""Functions with a lowering per platform, traced when the program is lowered.

`jax.lax.platform_dependent` traces the branches of all platforms, and each transformation processes all of them. Here
the traced function has one equation, whose body is traced for the platform that the program is lowered for.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import jax
from jax import Array, lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir


@dataclasses.dataclass(frozen=True)
class Fixed:
    """``function(*leading, *arrays)`` as a function of the arrays. Hashable, so that equal calls are lowered once."""

    function: Callable[..., Any]
    leading: tuple[Any, ...]

    def __call__(self, *arrays: Array) -> Any:
        """Return the function's result."""
        return self.function(*self.leading, *arrays)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known of the program that is being lowered."""

    #: Number of devices among which XLA divides arrays. `jax.shard_map` has divided them already.
    devices: int = 1
    #: Whether the layout of an array can be prescribed. XLA would gather some sharded arrays, and programs for
    #: `jax.export` must not prescribe one.
    accepts_layouts: bool = False


#: What is known of a program before it is lowered.
UNKNOWN = Program()

_PROGRAM = ContextVar("program", default=UNKNOWN)


def program() -> Program:
    """Return what is known of the program that is being lowered, or `UNKNOWN`."""
    return _PROGRAM.get()


def _unchanged(*arrays: Array) -> Any:
    return arrays[0] if len(arrays) == 1 else arrays


#: The identity, of one array or of several.
UNCHANGED = Fixed(_unchanged, ())


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A function for each platform, with the settings of JAX under which it was called."""

    default: Fixed
    others: tuple[tuple[str, Fixed], ...]
    matmul_precision: Any
    x64: bool
    dtype_promotion: Any
    rank_promotion: Any
    #: The function for programs that run in this process, on one CPU device.
    native: Fixed | None = None

    def for_platforms(self, platforms: Sequence[str]) -> Callable[..., list[Array]]:
        """Return the function for some platforms; its result is a list."""
        others = dict(self.others)
        each = list(dict.fromkeys(others.get(platform, self.default) for platform in platforms))
        return functools.partial(self._run, each[0] if len(each) == 1 else self._anywhere)

    def run_natively(self, *arrays: Array) -> list[Array]:
        """Return the results of the native function as a list."""
        assert self.native is not None
        return self._run(self.native, *arrays)

    def batched(self, dims: tuple[int | None, ...]) -> "Implementation":
        """Return the functions under `jax.vmap` over ``dims`` of the arrays."""

        def each(function: Fixed) -> Fixed:
            return Fixed(_vmapped, (function, dims))

        others = tuple((platform, each(function)) for platform, function in self.others)
        native = None if self.native is None else each(self.native)
        return dataclasses.replace(self, default=each(self.default), others=others, native=native)

    def anywhere(self, *arrays: Array) -> list[Array]:
        """Return the results of `jax.lax.platform_dependent` as a list."""
        return self._run(self._anywhere, *arrays)

    def _anywhere(self, *arrays: Array) -> Any:
        return lax.platform_dependent(*arrays, default=self.default, **dict(self.others))

    def _run(self, function: Callable[..., Any], *arrays: Array) -> list[Array]:
        with ExitStack() as stack:
            stack.enter_context(jax.default_matmul_precision(self.matmul_precision))
            stack.enter_context(jax.enable_x64(self.x64))
            stack.enter_context(jax.numpy_dtype_promotion(self.dtype_promotion))
            stack.enter_context(jax.numpy_rank_promotion(self.rank_promotion))
            return jax.tree.leaves(function(*arrays))


def _vmapped(function: Fixed, dims: tuple[int | None, ...], *arrays: Array) -> Any:
    return jax.vmap(function, dims)(*arrays)


def platform_dependent(*arrays: Array, default: Fixed, native: Fixed | None = None, **others: Fixed) -> Any:
    """Return the result of ``default``, or on the platforms in ``others`` that of their function.

    Args:
        *arrays: the arguments of these functions.
        default: a function that returns an array or a tuple of arrays.
        native: a function that calls compiled code. It runs instead of the one for CPU in programs for one CPU device,
            but not in exported ones.
        **others: functions with results of the same types, by platform: "cpu", "tpu", "cuda", "rocm".

    Returns:
        The result.
    """
    if not others and native is None:
        return default(*arrays)
    config: Any = jax.config
    implementation = Implementation(
        default,
        tuple(others.items()),
        config.jax_default_matmul_precision,
        config.jax_enable_x64,
        config.jax_numpy_dtype_promotion,
        config.jax_numpy_rank_promotion,
        native,
    )
    results = PER_PLATFORM.bind(*arrays, implementation=implementation)
    return results[0] if len(results) == 1 else tuple(results)


# ---------------------------------------------------------------------------------------------------------------------
# The primitive

PER_PLATFORM = core.Primitive("per_platform")
PER_PLATFORM.multiple_results = True


@PER_PLATFORM.def_impl
@functools.partial(jax.jit, static_argnames="implementation")
def _evaluated(*arrays: Array, implementation: Implementation) -> list[Array]:
    return implementation.anywhere(*arrays)


@functools.lru_cache(maxsize=1024)
def _types(implementation: Implementation, *avals: Any) -> list[Any]:
    if implementation.default == UNCHANGED:
        return list(avals)
    run = functools.partial(implementation._run, implementation.default)
    return list(jax.make_jaxpr(run)(*avals).out_avals)


@PER_PLATFORM.def_abstract_eval
def _abstract(*avals: Any, implementation: Implementation) -> list[Any]:
    return _types(implementation, *avals)


def _lowered(ctx: Any, *arrays: Any, implementation: Implementation) -> Any:
    platforms = ctx.platforms or ctx.module_context.platforms
    native = implementation.native is not None and tuple(platforms) == ("cpu",) and _runs_here(ctx.module_context)
    function = implementation.run_natively if native else implementation.for_platforms(platforms)
    token = _PROGRAM.set(_program(ctx.module_context))
    try:
        return mlir.lower_fun(function, multiple_results=True)(ctx, *arrays)
    finally:
        _PROGRAM.reset(token)


def _program(module: Any) -> Program:
    context = module.axis_context
    mesh = getattr(context, "mesh", None)  # inside `jax.shard_map`
    if mesh is None:
        devices = getattr(context, "num_devices", 1)
    else:
        devices = math.prod(size for axis, size in mesh.shape.items() if axis not in context.manual_axes)
    return Program(devices, devices == 1 and not module.lowering_parameters.for_export)


def _runs_here(module: Any) -> bool:
    """Whether a program is lowered for one device of this process, not to be exported."""
    return not module.lowering_parameters.for_export and getattr(module.axis_context, "num_devices", None) == 1


def _batched(arrays: Sequence[Array], dims: Sequence[Any], *, implementation: Implementation) -> Any:
    if implementation.native is None:
        results = jax.vmap(implementation.anywhere, tuple(dims))(*arrays)
    else:
        results = PER_PLATFORM.bind(*arrays, implementation=implementation.batched(tuple(dims)))
    return results, [0] * len(results)


def _differentiated(
    arrays: Sequence[Array], tangents: Sequence[Any], *, implementation: Implementation
) -> tuple[Any, Any]:
    results, derivatives = jax.jvp(implementation.anywhere, tuple(arrays), tuple(map(ad.instantiate_zeros, tangents)))
    zeros = (ad.Zero(jax.typeof(y).to_tangent_aval()) for y in results)
    return results, [zero if t.dtype == jax.dtypes.float0 else t for zero, t in zip(zeros, derivatives, strict=True)]


mlir.register_lowering(PER_PLATFORM, _lowered)
batching.primitive_batchers[PER_PLATFORM] = _batched
ad.primitive_jvps[PER_PLATFORM] = _differentiated
