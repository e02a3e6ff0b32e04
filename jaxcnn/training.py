"""Training: one jitted step, evaluation, and statistics of the training data.  Rooms: imports `jaxcnn.net`."""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.geometry import fail, static_int
from jaxcnn.layers import HIDING, UNKNOWN, BatchNorm, Layer, Params, reached_p
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


def calibrate(net: Serial, params: Params, batches: Iterable[Batch], *, keep_bytes: int = 2**32) -> Params:
    """Parameters with exact statistics of the training data added to every `BatchNorm` of the net.

    The result is for evaluation: ``net.apply(calibrated, x)`` normalizes by "mean" and "var", the mean and the variance
    (Σ (x − mean)²/n) of everything that reaches the layer when the net is evaluated on ``batches``. The statistics do
    not depend on how the data are cut into batches. The optimizer keeps the original parameters and never sees the
    statistics.

    The input of a batch norm depends on the statistics of the batch norms before it. The net is therefore traced once
    and cut into stages, one for each level of batch norms, wherever they are: in residual nets, parallel branches and
    subclasses of `Serial` with an `apply` of their own. A stage continues from the arrays that the earlier stages left
    for it, so that all stages together are one forward pass over the data.

    These arrays are held for every batch: the input of the batch norm and what else the rest of the net needs, such as
    the other term of a residual sum. At a stage where they exceed ``keep_bytes`` over all batches, none of them is
    held, and the next stage starts again from the data. The mean and Σ (x − mean)² of every batch are merged in float64
    on the host (Chan et al. 1979).

    Args:
        net: from `serial`.
        params: as training left them.
        batches: of the training data, ``(x, targets)``; a list, or another iterable that can be iterated repeatedly.
        keep_bytes: how many bytes of activations may be held.

    Raises: ValueError if there are no examples, and for a batch norm that cannot be calibrated exactly: one that the
        net never calls, that is inside `jax.lax.scan` and the like, whose own output reaches it again, or that a layer
        contains which is not a `Serial`, unless the parameters are named like the fields of that layer. TypeError for
        an iterable that can be iterated only once, such as a generator.

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
    if static_int("calibrate", "keep_bytes", keep_bytes, keep_bytes) < 0:
        fail("calibrate", f"keep_bytes must be an int >= 0, got {keep_bytes}")
    paths, hiding = _norms(net)
    if iter(batches) is batches and paths:
        raise TypeError(
            f"calibrate: batches expected a list, or what else can be gone through once for each of {len(paths)} "
            f"layers, got {type(batches).__name__}"
        )
    if not paths and not hiding:
        return params
    traced = params
    for path in paths:
        traced = _with(traced, path.split("/"), {part: jnp.zeros(UNKNOWN, np.float32) for part in ("mean", "var")})
    leaves, tree = jax.tree.flatten(traced)

    def stages(x: Any) -> _Stages:
        return _stages(net, paths, hiding, tree, tuple(map(jax.typeof, leaves)), jax.typeof(jnp.asarray(x)))

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
    """Where the batch norms are that calibrate can see, and the layers that may contain others."""
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
    """Count, mean and Σ (x − mean)² of two sets together."""
    n1, m1, s1 = one
    n2, m2, s2 = int(two[0]), *(np.asarray(a, np.float64) for a in two[1:])
    n, d = n1 + n2, m2 - m1
    return (n, m1 + d * (n2 / n), s1 + s2 + d * d * (n1 * n2 / n)) if n else one


@jax.jit
def _moments(x: Array) -> tuple[int, Array, Array]:
    """How many entries a channel has, their mean, and Σ (x − mean)²."""
    pixels = x.reshape(-1, x.shape[-1])
    pixels = pixels.astype(np.promote_types(pixels.dtype, np.float32))
    mean = pixels.sum(0) / max(len(pixels), 1)
    return len(pixels), mean, jnp.square(pixels - mean).sum(0)


def _with(params: Any, path: list[str], found: Params) -> Any:
    """The parameters with more entries at one place, dicts of the types they had; the original is left as it is."""
    part = found if not path else {path[0]: _with(params.get(path[0], {}), path[1:], found)}
    if type(params) is dict or not isinstance(params, Mapping):
        return {**params, **part}
    if isinstance(params, MutableMapping):  # such as OrderedDict and defaultdict
        changed = copy.copy(params)
        changed.update(part)
        return changed
    return type(params)({**params, **part})  # type: ignore[call-arg]


def _remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make`` with a cache for arguments that can be hashed; nets and losses of one's own may not be."""
    cached = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def remembered(*args: Any) -> Any:
        try:
            hash(args)
        except TypeError:
            return make(*args)
        return cached(*args)

    return remembered


# ---------------------------------------------------------------------------------------------------------------------
# A net cut at its batch norms


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operation of a traced net. Values are numbered; an operand that has no number is a constant."""

    run: Callable[..., Any]
    operands: tuple[Any, ...]
    results: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Reached:
    """A batch norm that x reaches; the results are its mean and var, in these dtypes."""

    path: str
    x: int
    results: tuple[int, int]
    dtypes: tuple[Any, Any]


class _Stages:
    """A net traced for one shape, cut so that each stage reads only statistics that earlier stages made known."""

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
        """Moments of what reaches batch norms at a stage, and the arrays that the stages after it read."""
        known = {path: value for path, value in known.items() if self._ready[path] <= stage}
        values = (values,) if stage == 0 else values
        moments, values = self._run[stage](leaves, known, values)
        return list(zip(self._met(stage), moments, strict=True)), values

    def ready(self, stage: int) -> list[str]:
        """The batch norms that everything has reached after a stage."""
        return [path for path, at in self._ready.items() if at == stage + 1]

    def _met(self, stage: int) -> list[str]:
        reached = (step for step in self._steps if isinstance(step, _Reached))
        return [step.path for step in reached if self._stage.get(step.x, 0) == stage]

    def _add(self, jaxpr: Any, constants: Any, operands: list[Any]) -> list[Any]:
        """Take up the operations of a jaxpr, those of functions that are called in it too; its results."""
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
                fail("calibrate", f"{', '.join(names)}: statistics must reach the BatchNorm as they are, outside of "
                     f"scan, cond, shard_map and the like; got {eqn.primitive.name}")
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
            fail("calibrate", "every BatchNorm must be called with its own parameters, got those of another layer")
        results = next(self._numbers), next(self._numbers)
        self._steps.append(_Reached(found[0][0], x, results, tuple(var.aval.dtype for var in eqn.outvars)))
        return list(results)

    def _schedule(self, most: int) -> tuple[dict[int, int], dict[str, int]]:
        """The stage at which each value can be computed; for each batch norm, the first that may read its statistics.

        A norm that is called several times is ready when all calls were reached, so that stages are found by repetition.
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
        """The values that are computed before a stage and read by it or the ones after it, up to the last."""
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

#: What only calls a function once.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any


def _like(kind: Any) -> Any:
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=getattr(kind, "sharding", None))


def _reaches(eqn: Any) -> bool:
    """Whether a batch norm is reached somewhere inside an operation."""
    return any(
        inner.primitive is reached_p or _reaches(inner)
        for jaxpr in jax.extend.core.jaxprs_in_params(eqn.params)
        for inner in jaxpr.eqns
    )


def _bound(jaxpr: Any, eqn: Any) -> Callable[..., Any]:
    """An operation of a jaxpr as a function of its operands, to a list of results."""
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
        raise TypeError(f"{op}: optimizer expected one from optax, got {value!r}")


def _are_labels(outputs: Array, targets: Any) -> bool:
    return jnp.issubdtype(targets.dtype, jnp.integer) and targets.shape == outputs.shape[:-1]


def _correct(outputs: Array, targets: Any) -> Array:
    return (jnp.argmax(outputs, -1) == targets).astype(jnp.float32)
