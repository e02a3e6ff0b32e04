"""Evaluate a program, step by step."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend import source_info_util as source_info
from jax.extend.core import primitives as p

from jaxcnn.ops.rule import Rule, autodiff
from jaxcnn.taps import collecting, tap, tapped_name
from jaxcnn.tracing.library import LibraryForm
from jaxcnn.tracing.program import Equation, Form, Operation, Program, Step, Value

#: Computes the outputs of a step from its inputs.
Run = Callable[[Step, Sequence[Any]], Sequence[Any]]


def evaluate(program: Program, inputs: Sequence[Any], run: Run | None = None) -> list[Any]:
    """Return the outputs of a program.

    Args:
        program: the program.
        inputs: one array for each of its inputs.
        run: computes each step, in loops and branches as well; `execute` by default, to which it can hand steps on.

    Returns:
        One array for each output.
    """
    known: dict[Value, Any] = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for step, done in zip(program.steps, program.last_reads, strict=True):
        given = [read(a) for a in step.inputs]
        outputs = execute(step, given) if run is None else run(step, given)
        known.update(zip(step.outputs, outputs, strict=True))
        for value in done:
            known.pop(value, None)
    return [read(a) for a in program.outputs]


def execute(step: Step, inputs: Sequence[Any], run: Run | None = None) -> Sequence[Any]:
    """Return the outputs of a step: an operation by its form and rule, an equation as JAX does.

    Args:
        step: the step.
        inputs: its inputs.
        run: as in `evaluate`, for the bodies of loops and branches.

    Returns:
        The outputs.
    """
    if isinstance(step, Operation):
        y = operate(step, inputs)
        return (tap(step.name, y) if step.tapped and collecting() else y,)
    name = tapped_name(step.eqn)
    if name is not None:
        return [tap(name, *inputs)]
    with _located(step), step.eqn.ctx.manager:
        if any(run is not None or _differs(body) for each in step.bodies.values() for body in each):
            return _rebound(step, inputs, run)
        return _bound(step.eqn.primitive, inputs, step.eqn.primitive.get_bind_params(step.eqn.params))


def operate(operation: Operation, inputs: Sequence[Any]) -> Any:
    """Return the output of an operation, without its tap."""
    form, rule = operation.form, operation.rule
    if (rule is None and not form.replaces) or (rule is autodiff and not isinstance(form, LibraryForm)):
        return evaluate(operation.body, inputs)[0]
    with _located(operation.equations[-1]):
        return _typed(call_form(form, rule, *inputs), operation.output.aval)


@functools.partial(jax.jit, static_argnums=(0, 1))
def call_form(form: Form, rule: Rule | None, *inputs: Any) -> Any:
    """Call a form in a jit of its own, so that equal calls are traced, differentiated and lowered once.

    Args:
        form: the form.
        rule: the rule.
        *inputs: the inputs of the operation.

    Returns:
        Its output.
    """
    return form(rule, *inputs)


def _typed(y: Any, aval: Any) -> Any:
    """Return y with the weak type that it has in the traced function."""
    if jax.typeof(y).weak_type == aval.weak_type:
        return y
    return p.convert_element_type_p.bind(y, new_dtype=aval.dtype, weak_type=aval.weak_type, sharding=None)


@contextlib.contextmanager
def _located(step: Equation) -> Iterator[None]:
    """Keep the scopes and the source line of an equation, for profilers and error messages."""
    stack = source_info.current_name_stack() + step.name_stack
    with source_info.user_context(step.eqn.source_info.traceback, name_stack=stack):
        yield


def _bound(primitive: Any, inputs: Sequence[Any], params: Any) -> Sequence[Any]:
    outputs = primitive.bind(*inputs, **params)
    return outputs if primitive.multiple_results else [outputs]


# ---------------------------------------------------------------------------------------------------------------------
# Loops, branches and other functions that hold functions


def _differs(program: Program) -> bool:
    """Whether a program computes a step in another way than it was traced."""
    taps = collecting() and any(tapped_name(step.eqn) is not None for step in program.equations())
    return taps or any(_differing(operation) for operation in program.operations())


def _differing(operation: Operation) -> bool:
    if isinstance(operation.form, LibraryForm):
        return operation.rule is not None
    return operation.rule is not autodiff and (operation.rule is not None or operation.form.replaces)


def _rebound(step: Equation, inputs: Sequence[Any], run: Run | None) -> Sequence[Any]:
    """Evaluate a step whose bodies have changed; all of its other parameters are kept."""
    params = dict(step.eqn.params)
    if step.primitive == p.remat_p.name:
        function = functools.partial(_body, step.bodies["jaxpr"][0], run)
        again = jax.checkpoint(function, prevent_cse=params["prevent_cse"], policy=params["policy"])
        return again(*inputs)
    if step.primitive == "shard_map":
        function = functools.partial(_body, step.bodies["jaxpr"][0], run)
        return jax.shard_map(
            function,
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=list(params["out_specs"]),
            axis_names=set(params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]),
            check_vma=params["check_vma"],
        )(*inputs)
    for name, bodies in step.bodies.items():
        traced = tuple(_retraced(body, run) for body in bodies)
        params[name] = traced if isinstance(params[name], tuple) else traced[0]
    return _bound(step.eqn.primitive, inputs, params)


def _body(program: Program, run: Run | None, *inputs: Any) -> list[Any]:
    """Evaluate a program; its outputs have the types that it was traced with."""
    outputs = evaluate(program, inputs, run)
    return [_typed(y, a.aval) for y, a in zip(outputs, program.outputs, strict=True)]


#: Jaxprs of bodies by the jaxpr that they were made from and the rules in them, so that a second call compiles nothing.
_AGAIN: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _retraced(program: Program, run: Run | None) -> Any:
    """Return the jaxpr of a program, for inputs and outputs of the same types."""

    def traced() -> Any:
        return jax.make_jaxpr(functools.partial(_body, program, run))(*(v.aval for v in program.inputs))

    if run is not None:
        return traced()
    known = _AGAIN.setdefault(program.source.jaxpr, {})
    key = tuple((operation.form, operation.rule) for operation in program.operations())
    if key not in known:
        known[key] = traced()
    return known[key]
