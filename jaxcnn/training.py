"""Training: a jitted step, and evaluation."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxcnn.arguments import bad_type, bad_value, expect_function, fail, floating_dtype, one_key, static_int
from jaxcnn.backprop import BackpropResult, value_grad_and_deltas
from jaxcnn.caching import remembered
from jaxcnn.layers import Params, Shape
from jaxcnn.net import Loss, Serial, expect_loss, expect_net, in_dtype
from jaxcnn.selection import Rules

#: (net, loss, params, x, targets, *, key) → a tree like params, or one gradient per example.
Gradient = Callable[..., Any]
Batch = tuple[Any, Any]
#: Numbers by name, or trees of them.
Metrics = dict[str, Any]
#: (result of the backward pass, updates of the parameters) → metrics.
Measure = Callable[[BackpropResult, Any], Metrics]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All values that a training step reads and writes.

    As a pytree, the state has the raw data of its key as a leaf (`jax.random.key_data`), so that it can be put on the
    devices of several processes: ``jax.device_put(state, everywhere)``. Every leaf has its own buffer, so all can be
    donated. An array that is passed twice, for example by an optimizer that starts from a copy of the parameters, is
    copied.
    """

    #: Number of steps taken.
    step: Array
    params: Params
    opt_state: Any
    #: Key for the whole run; step i uses ``fold_in(key, i)``.
    key: Array

    def __post_init__(self) -> None:
        seen: set[Any] = set()
        for field in ("step", "params", "opt_state", "key"):
            unaliased = functools.partial(_with_own_buffer, seen)
            object.__setattr__(self, field, jax.tree.map(unaliased, getattr(self, field)))

    def tree_flatten_with_keys(self) -> Any:
        """Flatten to the fields, with the key as raw data.

        Returns:
            The children with their names, and the key implementation as static data.
        """
        key, kind = self.key, self.__dict__.get("_kind")
        if hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and isinstance(key, Array):
            key, kind = jax.random.key_data(key), jax.random.key_impl(key)
        children = {"step": self.step, "params": self.params, "opt_state": self.opt_state, "key": key}
        return [(jax.tree_util.GetAttrKey(name), child) for name, child in children.items()], kind

    @classmethod
    def tree_unflatten(cls, kind: Any, children: Any) -> "TrainState":
        """Rebuild the state from its fields.

        A leaf that is not the data of a key, such as a sharding, is kept unchanged.

        Args:
            kind: the key implementation.
            children: the fields, in order.

        Returns:
            The state.
        """
        state = object.__new__(cls)
        step, params, opt_state, key = children
        if isinstance(key, Array | np.ndarray) and key.dtype == np.uint32 and kind is not None:
            key = jax.random.wrap_key_data(jnp.asarray(key), impl=kind)
        fields = {"step": step, "params": params, "opt_state": opt_state, "key": key, "_kind": kind}
        for name, value in fields.items():
            object.__setattr__(state, name, value)
        return state

    @classmethod
    def create(
        cls,
        net: Serial,
        optimizer: optax.GradientTransformation,
        key: Array,
        input_shape: Shape,
        *,
        dtype: DTypeLike = jnp.float32,
    ) -> "TrainState":
        """Return the state before the first step.

        Args:
            net: from `serial`.
            optimizer: from optax.
            key: from `jax.random.key`; initializes the parameters, and is split for training.
            input_shape: shape of one example, without the batch; a tuple of shapes for a net with several inputs.
            dtype: dtype of the parameters, which is that of the inputs.

        Returns:
            The state, at step 0.

        Raises:
            TypeError: if net, optimizer or key has the wrong type, or dtype is not a floating dtype.
            ValueError: if the net does not fit ``input_shape``, or dtype is float64 and ``jax_enable_x64`` is off.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import jaxcnn
        >>> net = jaxcnn.serial(jaxcnn.Dense(3))
        >>> state = jaxcnn.TrainState.create(net, optax.adam(0.1), jax.random.key(0), (4,), dtype=jnp.bfloat16)
        >>> state.params["dense1"]["weight"].dtype
        dtype(bfloat16)
        """
        expect_net("TrainState.create", net)
        _expect_optimizer("TrainState.create", optimizer)
        init_key, train_key = jax.random.split(one_key("TrainState.create", key))
        params = net.init(init_key, input_shape, floating_dtype("TrainState.create", "dtype", dtype))
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), train_key)


def _with_own_buffer(seen: set[Any], leaf: Any) -> Any:
    """Return the leaf, or a copy of it if its buffers are in ``seen``."""
    if not isinstance(leaf, Array) or isinstance(leaf, jax.core.Tracer):
        return leaf
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    if data.is_deleted():
        return leaf
    buffers = {(s.device, s.data.unsafe_buffer_pointer()) for s in data.addressable_shards if s.data.size}
    if buffers & seen:
        return jnp.copy(leaf)
    seen |= buffers
    return leaf


def make_train_step(
    net: Serial,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    rules: Rules | None = None,
    microbatch: int | None = None,
    gradient: Gradient | None = None,
    compute_dtype: DTypeLike | None = None,
    measure: Measure | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return a jitted training step: ``state, metrics = step(state, (x, targets))``.

    The state is donated: continue with the returned one. ``metrics`` contains the mean "loss" of the batch, in float32
    or wider. If targets are integer labels, it also contains "accuracy", as in `evaluate`. Both are from before the
    update, with dropout active.

    An optimizer that takes ``value``, ``grad`` or ``value_fn`` receives them: the mean loss, its gradient, and the mean
    loss of the batch as a function of the parameters. Examples are `optax.contrib.reduce_on_plateau`,
    `optax.polyak_sgd` and `optax.lbfgs`.

    An optimizer that aggregates per-example gradients, such as `optax.contrib.dpsgd`, needs
    ``gradient=jaxcnn.per_example_gradients``. In general ``gradient`` is a function that replaces the gradient of the
    mean loss: ``gradient(net, loss, params, x, targets, key=key)``. It returns a tree like the parameters, after any
    processing such as clipping and adding noise (see the last example). The key is that of the step, which dropout
    uses; fold in a number before using it for anything else.

    For a small net, Python dispatch dominates each step. If the batches are already on the device, run several steps in
    one call: ``jax.lax.scan(step, state, (xs, targets))``, with xs ``(steps, N, …)``. Its metrics also have a leading
    dim.

    If ``microbatch`` is given, that many examples at a time go through the forward and backward pass, and their
    gradients are accumulated. Only the activations of one microbatch are kept. The step differs by rounding only,
    unless a layer is random (each microbatch gets its own key) or depends on the whole batch (`BatchNorm` uses the
    statistics of a microbatch). On CPU this is often faster: 16 to 64 examples of a large net stay in cache.

    If ``measure`` is given, it is called with the `BackpropResult` of the step, which has every layer's activation and
    δ, and with the updates of the parameters. The returned values are added to the metrics. With ``microbatch``, the
    `BackpropResult` has the loss and the gradients of the batch, and neither activations nor δ.

    If ``compute_dtype`` is given, activations and δ have it (mixed precision), as in `Serial.apply` with ``dtype``.
    Parameters, their gradients and the optimizer's state keep their dtype. Sums, the statistics of norms and the loss
    are in float32 or wider. ``gradient`` receives a net that computes in this dtype.

    On several devices, replicate the state and shard the batch; the step is the same. With k microbatches, each takes
    every k-th example, so every device holds a share of each one.

    Args:
        net: from `serial`.
        loss: loss of each example, such as `softmax_cross_entropy_with_integer_labels`; its mean is minimized.
        optimizer: from optax.
        rules: replacement backward rules, as in `Serial.apply`.
        microbatch: number of examples per microbatch; None uses the whole batch. A smaller remainder is processed last.
        gradient: called in place of the gradient of the mean loss. It cannot be combined with ``rules`` or
            ``microbatch``.
        compute_dtype: dtype of activations and δ, such as ``jnp.bfloat16``; None for that of parameters and inputs.
        measure: function of a `BackpropResult` and the updates that returns further metrics by name. It cannot be
            combined with ``gradient``.

    Returns:
        The step, a function of a `TrainState` and a batch that returns the new state and the metrics. It raises the
        errors of the layers and the loss for shapes and dtypes that do not fit, and ValueError if the optimizer needs
        per-example gradients and does not receive them.

    Raises:
        TypeError: if net, loss, optimizer, gradient, measure or microbatch has the wrong type, or compute_dtype is not
            a floating dtype.
        ValueError: if microbatch is less than 1, if gradient is combined with rules, microbatch or measure, or if
            compute_dtype is float64 and ``jax_enable_x64`` is off.

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

    The norm of every layer's δ:

    >>> def delta_norms(result, updates):
    ...     return {"delta_norms": jax.tree.map(jnp.linalg.norm, result.deltas)}
    >>> step = jaxcnn.make_train_step(
    ...     net, jaxcnn.softmax_cross_entropy_with_integer_labels, optimizer, measure=delta_norms
    ... )
    >>> state, metrics = step(state, (jnp.ones((8, 28, 28, 1)), jnp.zeros(8, jnp.int32)))
    >>> sorted(metrics["delta_norms"])
    ['dense1', 'flatten1']

    Private training, every gradient clipped and noise added to their sum:

    >>> def private(net, loss, params, x, targets, *, key):
    ...     total = jaxcnn.clipped_gradient(net, loss, params, x, targets, 1.0, key=key)
    ...     leaves, tree = jax.tree.flatten(total)
    ...     keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    ...     noisy = [a + 0.5 * jax.random.normal(key, a.shape) for key, a in zip(keys, leaves)]
    ...     return jax.tree.unflatten(tree, [a / len(x) for a in noisy])
    >>> step = jaxcnn.make_train_step(
    ...     net, jaxcnn.softmax_cross_entropy_with_integer_labels, optimizer, gradient=private
    ... )
    >>> state, metrics = step(state, (jnp.ones((8, 28, 28, 1)), jnp.zeros(8, jnp.int32)))
    >>> int(state.step)
    8
    """
    expect_net("make_train_step", net)
    expect_loss("make_train_step", loss)
    _expect_optimizer("make_train_step", optimizer)
    if microbatch is not None:
        static_int("make_train_step", "microbatch", microbatch, least=1)
    if gradient is not None:
        expect_function("make_train_step", "gradient", gradient)
        if rules is not None or microbatch is not None:
            fail("make_train_step", "gradient must not be given together with rules or microbatch")
    if measure is not None:
        expect_function("make_train_step", "measure", measure)
        if gradient is not None:
            fail("make_train_step", "measure must not be given together with gradient")
    if compute_dtype is not None:
        net = in_dtype(net, floating_dtype("make_train_step", "compute_dtype", compute_dtype))
    requested = _extra_arguments(optimizer)

    def mean_loss(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        """Return the mean loss, and the numbers of correct and of valid labels."""
        x, targets = batch
        outputs = net.apply(params, x, key=key, rules=rules)
        return _widened(loss(outputs, targets)).mean(), _counts(outputs, targets)

    def loss_and_gradient(params: Params, batch: Batch, key: Array) -> tuple[tuple[Array, Params], dict[str, Array]]:
        """Return the mean loss with its gradient, and the label counts."""
        (value, counts), grad = jax.value_and_grad(mean_loss, has_aux=True)(params, batch, key)
        return (value, grad), counts

    def over_batch(f: Callable[..., Any], batch: Batch, key: Array) -> Any:
        if microbatch is None or microbatch >= _size(batch[0]):
            return f(batch, key)
        return _accumulated(f, batch, key, microbatch)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if measure is not None and microbatch is None:
            result, counts = value_grad_and_deltas(mean_loss, has_aux=True)(state.params, batch, key)
            value, grad = result.loss, result.gradients
        elif gradient is None:
            (value, grad), counts = over_batch(functools.partial(loss_and_gradient, state.params), batch, key)
            result = BackpropResult(value, grad, {}, {})
        else:
            value, counts = mean_loss(state.params, batch, key)
            grad = gradient(net, loss, state.params, *batch, key=key)

        def value_fn(params: Params) -> Array:
            return over_batch(functools.partial(mean_loss, params), batch, key)[0]

        available = {"value": value, "grad": grad, "value_fn": value_fn}
        extra = {name: a for name, a in available.items() if name in requested}
        _check_gradient(optimizer, state, grad, extra, _size(batch[0]))
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        metrics: Metrics = {"loss": value}
        if counts:
            metrics["accuracy"] = counts["correct"].astype(np.float32) / counts["labels"].astype(np.float32)
        if measure is not None:
            measured = measure(result, updates)
            if not isinstance(measured, Mapping):
                raise bad_type("make_train_step", "the result of measure", "a dict", type(measured).__name__)
            metrics |= measured
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def _extra_arguments(optimizer: Any) -> frozenset[str]:
    """Return the names of the extra arguments that an optimizer takes."""
    names = {"value", "grad", "value_fn"}
    try:
        parameters = inspect.signature(optimizer.update).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return frozenset(names if everything else names & {p.name for p in parameters})


def _check_gradient(optimizer: Any, state: TrainState, grad: Any, extra: Any, size: int) -> None:
    """Raise ValueError unless the optimizer gets one gradient, or one per example if it aggregates them."""
    per_example = _aggregates(optimizer, state, extra)
    leading = (size,) if per_example else ()
    expected = [(path, (*leading, *jnp.shape(p))) for path, p in jax.tree.leaves_with_path(state.params)]
    if [(path, jnp.shape(a)) for path, a in jax.tree.leaves_with_path(grad)] == expected:
        return
    if per_example:
        fail(
            "make_train_step",
            "the optimizer aggregates per-example gradients and needs a function that returns them, such as "
            "gradient=jaxcnn.per_example_gradients; got one gradient for the batch",
        )
    got = f"the shapes {jax.tree.map(jnp.shape, grad)}"
    raise bad_value("make_train_step", "the result of gradient", "a tree like params", got)


def _aggregates(optimizer: Any, state: TrainState, extra: Any) -> bool:
    """Whether an optimizer takes per-example gradients, that is, whether it removes a leading dim."""

    def private(node: Any) -> bool:
        return isinstance(node, optax.contrib.DifferentiallyPrivateAggregateState)

    if any(map(private, jax.tree.leaves(state.opt_state, is_leaf=private))):
        return True
    params = jax.tree.leaves(state.params)
    each = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *jnp.shape(a)), jnp.result_type(a)), state.params)

    def update(grad: Any) -> Any:
        options = {**extra, "grad": grad} if "grad" in extra else extra
        return optimizer.update(grad, state.opt_state, state.params, **options)[0]

    try:
        updates = jax.tree.leaves(jax.eval_shape(update, each))
    except Exception:  # any error that an optimizer raises for shapes it does not accept
        return False
    return len(updates) == len(params) and any(u.shape == jnp.shape(p) for u, p in zip(updates, params, strict=True))


def _accumulated(mean: Callable[[Batch, Array], Any], batch: Batch, key: Array, size: int) -> Any:
    """Return a mean and counts over a batch, ``size`` examples at a time, in float32 or wider.

    ``mean`` returns both for a part. The means are added with their shares as weights, and the counts are added.
    """
    examples = _size(batch[0])
    count = examples // size

    def wide(a: Any) -> Any:
        return np.promote_types(a.dtype, np.float32)

    def of_part(part: Batch, i: ArrayLike) -> Any:
        means, counts = mean(part, jax.random.fold_in(key, i))
        return jax.tree.map(lambda a: a.astype(wide(a)), means), counts

    def scaled(means: Any, of: int) -> Any:
        return jax.tree.map(lambda a: a * (of / examples), means)

    # Means are scaled after the loop: XLA then takes the sum over devices out of it, too.
    def add(total: Any, i: Array) -> tuple[Any, None]:
        part = jax.tree.map(lambda a: a[: count * size].reshape(size, count, *a.shape[1:])[:, i], batch)
        return jax.tree.map(jnp.add, total, of_part(part, i)), None

    shapes, counts = jax.eval_shape(mean, batch, key)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, wide(a)), shapes)
    no_counts = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), counts)
    (means, counts), _ = jax.lax.scan(add, (zeros, no_counts), jnp.arange(count))
    total = scaled(means, size), counts
    if examples % size:
        rest = jax.tree.map(lambda a: a[count * size :], batch)
        means, counts = of_part(rest, count)
        total = jax.tree.map(jnp.add, total, (scaled(means, examples % size), counts))
    return jax.tree.map(lambda a, like: a.astype(like.dtype), total[0], shapes), total[1]


def evaluate(net: Serial, loss: Loss, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the mean loss, and the accuracy if targets are integer labels, over all examples; dropout is inactive.

    Every example has the same weight, whatever its batch. If there is one class per pixel, with outputs
    ``(N, …, classes)`` and targets ``(N, …)``, the loss of an example is the mean over the values that ``loss`` returns
    for it, and the accuracy is the fraction of correct pixels. Labels outside the classes, such as −100 or 255 for
    pixels to ignore, do not count in the accuracy; their share in the loss is what ``loss`` returns for them. If no
    label is in the classes, the accuracy is NaN. The sum over a batch is computed in float32, or in float64 if the loss
    is; the sum over batches is computed in float64.

    Args:
        net: from `serial`.
        loss: loss of each example, ``(N, …)``, as in `make_train_step`.
        params: the net's parameters, with the statistics of `calibrate` if it has batch norms.
        batches: ``(x, targets)`` pairs, each used once.

    Returns:
        A dict with "loss", and "accuracy" if targets are integer labels.

    Raises:
        ValueError: if ``batches`` has no examples, or if the loss does not return one value per example.
        TypeError: if net or loss has the wrong type.

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
    total, examples = 0.0, 0
    totals: dict[str, int] = {}
    for x, targets in batches:
        loss_of_batch, counts = run(params, (x, targets))
        total += float(loss_of_batch)
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + int(count)
        examples += _size(x)
    if not examples:
        fail("evaluate", "batches must have at least one example, got none")
    metrics = {"loss": total / examples}
    if totals:
        metrics["accuracy"] = totals["correct"] / totals["labels"] if totals["labels"] else math.nan
    return metrics


@remembered
def _evaluator(net: Serial, loss: Loss) -> Callable[[Params, Batch], tuple[Array, dict[str, Array]]]:
    """Return a function, jitted once per net and loss, for the sum of a batch's losses and the counts of its labels."""

    @jax.jit
    def run(params: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
        x, targets = batch
        outputs = net.apply(params, x)
        losses = _widened(loss(outputs, targets))
        n = _size(x)
        if losses.shape[:1] != (n,):
            expected = f"one loss for each of {n} examples, (N, …)"
            raise bad_value("evaluate", "the result of loss", expected, f"shape {losses.shape}")
        return losses.reshape(n, math.prod(losses.shape[1:])).mean(1).sum(), _counts(outputs, targets)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _expect_optimizer(op: str, value: Any) -> None:
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise bad_type(op, "optimizer", "an optimizer from optax", repr(value))


def _size(x: Any) -> int:
    """Return the number of examples in a batch of inputs, one array or a tuple of them."""
    return jnp.shape(x[0] if isinstance(x, tuple) else x)[0]


def _widened(losses: Any) -> Array:
    """Return the losses in the dtype that they are summed in: float32, or wider if they are wider."""
    losses = jnp.asarray(losses)
    floating = jnp.issubdtype(losses.dtype, jnp.floating)
    return losses.astype(np.promote_types(losses.dtype, np.float32) if floating else np.float32)


def _counts(outputs: Any, targets: Any) -> dict[str, Array]:
    """Count valid and correctly predicted labels, if targets are integer labels."""
    labels = hasattr(targets, "dtype") and jnp.issubdtype(targets.dtype, jnp.integer)
    if not labels or targets.shape != jnp.shape(outputs)[:-1] or not jnp.ndim(outputs):
        return {}
    targets = targets.astype(np.promote_types(targets.dtype, np.int32))  # int8 cannot represent the number of classes
    valid = (targets >= 0) & (targets < outputs.shape[-1])
    predicted = jnp.argmax(outputs, -1).astype(np.int32)
    correct = valid & (predicted == jnp.where(valid, targets, 0).astype(np.int32))
    return {"correct": correct.sum(dtype=np.int32), "labels": valid.sum(dtype=np.int32)}
