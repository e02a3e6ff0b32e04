"""Statistics of the training data for batch norms in evaluation."""

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.arguments import bad_type, fail, static_int
from jaxcnn.kernels.moments import Moments, merge
from jaxcnn.layers import Params
from jaxcnn.net import Serial, batch_norms, expect_net
from jaxcnn.stages import Stages, stages_of
from jaxcnn.statistics import UNKNOWN


def calibrate(net: Serial, params: Params, batches: Iterable[tuple[Any, Any]], *, keep_bytes: int = 2**32) -> Params:
    """Return parameters with exact statistics of the training data added to every `BatchNorm` of the net.

    The result is for evaluation: ``net.apply(calibrated, x)`` normalizes by "mean" and "var", the mean and the variance
    (Σ (x − mean)²/n) of all inputs that the layer receives when the net is evaluated on ``batches``. The statistics do
    not depend on how the data are split into batches. The optimizer keeps the original parameters and never sees the
    statistics.

    The input of a batch norm depends on the statistics of the batch norms before it. The net is therefore traced once
    and cut into stages, one per level of batch norms, wherever they are: in residual nets, branches and subclasses of
    `Serial` with their own `apply`. A stage continues from the arrays that the earlier stages saved for it, so all
    stages together are one forward pass over the data.

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
    static_int("calibrate", "keep_bytes", keep_bytes, least=0)
    norms, opaque = batch_norms(net)
    if iter(batches) is batches and norms:
        expected = f"an iterable that can be iterated once per BatchNorm ({len(norms)}), such as a list"
        raise bad_type("calibrate", "batches", expected, type(batches).__name__)
    if not norms and not opaque:
        return params
    traced = params
    for path in norms:
        unknown = {part: jnp.zeros(UNKNOWN, np.float32) for part in ("mean", "var")}
        traced = _with_entries(traced, path.split("/"), unknown)
    leaves, tree = jax.tree.flatten(traced)

    def stages(x: Any) -> Stages:
        return stages_of(net, norms, opaque, tree, tuple(map(jax.typeof, leaves)), jax.tree.map(jax.typeof, x))

    if not norms:
        for x, _ in batches:
            stages(_arrays(x))  # raises an error for a batch norm inside a custom layer
        return params
    for path, (mean, var) in _statistics(stages, leaves, batches, keep_bytes).items():
        params = _with_entries(params, path.split("/"), {"mean": mean, "var": var})
    return params


def _statistics(stages: Any, leaves: Any, batches: Iterable[tuple[Any, Any]], keep_bytes: int) -> dict[str, Any]:
    """Return mean and var of every batch norm, from one pass over the batches per stage."""
    known: dict[str, tuple[Any, Any]] = {}
    totals: dict[str, Moments] = {}
    dtypes: dict[str, Any] = {}
    held: list[tuple[Stages, Any]] | None = None
    stage, count = 0, 1
    while stage < count:
        source: Iterable[tuple[Stages, Any, int]]
        if held is None:
            source = ((stages(x), x, 0) for x in (_arrays(x) for x, _ in batches))
        else:
            source = ((of_shape, values, stage) for of_shape, values in held)
        to_hold: list[tuple[Stages, Any]] | None = []
        size, empty = 0, True
        for of_shape, values, first in source:
            count, empty = of_shape.count, False
            for at in range(first, stage + 1):
                moments, values = of_shape.run(at, leaves, known, values)
            for path, of_batch in moments:
                dtypes[path] = of_batch.m.dtype
                totals[path] = merge(totals.get(path, _NOTHING), _on_host(of_batch))
            size += sum(a.nbytes for a in values)
            to_hold = None if to_hold is None or size > keep_bytes else [*to_hold, (of_shape, values)]
        ready = [] if empty else of_shape.ready(stage)
        if empty or not all(totals[path].n for path in ready):
            fail("calibrate", "batches must have at least one example, got none")
        for path in ready:
            total = totals[path]
            known[path] = jnp.asarray(total.m, dtypes[path]), jnp.asarray(total.s / total.n, dtypes[path])
        held, stage = to_hold, stage + 1
    return known


def _arrays(x: Any) -> Any:
    """Return the input of a net as an array, or as a tuple of arrays."""
    return tuple(map(jnp.asarray, x)) if isinstance(x, tuple) else jnp.asarray(x)


_NOTHING: Any = Moments(np.zeros(()), np.zeros(()), 0)  # type: ignore[arg-type]


def _on_host(moments: Moments) -> Any:
    """Return moments in float64, as NumPy arrays."""
    return Moments(np.asarray(moments.m, np.float64), np.asarray(moments.s, np.float64), int(moments.n))  # type: ignore[arg-type]


def _with_entries(params: Any, path: list[str], entries: Params) -> Any:
    """Return a copy of ``params`` with ``entries`` added at ``path``; mappings keep their types."""
    part = entries if not path else {path[0]: _with_entries(params.get(path[0], {}), path[1:], entries)}
    if type(params) is dict or not isinstance(params, Mapping):
        return {**params, **part}
    if isinstance(params, MutableMapping):  # such as OrderedDict and defaultdict
        changed = copy.copy(params)
        changed.update(part)
        return changed
    return type(params)({**params, **part})  # type: ignore[call-arg]
