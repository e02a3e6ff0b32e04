"""Rules as values: how an op's backward rule is replaced.

Every op accepts ``rule=``. None selects the exact rule, written below the op. `autodiff` skips the hand-written rule.
Any other value is a function ``rule(call, delta)`` that returns one cotangent per input of the op. `Call` holds
everything that a rule may read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcnn.arguments import bad_type, bad_value
from jaxcnn.ops.kinds import kind_of
from jaxcnn.ops.mark import marked, marking_ops
from jaxcnn.ops.mesh import on_any_mesh, varying_alike


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op, as its backward rule sees it.

    Under jit, values that the rule does not read are not saved.
    """

    #: Name of the op, as in error messages: "conv", "relu", ….
    name: str
    #: The input arrays in the op's order; None for an omitted optional one.
    inputs: tuple[Any, ...]
    #: The output of the op.
    output: Any
    #: The static part of the call, such as a `Correlation` or a `Window`; None if the op has none.
    static: Any
    #: The exact rule: maps δ to one cotangent per input.
    exact: Callable[[Any], tuple[Any, ...]]
    #: Evaluates the op at other inputs: maps arrays to another `Call`, with its own output and exact rule.
    at: Callable[..., "Call"]

    @property
    def kind(self) -> str:
        """Return the kind of the op, a key of `jaxcnn.ops.kinds.KINDS`: "affine", "max", "activation", …."""
        return kind_of(self.name)


Rule = Callable[[Call, Any], tuple[Any, ...]]


def custom_vjp(f: Callable[..., Any], static: int = 1) -> Any:
    """`jax.custom_vjp` with static leading arguments, correct inside loops.

    JAX 0.10 to 0.12 compute second derivatives through `lax.scan` incorrectly if the function has an equation without
    inputs (`jnp.zeros`, an iota, `lax.platform_dependent`) and its ``fwd`` returns an argument as a residual. Partial
    evaluation hoists the equation out of the loop and passes its value as an additional argument, but does not shift
    the positions of the residuals among the arguments. `jax.checkpoint` keeps the function in one equation, so that
    nothing is hoisted. It adds nothing to the compiled program. `docs/mathematics.md` has the smallest case.

    Args:
        f: function of ``static`` hashable arguments followed by arrays.
        static: number of leading arguments that are not differentiated.

    Returns:
        The `jax.custom_vjp`, without its rule.
    """
    leading = tuple(range(static))
    whole = jax.checkpoint(f, prevent_cse=False, static_argnums=leading)
    return jax.custom_vjp(jax.jit(whole, static_argnums=leading, inline=True), nondiff_argnums=leading)


def call_of(core: Any, name: str, static: Any, *inputs: Any) -> Call:
    """Return the `Call` of ``core(static, *inputs)``, an op named ``name``."""
    y, saved = core.fwd(static, *inputs)
    return _call(core, name, static, inputs, y, saved)


def _call(core: Any, name: str, static: Any, inputs: tuple[Any, ...], y: Any, saved: Any) -> Call:
    exact = functools.partial(core.bwd, static, saved)
    return Call(name, inputs, y, static, exact, functools.partial(call_of, core, name, static))


def autodiff(call: Call, delta: Any) -> tuple[Any, ...]:
    """Marker for ``rule=``: skip the hand-written backward rule and let JAX differentiate the op.

    The op then runs in plain JAX, so forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) works. The exact rules are
    tested against it.

    Args:
        call: unused; the marker is never called.
        delta: unused.

    Raises:
        TypeError: always.

    >>> import jax, jaxcnn
    >>> jax.jacfwd(lambda x: jaxcnn.relu(x, rule=jaxcnn.rules.autodiff))(2.0)
    Array(1., dtype=float32, weak_type=True)
    """
    raise TypeError("autodiff: it must be passed as rule= of an op, and cannot be called")


def apply_rule(core: Any, rule: Any, reference: Callable[..., Any], op: str | None = None) -> Callable[..., Any]:
    """Return the op ``core(static, *inputs)`` with the backward rule ``rule``.

    Args:
        core: the op's core, a `custom_vjp`.
        rule: None for the exact rule, `autodiff`, or a function ``rule(call, delta)``.
        reference: the same function in stock JAX, which `autodiff` selects.
        op: name of the op, for rules and error messages; by default that of the core.

    Returns:
        A function ``(static, *inputs)``.

    Raises:
        TypeError: if rule is none of these, or not hashable.
    """
    if rule is autodiff:
        return functools.partial(on_any_mesh, reference)
    op = op or core.__name__.lstrip("_")
    if not (rule is None or (callable(rule) and not isinstance(rule, type) and _hashable(rule))):
        raise bad_type(op, "rule", "None, autodiff or a hashable function (call, delta)", repr(rule))
    chosen = core if rule is None else _replaced(core, rule, op)
    run = lambda static, *inputs: on_any_mesh(chosen, static, *varying_alike(inputs))  # noqa: E731
    return functools.partial(marked, core, rule, reference, op, run) if marking_ops() else run


def rule_name(rule: Any) -> str:
    """Return the name of a function, or the repr of another rule, for messages."""
    return getattr(rule, "__name__", repr(rule))


def _hashable(rule: Any) -> bool:
    """Test by hashing, because a frozen dataclass that holds an array is not hashable."""
    try:
        hash(rule)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=256)
def _replaced(core: Any, rule: Rule, op: str) -> Any:
    """Return a core with the same forward pass and the backward rule ``rule``."""

    @custom_vjp
    def replaced(static: Any, *inputs: Any) -> Any:
        return core(static, *inputs)

    def fwd(static: Any, *inputs: Any) -> Any:
        y, saved = core.fwd(static, *inputs)
        return y, (inputs, y, saved)

    def bwd(static: Any, residuals: Any, delta: Any) -> tuple[Any, ...]:
        inputs, y, saved = residuals
        call = _call(core, op, static, inputs, y, saved)
        return _check_cotangents(op, rule, call, rule(call, delta))

    replaced.defvjp(fwd, bwd)
    return replaced


def _check_cotangents(op: str, rule: Rule, call: Call, cotangents: Any) -> tuple[Any, ...]:
    """Return one cotangent per input, with its shape and dtype."""
    name = f"rule {getattr(rule, '__name__', repr(rule))}"
    count = len(call.inputs)
    if not isinstance(cotangents, tuple) or len(cotangents) != count:
        got = f"length {len(cotangents)}" if isinstance(cotangents, tuple) else type(cotangents).__name__
        raise bad_value(op, f"the result of {name}", f"a tuple of length {count}, one cotangent per input", got)
    return tuple(
        _check_cotangent(op, f"cotangent {i} of {name}", x, cotangent)
        for i, (x, cotangent) in enumerate(zip(call.inputs, cotangents, strict=True))
    )


def _check_cotangent(op: str, argument: str, x: Any, cotangent: Any) -> Any:
    """Return the cotangent in the dtype of x; None if x has none."""
    if x is None or cotangent is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    if jnp.shape(cotangent) != x.shape:
        raise bad_value(op, argument, f"of shape {x.shape}", jnp.shape(cotangent))
    return jnp.asarray(cotangent, x.dtype)
