"""From equations to operations.

Each recognizer looks at one equation, and at those before it, and proposes a `Match`. Where matches overlap, the one
with more equations is taken. A form must give the type that the function has; otherwise the equations stay.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.tracing.activation import activations
from jaxcnn.tracing.convolution import ConvForm, conv_form
from jaxcnn.tracing.evaluate import call_form
from jaxcnn.tracing.library import LibraryForm, library_form
from jaxcnn.tracing.linear import AddForm, DenseForm, dense_form
from jaxcnn.tracing.names import named, tap_of
from jaxcnn.tracing.pooling import PoolForm, counted, global_form, pool_form
from jaxcnn.tracing.program import (
    Atom,
    Equation,
    Form,
    Operation,
    Program,
    Value,
    is_float,
    producer_of,
    scalar_of,
)
from jaxcnn.tracing.shapes import bias_of, move_of, moved_back, used_once


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """A proposal: these equations are an operation with this form."""

    form: Form
    inputs: tuple[Atom, ...]
    equations: tuple[Equation, ...]

    @property
    def root(self) -> Equation:
        """Return the equation that computes the output."""
        return self.equations[-1]


def recognize(program: Program) -> Program:
    """Return the program with operations in place of the equations that they replace, named and in order."""
    return named(_recognized(program, tapped=True))


def _recognized(program: Program, tapped: bool) -> Program:
    """Return the program with operations, which have no names yet."""
    program = dataclasses.replace(program, steps=tuple(map(_with_bodies, program.steps)))
    operations: dict[Any, Operation] = {}
    reasons: dict[Equation, str] = {}
    matches = [match for step in program.steps for match in _matches(program, step, reasons)]
    data = _data(program)
    for match in _chosen([match for match in matches if any(a in data for a in match.inputs if isinstance(a, Value))]):
        output = match.root.outputs[0]
        body = program.part(match.inputs, output)
        reason = "its value depends on more than its inputs" if body is None else _misfit(match, output)
        if body is None or reason is not None:
            reasons[match.equations[0]] = str(reason)
            continue
        operation = Operation(match.form, match.inputs, output, match.equations, body, tapped=tapped)
        name = tap_of(program, operation)
        if name is not None:
            operation = dataclasses.replace(operation, name=name, tapped=False)
        operations[match.root] = operation
    steps = [operations.get(step, step) for step in program.steps]
    return dataclasses.replace(program, steps=tuple(_alive(steps, program.outputs)), reasons=reasons)


def _data(program: Program) -> set[Value]:
    """Return the values that depend on a floating input or constant array, unlike random numbers and their bounds."""
    arrays = (v for v in program.constants if v.shape)
    return program.dependents(v for v in (*program.inputs, *arrays) if jnp.issubdtype(v.dtype, np.inexact))


def _misfit(match: Match, output: Value) -> str | None:
    """Return why a form does not give the type that the function has, or None."""
    if not match.form.replaces or isinstance(match.form, LibraryForm):  # a call of the op itself has its type
        return None
    avals = [jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in match.inputs]
    try:
        y = jax.eval_shape(functools.partial(call_form, match.form, None), *avals)
    except (ValueError, TypeError) as error:
        return str(error)
    if (y.shape, y.dtype) != (output.shape, output.dtype):
        return f"the op gives {y.dtype}{list(y.shape)}"
    return None


def _with_bodies(step: Any) -> Any:
    if not step.bodies:
        return step
    bodies = {name: tuple(_recognized(body, tapped=False) for body in each) for name, each in step.bodies.items()}
    return dataclasses.replace(step, bodies=bodies)


def _chosen(matches: list[Match]) -> list[Match]:
    """Return matches that do not overlap, those with more equations first."""
    taken: set[Equation] = set()
    chosen = []
    for match in sorted(matches, key=lambda match: (-len(match.equations), not match.form.replaces)):
        if taken.isdisjoint(match.equations):
            taken.update(match.equations)
            chosen.append(match)
    return chosen


def _alive(steps: list[Any], outputs: tuple[Atom, ...]) -> list[Any]:
    """Return the steps without those whose results nothing reads."""
    needed = {v for v in outputs if isinstance(v, Value)}
    alive = []
    for step in reversed(steps):
        if not needed.isdisjoint(step.outputs) or (isinstance(step, Equation) and step.eqn.effects):
            needed.update(v for v in step.inputs if isinstance(v, Value))
            alive.append(step)
    return alive[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# Matches that end in an equation


def _matches(program: Program, step: Any, reasons: dict[Equation, str]) -> Iterator[Match]:
    """Yield the proposals; if there is none, write the reason to ``reasons``."""
    primitive = step.primitive
    if primitive in _FORMS:
        form = _form(program, step)
        if isinstance(form, str):
            reasons[step] = form
        else:
            yield Match(form, _operands(form, step), (step,))
    if primitive == "reduce_max":
        whole = global_form(program, step)
        if whole is not None:
            yield Match(whole, step.inputs, (step,))
    elif primitive == "add":
        yield from _biased(program, step)
        if _is_sum(program, step):
            yield Match(AddForm(), step.inputs, (step,))
    elif primitive == "div":
        yield from _averaged(program, step)
    library = library_form(step) if isinstance(step, Equation) else None
    if library is not None:
        yield Match(library, step.inputs, (step,))
        return
    for form, x, equations in activations(program, step):
        if not (form.kind == "relu" and _is_variance(program, x)):
            yield Match(form, (x,), equations)


def _is_sum(program: Program, step: Equation) -> bool:
    """Whether an addition is that of two arrays of one shape, as at the end of a residual block.

    Neither repeats a smaller array, and they are not both multiplied by a number, as in a running average.
    """
    x, y = step.inputs
    if not (is_float(x) and is_float(y) and x.aval.shape == y.aval.shape != ()):
        return False
    repeated = (producer_of(program, a, "broadcast_in_dim") for a in (x, y))
    scaled = (producer_of(program, a, "mul") for a in (x, y))
    return all(made is None or move_of(made) for made in repeated) and not all(
        made is not None and any(scalar_of(program, a) is not None for a in made.inputs) for made in scaled
    )


def _is_variance(program: Program, atom: Atom) -> bool:
    """Whether an atom is E[x²] − E[x]², which normalizations keep from being negative."""
    difference = producer_of(program, atom, "sub")
    square = difference and producer_of(program, difference.inputs[1], "square", "integer_pow", "mul")
    return square is not None and (square.primitive != "mul" or square.inputs[0] is square.inputs[1])


#: Primitives that are operations where they can be.
_FORMS = (
    "conv_general_dilated", "dot_general", "reduce_window", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum",
)  # fmt: skip


def _form(program: Program, step: Equation) -> Form | str:
    if step.primitive == "conv_general_dilated":
        return conv_form(step)
    if step.primitive == "dot_general":
        return dense_form(step, swapped=_first_holds_weights(program, step))
    return pool_form(program, step)


def _operands(form: Form, step: Equation) -> tuple[Atom, ...]:
    """Return the inputs of an operation of one equation: data first, without the initial value of a reduction."""
    if isinstance(form, PoolForm):
        return step.inputs[:1]
    return step.inputs[::-1] if isinstance(form, DenseForm) and form.swapped else step.inputs


def _biased(program: Program, step: Equation) -> Iterator[Match]:
    """Yield the convolution or product to which an equation adds a bias."""
    for y, b in (step.inputs, step.inputs[::-1]):
        if not used_once(program, y) or y.shape != step.outputs[0].shape:
            continue
        made, moves, equations = moved_back(program, y)
        source = producer_of(program, made, "conv_general_dilated", "dot_general")
        if source is None:
            continue
        for form, inputs, channel in _affine(program, source):
            place = None if channel is None else moves.position(channel, source.outputs[0].shape)
            vector = None if place is None else bias_of(program, b, place, y.shape)
            if vector is not None and is_float(vector) and vector.dtype == y.dtype:
                both = dataclasses.replace(form, moves=moves)
                yield Match(both, (*inputs, vector), (source, *equations, step))
                return


def _affine(program: Program, step: Equation) -> Iterator[tuple[Any, tuple[Atom, ...], int | None]]:
    """Yield the form of a convolution or product, its inputs, and the dim of the channels in its result."""
    if step.primitive == "conv_general_dilated":
        form = conv_form(step)
        if isinstance(form, ConvForm):
            yield form, step.inputs, form.y_dims.index(len(form.y_dims) - 1)
        return
    first = _first_holds_weights(program, step)
    for swapped in (first, not first):
        dense = dense_form(step, swapped)
        if isinstance(dense, DenseForm):
            free_a, free_b = dense.free
            single = len(free_a if swapped else free_b) == 1
            channel = 0 if swapped else len(free_a)
            yield dense, _operands(dense, step), channel if single else None


def _first_holds_weights(program: Program, step: Equation) -> bool:
    """Whether the first operand of a product holds the weights.

    Weights are inputs or constants, possibly moved or converted. If only one operand is one, it holds the weights. If
    both are, it is the second; the first if the result is transposed, as in ``vmap`` of ``w @ x``.
    """
    first, second = (_is_given(program, a) for a in step.inputs)
    if first != second:
        return first
    users = program.users.get(step.outputs[0], ())
    return first and len(users) == 1 and users[0].primitive == "transpose"


def _is_given(program: Program, atom: Atom) -> bool:
    """Whether an atom is an input or a constant, possibly moved or converted."""
    while isinstance(atom, Value):
        step = producer_of(program, atom)
        if step is None:
            return atom not in program.producer
        if len(step.inputs) != 1 or not (step.primitive == "convert_element_type" or move_of(step)):
            return False
        atom = step.inputs[0]
    return True


def _averaged(program: Program, step: Equation) -> Iterator[Match]:
    """Yield the average that a division of sums completes."""
    y, divisor = step.inputs
    if not used_once(program, y) or y.shape != step.outputs[0].shape:
        return
    made, moves, equations = moved_back(program, y)
    source = producer_of(program, made, "reduce_window_sum", "reduce_window", "reduce_sum")
    if source is None:
        return
    x = source.inputs[:1]
    if source.primitive == "reduce_sum":
        whole = global_form(program, source)
        count = None if whole is None else np.prod([x[0].aval.shape[i] for i in whole.axes])
        if whole is not None and scalar_of(program, divisor) == count:
            yield Match(dataclasses.replace(whole, moves=moves), x, (source, *equations, step))
        return
    form = pool_form(program, source)
    if isinstance(form, PoolForm) and form.reduction == "sum":
        average = counted(program, dataclasses.replace(form, moves=moves), source, divisor, y.shape)
        if average is not None:
            yield Match(average, x, (source, *equations, step))
