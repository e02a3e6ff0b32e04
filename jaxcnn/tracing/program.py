"""Traced functions as flat lists of steps.

A `Program` is a jaxpr whose inner functions (jit, closed_call) have been written out in place, so that patterns and
data flow can be read across their boundaries. Loops, branches and other transformed functions stay steps of their own,
whose bodies are programs again.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend import source_info_util as source_info
from jax.extend.core import primitives as p
from jax.typing import ArrayLike

from jaxcnn.ops.mark import marked_call
from jaxcnn.ops.rule import Rule


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A variable of a program, compared by identity."""

    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape."""
        return getattr(self.aval, "shape", ())

    @property
    def dtype(self) -> Any:
        """Return the dtype."""
        return getattr(self.aval, "dtype", None)


#: What a step reads: a variable, or a scalar that is written in the program.
Atom = Value | Any  # core.Literal, whose types JAX does not export


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """A step that stays what it was: one equation of JAX."""

    eqn: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    #: All enclosing name scopes.
    name_stack: Any
    #: Path of the step that holds this one, for steps in loops and branches.
    outer: str = ""
    #: For loops, branches and inner functions: parameter of the primitive → the program or programs that it holds.
    bodies: Mapping[str, tuple["Program", ...]] = dataclasses.field(default_factory=dict)

    @property
    def primitive(self) -> str:
        """Return the name of the primitive."""
        return str(self.eqn.primitive.name)

    @property
    def params(self) -> Mapping[str, Any]:
        """Return the parameters of the primitive."""
        return self.eqn.params

    @property
    def path(self) -> str:
        """Return the path of the enclosing modules, such as "Net/Block_0"."""
        return "/".join(filter(None, (self.outer, module_path(self.name_stack))))


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """A step that is one of the library's ops: one or several equations of JAX that were recognized.

    ``form`` maps the inputs of the traced function to the arguments of the op and its result back. See `Form`.
    """

    form: "Form"
    inputs: tuple[Atom, ...]
    output: Value
    #: The equations that it replaces, in order; the last one computes the output.
    equations: tuple[Equation, ...]
    #: The same function as it was traced: the equations, and those that compute their constants.
    body: "Program"
    #: Unique in the function, such as "Net/Block_0/Conv_1".
    name: str = ""
    #: Replacement for the backward rule.
    rule: Rule | None = None
    #: Whether it is outside of loops and branches, so that its δ can be returned.
    tapped: bool = False

    @property
    def op(self) -> Callable[..., Any]:
        """Return the public function, such as `jaxcnn.conv`."""
        return self.form.op

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Return the output as a tuple, as `Equation.outputs`."""
        return (self.output,)

    @property
    def name_stack(self) -> Any:
        """Return all enclosing name scopes."""
        return self.equations[-1].name_stack

    @property
    def path(self) -> str:
        """Return the path of the enclosing modules."""
        return self.equations[0].path

    @property
    def primitive(self) -> str:
        """Return the name of the op."""
        return self.form.kind


Step = Equation | Operation


class Form:
    """An operation of a traced function, written as a call of one of the library's ops.

    A form is static and hashable; equal calls have equal forms, so that they are traced and lowered once.

        y = restore(call(rule, *prepare(*inputs)))
    """

    #: The public function of the library.
    op: Callable[..., Any]
    #: Name of the op as in `jaxcnn.ops.rule.Call`.
    kind: str
    #: Whether the library's op runs if there is no rule; otherwise the original equations do.
    replaces: bool = True
    #: If they do, why.
    kept: str = "as fast there"

    def prepare(self, *inputs: Any) -> tuple[Any, ...]:
        """Return the arguments of the op: arrays in the library's layout (channels last), None for no bias."""
        return inputs

    def restore(self, y: Any) -> Any:
        """Return the output of the traced function from the op's result."""
        return y

    def call(self, rule: Rule | None, *arguments: Any) -> Any:
        """Return the op's result for prepared arguments."""
        raise NotImplementedError

    def flops(self, inputs: Sequence[Any], output: Any) -> int:
        """Return the number of additions and multiplications of the forward pass."""
        return int(np.prod(output.shape))

    def weights(self) -> tuple[int, ...]:
        """Return the positions of weights among the inputs."""
        return ()

    def __call__(self, rule: Rule | None, *inputs: Any) -> Any:
        """Return the output of the traced function."""
        return self.restore(self.call(rule, *self.prepare(*inputs)))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function: inputs, constants, steps in order, outputs."""

    inputs: tuple[Value, ...]
    constants: Mapping[Value, Any]
    steps: tuple[Step, ...]
    outputs: tuple[Atom, ...]
    #: The jaxpr that it was made from.
    source: Any = None
    #: Why equations that could have been operations are none.
    reasons: Mapping[Equation, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def producer(self) -> dict[Value, Step]:
        """Map each value to the step that computes it; inputs and constants have none."""
        return {v: step for step in self.steps for v in step.outputs}

    @functools.cached_property
    def users(self) -> dict[Value, list[Step]]:
        """Map each value to the steps that read it."""
        users: dict[Value, list[Step]] = {}
        for step in self.steps:
            for v in dict.fromkeys(v for v in step.inputs if isinstance(v, Value)):
                users.setdefault(v, []).append(step)
        return users

    @functools.cached_property
    def last_reads(self) -> list[list[Value]]:
        """Return, for each step, the values that no later step and no output reads."""
        alive = {v for v in self.outputs if isinstance(v, Value)}
        reads: list[list[Value]] = []
        for step in reversed(self.steps):
            values = dict.fromkeys(v for v in (*step.inputs, *step.outputs) if isinstance(v, Value))
            reads.append([v for v in values if v not in alive])
            alive.update(values)
        return reads[::-1]

    def operations(self) -> Iterator[Operation]:
        """Yield the operations in order, those in loops and branches included."""
        for step in self.steps:
            if isinstance(step, Operation):
                yield step
            else:
                for body in (body for bodies in step.bodies.values() for body in bodies):
                    yield from body.operations()

    def equations(self) -> Iterator[Equation]:
        """Yield the equations, including those in loops and branches."""
        for step in self.steps:
            if isinstance(step, Equation):
                yield step
                for body in (body for bodies in step.bodies.values() for body in bodies):
                    yield from body.equations()

    def part(self, inputs: tuple[Atom, ...], output: Value) -> "Program | None":
        """Return the function from ``inputs`` to one value, or None if the value depends on more than these."""
        known = {v for v in inputs if isinstance(v, Value)}
        steps: list[Step] = []
        todo = [output]
        while todo:
            value = todo.pop()
            if value in known or value in self.constants:
                continue
            step = self.producer.get(value)
            if step is None or (isinstance(step, Equation) and step.eqn.effects):
                return None
            steps.append(step)
            known.update(step.outputs)
            todo.extend(v for v in step.inputs if isinstance(v, Value))
        place = {step: i for i, step in enumerate(self.steps)}
        read = {v for step in steps for v in step.inputs if isinstance(v, Value)}
        constants = {v: const for v, const in self.constants.items() if v in read}
        values = tuple(v if isinstance(v, Value) else Value(v.aval) for v in inputs)
        return Program(values, constants, tuple(sorted(steps, key=place.__getitem__)), (output,))

    def map(self, change: Callable[[Operation], Operation]) -> "Program":
        """Return the program with every operation changed, in loops and branches as well."""

        def changed(step: Step) -> Step:
            if isinstance(step, Operation):
                return change(step)
            if not step.bodies:
                return step
            bodies = {name: tuple(body.map(change) for body in each) for name, each in step.bodies.items()}
            return dataclasses.replace(step, bodies=bodies)

        return dataclasses.replace(self, steps=tuple(map(changed, self.steps)))

    def dependents(self, values: Iterable[Value]) -> set[Value]:
        """Return the values that depend on any of ``values``, these included."""
        known = set(values)
        for step in self.steps:
            if not known.isdisjoint(a for a in step.inputs if isinstance(a, Value)):
                known.update(step.outputs)
        return known

    def without_checkpoints(self) -> "Program":
        """Return the program with the bodies of `jax.checkpoint` written out in place, so that their steps are read."""
        known: dict[Value, Atom] = {}
        steps: list[Step] = []
        constants = dict(self.constants)

        def read(atom: Atom) -> Atom:
            return known.get(atom, atom) if isinstance(atom, Value) else atom

        def write(program: Program) -> None:
            constants.update(program.constants)
            for step in program.steps:
                step = dataclasses.replace(step, inputs=tuple(map(read, step.inputs)))
                if isinstance(step, Equation) and step.primitive == p.remat_p.name and step.bodies:
                    (body,) = step.bodies["jaxpr"]
                    known.update(zip(body.inputs, step.inputs, strict=True))
                    write(body)
                    known.update(zip(step.outputs, map(read, body.outputs), strict=True))
                else:
                    steps.append(step)

        write(self)
        return Program(self.inputs, constants, tuple(steps), tuple(map(read, self.outputs)))


def _is_inlined_by_jax(inline: Any) -> bool:
    """Whether JAX writes out a jitted function with this option `inline`: a bool, from jax 0.11 on a `jax.Inline`."""
    return inline is True or getattr(inline, "name", "").startswith("JAX_")


def module_path(name_stack: Any) -> str:
    """Return the scopes of a name stack, without those of transformations: "jvp(Net)/Conv_0" is "Net/Conv_0"."""
    return "/".join(scope.name for scope in name_stack.stack if type(scope).__name__ != "Transform").strip("/")


# ---------------------------------------------------------------------------------------------------------------------
# From a jaxpr to a program

#: Transformed functions whose bodies are read: primitive → the parameters that hold their jaxprs.
BODIES = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    p.remat_p.name: ("jaxpr",),
    "shard_map": ("jaxpr",),
}

#: Inner functions that are always written out in place.
_INLINED = {"closed_call": "call_jaxpr", "core_call": "call_jaxpr", "call": "call_jaxpr"}

#: An inner jit is kept if it contains one of these steps; others are written out in place.
_COSTLY = {
    "conv_general_dilated", "dot_general", "reduce_window", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum", "scan", "while", "cond", p.remat_p.name, "shard_map", "custom_vjp_call",
}  # fmt: skip


def program_of(closed: Any, *, inline: bool, outer: str = "") -> Program:
    """Return the program of a closed jaxpr.

    Args:
        closed: the jaxpr.
        inline: whether inner jits are written out even if they contain costly steps. They are then one program; kept
            jits compile separately where the function runs without an outer jit, and equal ones are traced once.
        outer: path of the step that holds the program.

    Returns:
        The program; nothing in it is recognized yet.
    """
    inputs = tuple(Value(v.aval) for v in closed.jaxpr.invars)
    writer = _Writer(inline, outer)
    outputs = writer.write(closed.jaxpr, closed.consts, inputs, source_info.new_name_stack())
    return Program(inputs, writer.constants, tuple(writer.steps), tuple(outputs), closed)


class _Writer:
    """Appends equations, inner functions written out in place."""

    def __init__(self, inline: bool, outer: str) -> None:
        self.inline, self.outer = inline, outer
        self.steps: list[Equation] = []
        self.constants: dict[Value, Any] = {}

    def write(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Atom], outer: Any) -> list[Atom]:
        """Append the equations of a jaxpr and return its outputs."""
        known: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for v, const in zip(jaxpr.constvars, consts, strict=True):
            known[v] = Value(v.aval)
            self.constants[known[v]] = const

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            stack = outer + eqn.source_info.name_stack
            ins = tuple(read(a) for a in eqn.invars)
            inner = self._inlined(eqn)
            if inner is not None:
                outs: Sequence[Atom] = self.write(inner.jaxpr, inner.consts, ins, stack)
            else:
                outs = tuple(Value(v.aval) for v in eqn.outvars)
                step = Equation(eqn, ins, outs, stack, self.outer)
                bodies = self._bodies(step)
                self.steps.append(dataclasses.replace(step, bodies=bodies) if bodies else step)
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def _inlined(self, eqn: Any) -> Any:
        """Return the jaxpr of an inner function to write out here, or None."""
        if eqn.primitive.name in _INLINED:
            inner = eqn.params[_INLINED[eqn.primitive.name]]
            return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
        if eqn.primitive is not p.jit_p or getattr(eqn.ctx, "xla_metadata", None) or marked_call(eqn):
            return None
        params = eqn.params
        placed = [*params.get("in_shardings", ()), *params.get("out_shardings", ())]
        options = [
            *params.get("in_layouts", ()),
            *params.get("out_layouts", ()),
            *params.get("compiler_options_kvs", ()),
        ]
        if any("Unspecified" not in type(s).__name__ for s in placed) or any(options):
            return None
        closed = params["jaxpr"]
        if self.inline or _is_inlined_by_jax(params["inline"]):
            return closed
        return None if any(params["donated_invars"]) or costly(closed.jaxpr) else closed

    def _bodies(self, step: Equation) -> dict[str, tuple[Program, ...]]:
        bodies = {}
        for name in () if marked_call(step.eqn) else BODIES.get(step.primitive, ()):
            held = step.params[name]
            each = held if isinstance(held, tuple) else (held,)
            closed = (j if isinstance(j, core.ClosedJaxpr) else core.ClosedJaxpr(j, ()) for j in each)
            bodies[name] = tuple(program_of(j, inline=self.inline, outer=step.path) for j in closed)
        return bodies


def costly(jaxpr: Any) -> bool:
    """Whether a jaxpr contains a convolution, a product, a pooling, a loop or a custom rule."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _COSTLY:
            return True
        if eqn.primitive is p.jit_p and costly(eqn.params["jaxpr"].jaxpr):
            return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Constants


def producer_of(program: Program, atom: Atom, *primitives: str) -> Equation | None:
    """Return the equation that computes an atom if it is one of these primitives (any, if none is named)."""
    step = None if isinstance(atom, core.Literal) else program.producer.get(atom)
    if not isinstance(step, Equation) or (primitives and step.primitive not in primitives):
        return None
    return step


def scalar_of(program: Program, atom: Atom) -> float | int | bool | None:
    """Return the number that all elements of an array are, if it is written in the program, or None."""
    if isinstance(atom, core.Literal):
        return atom.val if np.ndim(atom.val) == 0 else None
    if atom in program.constants:
        value = program.constants[atom]
        if (
            isinstance(value, jax.core.Tracer)
            or not hasattr(value, "dtype")
            or not np.issubdtype(value.dtype, np.number)
        ):
            return None
        return np.asarray(value).item() if np.size(value) == 1 else None
    step = producer_of(program, atom, "convert_element_type", "broadcast_in_dim", "reshape", "copy")
    if step is None:
        return None
    value = scalar_of(program, step.inputs[0])
    return None if value is None else _converted(value, atom.dtype)


def _converted(value: Any, dtype: Any) -> Any:
    return np.asarray(value).astype(dtype).item() if jnp.issubdtype(dtype, np.number) else value


def is_float(atom: Atom | ArrayLike) -> bool:
    """Whether an atom is an array of a floating dtype of at least 16 bits that is not weakly typed."""
    aval = getattr(atom, "aval", atom)
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.floating) and dtype.itemsize >= 2
