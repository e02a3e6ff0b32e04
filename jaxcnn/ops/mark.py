"""Marks on the calls of ops in a traced function, by which `jaxcnn.tracing` recognizes them.

A marked call is a jit whose name is a number in a table.
"""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Marked:
    """One call of an op: the arguments of `jaxcnn.ops.rule.apply_rule`, the static part, and the types of the inputs.

    The type of an omitted input is None.
    """

    core: Any
    rule: Any
    plain: Callable[..., Any]
    op: str
    static: Any
    types: tuple[Any, ...]


_PREFIX = "jaxcnn_op_"
#: Number of calls in the table. Older ones are dropped, and are then functions like any other.
MAX_CALLS = 1 << 14
_CALLS: dict[int, Marked] = {}
_NUMBERS: dict[Marked, int] = {}
#: The functions of the calls, so that equal calls are traced once.
_FUNCTIONS: dict[int, Any] = {}
_COUNT = itertools.count()
_LOCK = threading.Lock()
_LOCAL = threading.local()

#: Part of JAX's cache key: inner functions are traced again with marks.
_MARKING: Any = jax.make_user_context(False)


@contextlib.contextmanager
def marks() -> Iterator[None]:
    """Mark the calls of all ops inside this context."""
    outer = marking_ops()
    _LOCAL.marking = True
    try:
        with _MARKING(True):
            yield
    finally:
        _LOCAL.marking = outer


def marking_ops() -> bool:
    """Return whether calls are marked."""
    return getattr(_LOCAL, "marking", False)


def marked(core: Any, rule: Any, plain: Any, op: str, run: Callable[..., Any], static: Any, *inputs: Any) -> Any:
    """Return ``run(static, *inputs)``, as a call with a mark."""
    types = tuple(None if a is None else (a.shape, a.dtype) for a in inputs)
    number = _number_of(Marked(core, rule, plain, op, static, types))
    jitted = _FUNCTIONS.get(number)
    if jitted is None:

        def function(*arrays: Any) -> Any:
            given = iter(arrays)
            return run(static, *(None if kind is None else next(given) for kind in types))

        function.__name__ = f"{_PREFIX}{number}"
        jitted = _FUNCTIONS[number] = jax.jit(function)
    return jitted(*(a for a in inputs if a is not None))


def _number_of(call: Marked) -> int:
    """Return the number of a call, and make the call the latest entry of the table."""
    with _LOCK:
        number = _NUMBERS.setdefault(call, next(_COUNT))
        _CALLS.pop(number, None)
        _CALLS[number] = call
        if len(_CALLS) > MAX_CALLS:
            oldest = next(iter(_CALLS))
            del _NUMBERS[_CALLS.pop(oldest)]
            _FUNCTIONS.pop(oldest, None)
        return number


def marked_call(eqn: Any) -> Marked | None:
    """Return the call that an equation of a jaxpr is, or None.

    A mark is valid while the equation holds the op's own call, with inputs of the same types: not if JAX has
    differentiated, transposed or batched it.
    """
    name = eqn.params.get("name") if eqn.primitive.name in ("jit", "pjit") else None
    if not isinstance(name, str) or not name.startswith(_PREFIX):
        return None
    with _LOCK:
        call = _CALLS.get(int(name.removeprefix(_PREFIX)))
    if call is None:
        return None
    jaxpr = eqn.params["jaxpr"].jaxpr
    if [(v.aval.shape, v.aval.dtype) for v in jaxpr.invars] != [kind for kind in call.types if kind is not None]:
        return None
    inner = jaxpr.eqns
    if len(inner) != 1 or inner[0].primitive.name != "custom_vjp_call":
        return None
    count = len(inner[0].invars) - len(jaxpr.invars)  # of constants, such as the positions that an op gathers
    constants, inputs = inner[0].invars[: max(count, 0)], inner[0].invars[max(count, 0) :]
    whole = all(v in jaxpr.constvars for v in constants) and list(inputs) == list(jaxpr.invars)
    return call if whole else None
