"""Activations in every spelling that people use, found by their structure.

A spelling is a function. It is traced like the program, and matches where the program computes the same: the same
primitives, parameters and constants, whatever the functions are called.
"""

import dataclasses
import functools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jax.extend.core import primitives as p

from jaxcnn.ops import activation
from jaxcnn.ops.rule import Rule
from jaxcnn.tracing.plain import call_plain
from jaxcnn.tracing.program import Atom, Equation, Form, Program, Value, program_of, scalar_of


def _clamp(low: float, x: Array, high: float) -> Array:
    return lax.clamp(jnp.asarray(low, x.dtype), x, jnp.asarray(high, x.dtype))


#: Functions that the library computes better: the ReLUs keep one byte per element for their rule.
_REPLACED = {
    "relu": (activation.relu, [jax.nn.relu]),
    "relu6": (activation.relu6, [jax.nn.relu6]),
}

#: Other spellings; they stay as they are, and take rules. A second argument is a constant of the op.
_KEPT: dict[str, tuple[Callable[..., Any], list[Callable[..., Any]]]] = {
    "relu": (activation.relu, [
        lambda x: jnp.maximum(x, 0), lambda x: jnp.where(x > 0, x, 0), lambda x: jnp.where(x >= 0, x, 0),
        lambda x: jnp.where(x < 0, 0, x), lambda x: jnp.where(x <= 0, 0, x), lambda x: x * (x > 0),
        lambda x: x * (x >= 0),
    ]),
    "relu6": (activation.relu6, [
        lambda x: jnp.minimum(jnp.maximum(x, 0), 6), lambda x: _clamp(0, x, 6),
        lambda x: jnp.maximum(jnp.minimum(x, 6), 0), lambda x: jnp.minimum(jax.nn.relu(x), 6),
    ]),
    "leaky_relu": (activation.leaky_relu, [
        lambda x, c: jnp.where(x > 0, x, c * x), lambda x, c: jnp.where(x >= 0, x, c * x),
        lambda x, c: jnp.where(x < 0, c * x, x), lambda x, c: jnp.where(x <= 0, c * x, x),
        lambda x, c: jnp.maximum(x, c * x),
    ]),
    "sigmoid": (activation.sigmoid, [lax.logistic, lambda x: 1 / (1 + jnp.exp(-x))]),
    "tanh": (activation.tanh, [jnp.tanh]),
    "silu": (activation.silu, [jax.nn.silu]),
    "gelu": (activation.gelu, [lambda x: jax.nn.gelu(x, approximate=False)]),
    "gelu_tanh": (activation.gelu, [lambda x: jax.nn.gelu(x, approximate=True)]),
    "softplus": (activation.softplus, [jax.nn.softplus]),
    "log_sigmoid": (activation.log_sigmoid, [jax.nn.log_sigmoid]),
    "elu": (activation.elu, [lambda x, c: jax.nn.elu(x, c)]),
    "selu": (activation.selu, [jax.nn.selu]),
    "celu": (activation.celu, [lambda x, c: jax.nn.celu(x, c)]),
    "hard_tanh": (activation.hard_tanh, [
        jax.nn.hard_tanh, lambda x: jnp.clip(x, -1, 1), lambda x: _clamp(-1, x, 1),
    ]),
    "hard_sigmoid": (activation.hard_sigmoid, [
        jax.nn.hard_sigmoid, lambda x: jnp.clip(x + 3, 0, 6) / 6, lambda x: jnp.clip(x / 6 + 0.5, 0, 1),
    ]),
    "hard_swish": (activation.hard_swish, [jax.nn.hard_silu, lambda x: x * (jnp.clip(x + 3, 0, 6) / 6)]),
    "mish": (activation.mish, [jax.nn.mish]),
    "softsign": (activation.softsign, [jax.nn.soft_sign]),
    "squareplus": (activation.squareplus, [lambda x, c: jax.nn.squareplus(x, c)]),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ActivationForm(Form):
    """An activation in one of its spellings, with the constants that the program has."""

    #: Row and number in the tables above.
    row: str
    spelling: int
    constants: tuple[float, ...]
    replaces: bool

    @property
    def op(self) -> Any:  # type: ignore[override]
        """Return the public function."""
        return (_REPLACED if self.replaces else _KEPT)[self.row][0]

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Return the name of the op."""
        return str(self.op.__name__)

    @property
    def kept(self) -> str:  # type: ignore[override]
        """Return why it is not replaced."""
        edges = ("relu", "relu6", "leaky_relu", "hard_tanh", "hard_sigmoid", "hard_swish")
        return "its derivative at an edge" if self.row in edges else Form.kept

    def call(self, rule: Rule | None, *arguments: Any) -> Array:
        """Return the activation of x."""
        if self.replaces:
            return self.op(*arguments, rule=rule)
        static = None if self.row == "relu" else activation.Activation(self.row, *self.constants)
        function = _Spelled(self.row, self.spelling, self.constants)
        return call_plain(self.kind, function, rule, static, *arguments)


@dataclasses.dataclass(frozen=True)
class _Spelled:
    row: str
    spelling: int
    constants: tuple[float, ...]

    def __call__(self, x: Array) -> Array:
        return _KEPT[self.row][1][self.spelling](x, *self.constants)


# ---------------------------------------------------------------------------------------------------------------------
# Matching


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """A spelling as a program; its inputs are x and the constants."""

    row: str
    spelling: int
    replaces: bool
    program: Program

    @property
    def root(self) -> Equation:
        step = self.program.producer[self.program.outputs[0]]
        assert isinstance(step, Equation)
        return step


@functools.lru_cache(maxsize=64)
def _patterns(dtype: np.dtype, context: Any) -> dict[str, list[_Pattern]]:
    """Return all spellings for a dtype by their last primitive, the longest first."""
    spellings = [
        (row, i, replaces, spelling, 0 if spelling.__name__ != "<lambda>" else spelling.__code__.co_argcount - 1)
        for replaces, table in ((True, _REPLACED), (False, _KEPT))
        for row, (_, each) in table.items()
        for i, spelling in enumerate(each)
    ]

    def results(x: Array, constant: float) -> list[Array]:
        return [spelling(x, *[constant] * takes) for *_, spelling, takes in spellings]

    with jax.numpy_dtype_promotion("standard"):
        closed = jax.make_jaxpr(results)(jax.ShapeDtypeStruct(_SHAPE, dtype), 0.5)
    together = program_of(closed, inline=True)
    patterns: dict[str, list[_Pattern]] = {}
    for (row, i, replaces, _, takes), result in zip(spellings, together.outputs, strict=True):
        program = together.part(together.inputs[: 1 + takes], result)
        assert program is not None  # spellings read x and the constant alone
        pattern = _Pattern(row, i, replaces, program)
        patterns.setdefault(pattern.root.primitive, []).append(pattern)
    for each in patterns.values():
        each.sort(key=lambda pattern: -len(pattern.program.steps))
    return patterns


#: Shape for which spellings are traced.
_SHAPE = (2, 3)


def activations(program: Program, step: Equation) -> Iterator[tuple[ActivationForm, Atom, tuple[Equation, ...]]]:
    """Yield the activations that end in an equation: form, input, and equations in the order of the program."""
    if len(step.outputs) != 1:
        return
    (out,) = step.outputs
    if not jnp.issubdtype(out.dtype, np.floating):
        return
    for pattern in _patterns(np.dtype(out.dtype), jax.config.jax_enable_x64).get(step.primitive, ()):  # type: ignore[attr-defined]
        match = _Match(pattern.program, program, pattern.program.inputs[1:])
        if match.of_steps(pattern.root, step):
            bound: list[Any] = [match.bound.get(v) for v in pattern.program.inputs]
            x, *constants = bound
            if not isinstance(x, Value) or x.shape != out.shape or x.dtype != out.dtype:
                continue
            order = {equation: i for i, equation in enumerate(program.steps)}
            equations = tuple(sorted(dict.fromkeys(match.equations), key=order.__getitem__))
            yield ActivationForm(pattern.row, pattern.spelling, tuple(constants), pattern.replaces), x, equations


class _Match:
    """Compares a pattern with a program, backward from one equation of each.

    Args:
        pattern: the pattern.
        program: the program.
        constants: inputs of the pattern that are numbers; the others are values.
        deep: whether functions with rules of their own must have the same derivative, in addition to the same value.
    """

    def __init__(self, pattern: Program, program: Program, constants: Sequence[Value] = (), deep: bool = True) -> None:
        self.pattern, self.program, self.constants, self.deep = pattern, program, constants, deep
        #: What each input of the pattern is in the program: a value, or a number.
        self.bound: dict[Value, Any] = {}
        self.equations: list[Equation] = []

    def of_steps(self, a: Any, b: Any) -> bool:
        """Whether equation b of the program computes what a of the pattern does."""
        if not isinstance(b, Equation) or a.primitive != b.primitive or len(a.inputs) != len(b.inputs):
            return False
        if a.primitive == "custom_jvp_call":
            if _value(a) != _value(b) or (self.deep and not _same_derivative(a, b)):
                return False
        elif a.bodies or b.bodies or not _same_params(a, b):
            return False
        self.equations.append(b)
        orders = [b.inputs]
        if a.primitive in ("add", "mul", "max", "min"):
            orders.append(b.inputs[::-1])
        for inputs in orders:
            saved = dict(self.bound), list(self.equations)
            if all(self.of_atoms(u, v) for u, v in zip(a.inputs, inputs, strict=True)):
                return True
            self.bound, self.equations = saved
        return False

    def of_atoms(self, a: Atom, b: Atom) -> bool:
        """Whether b of the program is what a of the pattern is."""
        if a in self.pattern.inputs and a not in self.constants:
            return self.bound.setdefault(a, b) is b
        constant = next((c for c in self.constants if _reaches(self.pattern, a, c)), None)
        if constant is not None:
            number = scalar_of(self.program, b)
            if number is None or not np.isfinite(number):
                return False
            return bool(self.bound.setdefault(constant, float(number)) == float(number))
        expected = scalar_of(self.pattern, a)
        if expected is not None:
            number = scalar_of(self.program, b)
            return number is not None and float(number) == float(expected)
        if isinstance(a, core.Literal) or isinstance(b, core.Literal):
            return False
        return self.of_steps(self.pattern.producer[a], self.program.producer.get(b))


def _reaches(program: Program, atom: Atom, constant: Value) -> bool:
    """Whether an atom is a constant of the pattern, possibly converted or broadcast."""
    while atom is not constant:
        step = None if isinstance(atom, core.Literal) else program.producer.get(atom)
        if step is None or step.primitive not in ("convert_element_type", "broadcast_in_dim", "reshape"):
            return False
        atom = step.inputs[0]
    return True


#: Parameters that depend on the shape, or on where the array is.
_FREE = {"shape", "sharding", "broadcast_dimensions", "out_sharding", "weak_type"}


def _same_params(a: Equation, b: Equation) -> bool:
    return all(b.params.get(name) == value for name, value in a.params.items() if name not in _FREE)


#: Texts of functions with rules of their own by their jaxprs, because each is compared with many patterns.
_TEXTS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _value(step: Equation) -> str:
    """Return the function of an equation as text, without shapes."""
    closed = step.params["call_jaxpr"]
    if closed.jaxpr not in _TEXTS:
        _TEXTS[closed.jaxpr] = _without_shapes(str(closed))
    return _TEXTS[closed.jaxpr]


def _same_derivative(a: Equation, b: Equation) -> bool:
    """Whether two functions with rules of their own have the same derivative.

    A user's function may have the name and the value of JAX's, but another derivative.
    """
    expected, found = _tangent_of_pattern(a), _tangent(b)
    match = _Match(expected, found, deep=False)
    match.bound = dict(zip(expected.inputs, found.inputs, strict=True))
    return all(match.of_atoms(u, v) for u, v in zip(expected.outputs, found.outputs, strict=True))


@functools.lru_cache(maxsize=256)
def _tangent_of_pattern(step: Equation) -> Program:
    return _tangent(step)


def _tangent(step: Equation) -> Program:
    """Return the derivative of an equation's function, of its inputs and their tangents."""
    eqn = step.eqn

    def value(*inputs: Any) -> Any:
        return p.custom_jvp_call_p.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))

    avals = tuple(a.aval for a in step.inputs)
    with jax.numpy_dtype_promotion("standard"):
        closed = jax.make_jaxpr(lambda xs, ts: jax.jvp(value, xs, ts)[1])(avals, avals)
    return program_of(closed, inline=True)


def _without_shapes(text: str) -> str:
    return re.sub(r"\[[\d,]*\]", "", re.sub(r"\s+", " ", text))
