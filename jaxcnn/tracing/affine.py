"""Affine steps of a program: which values depend on an input, and chains of steps that are one affine function.

At evaluation, a batch norm is y = a·x + c per channel, in whatever primitives it was written. After a convolution or
dense product, the chain is one affine op:

    a·(x·w + b) + c = x·(a·w) + (a·b + c)

Without such a product before it, a chain is y = a ∘ x + c.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from jaxcnn.ops.kinds import kind_of
from jaxcnn.ops.normalization import batch_norm, scale_and_shift
from jaxcnn.ops.rule import Rule
from jaxcnn.taps import collecting, tap
from jaxcnn.tracing.convolution import ConvForm, TransposedForm
from jaxcnn.tracing.evaluate import call_form, execute
from jaxcnn.tracing.library import LibraryForm
from jaxcnn.tracing.linear import AddForm, DenseForm
from jaxcnn.tracing.plain import call_plain
from jaxcnn.tracing.program import Atom, Equation, Form, Operation, Program, Step, Value

#: Equations that only move, join or repeat elements: their transpose conserves Σ R.
MOVES = {
    "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "concatenate", "slice", "dynamic_slice",
    "gather", "split", "pad", "rev", "copy", "copy_p", "name", "optimization_barrier", "reduce_precision",
    "sharding_constraint", "pvary", "pcast",
}  # fmt: skip

#: Elementwise equations of one array that depends on x and others that do not.
_SCALES = {"add", "sub", "mul", "div", "neg"}
#: Equations inside a chain that change nothing but the dtype.
_SAME = {"convert_element_type", "name", "copy", "copy_p", "reduce_precision"}
#: Elementwise functions of parameters.
_ELEMENTWISE = {
    *_SCALES, *_SAME, "rsqrt", "sqrt", "exp", "log", "max", "min", "pow", "integer_pow", "square", "abs", "sign",
    "tanh", "logistic",
}  # fmt: skip


def is_move(step: Equation, data: set[Value]) -> bool:
    """Whether an equation only moves elements of arrays that depend on x, or changes their floating dtype."""
    if step.primitive == "convert_element_type":
        return all(jnp.issubdtype(a.dtype, jnp.floating) for a in (step.inputs[0].aval, step.outputs[0].aval))
    first_only = step.primitive in ("pad", "dynamic_slice", "gather")
    return step.primitive in MOVES and not (
        first_only and any(isinstance(a, Value) and a in data for a in step.inputs[1:])
    )


def scales(step: Step, data: set[Value]) -> bool:
    """Whether a step is y = a ∘ x + c with one x of y's shape that depends on the input."""
    places = [i for i, a in enumerate(step.inputs) if isinstance(a, Value) and a in data]
    if len(places) != 1 or len(step.outputs) != 1 or step.inputs[places[0]].aval.shape != step.outputs[0].shape:
        return False
    if isinstance(step, Operation):
        return step.primitive == "add" or (step.primitive == "batch_norm" and _has_statistics(step, places[0]))
    return step.primitive in _SCALES and (step.primitive != "div" or places == [0])


def _has_statistics(step: Operation, place: int) -> bool:
    return isinstance(step.form, LibraryForm) and len(step.form.marked.types) == 5 and place == 0


# ---------------------------------------------------------------------------------------------------------------------
# Chains


@dataclasses.dataclass(frozen=True, eq=False)
class Chain(Form):
    """An affine op, or the identity, and the steps y = a ∘ x + c after it, as one operation.

    Its inputs are those of the op, or x, followed by the other inputs of all steps.
    """

    #: The form of the op; None for the identity.
    head: Form | None
    #: Number of inputs of the op.
    count: int
    #: Each step, with the place of its x among its inputs.
    steps: tuple[tuple[Step, int], ...]
    #: The dim of the channels in the output of the op; None if a and c are whole arrays.
    channel: int | None
    dtype: Any

    @property
    def op(self) -> Any:  # type: ignore[override]
        """Return the public function."""
        return batch_norm if self.head is None else self.head.op

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Return the name of the op."""
        return "batch_norm" if self.head is None else self.head.kind

    @property
    def shifts(self) -> bool:
        """Whether a step adds something."""
        return any(step.primitive in ("add", "sub", "batch_norm") for step, _ in self.steps)

    def __call__(self, rule: Rule | None, *inputs: Any) -> Array:
        """Return the output of the chain, as one call of the op with the rule."""
        own, others = inputs[: self.count], iter(inputs[self.count :])
        a, c = self._factors(others)
        if self.head is None:
            y = call_form(_Elementwise(), rule, own[0], a, c)
        else:
            y = call_form(_Scaled(self.head, len(own) > 2), rule, *own, a.reshape(-1), c.reshape(-1))
        return y.astype(self.dtype)

    def _factors(self, others: Any) -> tuple[Array, Array]:
        """Return a and c, with one number per channel, or of any shape that broadcasts to x."""
        step, place = self.steps[0]
        x = step.inputs[place].aval
        shape = () if self.channel is None else [n if i == self.channel else 1 for i, n in enumerate(x.shape)]
        a, c = jnp.ones(shape, x.dtype), jnp.zeros(shape, x.dtype)
        for step, place in self.steps:
            given = [next(others) for _ in step.inputs[1:]]
            if step.primitive in _SAME:
                continue
            if step.primitive == "batch_norm":
                form: Any = step.form  # type: ignore[union-attr]
                norm = scale_and_shift(form.marked.static.eps, *form.prepare(None, *given)[1:])
                a_step, c_step = (p.reshape(shape) for p in norm)
                a, c = a * a_step, c * a_step + c_step
                continue
            p: Any = self._reduced(given[0]) if given else None
            if step.primitive == "add":
                c = c + p
            elif step.primitive == "sub":
                a, c = (a, c - p) if place == 0 else (-a, p - c)
            elif step.primitive == "neg":
                a, c = -a, -c
            else:
                a, c = (a * p, c * p) if step.primitive == "mul" else (a / p, c / p)
        return a, c

    def _reduced(self, p: Any) -> Any:
        """Return one number per channel of an array that is constant along all other dims."""
        if self.channel is None or jnp.ndim(p) == 0:
            return p
        return p[tuple(slice(None) if i == self.channel else slice(0, 1) for i in range(jnp.ndim(p)))]


@dataclasses.dataclass(frozen=True)
class _Scaled(Form):
    """A convolution or product with a·w and a·b + c in place of w and b."""

    form: Form
    has_bias: bool

    def __call__(self, rule: Rule | None, *inputs: Any) -> Array:
        x, w, b, a, c = inputs if self.has_bias else (*inputs[:2], None, *inputs[2:])
        x, w, b, *_ = (*self.form.prepare(*(v for v in (x, w, b) if v is not None)), None)
        scaled = w * self._for_weights(w, a)
        shift = c if b is None else b * a + c
        return self.form.restore(self.form.call(rule, x, scaled.astype(w.dtype), shift.astype(w.dtype)))

    def _for_weights(self, w: Array, a: Array) -> Array:
        """Return a in the shape of the weights' output channels."""
        groups = _groups(self.form)
        if groups is None:
            return a
        return jnp.repeat(a.reshape(groups, -1), w.shape[-1] // groups, axis=0).T  # (O/groups, I)


def _groups(form: Form) -> int | None:
    """Return the number of groups of a transposed convolution, whose weights end in (O/groups, I), or None."""
    if isinstance(form, TransposedForm):
        return form.groups
    if isinstance(form, LibraryForm) and form.kind == "conv_transpose":
        return int(form.marked.static.groups)
    return None


@dataclasses.dataclass(frozen=True)
class _Elementwise(Form):
    """y = a ∘ x + c as a batch norm with mean 0 and variance 1, so that its rules fit."""

    def __call__(self, rule: Rule | None, *inputs: Any) -> Array:
        x, a, c = inputs
        statistics = jnp.zeros_like(c), jnp.ones_like(c)
        return call_plain("batch_norm", _affine, rule, None, x, a, c, *statistics)


def _affine(x: Array, a: Array, c: Array, mean: Array, var: Array) -> Array:
    return a * x + c


def run_chains(step: Step, inputs: Sequence[Any]) -> Sequence[Any]:
    """Compute a step, for `evaluate`: chains by their forms, all else by `execute`."""
    if not isinstance(step, Operation) or not isinstance(step.form, Chain):
        return execute(step, inputs, run_chains)
    with jax.named_scope(step.name):
        y = step.form(step.rule, *inputs)
    return (tap(step.name, y) if step.tapped and collecting() else y,)


def chained(program: Program, data: set[Value], keeps: Callable[[Any], bool]) -> Program:
    """Return the program with each chain of affine steps as one operation, whose form is a `Chain`.

    Args:
        program: the program, without loops and branches that depend on x.
        data: the values that depend on x.
        keeps: whether a library's batch norm stays an operation of its own.

    Returns:
        The program.
    """
    program = _with_ordered_products(program, data)
    chains: dict[Step, Operation] = {}
    absorbed: set[Step] = set()
    varying = _Varying(program)
    for step in program.steps:
        if step in absorbed or data.isdisjoint(a for a in step.inputs if isinstance(a, Value)):
            continue
        channel = channel_of(step) if isinstance(step, Operation) else None
        alone = scales(step, data) and not (isinstance(step, Operation) and step.primitive == "batch_norm")
        if channel is None and not alone:
            continue
        first = [(step, _place(step, data))] if alone else []
        tail = [*first, *_tail(program, step, data, channel, varying, keeps)]
        while tail and tail[-1][0].primitive in _SAME:
            tail.pop()
        if tail:
            operation = _joined(step, tail, channel, data, alone)
            absorbed.update(each for each, _ in tail)
            absorbed.add(step)
            chains[tail[-1][0]] = operation
    steps = tuple(chains.get(step, step) for step in program.steps if step in chains or step not in absorbed)
    return dataclasses.replace(program, steps=steps)


def _place(step: Step, data: set[Value]) -> int:
    return next(i for i, a in enumerate(step.inputs) if isinstance(a, Value) and a in data)


def _tail(
    program: Program,
    step: Step,
    data: set[Value],
    channel: int | None,
    varying: "_Varying",
    keeps: Callable[[Any], bool],
) -> list[tuple[Step, int]]:
    """Return the affine steps after a step, each of which is the only one that reads the one before."""
    tail = []
    value = step.outputs[0]
    while value not in program.outputs and len(program.users.get(value, ())) == 1:
        (user,) = program.users[value]
        same = isinstance(user, Equation) and user.primitive in _SAME and is_move(user, data)
        if not same and not scales(user, data):
            break
        place = _place(user, data)
        if user.primitive == "batch_norm":  # of the library, whose channels are the last dim
            if channel != len(value.shape) - 1 or keeps(user):
                break
        elif channel is not None and any(varying(a) - {channel} for i, a in enumerate(user.inputs) if i != place):
            break
        tail.append((user, place))
        (value,) = user.outputs
    return tail


def _joined(
    step: Any, tail: Sequence[tuple[Step, int]], channel: int | None, data: set[Value], alone: bool
) -> Operation:
    """Return a chain as an operation."""
    own = (step.inputs[_place(step, data)],) if alone else step.inputs
    others = [a for each, place in tail for i, a in enumerate(each.inputs) if i != place]
    (output,) = tail[-1][0].outputs
    form = Chain(None if alone else step.form, len(own), tuple(tail), channel, output.dtype)
    if isinstance(step, Operation):
        return dataclasses.replace(step, form=form, inputs=(*own, *others), output=output)
    empty = Program((), {}, (), ())
    return Operation(form, (*own, *others), output, (step,), empty, name=step.path or "scale")


def channel_of(operation: Operation) -> int | None:
    """Return the dim of the output channels of a convolution or dense product, or None."""
    form = operation.form
    if isinstance(form, ConvForm):
        channel = form.y_dims.index(len(form.y_dims) - 1)
        return form.moves.position(channel, operation.equations[0].outputs[0].shape)
    if isinstance(form, DenseForm):
        free_a, free_b = form.free
        if len(free_a if form.swapped else free_b) != 1:
            return None
        return form.moves.position(0 if form.swapped else len(free_a), form.shape)
    if isinstance(form, LibraryForm) and kind_of(form.kind) == "affine":
        return len(operation.output.shape) - 1
    return None


def _with_ordered_products(program: Program, data: set[Value]) -> Program:
    """Return the program in which data comes before weights, and biases do not depend on x.

    With a batch of one example, the other branch of a sum has the shape of a bias.
    """
    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step, Operation) and isinstance(step.form, DenseForm) and len(step.inputs) == 2:
            first, second = (isinstance(a, Value) and a in data for a in step.inputs)
            swapped = dataclasses.replace(step.form, swapped=not step.form.swapped)
            if second and not first and swapped.free[0 if swapped.swapped else 1]:
                step = dataclasses.replace(step, form=swapped, inputs=step.inputs[::-1])
        elif isinstance(step, Operation) and isinstance(step.form, ConvForm | DenseForm) and len(step.inputs) == 3:
            b = step.inputs[2]
            if isinstance(b, Value) and b in data and b.shape == step.output.shape:
                y = Value(step.output.aval)
                data.add(y)
                steps.append(dataclasses.replace(step, inputs=step.inputs[:2], output=y))
                step = dataclasses.replace(
                    step, form=AddForm(), inputs=(y, b), name=f"{step.name}/add", rule=None, tapped=False
                )
        steps.append(step)
    return dataclasses.replace(program, steps=tuple(steps))


class _Varying:
    """Finds the dims along which values may vary: all but those along which they are repeated."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.known: dict[Value, frozenset[int]] = {}

    def __call__(self, atom: Atom) -> frozenset[int]:
        """Return the dims of an atom along which it may vary."""
        if isinstance(atom, core.Literal):
            return frozenset()
        if atom not in self.known:
            dims = self._of(self.program.producer.get(atom))
            wide = frozenset(i for i, n in enumerate(atom.shape) if n != 1)
            self.known[atom] = wide if dims is None else dims & wide
        return self.known[atom]

    def _of(self, step: Step | None) -> frozenset[int] | None:
        """Return the dims for the result of a step; None if it may vary along all."""
        if step is None:
            return None
        if step.primitive in _ELEMENTWISE:
            return frozenset().union(*map(self, step.inputs))
        if not isinstance(step, Equation) or len(step.inputs) != 1:
            return None
        dims, given = self(step.inputs[0]), step.inputs[0].aval.shape
        if not dims:
            return frozenset()
        if step.primitive == "broadcast_in_dim":
            return frozenset(step.params["broadcast_dimensions"][i] for i in dims)
        if step.primitive == "transpose":
            return frozenset(i for i, old in enumerate(step.params["permutation"]) if old in dims)
        if step.primitive in ("reshape", "squeeze", "expand_dims"):
            shape = step.outputs[0].shape
            wide, wide_before = ([i for i, n in enumerate(s) if n != 1] for s in (shape, given))
            if [shape[i] for i in wide] == [given[i] for i in wide_before]:
                return frozenset(new for new, old in zip(wide, wide_before, strict=True) if old in dims)
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Channels


def channel_dims(program: Program) -> dict[Value, int]:
    """Return the dim of the channels in each value that is made from a convolution by steps that keep its dims."""
    dims: dict[Value, int] = {}
    for step in program.steps:
        channel = channel_of(step) if isinstance(step, Operation) else None
        given = next((a for a in step.inputs if isinstance(a, Value) and a in dims), None)
        if channel is None and given is not None and len(step.outputs) == 1:
            (y,) = step.outputs
            if step.primitive == "transpose" and isinstance(step, Equation):
                channel = step.params["permutation"].index(dims[given])
            elif len(y.shape) == len(given.shape) and y.shape[dims[given]] == given.shape[dims[given]]:
                channel = dims[given]
        if channel is not None:
            dims[step.outputs[0]] = channel
    return dims
