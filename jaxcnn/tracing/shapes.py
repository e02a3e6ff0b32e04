"""Reshapes and transposes between an op and the equation that completes it, such as the addition of its bias."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxcnn.tracing.program import Atom, Equation, Program, Value, producer_of


@dataclasses.dataclass(frozen=True)
class Moves:
    """A chain of transposes ("transpose", permutation) and reshapes ("reshape", shape)."""

    steps: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __call__(self, y: Any) -> Any:
        """Apply the chain."""
        for kind, what in self.steps:
            y = jnp.transpose(y, what) if kind == "transpose" else jnp.reshape(y, what)
        return y

    def position(self, dim: int, shape: tuple[int, ...]) -> int | None:
        """Return where a dim of an array of ``shape`` is after the chain, or None if it is joined or divided."""
        for kind, what in self.steps:
            if kind == "transpose":
                dim, shape = what.index(dim), tuple(shape[i] for i in what)
                continue
            before = _product(shape[:dim])
            found = [i for i, n in enumerate(what) if n == shape[dim] and _product(what[:i]) == before]
            if len(found) != 1:
                return None
            dim, shape = found[0], what
        return dim


STAY = Moves()


def _product(sizes: tuple[Any, ...]) -> Any:
    result = 1
    for n in sizes:
        result = result * n
    return result


def move_of(step: Equation) -> tuple[str, tuple[int, ...]] | None:
    """Return an equation as a step of `Moves` if it only moves elements, or None."""
    if not step.outputs:
        return None
    shape = step.outputs[0].shape
    if step.primitive == "transpose":
        return "transpose", tuple(step.params["permutation"])
    if step.primitive == "squeeze" or (step.primitive == "reshape" and step.params.get("dimensions") is None):
        return "reshape", shape
    if step.primitive != "broadcast_in_dim":
        return None
    given = step.inputs[0].aval.shape
    return ("reshape", shape) if _product(given) == _product(shape) else None


def moved_back(program: Program, atom: Atom) -> tuple[Atom, Moves, tuple[Equation, ...]]:
    """Follow an atom back through moves of arrays that are read only once.

    Returns:
        The atom that is moved, the moves, and their equations.
    """
    steps: list[tuple[str, tuple[int, ...]]] = []
    equations: list[Equation] = []
    while isinstance(atom, Value):
        step = producer_of(program, atom)
        if step is None or len(step.outputs) != 1 or not step.inputs:
            break
        move = move_of(step)
        if move is None or not used_once(program, step.inputs[0]):
            break
        steps.append(move)
        equations.append(step)
        atom = step.inputs[0]
    return atom, Moves(tuple(steps[::-1])), tuple(equations[::-1])


def used_once(program: Program, atom: Atom) -> bool:
    """Whether a single step reads the atom, and it is not an output."""
    return isinstance(atom, Value) and len(program.users.get(atom, ())) == 1 and atom not in program.outputs


def bias_of(program: Program, atom: Atom, channel: int, shape: tuple[int, ...]) -> Atom | None:
    """Return the vector that an addend of ``shape`` repeats along all dims but ``channel``, or None.

    The vector may have more dims, of size 1.
    """
    size = shape[channel]
    step = producer_of(program, atom, "broadcast_in_dim")
    if step is not None:
        given = step.inputs[0]
        places = step.params["broadcast_dimensions"]
        wide = [place for place, n in zip(places, given.aval.shape, strict=True) if n != 1]
        if len(step.inputs) == 1 and isinstance(given, Value) and wide == [channel] and _product(given.shape) == size:
            return given
    if isinstance(atom, Value) and len(atom.shape) == len(shape):
        ones = all(n == 1 for i, n in enumerate(atom.shape) if i != channel)
        if ones and atom.shape[channel] == size:
            return atom
    return None
