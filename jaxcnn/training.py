"""Training: one jitted step, evaluation, and statistics of the training data.  Rooms: imports `jaxcnn.net`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.geometry import fail, static_int
from jaxcnn.layers import BatchNorm, Params
from jaxcnn.net import Rules, Serial, expect_loss, expect_net
from jaxcnn.ops.rule import one_key

#: Error of each example: (outputs, targets) → (N, …).
Loss = Callable[[Any, Any], Array]
Batch = tuple[Any, Any]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training step reads and writes."""

    #: How many steps were taken.
    step: Array
    params: Params
    opt_state: Any
    #: Each step's own key is this one folded with its number.
    key: Array

    @classmethod
    def create(
        cls, net: Serial, optimizer: optax.GradientTransformation, key: Array, input_shape: tuple[int, ...]
    ) -> "TrainState":
        """The state before the first step; ``input_shape`` is one example's."""
        expect_net("TrainState.create", net)
        _expect_optimizer("TrainState.create", optimizer)
        init_key, train_key = jax.random.split(one_key("TrainState.create", key))
        params = net.init(init_key, input_shape)
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), train_key)


def make_train_step(
    net: Serial,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    rules: Rules | None = None,
    microbatch: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted training step: ``state, metrics = step(state, (x, targets))``.

    The state is donated: use the one that comes back.  ``metrics`` holds the mean "loss" of the batch, and "accuracy"
    where targets are integer labels; both before the update, with dropout on.

    A small net waits for Python at every step.  Over batches that are on the device already, several steps are one
    call: ``jax.lax.scan(step, state, (xs, targets))``, with xs ``(steps, N, …)``; its metrics have a leading dim, too.

    With ``microbatch`` so many examples at a time go through both halves, and what they say of the gradient is added up
    (gradient accumulation): the activations of one microbatch are all that is kept.  The step is the same but for the
    rounding, unless layers draw numbers (each microbatch has a key of its own) or look at the whole batch (`BatchNorm`
    sees a microbatch).  On CPU it is often faster, too: 16 to 64 examples of a large net stay in cache.

    On several devices, put the state on all of them and split the batch; the step is the same.  Microbatches take every
    so manieth example, so that each device has its part of all of them.

    Args:
        net: from `serial`.
        loss: error of each example, such as `softmax_cross_entropy_with_integer_labels`; its mean is minimised.
        optimizer: from optax.
        rules: other backward halves, as in `Serial.apply`.
        microbatch: how many examples at a time; None: all.  What remains of the batch goes last.

    Raises: TypeError for what is no net, function or optimizer, TypeError or ValueError for a microbatch that is no
    int >= 1; when the step is first called, what the layers and the loss raise for shapes and dtypes that do not fit.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Flatten(), jaxcnn.Dense(10))
    >>> optimizer = optax.sgd(0.1)
    >>> state = jaxcnn.TrainState.create(net, optimizer, jax.random.key(0), (28, 28, 1))
    >>> step = jaxcnn.make_train_step(net, jaxcnn.softmax_cross_entropy_with_integer_labels, optimizer)
    >>> state, metrics = step(state, (jnp.ones((8, 28, 28, 1)), jnp.zeros(8, jnp.int32)))
    >>> int(state.step), sorted(metrics)
    (1, ['accuracy', 'loss'])
    >>> state, metrics = jax.lax.scan(step, state, (jnp.ones((3, 8, 28, 28, 1)), jnp.zeros((3, 8), jnp.int32)))
    >>> int(state.step), metrics["loss"].shape
    (4, (3,))
    >>> mesh = jax.make_mesh((jax.device_count(),), ("batch",))
    >>> everywhere, split = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("batch",)))
    >>> batch = jax.device_put((jnp.ones((8, 28, 28, 1)), jnp.zeros(8, jnp.int32)), split)
    >>> state, metrics = step(jax.device_put(state, everywhere), batch)
    >>> int(state.step)
    5
    >>> frugal = jaxcnn.make_train_step(
    ...     net, jaxcnn.softmax_cross_entropy_with_integer_labels, optimizer, microbatch=16
    ... )
    >>> state, metrics = frugal(state, (jnp.ones((128, 28, 28, 1)), jnp.zeros(128, jnp.int32)))
    >>> int(state.step)
    6
    """
    expect_net("make_train_step", net)
    expect_loss("make_train_step", loss)
    _expect_optimizer("make_train_step", optimizer)
    if microbatch is not None and static_int("make_train_step", "microbatch", microbatch, microbatch) < 1:
        fail("make_train_step", f"microbatch expected an int >= 1, got {microbatch}")

    def gradients(params: Params, batch: Batch, key: Array) -> tuple[Params, Metrics]:
        """Of the mean error."""
        x, targets = batch

        def error(params: Params) -> tuple[Array, Array]:
            outputs = net.apply(params, x, key=key, rules=rules)
            return loss(outputs, targets).mean(), outputs

        (value, outputs), found = jax.value_and_grad(error, has_aux=True)(params)
        metrics = {"loss": value}
        if _are_labels(outputs, targets):
            metrics["accuracy"] = _correct(outputs, targets).mean()
        return found, metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if microbatch is None or microbatch >= batch[0].shape[0]:
            found, metrics = gradients(state.params, batch, key)
        else:
            found, metrics = _accumulated(functools.partial(gradients, state.params), batch, key, microbatch)
        updates, opt_state = optimizer.update(found, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def _accumulated(mean: Callable[[Batch, Array], Any], batch: Batch, key: Array, size: int) -> Any:
    """The mean over a batch, ``size`` examples at a time: Σ (mean of a part)·(its share), in float32 or wider."""
    examples = batch[0].shape[0]
    count = examples // size

    def wide(a: Any) -> Any:
        return np.promote_types(a.dtype, np.float32)

    def share(part: Batch, i: ArrayLike, of: int) -> Any:
        found = mean(part, jax.random.fold_in(key, i))
        return jax.tree.map(lambda a: a.astype(wide(a)) * (of / examples), found)

    def add(total: Any, i: Array) -> tuple[Any, None]:
        part = jax.tree.map(lambda a: a[: count * size].reshape(size, count, *a.shape[1:])[:, i], batch)
        return jax.tree.map(jnp.add, total, share(part, i, size)), None

    def rest(a: Array) -> Array:
        return a[count * size :]

    shapes = jax.eval_shape(mean, batch, key)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, wide(a)), shapes)
    total, _ = jax.lax.scan(add, zeros, jnp.arange(count))
    if examples % size:
        total = jax.tree.map(jnp.add, total, share(jax.tree.map(rest, batch), count, examples % size))
    return jax.tree.map(lambda a, like: a.astype(like.dtype), total, shapes)


def evaluate(net: Serial, loss: Loss, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss, and accuracy where targets are integer labels, over all examples of ``batches``; dropout is off.

    Raises: ValueError if there are no examples, TypeError for what is no net or no function.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Dense(1))
    >>> params = net.init(jax.random.key(0), (2,))
    >>> jaxcnn.evaluate(net, jaxcnn.squared_error, params, [(jnp.zeros((4, 2)), jnp.ones((4, 1)))])
    {'loss': 1.0}
    """
    expect_net("evaluate", net)
    expect_loss("evaluate", loss)
    run = _evaluator(net, loss)
    totals: dict[str, float] = {}
    examples = 0
    for x, targets in batches:
        for name, total in run(params, (x, targets)).items():
            totals[name] = totals.get(name, 0.0) + float(total)
        examples += np.shape(x)[0]
    if not examples:
        raise ValueError("evaluate: batches expected at least one example, got none")
    return {name: total / examples for name, total in totals.items()}


@functools.lru_cache(maxsize=16)
def _evaluator(net: Serial, loss: Loss) -> Callable[[Params, Batch], Metrics]:
    """Jitted once for a net and a loss: totals over a batch."""

    @jax.jit
    def run(params: Params, batch: Batch) -> Metrics:
        x, targets = batch
        outputs = net.apply(params, x)
        errors = loss(outputs, targets)
        totals = {"loss": errors.reshape(len(errors), math.prod(errors.shape[1:])).mean(1).sum()}
        if _are_labels(outputs, targets):
            totals["accuracy"] = _correct(outputs, targets).sum()
        return totals

    return run


def calibrate(net: Serial, params: Params, batches: Iterable[Batch]) -> Params:
    """Parameters with exact statistics of the training data beside them, for every `BatchNorm` of the net.

    What comes back is for evaluation: ``net.apply(calibrated, x)`` normalises by "mean" and "var", the mean and the
    variance (Σ (x − mean)²/n) of all that reaches the layer when the net is evaluated on ``batches``.  They do not
    depend on how the data are cut into batches.  The optimiser keeps the parameters that went in, and never sees them.

    Layer after layer: what reaches a layer hangs on the statistics of those before it, so the data are gone through
    once for each.  Every batch's mean and Σ (x − mean)² are merged in float64 on the host (Chan et al. 1979).

    Args:
        net: from `serial`.
        params: as training left them.
        batches: of the training data, ``(x, targets)``; a list, or what else can be gone through more than once.

    Raises: ValueError if there are no examples; TypeError for what can be gone through only once, such as a generator.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.BatchNorm())
    >>> params = net.init(jax.random.key(0), (1,))
    >>> batches = [(jnp.array([[1.0], [3.0]]), None), (jnp.array([[5.0]]), None)]
    >>> calibrated = jaxcnn.calibrate(net, params, batches)
    >>> calibrated["batch_norm1"]["mean"], calibrated["batch_norm1"]["var"].round(4)
    (Array([3.], dtype=float32), Array([2.6667], dtype=float32))
    >>> net.apply(calibrated, jnp.array([[3.0]]))
    Array([[0.]], dtype=float32)
    """
    expect_net("calibrate", net)
    if not isinstance(batches, Iterable):
        raise TypeError(f"calibrate: batches expected (x, targets) pairs, got {batches!r}")
    paths = [path for path, layer in net.walk() if isinstance(layer, BatchNorm)]
    if iter(batches) is batches and paths:
        raise TypeError(
            f"calibrate: batches expected a list, or what else can be gone through once for each of {len(paths)} "
            f"layers, got {type(batches).__name__}"
        )
    for path in paths:
        n, mean, squares = 0, np.zeros(()), np.zeros(())
        dtype: Any = None
        for x, _ in batches:
            of_batch = _moments_before(net, path)(params, x)
            dtype = of_batch[1].dtype
            n, mean, squares = _merged((n, mean, squares), of_batch)
        if not n:
            raise ValueError("calibrate: batches expected at least one example, got none")
        found = {"mean": jnp.asarray(mean, dtype), "var": jnp.asarray(squares / n, dtype)}
        params = _with(params, path.split("/"), found)
    return params


def _merged(one: tuple[int, Any, Any], two: tuple[Any, Any, Any]) -> tuple[int, Any, Any]:
    """Count, mean and Σ (x − mean)² of two sets together."""
    n1, m1, s1 = one
    n2, m2, s2 = int(two[0]), *(np.asarray(a, np.float64) for a in two[1:])
    n, d = n1 + n2, m2 - m1
    return (n, m1 + d * (n2 / n), s1 + s2 + d * d * (n1 * n2 / n)) if n else one


@functools.lru_cache(maxsize=64)
def _moments_before(net: Serial, path: str) -> Callable[[Params, Any], tuple[int, Array, Array]]:
    """Jitted once for a net and a layer: how many entries reach a channel of it, their mean, and Σ (x − mean)²."""
    before = _before(net, path.split("/"))

    @jax.jit
    def run(params: Params, x: Any) -> tuple[int, Array, Array]:
        reached = before.apply(params, x)
        pixels = reached.reshape(-1, reached.shape[-1])
        pixels = pixels.astype(np.promote_types(pixels.dtype, np.float32))
        mean = pixels.sum(0) / max(len(pixels), 1)
        return len(pixels), mean, jnp.square(pixels - mean).sum(0)

    return run


def _before(net: Serial, path: list[str]) -> Serial:
    """The layers that run before the one of this name, in its own net and in those around it."""
    at = [name for name, _ in net.layers].index(path[0])
    inner = net.layers[at][1]
    # Of a residual net, what its last layers add is not yet added.
    own = ((path[0], _before(inner, path[1:])),) if isinstance(inner, Serial) else ()
    return Serial(net.layers[:at] + own)


def _with(params: Params, path: list[str], found: Params) -> Params:
    """The parameters with some more at one place; the ones that came are left as they are."""
    if not path:
        return {**params, **found}
    return {**params, path[0]: _with(params.get(path[0], {}), path[1:], found)}


def _expect_optimizer(op: str, value: Any) -> None:
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(f"{op}: optimizer expected one from optax, got {value!r}")


def _are_labels(outputs: Array, targets: Any) -> bool:
    return jnp.issubdtype(targets.dtype, jnp.integer) and targets.shape == outputs.shape[:-1]


def _correct(outputs: Array, targets: Any) -> Array:
    return (jnp.argmax(outputs, -1) == targets).astype(jnp.float32)
