"""Per-example gradients from a and δ of one backward pass: a is an operation's input, δ the gradient at its output.

    conv     ∂E_n/∂w = a_n ⋆ δ_n        ∂E_n/∂b = Σ δ_n
    dense    ∂E_n/∂w = a_n ⊗ δ_n        ∂E_n/∂b = δ_n

The rule for the batch is the same products, summed over n. No convolution has one group per example; that is what makes
`jax.vmap` of `jax.grad` slow.

The function is traced for a single example. What depends on parameters alone, such as a standardized weight, is
h(params) and equal for all examples; the rest has a leading N. Gradients are taken where h meets the rest, for each
example, and then pulled back through h.
"""

import dataclasses
import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.arguments import array, bad_type, bad_value, expect_function
from jaxcnn.geometry import Correlation
from jaxcnn.kernels import per_example as kernels
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.layers import BatchNorm, Net
from jaxcnn.net import Loss, expect_loss
from jaxcnn.ops import convolution, hidden, pooling
from jaxcnn.ops.kinds import kind_of
from jaxcnn.ops.mesh import automatic_inside, on_any_mesh, varying_alike
from jaxcnn.taps import add_probe, idle, probe
from jaxcnn.tracing import Equation, Form, Operation, Program, Value, evaluate, execute
from jaxcnn.tracing.convolution import ConvForm, TransposedForm
from jaxcnn.tracing.evaluate import call_form, operate
from jaxcnn.tracing.library import LibraryForm
from jaxcnn.tracing.linear import DenseForm
from jaxcnn.tracing.pooling import PoolForm
from jaxcnn.tracing.program import Atom, Step
from jaxcnn.tracing.shapes import STAY, move_of
from jaxcnn.tracing.trace import trace_call


@automatic_inside()
def per_example_gradients(
    fun: Callable[..., Any], loss: Loss, params: Any, x: Any, targets: Any, *, key: Array | None = None
) -> Any:
    """Return the gradient of each example's loss: a tree like ``params``, every array with a leading N.

    ``fun`` is any function of parameters and a batch: a net of this library, ``apply`` of a Flax or Haiku module, a
    call of an Equinox module. These are the gradients of `jax.vmap` of `jax.grad`. ``fun`` is traced for one example,
    so examples cannot influence each other, and its operations then run on the whole batch. Where parameters reach a
    convolution or dense product, possibly through functions of their own such as weight standardization, the gradient
    is a product of its input and δ. Where they reach any other operation, each example has a copy of them.

    Inside `jax.shard_map` each device returns the gradients of its own examples, even for replicated parameters.

    Args:
        fun: function ``(params, x)`` → outputs ``(N, …)``, such as a net from `serial`. It must process examples
            independently; this cannot be checked in general. Of batch norm only the form with given statistics does.
        loss: loss of each example, as in `make_train_step`: ``(outputs, targets)`` → ``(N, …)``. All dims after N are
            averaged.
        params: any tree of floating-point arrays. A mapping that is not a JAX tree becomes a dict.
        x: a batch ``(N, …)``, or a tree of arrays with a leading N.
        targets: an array ``(N, …)``, or a tree of arrays with a leading N.
        key: from `jax.random.key`. If given, ``fun`` is called with ``key=``, for each example with the key folded
            with its index, so that each has a separate dropout mask.

    Returns:
        Arrays ``(N, …)``, which `optax.contrib.differentially_private_aggregate` accepts as updates. The gradient of a
        parameter that is not read is 0, as in `jax.grad`.

    Raises:
        ValueError: if fun or loss does not return one value per example, or a norm of this library mixes examples.
        TypeError: if fun or loss is not callable, or params contains anything other than floating-point arrays.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.HiddenLayer(4, 3), jaxcnn.Flatten(), jaxcnn.Dense(2))
    >>> params = net.init(jax.random.key(0), (6, 6, 1))
    >>> x, labels = jnp.ones((8, 6, 6, 1)), jnp.zeros(8, int)
    >>> loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    >>> jaxcnn.per_example_gradients(net, loss, params, x, labels)["hidden_layer1"]["weight"].shape
    (8, 3, 3, 1, 4)
    """
    return _backward("per_example_gradients", fun, loss, params, x, targets, key).gradients()


@automatic_inside()
def per_example_norms(
    fun: Callable[..., Any], loss: Loss, params: Any, x: Any, targets: Any, *, key: Array | None = None
) -> Array:
    """Return ``(N,)`` norms of each example's gradient, over all parameters.

    Gradients of weights are not materialized where their norms are cheaper to compute directly: ‖∂E_n/∂w‖² = Σ_{o, o'}
    ⟨P[o], P[o']⟩·⟨δ[o], δ[o']⟩ with P the image patches at positions o, and ‖a_n‖²·‖δ_n‖² for a dense layer. The choice
    depends only on static shapes.

    Args:
        fun: function ``(params, x)`` → outputs ``(N, …)``, as in `per_example_gradients`.
        loss: loss of each example, as in `make_train_step`.
        params: any tree of floating-point arrays.
        x: a batch ``(N, …)``, or a tree of arrays with a leading N.
        targets: an array ``(N, …)``, or a tree of arrays with a leading N.
        key: from `jax.random.key`; if given, ``fun`` is called with ``key=``, folded with the index of the example.

    Returns:
        An array ``(N,)``.

    Raises:
        ValueError: as in `per_example_gradients`.
        TypeError: as in `per_example_gradients`.

    Source: Goodfellow 2015 for dense layers; Rochette et al. 2019 and Bu et al. 2022 for convolutions.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Dense(1))
    >>> params = {"dense1": {"weight": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}}
    >>> x, target = jnp.array([[3.0, 0.0], [0.0, 0.0]]), jnp.ones((2, 1))
    >>> jaxcnn.per_example_norms(net, jaxcnn.squared_error, params, x, target) ** 2  # (2·3)² + 2², 2²
    Array([40.,  4.], dtype=float32)
    """
    return _backward("per_example_norms", fun, loss, params, x, targets, key).norms()


@automatic_inside(like="params")
def clipped_gradient(
    fun: Callable[..., Any],
    loss: Loss,
    params: Any,
    x: Any,
    targets: Any,
    max_norm: ArrayLike,
    *,
    key: Array | None = None,
) -> Any:
    """Return the sum of all examples' gradients, each clipped: ``Σ_n g_n · min(1, max_norm / ‖g_n‖)``.

    For differentially private training, without materializing g_n: g_n is linear in δ_n, so each δ_n is scaled instead
    and the ordinary batch gradient gives the sum. The cost is an ordinary gradient plus `per_example_norms`. Divide by
    N for a mean; add noise before that.

    Inside `jax.shard_map` each device returns the sum over its own examples, even for replicated parameters.
    `jax.lax.psum` of the result is the sum over all examples.

    Args:
        fun: function ``(params, x)`` → outputs ``(N, …)``, as in `per_example_gradients`.
        loss: loss of each example, as in `make_train_step`.
        params: any tree of floating-point arrays.
        x: a batch ``(N, …)``, or a tree of arrays with a leading N.
        targets: an array ``(N, …)``, or a tree of arrays with a leading N.
        max_norm: maximum norm of an example's gradient over all parameters together, above 0.
        key: from `jax.random.key`; if given, ``fun`` is called with ``key=``, folded with the index of the example.

    Returns:
        A tree like ``params``.

    Raises:
        ValueError: if max_norm is not above 0, or as in `per_example_gradients`.
        TypeError: as in `per_example_gradients`.

    Source: Abadi et al. 2016, alg. 1; Bu et al. 2023 ("book-keeping") for the method.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Dense(1, bias=False))
    >>> params = {"dense1": {"weight": jnp.zeros((1, 1))}}
    >>> x, target = jnp.array([[0.1], [3.0]]), jnp.ones((2, 1))
    >>> clipped = jaxcnn.clipped_gradient(net, jaxcnn.squared_error, params, x, target, 1.0)
    >>> clipped["dense1"]["weight"]  # −0.2, and −6 → −1
    Array([[-1.2]], dtype=float32)
    """
    if not isinstance(max_norm, jax.core.Tracer) and not np.all(np.asarray(max_norm) > 0):
        raise bad_value("clipped_gradient", "max_norm", "a number > 0", max_norm)
    result = _backward("clipped_gradient", fun, loss, params, x, targets, key)
    norms = result.norms()
    return result.summed(jnp.where(norms > max_norm, max_norm / jnp.where(norms > 0, norms, 1), 1))


# ---------------------------------------------------------------------------------------------------------------------
# The function for one example


@dataclasses.dataclass(frozen=True)
class _Single:
    """The loss of one example, in two parts: what depends on parameters alone, and the rest."""

    program: Program
    #: Inputs that are parameters.
    params: tuple[Value, ...]
    #: Values that differ between examples.
    batched: frozenset[Value]
    #: Values that depend on parameters alone and that steps with batched inputs read.
    from_params: tuple[Value, ...]
    #: All other values that these steps read and that are equal for all examples.
    constant: tuple[Value, ...]

    @property
    def steps(self) -> list[Step]:
        """Return the steps with batched inputs."""
        return [step for step in self.program.steps if not self.batched.isdisjoint(step.outputs)]

    def of_params(self, values: Sequence[Value], params: Sequence[Array]) -> list[Array]:
        """Evaluate values that are equal for all examples."""
        steps = tuple(step for step in self.program.steps if self.batched.isdisjoint(step.outputs))
        fixed = Program(self.params, self.program.constants, steps, tuple(values))
        return evaluate(fixed, params)

    def alone(self, value: Value, reads: Mapping[Value, int]) -> bool:
        """Whether a value is a parameter whose elements are only moved and which nothing else reads."""
        while reads[value] == 1:
            step = self.program.producer.get(value)
            if step is None:
                return value in self.params
            if not isinstance(step, Equation) or not isinstance(step.inputs[0], Value) or not _is_view(step):
                return False
            value = step.inputs[0]
        return False


def _is_view(step: Equation) -> bool:
    """Whether a step keeps the norm of its input."""
    floats = all(jnp.issubdtype(v.dtype, jnp.floating) for v in (*_values(step.inputs[:1]), *step.outputs))
    same = step.primitive in ("rev", "copy", "name") or (step.primitive == "convert_element_type" and floats)
    return same or move_of(step) is not None


def _single(op: str, fun: Any, loss: Any, params: Any, batch: Any, n: int) -> _Single:
    """Trace the loss of one example; ``batch`` is (x, targets, keys), with a leading N."""

    def of_one(params: Any, batch: Any) -> Array:
        x, targets, key = batch
        x, targets = jax.tree.map(lambda a: a[None], (x, targets))
        outputs = fun(params, x) if key is None else fun(params, x, key=key)
        for y in jax.tree.leaves(outputs):
            if jnp.shape(y)[:1] != (1,):
                expected = "(1, …) for a batch of one example"
                raise bad_value(op, "the result of fun", expected, f"shape {jnp.shape(y)}")
        return _mean(op, loss(outputs, targets), n)

    def one(a: Any) -> Any:
        return a[0] if n else jax.ShapeDtypeStruct(a.shape[1:], a.dtype)  # an element varies over devices as a does

    with idle():
        traced = trace_call(op, of_one, (params, jax.tree.map(one, batch)))
    program = traced.program.without_checkpoints()
    leaves = program.inputs[: len(jax.tree.leaves(params))]
    for step in program.steps:
        _refuse_mixing(op, step)
    batched, depends = program.dependents(program.inputs[len(leaves) :]), program.dependents(leaves)
    rest = [step for step in program.steps if not batched.isdisjoint(step.outputs)]
    read = dict.fromkeys(_values((*(v for step in rest for v in step.inputs), *program.outputs)))
    fixed = [v for v in read if v not in batched]
    from_params = tuple(v for v in fixed if v in depends and jnp.issubdtype(v.dtype, jnp.inexact))
    return _Single(program, leaves, frozenset(batched), from_params, tuple(v for v in fixed if v not in from_params))


def _values(atoms: Sequence[Atom]) -> list[Value]:
    """Return the atoms that are values, not literals."""
    return [atom for atom in atoms if isinstance(atom, Value)]


def _mean(op: str, losses: Any, n: int) -> Array:
    """Return the mean of one example's losses, ``(1, …)``."""
    result = "the result of loss"
    if not isinstance(losses, Array):
        raise bad_type(op, result, "an array", type(losses).__name__)
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise bad_type(op, result, "of a floating dtype", losses.dtype)
    if losses.shape[:1] != (1,):
        raise bad_value(op, result, f"({n}, …), a loss for each example", f"shape {losses.shape}")
    return losses.mean()


def _refuse_mixing(op: str, step: Step) -> None:
    """Raise ValueError for a norm of this library that takes its statistics over the batch."""
    if not isinstance(step, Operation) or not isinstance(step.form, LibraryForm):
        return
    kind, static = step.form.kind, step.form.marked.static
    if kind == "batch_norm" and len(step.form.marked.types) == 3:
        expected = "used with statistics, mean and var"
        raise bad_value(op, kind, expected, "statistics of the batch, which mix examples")
    if kind == "layer_norm" and 0 in static.over:
        raise bad_value(op, f"{kind}: axes", "dims of one example", f"{static.over}, which mixes examples")


def _refuse_statistics(op: str, net: Net, params: Any, key: Any) -> None:
    """Raise ValueError for a `BatchNorm` that takes its statistics from the batch."""
    for name, layer in net.walk():
        if isinstance(layer, BatchNorm):
            layer_params = params
            for part in name.split("/"):
                layer_params = layer_params.get(part, {}) if isinstance(layer_params, Mapping) else {}
            given = isinstance(layer_params, Mapping) and all(
                layer_params.get(statistic) is not None for statistic in ("mean", "var")
            )
            if key is not None or not given:
                expected = "used without a key and with statistics from jaxcnn.calibrate"
                raise bad_value(op, name, expected, "statistics of the batch, which mix examples")


def _arrays(op: str, name: str, tree: Any, floating: bool = False) -> Any:
    """Return a tree of arrays; a mapping that is not a JAX tree becomes a dict."""

    def leaf(path: Any, value: Any) -> Any:
        if isinstance(value, Mapping):
            return jax.tree_util.tree_map_with_path(lambda inner, v: leaf((*path, *inner), v), dict(value))
        at = f"{name}{jax.tree_util.keystr(path)}"
        a = array(op, at, value)
        if floating and not jnp.issubdtype(a.dtype, jnp.inexact):
            raise bad_type(op, at, "a floating array", a.dtype)
        return a

    return jax.tree_util.tree_map_with_path(leaf, tree)


# ---------------------------------------------------------------------------------------------------------------------
# All examples at once

#: Gives a value or operation its probe: maps it and its array to the array with the probe.
_Tap = Callable[[Any, Array], Array]


class _Affine(NamedTuple):
    """An affine operation: its input differs between examples, its weights do not."""

    form: Form
    x: Value
    w: Atom
    b: Atom | None
    #: Whether the addend differs between examples. It is then added after the op.
    adds: bool

    def prepared(self, w: Any, b: Any) -> tuple[Array, Array | None]:
        """Return weights and bias as the op takes them."""
        x = jnp.zeros(self.x.shape, self.x.dtype)
        return self.form.prepare(x, w, *(() if b is None else (b,)))[1:]

    def run(self, x: Array, w: Any, b: Any, tap: Callable[[Array], Array]) -> tuple[Array, Array]:
        """Return the op's input, with all examples in one batch, and the outputs ``(N, …)``."""
        n, merges = x.shape[0], self.form.kind != "dense"  # dense accepts any number of dims
        x = jax.vmap(lambda x: self.form.prepare(x, w)[0])(x)
        rows = x.shape[1] if merges else 1
        x = x.reshape(n * rows, *x.shape[2:]) if merges else x
        y = tap(_call(self.form, x, *self.prepared(w, None if self.adds else b)))
        y = y.reshape(n, rows, *y.shape[1:]) if merges else y
        if self.adds:
            b = jax.vmap(lambda b: self.prepared(w, b)[1])(b)
            y = y + b.reshape(n, *(1,) * (y.ndim - 2), y.shape[-1])
        return x, jax.vmap(self.form.restore)(y)


@functools.partial(jax.jit, static_argnums=0)
def _call(form: Form, *arguments: Any) -> Array:
    """Call an op in a jit of its own, so that equal calls are traced once."""
    return form.call(None, *arguments)


def _affine(single: _Single, step: Step) -> _Affine | None:
    """Return a step as an affine operation whose weights are equal for all examples, or None."""
    form = step.form if isinstance(step, Operation) else None
    if form is None or kind_of(form.kind) not in ("affine", "hidden"):
        return None
    if isinstance(form, LibraryForm) and form.marked.rule is not None:
        return None

    def differs(atom: Any) -> bool:
        return isinstance(atom, Value) and atom in single.batched

    x, w, b = (*step.inputs, None)[:3]
    if isinstance(form, DenseForm) and b is None and not differs(x) and differs(w):
        form, x, w = dataclasses.replace(form, swapped=not form.swapped), w, x
    adds = differs(b)
    if not differs(x) or differs(w) or (adds and kind_of(form.kind) == "hidden"):
        return None
    return _Affine(form, x, w, b, adds)  # type: ignore[arg-type]


def _losses(single: _Single, known: Mapping[Value, Any], inputs: Mapping[Value, Any], n: int, tap: _Tap) -> Any:
    """Return the losses ``(N,)``, and the inputs of the affine operations."""
    values: dict[Value, Any] = dict(inputs)

    def each(atom: Atom) -> Any:
        """Return a value with a leading N; parameters receive a probe, so that each example has its own."""
        if isinstance(atom, Value) and atom in single.from_params and atom not in values:
            values[atom] = tap(atom, jnp.broadcast_to(known[atom], (n, *atom.shape)))
        return values.get(atom) if isinstance(atom, Value) else None

    def same(atom: Atom | None) -> Any:
        return atom if atom is None else known[atom] if isinstance(atom, Value) else atom.val

    activations = {}
    for step in single.steps:
        affine = _affine(single, step)
        if affine is not None:
            b = values[affine.b] if affine.adds else same(affine.b)  # type: ignore[index]
            tapped = functools.partial(tap, step)
            activations[step], y = affine.run(values[affine.x], same(affine.w), b, tapped)
            values[step.outputs[0]] = y
            continue
        batched = [each(atom) for atom in step.inputs]
        shared = [same(atom) if a is None else None for atom, a in zip(step.inputs, batched, strict=True)]
        values.update(zip(step.outputs, _each_example(step, batched, shared), strict=True))
    (loss,) = single.program.outputs
    y = each(loss)
    return jnp.broadcast_to(same(loss), n) if y is None else y, list(activations.values())


def _each_example(step: Step, batched: Sequence[Any], shared: Sequence[Any]) -> Sequence[Any]:
    """Apply a step to each example; ``batched`` and ``shared`` are its inputs, and None where the other has one."""
    form = step.form if isinstance(step, Operation) else None
    if isinstance(form, PoolForm):
        moved = dataclasses.replace(form, dims=tuple(d + 1 for d in form.dims), ndim=form.ndim + 1, moves=STAY)
        return [jax.vmap(form.moves)(call_form(moved, None, *batched))]
    if isinstance(form, LibraryForm) and len(batched) == 1 and kind_of(form.kind) in ("max", "sum"):
        (x,) = batched
        y = _call(form, x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]))
        return [y.reshape(*x.shape[:2], *y.shape[1:])]

    def one(*batched: Any) -> Sequence[Any]:
        given = iter(batched)
        inputs = [next(given) if differs else a for differs, a in zip(mapped, shared, strict=True)]
        return [operate(step, inputs)] if isinstance(step, Operation) else execute(step, inputs)

    mapped = [a is not None for a in batched]
    given = [a for a in batched if a is not None]
    may_convolve = (
        isinstance(form, ConvForm | LibraryForm)
        if isinstance(step, Operation)
        else step.bodies or step.primitive in ("conv_general_dilated", "custom_vjp_call")
    )
    return kernels.for_each(one, *given) if may_convolve else jax.vmap(one)(*given)


def _backward(op: str, fun: Any, loss: Any, params: Any, x: Any, targets: Any, key: Array | None) -> "_Result":
    """Run one forward and backward pass of the sum of the examples' losses, and pair a and δ of each operation."""
    run = fun.apply if isinstance(fun, Net) else expect_function(op, "fun", fun)
    expect_loss(op, loss)
    params = _arrays(op, "params", params, floating=True)
    if isinstance(fun, Net):
        _refuse_statistics(op, fun, params, key)
    x, targets = _arrays(op, "x", x), _arrays(op, "targets", targets)
    n = next((a.shape[0] for a in jax.tree.leaves(x) if a.ndim), 0)
    for name, tree in (("x", x), ("targets", targets)):
        for a in jax.tree.leaves(tree):
            if a.shape[:1] != (n,):
                raise bad_value(op, name, f"({n}, …), with a value for each example", f"shape {a.shape}")
    keys = None if key is None else jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(n))
    # Inside `jax.shard_map` all must vary alike: a gradient at a replicated array would be a sum over devices.
    leaves, tree = jax.tree.flatten((params, (x, targets, keys)))
    params, batch = jax.tree.unflatten(tree, varying_alike(tuple(leaves)))
    single = _single(op, run, loss, params, batch, n)
    leaves = jax.tree.leaves(batch)
    over = [tuple(jax.typeof(a).manual_axis_type.varying) for a in leaves[:1]]
    result: Any = single.program.outputs[0].aval
    over += [tuple(result.manual_axis_type.varying)]
    if set(over[-1]) - set(over[0]):
        expected = f"varying over {over[-1]}, as the result of loss is (see jax.lax.pcast)"
        raise bad_value(op, "x", expected, f"an array that varies over {over[0]}")

    params, structure = jax.tree.flatten(params)
    fixed = (*single.from_params, *single.constant)
    known = dict(zip(fixed, single.of_params(fixed, params), strict=True))
    inputs = dict(zip(single.program.inputs[len(params) :], leaves, strict=True))
    types: dict[Any, Any] = {}

    def note(key: Any, y: Array) -> Array:
        types[key] = jax.typeof(y)
        return y

    jax.eval_shape(lambda: _losses(single, known, inputs, n, note))

    def probed(probes: list[Array]) -> Any:
        of = dict(zip(types, probes, strict=True))
        return _losses(single, known, inputs, n, lambda key, y: add_probe(y, of[key]))

    total, pull, activations = jax.vjp(probed, [probe(kind) for kind in types.values()], has_aux=True)
    deltas = dict(zip(types, pull(jnp.ones_like(total))[0], strict=True))
    used = [(step, use) for step in single.steps if (use := _affine(single, step)) is not None]
    products = []
    for (step, use), a in zip(used, activations, strict=True):
        atoms: Any = (use.w, None if use.adds else use.b)
        w, b = (known.get(v) if isinstance(v, Value) else None for v in atoms)
        products.append(_Product(use, w, b, _products(use, a, *use.prepared(w, b), deltas[step], n), n))
    return _Result(single, params, structure, total, products, deltas)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients from a and δ


@dataclasses.dataclass(frozen=True)
class _ConvProducts:
    """The gradients of a convolution, not materialized. For a transposed one, δ and x have swapped roles.

    x and δ have one or several rows for each of n examples.
    """

    n: int
    c: Correlation
    x: Array
    delta: Array
    transposed: bool = False

    @property
    def at_output(self) -> Array:
        """Return δ at the output of the op."""
        return self.x if self.transposed else self.delta

    def each(self) -> Array:
        """Return the gradients ``(N, …)`` of the kernel."""
        w = on_any_mesh(kernels.kernel_grad_each, self.c, self.x, self.delta)
        return w if w.shape[0] == self.n else w.reshape(self.n, -1, *w.shape[1:]).sum(1)

    def squares(self) -> Array:
        """Return ``(N,)`` squared norms of these gradients."""
        if self.x.shape[0] != self.n:
            return kernels.squares(self.each())
        return on_any_mesh(kernels.kernel_grad_squares, self.c, self.x, self.delta)

    def summed(self, factors: Array) -> Array:
        """Return Σ_n factor_n · gradient_n."""
        delta = _scale(
            self.delta, factors if self.x.shape[0] == self.n else jnp.repeat(factors, self.x.shape[0] // self.n)
        )
        return on_any_mesh(convolution.kernel_grad, self.c, self.x, delta)


@dataclasses.dataclass(frozen=True)
class _DenseProducts:
    """The gradients of a dense op, from rows x and δ, ``(N, positions, …)``."""

    x: Array
    delta: Array

    @property
    def at_output(self) -> Array:
        """Return δ at the output of the op."""
        return self.delta

    def each(self) -> Array:
        """Return the gradients ``(N, I, O)`` of the weights."""
        return kernels.outer_each(self.x, self.delta)

    def squares(self) -> Array:
        """Return ``(N,)`` squared norms of these gradients."""
        return kernels.outer_squares(self.x, self.delta)

    def summed(self, factors: Array) -> Array:
        """Return Σ_n factor_n · gradient_n."""
        delta = _scale(self.delta, factors)
        return on_any_mesh(jnp.einsum, "npi,npo->io", self.x, delta)


def _products(use: _Affine, x: Array, w: Array, b: Any, delta: Array, n: int) -> _ConvProducts | _DenseProducts:
    """Return the gradients of an operation from its input and δ, both with all examples in one batch."""
    form = use.form
    if isinstance(form, TransposedForm):
        options = form.options
        names = ["stride", "padding", "output_padding", "dilation", "groups", "preferred_element_type", "precision"]
        values: Any = map(options.get, names)
        c = convolution.transposed_correlation_of("conv_transpose", x, w, *values)
        return _ConvProducts(n, c, delta, _followed_by_zeros(c, x), transposed=True)
    if isinstance(form, ConvForm):
        options = form.options
        stride, padding, dilation = (options[name] for name in ("stride", "padding", "dilation"))
        groups, kinds = form.groups * form.batch_groups, (form.dtype, form.precision)
        x, c = convolution.correlation_of(form.kind, x, w, stride, padding, dilation, groups, *kinds)
        return _ConvProducts(n, c, x, delta)
    if form.kind == "dense":
        return _DenseProducts(*(a.reshape(n, math.prod(a.shape[1:-1]), a.shape[-1]) for a in (x, delta)))
    assert isinstance(form, LibraryForm)
    c = form.marked.static
    if form.kind == "conv_transpose":
        return _ConvProducts(n, c, delta, x, transposed=True)
    if form.kind == "hidden_layer":
        # The same as in the forward pass; within one program it is computed once.
        _, code = on_any_mesh(hidden.hidden_with_code, c, x, w, b)
        delta = on_any_mesh(pooling.scatter_to_winners, c.window, delta, code)
        c = c.correlation
    return _ConvProducts(n, c, x, delta)


def _followed_by_zeros(c: Correlation, x: Array) -> Array:
    """Return the input of a transposed convolution, extended by zeros to the output of the one that it transposes."""
    ends = [(0, out - n) for n, out in zip(x.shape[1:-1], c.window.out, strict=True)]
    return jnp.pad(x, ((0, 0), *ends, (0, 0))) if any(end for _, end in ends) else x


class _Product(NamedTuple):
    """An affine operation with its weights and their gradients."""

    use: _Affine
    w: Any
    b: Array | None
    gradients: _ConvProducts | _DenseProducts
    n: int

    def cotangents(self, values: Sequence[Value], factors: Array | None) -> Iterator[tuple[Value, Array]]:
        """Yield the gradients of weights and bias, if they are among ``values``.

        These are ``(N, …)``, or with factors their sum, each times the factor of the example.
        """
        use, gradients, delta = self.use, self.gradients, self.gradients.at_output
        (w, b), pull = jax.vjp(use.prepared, self.w, self.b)
        rows = delta.shape[0] // max(self.n, 1) if isinstance(self.n, int) else 1
        if factors is None:
            pull = jax.vmap(pull)
            of_w = gradients.each() if use.w in values else _zeros(w, self.n)
            of_b = delta.reshape(self.n, rows * math.prod(delta.shape[1:-1]), delta.shape[-1]).sum(1)
        else:
            of_w = gradients.summed(factors)
            of_b = convolution.sum_pixels(_scale(delta, jnp.repeat(factors, rows) if rows != 1 else factors))
        of_w, of_b = pull((of_w.astype(w.dtype), None if b is None else of_b.astype(b.dtype)))
        if use.w in values:
            yield use.w, of_w
        if use.b in values and not use.adds:
            yield use.b, of_b  # type: ignore[misc]


class _Result(NamedTuple):
    """The gradients of all parameters, which are not materialized before a method is called."""

    single: _Single
    #: The parameters, and the structure of their tree.
    params: list[Array]
    tree: Any
    losses: Array
    products: list[_Product]
    #: The gradients ``(N, …)`` of values that other operations read.
    deltas: Mapping[Value, Array]

    def gradients(self) -> Any:
        """Return the gradients, ``(N, …)``."""
        return jax.tree.unflatten(self.tree, self._of_params(self.single.from_params))

    def norms(self) -> Array:
        """Return ``(N,)`` norms of the gradients of all parameters together."""
        program = self.single.program
        reads = Counter(_values((*(v for step in program.steps for v in step.inputs), *program.outputs)))
        cheap = {
            use.w: gradients
            for use, _, _, gradients, _ in self.products
            if isinstance(use.w, Value) and self.single.alone(use.w, reads)
        }
        rest = [v for v in self.single.from_params if v not in cheap]
        squares = [gradients.squares() for gradients in cheap.values()]
        squares += map(kernels.squares, self._of_params(rest) if rest else ())
        return jnp.sqrt(functools.reduce(operator.add, squares)) if squares else _zeros(self.losses)

    def summed(self, factors: Array) -> Any:
        """Return Σ_n factor_n · gradient_n for each parameter."""
        return jax.tree.unflatten(self.tree, self._of_params(self.single.from_params, factors))

    def _of_params(self, values: Sequence[Value], factors: Array | None = None) -> Sequence[Array]:
        """Return what the gradients of some values contribute to those of the parameters, or to their sum."""
        total: dict[Value, Array] = {}
        for v, g in self._cotangents(values, factors):
            total[v] = total[v] + g if v in total else g
        like, pull = jax.vjp(lambda *params: self.single.of_params(values, params), *self.params)
        lead = self.losses.shape if factors is None else ()
        zeros = [_zeros(a, *lead) for a in (*like, *self.params)]
        if not total:
            return zeros[len(like) :]
        given = [total.get(v, zero) for v, zero in zip(values, zeros, strict=False)]
        return (jax.vmap(pull) if factors is None else pull)(given)

    def _cotangents(self, values: Sequence[Value], factors: Array | None) -> Iterator[tuple[Value, Array]]:
        for product in self.products:
            if product.use.w in values or product.use.b in values:
                yield from product.cotangents(values, factors)
        for v in values:
            if v in self.deltas:
                g = self.deltas[v]
                yield (
                    v,
                    g if factors is None else _scale(g.astype(accumulator(g.dtype)), factors).sum(0).astype(g.dtype),
                )


def _zeros(a: Array, *lead: int) -> Array:
    """Return zeros like ``a`` with more dims in front; inside `jax.shard_map` they vary over devices as ``a`` does."""
    return jnp.broadcast_to(probe(jax.typeof(a)), (*lead, *a.shape))


def _scale(a: Array, factors: Array) -> Array:
    """Return ``a`` with each row multiplied by its factor."""
    return a * factors.reshape(-1, *(1,) * (a.ndim - 1)).astype(a.dtype)
