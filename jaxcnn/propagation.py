"""Rules through a whole function: the programs that `jaxcnn.attribution` differentiates for relevance and DeepLIFT.

Both need a rule at every step that depends on x. A step that only moves elements has none, because its transpose
conserves Σ R. What has no rule is refused before anything is computed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcnn.arguments import bad_value
from jaxcnn.ops.kinds import kind_of
from jaxcnn.ops.rule import Rule, autodiff
from jaxcnn.rules.relevance import Epsilon, pass_through, rescale
from jaxcnn.tracing.affine import Chain, chained, is_move, scales
from jaxcnn.tracing.program import Atom, Equation, Operation, Program, Step, Value
from jaxcnn.tracing.replace import Rules, check_operation, rule_of

#: Kinds of ops whose exact rule propagates relevance.
_NEED_NO_RULE = ("max", "dropout")
#: Equations that are linear in one array, the others being independent of x, in addition to moves and scales.
_LINEAR_IN_ONE = {"mul", "dot_general", "conv_general_dilated", "gather", "div"}
#: Equations that are linear in all arrays that depend on x.
_LINEAR = {"add", "sub", "neg", "reduce_sum", "cumsum", "reduce_window_sum", "select_n"}


def for_relevance(program: Program, x: Value, rules: Rules | None) -> Program:
    """Return a program whose VJP with respect to x is relevance.

    Args:
        program: the function, whose operations have their rules.
        x: the input to explain.
        rules: the rules, for operations that the program does not have yet.

    Returns:
        The program, to be evaluated with `run_chains`.

    Raises:
        ValueError: if a step has no rule, or the rule does not fit.
    """
    program = program.without_checkpoints()
    data = program.dependents([x])
    for step in program.steps:
        if reads(step, data) and isinstance(step, Equation) and not (is_move(step, data) or scales(step, data)):
            raise _refused(step, "relevance")
    program = chained(program, data, keeps=lambda operation: operation.rule is not None)
    steps = []
    for step in program.steps:
        if isinstance(step, Operation) and reads(step, data):
            _check_weights(step, data)
            step = dataclasses.replace(step, rule=_relevance_rule(step, rules))
            check_operation(step, _call)
        steps.append(step)
    return dataclasses.replace(program, steps=tuple(steps))


def for_rescale(program: Program, x: Value) -> Program:
    """Return a program whose VJP with respect to x is that of DeepLIFT, for examples followed by references.

    Args:
        program: the function.
        x: the input.

    Returns:
        The program.

    Raises:
        ValueError: if a step is not linear in x and has no rule.
    """
    program = program.without_checkpoints()
    data = program.dependents([x])
    steps = []
    for step in program.steps:
        if reads(step, data):
            if isinstance(step, Operation):
                _check_weights(step, data)
                step = dataclasses.replace(step, rule=rescale)
                check_operation(step)
            elif not (is_move(step, data) or scales(step, data) or _is_linear(step, data)):
                raise _refused(step, "DeepLIFT")
        steps.append(step)
    return dataclasses.replace(program, steps=tuple(steps))


def reads(step: Step, data: set[Value]) -> bool:
    """Whether a step reads a value that depends on x."""
    return any(_in(a, data) for a in step.inputs)


def _in(atom: Atom, data: set[Value]) -> bool:
    return isinstance(atom, Value) and atom in data


def _is_linear(step: Equation, data: set[Value]) -> bool:
    places = [i for i, a in enumerate(step.inputs) if _in(a, data)]
    if step.primitive in _LINEAR:
        return step.primitive != "select_n" or 0 not in places
    if step.primitive in ("gather", "div") and places != [0]:
        return False
    return step.primitive in _LINEAR_IN_ONE and len(places) == 1


def _refused(step: Equation, method: str) -> ValueError:
    name = step.params.get("name")
    shown = f"{step.primitive} {name!r}" if isinstance(name, str) else step.primitive
    at = f" at {step.path}" if step.path else ""
    return bad_value(
        "attribute", "net", f"a composition of ops with a rule for {method}", f"{shown}{at}, which depends on x"
    )


def _check_weights(operation: Operation, data: set[Value]) -> None:
    """Raise ValueError if an operation other than a sum reads several arrays that depend on x."""
    if operation.form.kind != "add" and any(_in(a, data) for a in operation.inputs[1:]):
        expected = "products of x with weights that do not depend on it"
        raise bad_value("attribute", "net", expected, f"{operation.form.kind} at {operation.name}")


def _relevance_rule(operation: Operation, rules: Rules | None) -> Rule | None:
    form, rule = operation.form, operation.rule
    if rule is None and isinstance(rules, Mapping):
        rule = rule_of(rules, operation)
    if isinstance(form, Chain) and form.head is None:  # its first step may be a sum, with a rule for sums of branches
        return (rule or Epsilon()) if form.shifts else pass_through
    if rule in (None, autodiff):
        if form.kind == "batch_norm":
            return Epsilon()
        if kind_of(form.kind) not in _NEED_NO_RULE and form.kind != "relu":
            expected = "given for each op whose gradient is not a relevance"
            a = "an" if form.kind[0] in "aeiou" else "a"
            raise bad_value("attribute", "rules", expected, f"none for {operation.name}, {a} {form.kind}")
    return rule


def _call(form: Any, rule: Any, *inputs: Any) -> Any:
    """Call a form as `run_chains` does."""
    return form(rule, *inputs)
