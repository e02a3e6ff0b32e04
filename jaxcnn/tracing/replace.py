"""Give the operations of a program replacement rules."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcnn.arguments import bad_type, bad_value, is_predicate, nearest
from jaxcnn.ops.rule import Rule, autodiff
from jaxcnn.tracing.evaluate import call_form
from jaxcnn.tracing.program import Operation, Program


@dataclasses.dataclass(frozen=True)
class OfOps:
    """A key of ``rules=`` that selects operations by the names of their ops, and may match nothing."""

    ops: tuple[str, ...]


#: One rule for all operations, or a mapping from names, ops or predicates (name, op) → bool to rules.
Rules = Rule | Mapping[Any, Rule | None]


def check_rules(op: str, rules: Any) -> None:
    """Raise TypeError unless ``rules`` is None, a rule, or a mapping with keys of the right kinds."""
    if rules is None or (callable(rules) and not isinstance(rules, type | Mapping)):
        return
    if not isinstance(rules, Mapping):
        raise bad_type(op, "rules", "a rule, or a mapping from names, ops or predicates to rules", repr(rules))
    for key in rules:
        is_key = isinstance(key, str | OfOps) or is_op(key) or is_predicate(key)
        if not is_key or isinstance(key, type):
            raise bad_type(
                op, "a key of rules", "a name, an op such as jaxcnn.conv, or a predicate (name, op)", repr(key)
            )


def with_rules(op: str, program: Program, rules: Rules | None) -> Program:
    """Return the program with a rule for each operation that ``rules`` has one for.

    Args:
        op: name of the function, for error messages.
        program: the program.
        rules: as in `jaxcnn.explicit`.

    Returns:
        The program; `check_fits` has not seen it.

    Raises:
        ValueError: if a key matches no operation.
    """
    if rules is None:
        return program
    operations = list(program.operations())
    if isinstance(rules, Mapping):
        for key in rules:
            if not isinstance(key, OfOps) and not any(_matches(key, operation) for operation in operations):
                raise bad_value(op, "a key of rules", "the name or op of an operation", _unknown(key, operations))
    return program.map(
        lambda operation: dataclasses.replace(operation, rule=rule_of(rules, operation) or operation.rule)
    )


def is_op(key: Any) -> bool:
    """Whether ``key`` is an op: a function with the option ``rule``."""
    return inspect.isfunction(key) and "rule" in inspect.signature(key).parameters


def _matches(key: Any, operation: Operation) -> bool:
    if isinstance(key, str):
        return f"{operation.name}/".startswith(f"{key}/")
    if isinstance(key, OfOps):
        return operation.form.kind in key.ops
    return operation.op is key if is_op(key) else bool(key(operation.name, operation.op))


def rule_of(rules: Rules | None, operation: Operation) -> Rule | None:
    """Return the rule of an operation: the one rule, or that of the first key that matches."""
    if not isinstance(rules, Mapping):
        return rules
    return next((rule for key, rule in rules.items() if _matches(key, operation)), None)


def _unknown(key: Any, operations: list[Operation]) -> str:
    names = [operation.name for operation in operations]
    if isinstance(key, str):
        known = dict.fromkeys((*names, *(name[:i] for name in names for i, c in enumerate(name) if c == "/")))
        near = nearest(key, known)
        return f"{key!r}; the nearest names are {_listed(map(repr, near))}"
    ops = dict.fromkeys(operation.op.__name__ for operation in operations)
    return f"{getattr(key, '__name__', repr(key))}; the ops of the function are {_listed(ops)}"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"


def check_fits(program: Program) -> Program:
    """Return a program whose rules fit; their errors come before anything is computed, with the operation's name.

    Args:
        program: the program.

    Returns:
        The program.

    Raises:
        ValueError: if a rule does not fit.
        TypeError: if an option of a rule has the wrong type.
    """
    for operation in program.operations():
        check_operation(operation)
    return program


def check_operation(operation: Operation, call: Callable[..., Any] = call_form) -> None:
    """Apply the rule of an operation to types alone.

    Args:
        operation: the operation.
        call: calls its form with a rule.

    Raises:
        ValueError: if the rule does not fit.
        TypeError: if an option of the rule has the wrong type.
    """
    if operation.rule is None or operation.rule is autodiff:
        return
    avals = [jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in operation.inputs]
    try:
        jax.eval_shape(functools.partial(_backward, functools.partial(call, operation.form, operation.rule)), *avals)
    except (ValueError, TypeError) as error:
        kind: Callable[[str], Exception] = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{operation.name}: {error}") from error


def _backward(function: Callable[..., Any], *inputs: Any) -> Any:
    y, pull = jax.vjp(function, *inputs)
    return pull(jnp.zeros_like(y))
