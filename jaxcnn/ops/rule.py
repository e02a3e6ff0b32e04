"""A rule is a value: how an op takes another backward half.

Every op takes ``rule=``.  None is the exact rule, written under the op.  `autodiff` drops the hand-written half.  Any
other value is a function ``rule(call, delta)`` that returns one cotangent for each of the op's inputs; `Call` is what
the backward half may read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxcnn.geometry import expect_numbers
from jaxcnn.ops.mesh import on_any_mesh, varying_alike

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op, as its backward half sees it.

    Under jit nothing is kept that the rule does not read.
    """

    #: What messages call the op: "conv", "relu", ….
    name: str
    #: The arrays that went in, in the op's order; None where an optional one was left out.
    inputs: tuple[Any, ...]
    #: What came out.
    output: Any
    #: The static half: a `Correlation`, a `Window`, ….  None where the op has none.
    geometry: Any
    #: The exact rule: δ → one cotangent for each input.
    exact: Callable[[Any], tuple[Any, ...]]
    #: The same op at other inputs: arrays → another `Call`, with its own output and exact rule.
    at: Callable[..., "Call"]


Rule = Callable[[Call, Any], tuple[Any, ...]]


def custom_vjp(f: Callable[..., Any], static: int = 1) -> Any:
    """`jax.custom_vjp` with static leading arguments, correct in loops as well.

    JAX 0.10 to 0.12 compute second derivatives through `lax.scan` wrongly if the function has an equation without
    inputs (`jnp.zeros`, an iota, `lax.platform_dependent`) and its ``fwd`` returns an argument as a residual. Partial
    evaluation hoists the equation out of the loop and passes its value as an additional argument, but does not shift
    the positions of the residuals among the arguments. `jax.checkpoint` keeps the function in one equation, so that
    nothing is hoisted. It adds nothing to the compiled program. `docs/mathematics.md` has the smallest case.

    Args:
        f: function of ``static`` hashable arguments and of arrays.
        static: number of leading arguments that are not differentiated.

    Returns: the `jax.custom_vjp`, without its rule.
    """
    leading = tuple(range(static))
    whole = jax.checkpoint(f, prevent_cse=False, static_argnums=leading)
    return jax.custom_vjp(jax.jit(whole, static_argnums=leading, inline=True), nondiff_argnums=leading)


def call_of(core: Any, name: str, geometry: Any, *inputs: Any) -> Call:
    """The call ``core(geometry, *inputs)``."""
    y, saved = core.fwd(geometry, *inputs)
    return _call(core, name, geometry, inputs, y, saved)


def _call(core: Any, name: str, geometry: Any, inputs: tuple[Any, ...], y: Any, saved: Any) -> Call:
    exact = functools.partial(core.bwd, geometry, saved)
    return Call(name, inputs, y, geometry, exact, functools.partial(call_of, core, name, geometry))


def autodiff(call: Call, delta: Any) -> tuple[Any, ...]:
    """As ``rule=``: no hand-written half at all, the op in plain JAX.

    Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) works through it, and it is what the exact rules are compared
    with.  A marker: it is never called.

    >>> import jax, jaxcnn
    >>> jax.jacfwd(lambda x: jaxcnn.relu(x, rule=jaxcnn.rules.autodiff))(2.0)
    Array(1., dtype=float32, weak_type=True)
    """
    raise TypeError("autodiff: expected as rule= of an op; it is not a function of (call, delta)")


def with_rule(core: Any, rule: Any, plain: Callable[..., Any], op: str | None = None) -> Callable[..., Any]:
    """The op ``core(geometry, *inputs)`` with another backward half; `plain` is the same function in stock JAX.

    ``op`` is what messages call it, if not by the core's own name.
    """
    if rule is autodiff:
        return functools.partial(on_any_mesh, plain)
    op = op or core.__name__.lstrip("_")
    if not (rule is None or (callable(rule) and not isinstance(rule, type) and _hashable(rule))):
        raise TypeError(f"{op}: rule expected None, autodiff or a hashable function (call, delta), got {rule!r}")
    chosen = core if rule is None else _replaced(core, rule, op)
    return lambda geometry, *inputs: on_any_mesh(chosen, geometry, *varying_alike(inputs))


def _hashable(rule: Any) -> bool:
    """Also what it is made of: a frozen dataclass that holds an array is not."""
    try:
        hash(rule)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=256)
def _replaced(core: Any, rule: Rule, op: str) -> Any:
    """A `custom_vjp` of the same forward half."""

    @custom_vjp
    def other(geometry: Any, *inputs: Any) -> Any:
        return core(geometry, *inputs)

    def fwd(geometry: Any, *inputs: Any) -> Any:
        y, saved = core.fwd(geometry, *inputs)
        return y, (inputs, y, saved)

    def bwd(geometry: Any, kept: Any, delta: Any) -> tuple[Any, ...]:
        inputs, y, saved = kept
        call = _call(core, op, geometry, inputs, y, saved)
        return _checked(op, rule, call, rule(call, delta))

    other.defvjp(fwd, bwd)
    return other


def _checked(op: str, rule: Rule, call: Call, found: Any) -> tuple[Any, ...]:
    """One cotangent for each input, of its shape, in its dtype."""
    name = f"{op}: rule {getattr(rule, '__name__', repr(rule))}"
    if not isinstance(found, tuple) or len(found) != len(call.inputs):
        got = f"{len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"{name}: expected a tuple of {len(call.inputs)} cotangents, one for each input; got {got}")
    return tuple(_fitted(name, i, x, ct) for i, (x, ct) in enumerate(zip(call.inputs, found, strict=True)))


def _fitted(name: str, i: int, x: Any, cotangent: Any) -> Any:
    if x is None or cotangent is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    if jnp.shape(cotangent) != x.shape:
        raise ValueError(f"{name}: cotangent {i} expected shape {x.shape}, got {jnp.shape(cotangent)}")
    return jnp.asarray(cotangent, x.dtype)


def arrays(op: str, **named: Any) -> tuple[Array, ...]:
    """The arguments as floating arrays of one dtype.

    Raises: TypeError for anything that is not an array of a real floating dtype, and for mixed dtypes.
    """
    found = {name: array(op, name, value) for name, value in named.items()}
    for name, a in found.items():
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise TypeError(f"{op}: {name} expected a floating dtype, got {a.dtype}")
        if a.dtype.itemsize < 2:
            raise TypeError(f"{op}: {name} expected a floating dtype of 16 bits or more, got {a.dtype}")
    if len({a.dtype for a in found.values()}) > 1:
        got = ", ".join(f"{name} {a.dtype}" for name, a in found.items())
        raise TypeError(f"{op}: expected one dtype for all arrays, got {got}")
    return tuple(found.values())


def array(op: str, name: str, value: Any) -> Array:
    """An argument as an array of any dtype; TypeError for what is none."""
    if isinstance(value, str) or value is None:
        raise TypeError(f"{op}: {name} expected an array, got {value!r}")
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{op}: {name} expected an array, got {type(value).__name__}") from None


def one_key(op: str, key: Any) -> Array:
    """A typed key; TypeError for anything else, and for more than one."""
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        got = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
        raise TypeError(f"{op}: key expected one typed key from jax.random.key(seed), got {got}")
    return key


def picture(op: str, x: Array) -> tuple[int, ...]:
    """The spatial dims of a picture ``(N, *spatial, C)``; ValueError unless there are one, two or three."""
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"{op}: x expected (N, *spatial, C) with 1, 2 or 3 spatial dims, got shape {x.shape}")
    expect_numbers(op, "x", x.shape[1:], x.shape)
    return x.shape[1:-1]
