"""The table of a function's operations."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core

from jaxcnn.text import aligned, by
from jaxcnn.tracing.program import Atom, Equation, Operation, Program, Value, costly
from jaxcnn.tracing.shapes import move_of

#: Equations that a table lists as left in plain JAX; all others only move elements, or are cheap.
_LISTED = {
    "sort": "", "top_k": "", "cumsum": "", "cumprod": "", "cummax": "", "cummin": "", "cumlogsumexp": "", "fft": "",
    "cholesky": "", "eigh": "", "eig": "", "svd": "", "qr": "", "lu": "", "triangular_solve": "", "pallas_call": "",
    "ffi_call": "", "pure_callback": "", "io_callback": "", "custom_partitioning": "",
    "select_and_scatter": "part of a derivative", "select_and_scatter_add": "part of a derivative",
    "select_and_gather_add": "part of a derivative", "custom_vjp_call": "has a rule of its own",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OperationRow:
    """One operation of a function, or one equation that could not be made one."""

    #: As in ``rules=`` and in `value_grad_and_deltas`; that of the module for an equation.
    name: str
    #: Name of the op, or of JAX's primitive.
    op: str
    #: Shapes of the inputs; those of weights included.
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    #: Elements of the weights, counted where they are first used.
    parameters: int
    #: Additions and multiplications of the forward pass, over all turns of a `jax.lax.scan`.
    flops: int
    #: Whether the library computes it.
    replaced: bool
    #: Whether it is one of the library's ops, with a name and a rule.
    recognized: bool
    #: Why JAX computes it, if it does.
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Operations:
    """The operations of a function, in order. ``str()`` is a table."""

    rows: tuple[OperationRow, ...]

    @property
    def parameters(self) -> int:
        """Return the number of elements of all weights of operations."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        """Return the FLOPs of the forward pass of all operations."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        table = [("name", "op", "input", "output", "parameters", "FLOPs", "in JAX because")]
        for row in self.rows:
            shapes = by(row.input_shapes[0]) if row.input_shapes else "", by(row.output_shape)
            table.append((row.name, row.op, *shapes, f"{row.parameters:,}", f"{row.flops:,}", row.reason))
        table.append(("total", "", "", "", f"{self.parameters:,}", f"{self.flops:,}", ""))
        return aligned(table, right=(4, 5))


def table_of(program: Program) -> Operations:
    """Return the table of a program whose operations are recognized."""
    return Operations(tuple(_rows(program, {}, set(), 1)))


def _rows(program: Program, outer: dict[Value, Any], counted: set[Any], times: int) -> Iterator[OperationRow]:
    """Yield the rows; ``outer`` maps inputs of a body to what they are outside, ``counted`` are weights seen before."""
    for step in program.steps:
        if isinstance(step, Operation):
            yield _row(program, outer, step, counted, times)
            continue
        reason = _reason(program, step)
        if reason is not None:
            shapes = tuple(tuple(a.aval.shape) for a in step.inputs)
            out = step.outputs[0].shape if step.outputs else ()
            yield OperationRow(step.path, step.primitive, shapes, tuple(out), 0, 0, False, False, reason)
        turns = step.params["length"] if step.primitive == "scan" else 1
        for name, bodies in step.bodies.items():
            for body in bodies:
                same = {
                    v: _root(program, outer, a) for v, a in zip(body.inputs, _given(step, name, body), strict=False)
                }
                yield from _rows(body, same, counted, times * turns)


def _given(step: Equation, name: str, body: Program) -> Sequence[Any]:
    """Return the inputs of a step that its body gets unchanged, those that come first."""
    if step.primitive == "scan":
        # What is carried has the same rank inside and outside; what is sliced or stacked has one dim more outside.
        carried = sum(a.aval.ndim == v.aval.ndim for a, v in zip(body.outputs, step.outputs, strict=True))
        unsliced = sum(v.aval.ndim == a.aval.ndim for v, a in zip(body.inputs, step.inputs, strict=True))
        return step.inputs[: unsliced - carried]
    if step.primitive == "while":
        before, after = step.params["cond_nconsts"], step.params["body_nconsts"]
        return step.inputs[:before] if name == "cond_jaxpr" else step.inputs[before : before + after]
    return step.inputs[len(step.inputs) - len(body.inputs) :]  # the index of a branch is first


def _row(
    program: Program, outer: dict[Value, Any], operation: Operation, counted: set[Any], times: int
) -> OperationRow:
    form = operation.form
    weights = [operation.inputs[place] for place in form.weights() if place < len(operation.inputs)]
    new = {root for a in weights if (root := _root(program, outer, a)) not in counted}
    counted.update(new)
    return OperationRow(
        name=operation.name,
        op=form.kind,
        input_shapes=tuple(tuple(a.aval.shape) for a in operation.inputs),
        output_shape=tuple(operation.output.shape),
        parameters=sum(math.prod(root.shape) for root in new if isinstance(root, Value)),
        flops=times * form.flops([a.aval for a in operation.inputs], operation.output.aval),
        replaced=form.replaces,
        recognized=True,
        reason="" if form.replaces else form.kept,
    )


def _root(program: Program, outer: dict[Value, Any], atom: Atom) -> Any:
    """Return the value that an atom is, before moves and conversions."""
    while isinstance(atom, Value):
        step = program.producer.get(atom)
        if not isinstance(step, Equation) or not (step.primitive == "convert_element_type" or move_of(step)):
            return outer.get(atom, atom)
        atom = step.inputs[0]
    return id(atom)


def _reason(program: Program, step: Equation) -> str | None:
    """Return why an equation stays in plain JAX, or None if it only moves elements or is cheap."""
    if step in program.reasons:
        return program.reasons[step]
    if step.primitive in _LISTED:
        return _LISTED[step.primitive] or "no op of the library"
    if step.primitive == "custom_jvp_call":
        return "has a derivative of its own" if costly(step.params["call_jaxpr"].jaxpr) else None
    if step.bodies:
        return None
    inner = (getattr(j, "jaxpr", j) for j in core.jaxprs_in_params(step.params))
    return "its function is not looked into" if any(map(costly, inner)) else None
