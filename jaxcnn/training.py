"""Training: a jitted step, evaluation, and statistics of the training data."""

import copy
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.arguments import bad_type, bad_value, fail, one_key, static_int
from jaxcnn.layers import HIDING, UNKNOWN, BatchNorm, Layer, Params, reached_p
from jaxcnn.net import Rules, Serial, expect_loss, expect_net

#: Loss of each example: (outputs, targets) → (N, …).
Loss = Callable[[Any, Any], Array]
#: (net, loss, params, x, targets, *, key) → a tree like params, or one gradient per example.
Gradient = Callable[..., Any]
Batch = tuple[Any, Any]
Metrics = dict[str, Array]


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
            object.__setattr__(self, field, jax.tree.map(functools.partial(_own_buffer, seen), getattr(self, field)))

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
        cls, net: Serial, optimizer: optax.GradientTransformation, key: Array, input_shape: tuple[int, ...]
    ) -> "TrainState":
        """Return the state before the first step.

        Args:
            net: from `serial`.
            optimizer: from optax.
            key: from `jax.random.key`; initializes the parameters, and is split for training.
            input_shape: shape of one example, without the batch.

        Returns:
            The state, at step 0.

        Raises:
            TypeError: if net, optimizer or key has the wrong type.
            ValueError: if the net does not fit ``input_shape``.
        """
        expect_net("TrainState.create", net)
        _expect_optimizer("TrainState.create", optimizer)
        init_key, train_key = jax.random.split(one_key("TrainState.create", key))
        params = net.init(init_key, input_shape)
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), train_key)


def _own_buffer(seen: set[Any], leaf: Any) -> Any:
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

    Returns:
        The step, a function of a `TrainState` and a batch that returns the new state and the metrics. It raises the
        errors of the layers and the loss for shapes and dtypes that do not fit, and ValueError if the optimizer needs
        per-example gradients and does not receive them.

    Raises:
        TypeError: if net, loss, optimizer, gradient or microbatch has the wrong type.
        ValueError: if microbatch is less than 1, or if gradient is combined with rules or microbatch.

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
    7
    """
    expect_net("make_train_step", net)
    expect_loss("make_train_step", loss)
    _expect_optimizer("make_train_step", optimizer)
    if microbatch is not None and static_int("make_train_step", "microbatch", microbatch, microbatch) < 1:
        raise bad_value("make_train_step", "microbatch", "an int >= 1", microbatch)

    if gradient is not None:
        if not callable(gradient):
            raise bad_type("make_train_step", "gradient", "a function", repr(gradient))
        if rules is not None or microbatch is not None:
            fail("make_train_step", "gradient must not be given together with rules or microbatch")
    asked = _asked_for(optimizer)

    def error(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        """Return the mean loss, and the numbers of correct and of valid labels."""
        x, targets = batch
        outputs = net.apply(params, x, key=key, rules=rules)
        return _widened(loss(outputs, targets)).mean(), _counts(outputs, targets)

    def gradients(params: Params, batch: Batch, key: Array) -> tuple[tuple[Array, Params], dict[str, Array]]:
        """Return the mean loss with its gradient, and the label counts."""
        (value, counts), found = jax.value_and_grad(error, has_aux=True)(params, batch, key)
        return (value, found), counts

    def over_batch(f: Callable[..., Any], batch: Batch, key: Array) -> Any:
        if microbatch is None or microbatch >= batch[0].shape[0]:
            return f(batch, key)
        return _accumulated(f, batch, key, microbatch)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if gradient is None:
            (value, found), counts = over_batch(functools.partial(gradients, state.params), batch, key)
        else:
            value, counts = error(state.params, batch, key)
            found = gradient(net, loss, state.params, *batch, key=key)

        def value_fn(params: Params) -> Array:
            return over_batch(functools.partial(error, params), batch, key)[0]

        extra = {name: a for name, a in (("value", value), ("grad", found), ("value_fn", value_fn)) if name in asked}
        _check_gradient(optimizer, state, found, extra, jnp.shape(batch[0])[:1])
        updates, opt_state = optimizer.update(found, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value}
        if counts:
            metrics["accuracy"] = counts["right"].astype(np.float32) / counts["labels"].astype(np.float32)
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def _asked_for(optimizer: Any) -> frozenset[str]:
    """Return the names of the extra arguments that an optimizer takes."""
    names = {"value", "grad", "value_fn"}
    try:
        parameters = inspect.signature(optimizer.update).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return frozenset(names if everything else names & {p.name for p in parameters})


def _check_gradient(optimizer: Any, state: TrainState, found: Any, extra: Any, batch: tuple[int, ...]) -> None:
    """Raise ValueError unless the optimizer gets what it needs: one gradient, or one per example."""
    each = _aggregates(optimizer, state, extra)
    lead = batch if each else ()
    expected = [(path, (*lead, *jnp.shape(p))) for path, p in jax.tree.leaves_with_path(state.params)]
    if [(path, jnp.shape(a)) for path, a in jax.tree.leaves_with_path(found)] == expected:
        return
    if each:
        fail(
            "make_train_step",
            "gradient must return gradients of single examples, which this optimizer aggregates, such as "
            "gradient=jaxcnn.per_example_gradients; got one gradient for the batch",
        )
    got = jax.tree.map(jnp.shape, found)
    fail("make_train_step", f"gradient must return a tree like params, got shapes {got}")


def _aggregates(optimizer: Any, state: TrainState, extra: Any) -> bool:
    """Whether an optimizer takes per-example gradients, that is, whether it removes a leading dim."""

    def private(node: Any) -> bool:
        return isinstance(node, optax.contrib.DifferentiallyPrivateAggregateState)

    if any(map(private, jax.tree.leaves(state.opt_state, is_leaf=private))):
        return True
    params = jax.tree.leaves(state.params)
    each = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *jnp.shape(a)), jnp.result_type(a)), state.params)

    def update(found: Any) -> Any:
        given = {**extra, "grad": found} if "grad" in extra else extra
        return optimizer.update(found, state.opt_state, state.params, **given)[0]

    try:
        updates = jax.tree.leaves(jax.eval_shape(update, each))
    except Exception:  # any error that an optimizer raises for shapes it does not accept
        return False
    return len(updates) == len(params) and any(u.shape == jnp.shape(p) for u, p in zip(updates, params, strict=True))


def _accumulated(mean: Callable[[Batch, Array], Any], batch: Batch, key: Array, size: int) -> Any:
    """Return a mean and counts over a batch, ``size`` examples at a time, in float32 or wider.

    ``mean`` returns both for a part. The means are added with their shares as weights, and the counts are added.
    """
    examples = batch[0].shape[0]
    count = examples // size

    def wide(a: Any) -> Any:
        return np.promote_types(a.dtype, np.float32)

    def share(part: Batch, i: ArrayLike, of: int) -> Any:
        found, counts = mean(part, jax.random.fold_in(key, i))
        return jax.tree.map(lambda a: a.astype(wide(a)) * (of / examples), found), counts

    def add(total: Any, i: Array) -> tuple[Any, None]:
        part = jax.tree.map(lambda a: a[: count * size].reshape(size, count, *a.shape[1:])[:, i], batch)
        return jax.tree.map(jnp.add, total, share(part, i, size)), None

    def rest(a: Array) -> Array:
        return a[count * size :]

    shapes, counts = jax.eval_shape(mean, batch, key)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, wide(a)), shapes)
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), counts)
    total, _ = jax.lax.scan(add, (zeros, nothing), jnp.arange(count))
    if examples % size:
        total = jax.tree.map(jnp.add, total, share(jax.tree.map(rest, batch), count, examples % size))
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
        of_batch, counts = run(params, (x, targets))
        total += float(of_batch)
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + int(count)
        examples += np.shape(x)[0]
    if not examples:
        raise ValueError("evaluate: batches expected at least one example, got none")
    found = {"loss": total / examples}
    if totals:
        found["accuracy"] = totals["right"] / totals["labels"] if totals["labels"] else math.nan
    return found


def _remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``make`` with a cache for hashable arguments; custom nets and losses may not be hashable."""
    cached = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make, updated=())
    def remembered(*args: Any) -> Any:
        try:
            hash(args)
        except TypeError:
            return make(*args)
        return cached(*args)

    return remembered


@_remembered
def _evaluator(net: Serial, loss: Loss) -> Callable[[Params, Batch], tuple[Array, dict[str, Array]]]:
    """Return a function, jitted once per net and loss, for the sum of a batch's losses and the counts of its labels."""

    @jax.jit
    def run(params: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
        x, targets = batch
        outputs = net.apply(params, x)
        errors = _widened(loss(outputs, targets))
        if errors.shape[:1] != (len(x),):
            expected = f"an error for each of {len(x)} examples, (N, …)"
            fail("evaluate", f"loss must return {expected}, got shape {errors.shape}")
        return errors.reshape(len(errors), math.prod(errors.shape[1:])).mean(1).sum(), _counts(outputs, targets)

    return run


def calibrate(net: Serial, params: Params, batches: Iterable[Batch], *, keep_bytes: int = 2**32) -> Params:
    """Return parameters with exact statistics of the training data added to every `BatchNorm` of the net.

    The result is for evaluation: ``net.apply(calibrated, x)`` normalizes by "mean" and "var", the mean and the variance
    (Σ (x − mean)²/n) of all inputs that the layer receives when the net is evaluated on ``batches``. The statistics do
    not depend on how the data are split into batches. The optimizer keeps the original parameters and never sees the
    statistics.

    The input of a batch norm depends on the statistics of the batch norms before it. The net is therefore traced once
    and cut into stages, one per level of batch norms, wherever they are: in residual nets, parallel branches and
    subclasses of `Serial` with their own `apply`. A stage continues from the arrays that the earlier stages saved for
    it, so all stages together are one forward pass over the data.

    These arrays are held for every batch: the input of the batch norm and whatever else the rest of the net needs, such
    as the other term of a residual sum. If they exceed ``keep_bytes`` over all batches at a stage, none of them is
    held, and the next stage starts again from the data. The mean and Σ (x − mean)² of every batch are merged in float64
    on the host (Chan et al. 1979).

    Args:
        net: from `serial`.
        params: trained parameters.
        batches: ``(x, targets)`` pairs of training data; any iterable that can be iterated repeatedly, such as a list.
        keep_bytes: maximum number of bytes of activations to hold.

    Returns:
        A copy of ``params`` with "mean" and "var" added for every batch norm.

    Raises:
        ValueError: if ``batches`` has no examples, or if a batch norm cannot be calibrated exactly. This is the case if
            the net never calls it, if it is inside `jax.lax.scan` and the like, if its own output reaches it again, or
            if it is inside a layer that is not a `Serial`, unless the parameters are named like the fields of that
            layer.
        TypeError: if net has the wrong type, or batches can be iterated only once, such as a generator.

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
        raise bad_type("calibrate", "batches", "(x, targets) pairs", repr(batches))
    if static_int("calibrate", "keep_bytes", keep_bytes, keep_bytes) < 0:
        raise bad_value("calibrate", "keep_bytes", "an int >= 0", keep_bytes)
    paths, hiding = _norms(net)
    if iter(batches) is batches and paths:
        raise bad_type(
            "calibrate",
            "batches",
            f"a list, or what else can be gone through once for each of {len(paths)} layers",
            type(batches).__name__,
        )
    if not paths and not hiding:
        return params
    traced = params
    for path in paths:
        traced = _with(traced, path.split("/"), {part: jnp.zeros(UNKNOWN, np.float32) for part in ("mean", "var")})
    leaves, tree = jax.tree.flatten(traced)

    def stages(x: Any) -> _Stages:
        return _stages(net, paths, hiding, tree, tuple(map(jax.typeof, leaves)), jax.typeof(jnp.asarray(x)))

    if not paths:
        for x, _ in batches:
            stages(x)  # refuses batch norms that custom layers hide
        return params
    known: dict[str, tuple[Any, Any]] = {}
    held: list[tuple[_Stages, Any]] | None = None
    stage, last, dtypes = 0, 1, dict[str, Any]()
    totals: dict[str, tuple[int, Any, Any]] = {}
    while stage < last:
        source: Iterable[tuple[_Stages, Any, int]]
        if held is None:
            source = ((stages(x), jnp.asarray(x), 0) for x, _ in batches)
        else:
            source = ((cut, values, stage) for cut, values in held)
        kept: list[tuple[_Stages, Any]] | None = []
        size, empty = 0, True
        for cut, values, start in source:
            last, empty = cut.count, False
            for at in range(start, stage + 1):
                moments, values = cut.run(at, leaves, known, values)
            for path, of_batch in moments:
                dtypes[path] = of_batch[1].dtype
                totals[path] = _merged(totals.get(path, (0, np.zeros(()), np.zeros(()))), of_batch)
            size += sum(a.nbytes for a in values)
            kept = None if kept is None or size > keep_bytes else [*kept, (cut, values)]
        if empty:
            raise ValueError("calibrate: batches expected at least one example, got none")
        for path in cut.ready(stage):
            n, mean, squares = totals[path]
            if not n:
                raise ValueError("calibrate: batches expected at least one example, got none")
            known[path] = jnp.asarray(mean, dtypes[path]), jnp.asarray(squares / n, dtypes[path])
        held, stage = kept, stage + 1
    for path, (mean, var) in known.items():
        params = _with(params, path.split("/"), {"mean": mean, "var": var})
    return params


def _norms(net: Serial) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the paths of the batch norms that calibrate can see, and the layers that may contain others."""
    found: list[str] = []
    hiding: list[str] = []

    def look(path: str, layer: Layer) -> None:
        if isinstance(layer, BatchNorm):
            found.append(path)
            return
        own = type(layer).__module__ not in (Layer.__module__, Serial.__module__)
        if own:
            hiding.append(path or type(layer).__name__)
        inside = list(layer.layers) if isinstance(layer, Serial) else []
        if own:
            fields = ((f.name, getattr(layer, f.name)) for f in dataclasses.fields(layer))
            inside += [(name, value) for name, value in fields if isinstance(value, Layer)]
        for name, value in inside:
            look(f"{path}/{name}" if path else name, value)

    look("", net)
    return tuple(found), tuple(hiding)


def _merged(one: tuple[int, Any, Any], two: tuple[Any, Any, Any]) -> tuple[int, Any, Any]:
    """Merge count, mean and Σ (x − mean)² of two sets."""
    n1, m1, s1 = one
    n2, m2, s2 = int(two[0]), *(np.asarray(a, np.float64) for a in two[1:])
    n, d = n1 + n2, m2 - m1
    return (n, m1 + d * (n2 / n), s1 + s2 + d * d * (n1 * n2 / n)) if n else one


@jax.jit
def _moments(x: Array) -> tuple[int, Array, Array]:
    """Return the number of elements per channel, their mean, and Σ (x − mean)²."""
    pixels = x.reshape(-1, x.shape[-1])
    pixels = pixels.astype(np.promote_types(pixels.dtype, np.float32))
    mean = pixels.sum(0) / max(len(pixels), 1)
    return len(pixels), mean, jnp.square(pixels - mean[None]).sum(0)


def _with(params: Any, path: list[str], found: Params) -> Any:
    """Return a copy of ``params`` with the entries of ``found`` added at ``path``; mappings keep their types."""
    part = found if not path else {path[0]: _with(params.get(path[0], {}), path[1:], found)}
    if type(params) is dict or not isinstance(params, Mapping):
        return {**params, **part}
    if isinstance(params, MutableMapping):  # such as OrderedDict and defaultdict
        changed = copy.copy(params)
        changed.update(part)
        return changed
    return type(params)({**params, **part})  # type: ignore[call-arg]


# ---------------------------------------------------------------------------------------------------------------------
# A net cut at its batch norms


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operation of a traced net. Values are numbered; an operand without a number is a constant."""

    run: Callable[..., Any]
    operands: tuple[Any, ...]
    results: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Reached:
    """A batch norm whose input is value x; the results are its mean and var, in these dtypes."""

    path: str
    x: int
    results: tuple[int, int]
    dtypes: tuple[Any, Any]


class _Stages:
    """A net traced for one shape, cut so that each stage reads only statistics from earlier stages."""

    def __init__(self, net: Serial, paths: Sequence[str], hiding: tuple[str, ...], tree: Any, leaves: Any, x: Any):
        def apply(leaves: Any, x: Array) -> Array:
            return net.apply(jax.tree.unflatten(tree, leaves), x)

        with HIDING(hiding):
            traced = jax.make_jaxpr(apply)(list(map(_like, leaves)), _like(x))
        self._leaves = len(leaves)
        self._constants: dict[int, Any] = {}
        self._steps: list[_Step | _Reached] = []
        self._numbers = itertools.count(self._leaves + 1)
        #: Numbers of statistics that are not known yet: (path, part).
        self._unknown: dict[int, tuple[str, str]] = {}
        named = jax.tree.unflatten(tree, range(self._leaves))
        for path in paths:
            own = functools.reduce(lambda at, name: at[name], path.split("/"), named)
            self._unknown |= {own[part]: (path, part) for part in ("mean", "var")}
        self._add(traced.jaxpr, traced.consts, list(range(self._leaves + 1)))
        missing = set(paths) - {step.path for step in self._steps if isinstance(step, _Reached)}
        if missing:
            fail("calibrate", f"{', '.join(sorted(missing))}: the net must call every BatchNorm with its parameters")
        self._stage, self._ready = self._schedule(len(paths))
        self.count = max(self._ready.values(), default=0)
        self._run = [jax.jit(functools.partial(self._compute, stage)) for stage in range(self.count)]

    def run(self, stage: int, leaves: Any, known: Mapping[str, Any], values: Any) -> tuple[Any, tuple[Array, ...]]:
        """Return the moments of the batch norm inputs at a stage, and the arrays that later stages read."""
        known = {path: value for path, value in known.items() if self._ready[path] <= stage}
        values = (values,) if stage == 0 else values
        moments, values = self._run[stage](leaves, known, values)
        return list(zip(self._met(stage), moments, strict=True)), values

    def ready(self, stage: int) -> list[str]:
        """Return the batch norms whose inputs are complete after a stage."""
        return [path for path, at in self._ready.items() if at == stage + 1]

    def _met(self, stage: int) -> list[str]:
        reached = (step for step in self._steps if isinstance(step, _Reached))
        return [step.path for step in reached if self._stage.get(step.x, 0) == stage]

    def _add(self, jaxpr: Any, constants: Any, operands: list[Any]) -> list[Any]:
        """Add the operations of a jaxpr, including those of functions that it calls; return its results."""
        numbers: dict[Any, Any] = {}
        for var, value in zip(jaxpr.constvars, constants, strict=True):
            numbers[var] = next(self._numbers)
            self._constants[numbers[var]] = value
        numbers.update(zip(jaxpr.invars, operands, strict=True))

        def read(var: Any) -> Any:
            return _Constant(var.val) if isinstance(var, jax.extend.core.Literal) else numbers[var]

        for eqn in jaxpr.eqns:
            of_eqn = [read(var) for var in eqn.invars]
            unknown = [n for n in of_eqn if not isinstance(n, _Constant) and n in self._unknown]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive is reached_p:
                results = self._reach(eqn, of_eqn)
            elif unknown and eqn.primitive.name == "convert_element_type":
                results = [next(self._numbers)]
                self._unknown[results[0]] = self._unknown[unknown[0]]
            elif (unknown or _reaches(eqn)) and eqn.primitive.name in _CALLS:
                closed = isinstance(inner, jax.extend.core.ClosedJaxpr)
                results = self._add(inner.jaxpr if closed else inner, inner.consts if closed else (), of_eqn)
            elif unknown or _reaches(eqn):
                names = sorted({self._unknown[n][0] for n in unknown}) or ["a BatchNorm"]
                fail(
                    "calibrate",
                    f"{', '.join(names)}: statistics must reach the BatchNorm as they are, outside of "
                    f"scan, cond, shard_map and the like; got {eqn.primitive.name}",
                )
            else:
                results = [next(self._numbers) for _ in eqn.outvars]
                dropped = [isinstance(var, jax.extend.core.DropVar) for var in eqn.outvars]
                read_by_it = [read(var) for var in eqn.invars if not isinstance(var, jax.extend.core.Literal)]
                kept = [n for n, drop in zip(results, dropped, strict=True) if not drop]
                self._steps.append(_Step(_bound(jaxpr, eqn), tuple(read_by_it), tuple(kept)))
            numbers.update(zip(eqn.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _reach(self, eqn: Any, operands: list[Any]) -> list[int]:
        x, *unknown = operands
        found = [self._unknown.get(n, ("", "")) for n in unknown]
        if [part for _, part in found] != ["mean", "var"] or found[0][0] != found[1][0]:
            raise bad_value("calibrate", "every BatchNorm", "called with its own parameters", "those of another layer")
        results = next(self._numbers), next(self._numbers)
        self._steps.append(_Reached(found[0][0], x, results, tuple(var.aval.dtype for var in eqn.outvars)))
        return list(results)

    def _schedule(self, most: int) -> tuple[dict[int, int], dict[str, int]]:
        """Return the stage of each value, and for each batch norm the first stage that may read its statistics.

        A norm that is called several times is ready once all calls have been reached. Stages are found by iteration.
        """
        ready: dict[str, int] = {}
        while True:
            stage: dict[int, int] = {}
            met: dict[str, int] = {}
            for step in self._steps:
                if isinstance(step, _Reached):
                    at = stage.get(step.x, 0)
                    met[step.path] = max(met.get(step.path, 0), at + 1)
                    at = max(at + 1, ready.get(step.path, 0))
                else:
                    at = max((stage.get(n, 0) for n in step.operands if not isinstance(n, _Constant)), default=0)
                stage.update(dict.fromkeys(step.results, at))
            if max(met.values(), default=0) > most:
                names = ", ".join(path for path, at in met.items() if at > most)
                fail("calibrate", f"{names}: the output of a BatchNorm must not reach the same BatchNorm again")
            if met == ready:
                return stage, ready
            ready = met

    def _compute(self, stage: int, leaves: Any, known: Any, values: Any) -> Any:
        held = (self._leaves,) if stage == 0 else self._held(stage)
        of = {**self._constants, **dict(enumerate(leaves)), **dict(zip(held, values, strict=True))}
        moments = []

        def read(n: Any) -> Any:
            return n.value if isinstance(n, _Constant) else of[n]

        for step in self._steps:
            if isinstance(step, _Reached):
                if self._stage.get(step.x, 0) == stage:
                    moments.append(_moments(read(step.x)))
                if step.path in known:
                    statistics = zip(step.results, known[step.path], step.dtypes, strict=True)
                    of.update({n: a.astype(dtype) for n, a, dtype in statistics})
            elif self._stage[step.results[0]] == stage if step.results else False:
                of.update(zip(step.results, step.run(*map(read, step.operands)), strict=True))
        return moments, tuple(of[n] for n in self._held(stage + 1))

    def _held(self, stage: int) -> tuple[int, ...]:
        """Return the values that are computed before a stage and read by it or by later ones."""
        found: dict[int, None] = {}
        statistics = {n for step in self._steps if isinstance(step, _Reached) for n in step.results}
        for step in self._steps:
            if isinstance(step, _Reached):
                reads, late = (step.x,), stage <= self._stage.get(step.x, 0) < self.count
            else:
                reads, late = step.operands, any(stage <= self._stage[n] < self.count for n in step.results)
            for n in reads if late else ():
                if isinstance(n, _Constant) or n < self._leaves or n in self._constants or n in statistics:
                    continue
                if self._stage.get(n, 0) < stage:
                    found[n] = None
        return tuple(found)


_stages = _remembered(_Stages)

#: Primitives that only call a function once.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any


def _like(kind: Any) -> Any:
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=getattr(kind, "sharding", None))


def _reaches(eqn: Any) -> bool:
    """Whether an operation contains a batch norm."""
    return any(
        inner.primitive is reached_p or _reaches(inner)
        for jaxpr in jax.extend.core.jaxprs_in_params(eqn.params)
        for inner in jaxpr.eqns
    )


def _bound(jaxpr: Any, eqn: Any) -> Callable[..., Any]:
    """Return an operation of a jaxpr as a function from its operands to a list of results."""
    operands = [var for var in eqn.invars if not isinstance(var, jax.extend.core.Literal)]
    distinct = list(dict.fromkeys(operands))
    results = [var for var in eqn.outvars if not isinstance(var, jax.extend.core.DropVar)]
    info = jaxpr.debug_info.with_unknown_names()
    alone = jax.extend.core.Jaxpr([], distinct, results, [eqn], eqn.effects, info)
    run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(alone, []))
    return lambda *values: run(*(values[operands.index(var)] for var in distinct))


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _expect_optimizer(op: str, value: Any) -> None:
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise bad_type(op, "optimizer", "one from optax", repr(value))


def _widened(errors: Any) -> Array:
    """Return the losses in the dtype that they are summed in: float32, or wider if they are wider."""
    errors = jnp.asarray(errors)
    floating = jnp.issubdtype(errors.dtype, jnp.floating)
    return errors.astype(np.promote_types(errors.dtype, np.float32) if floating else np.float32)


def _counts(outputs: Any, targets: Any) -> dict[str, Array]:
    """Count valid and correctly predicted labels, if targets are integer labels."""
    labels = hasattr(targets, "dtype") and jnp.issubdtype(targets.dtype, jnp.integer)
    if not labels or targets.shape != jnp.shape(outputs)[:-1] or not jnp.ndim(outputs):
        return {}
    targets = targets.astype(np.promote_types(targets.dtype, np.int32))  # int8 cannot represent the number of classes
    there = (targets >= 0) & (targets < outputs.shape[-1])
    predicted = jnp.argmax(outputs, -1).astype(np.int32)
    right = there & (predicted == jnp.where(there, targets, 0).astype(np.int32))
    return {"right": right.sum(dtype=np.int32), "labels": there.sum(dtype=np.int32)}
