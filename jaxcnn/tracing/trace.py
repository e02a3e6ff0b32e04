"""Trace a function to a program."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxcnn.ops.mark import marks
from jaxcnn.taps import as_equations
from jaxcnn.tracing.program import Operation, Program, program_of
from jaxcnn.tracing.recognize import recognize


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A function, traced for arguments of some types: its program and the trees around it."""

    program: Program
    #: The arrays among the leaves of the arguments: the inputs of the program.
    arrays: tuple[Any, ...]
    #: Paths of these arrays in ``(args, kwargs)``.
    paths: tuple[Any, ...]
    _outputs: Any
    _static: tuple[Any, ...]

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Return the operations in order."""
        return tuple(self.program.operations())

    def result(self, outputs: Sequence[Any]) -> Any:
        """Return the function's result from the outputs of the program."""
        arrays = iter(outputs)
        return jax.tree.unflatten(self._outputs, [next(arrays) if s is ARRAY else s for s in self._static])


#: Marks an array among leaves.
ARRAY = object()


def trace(fun: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Traced:
    """Return a function as a program whose operations are recognized, inner jits written out in place.

    Args:
        fun: any function of JAX.
        *args: its arguments: arrays or `jax.ShapeDtypeStruct` s are traced, all other leaves are as they are.
        **kwargs: its keyword arguments.

    Returns:
        The traced function.
    """
    return trace_call("trace", fun, args, kwargs, inline=True)


def trace_call(
    op: str,
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    inline: bool = True,
) -> Traced:
    """Return `trace` of a call.

    Args:
        op: name of the caller, for error messages.
        fun: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        inline: as in `program_of`.

    Returns:
        The traced function.
    """
    leaves, tree = jax.tree.flatten_with_path((args, kwargs or {}))
    paths, values = zip(*leaves, strict=True) if leaves else ((), ())
    traced = [is_array(leaf) for leaf in values]
    arrays = tuple(leaf for leaf, is_traced in zip(values, traced, strict=True) if is_traced)
    found: dict[str, Any] = {}

    def flat(*arrays: Any) -> list[Any]:
        given = iter(arrays)
        inner = [next(given) if is_traced else leaf for leaf, is_traced in zip(values, traced, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, inner)
        outputs, found["tree"] = jax.tree.flatten(fun(*args, **kwargs))
        found["static"] = tuple(ARRAY if is_array(y) else y for y in outputs)
        return [y for y in outputs if is_array(y)]

    try:
        with as_equations(), marks():
            closed = jax.make_jaxpr(flat)(*arrays)
    except Exception as error:
        error.add_note(
            f"jaxcnn: raised while {getattr(fun, '__name__', repr(fun))} was traced; {op} needs a function that "
            "jax.jit accepts, with Python scalars as static arguments"
        )
        raise
    program = recognize(program_of(closed, inline=inline))
    at = tuple(path for path, is_traced in zip(paths, traced, strict=True) if is_traced)
    return Traced(program, arrays, at, found["tree"], found["static"])


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced: an array of JAX or NumPy, but no scalar of Python or NumPy."""
    if isinstance(leaf, bool | int | float | complex | np.generic | str | bytes):
        return False
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return True
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True
