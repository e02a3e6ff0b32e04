"""The δ sweep: the error, its gradients and, by name, every layer's activation and δ, in one forward and one backward.

Rooms: imports `jaxcnn.net` and `jaxcnn.taps`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.layers import Params
from jaxcnn.net import Rules, Serial, expect_net
from jaxcnn.taps import Collector, probe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep finds.

    The names are those of the taps: for a net the full names of its layers, as `Serial.walk` has them, those of nets
    inside nets ("residual1") beside those of their layers ("residual1/conv2").  As in all trees of JAX they come in
    alphabetical order.
    """

    #: E, a scalar.
    error: Array
    #: ∂E/∂params, a tree like the parameters.
    gradients: Any
    #: By name, δ = ∂E/∂(what came out there); an integer array has none.
    deltas: dict[str, Array]
    #: By name, what came out there.
    activations: dict[str, Array]


def backprop(
    net: Serial,
    params: Params,
    x: ArrayLike,
    error: Callable[[Array], ArrayLike],
    *,
    key: Array | None = None,
    rules: Rules | None = None,
) -> Sweep:
    """The error of a net, its gradients, and every layer's activation and δ by name.

    δ = ∂E/∂(the layer's output).  The gradients are those of `jax.grad`; nothing is computed that it would not compute,
    except that what it throws away is kept.  Under jit, return only what you need of the sweep: the rest is not made.

    Args:
        net: from `serial`.
        params: as its `init` made them.
        x: a batch ``(N, …)``.
        error: of the net's outputs; a scalar, or an array of which E is the mean, as `make_train_step` has it: for its
            ``loss`` that is ``lambda outputs: loss(outputs, targets)``.  Each example's δ then has the factor 1/N.
        key: from `jax.random.key`; its presence means training (dropout is on).
        rules: other backward halves, as in `Serial.apply`: the sweep shows the δ that they send.

    Raises: what the net and the error raise; TypeError for what is no net or no function, and if ``error`` returns no
    floating array; ValueError as in `tap`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Conv(4, 3), jaxcnn.Relu(), jaxcnn.Flatten(), jaxcnn.Dense(2))
    >>> params = net.init(jax.random.key(0), (5, 5, 1))
    >>> x, target = jnp.ones((8, 5, 5, 1)), jnp.zeros((8, 2))
    >>> sweep = jaxcnn.backprop(net, params, x, lambda outputs: jaxcnn.squared_error(outputs, target))
    >>> sorted(sweep.deltas)
    ['conv1', 'dense1', 'flatten1', 'relu1']
    >>> sweep.deltas["relu1"].shape, sweep.gradients["conv1"]["w"].shape
    ((8, 3, 3, 4), (3, 3, 1, 4))
    """
    expect_net("backprop", net)
    if not callable(error):
        raise TypeError(f"backprop: error expected a function of the net's outputs, got {error!r}")

    def mean_error(params: Params) -> Array:
        found = jnp.asarray(error(net.apply(params, x, key=key, rules=rules)))
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise TypeError(f"backprop: error expected to return a floating array, got {found.dtype}")
        return found.mean()

    return value_grad_and_deltas(mean_error)(params)


def value_grad_and_deltas(fun: Callable[..., Any]) -> Callable[..., Sweep]:
    """Like `jax.value_and_grad`, and with value and δ at every `tap` that ``fun`` passes.

    Args:
        fun: of parameters (any tree) and further arguments, to a scalar.  It is called twice: once to find the taps.

    Returns: a function of the same arguments, to a `Sweep` whose gradients are with respect to the first.

    Raises: when it is called: TypeError if ``fun`` does not return a floating scalar, ValueError as in `tap`.

    A net and its input, δ of which is the saliency map:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Conv(4, 3), jaxcnn.Relu(), jaxcnn.Flatten(), jaxcnn.Dense(2))
    >>> params = net.init(jax.random.key(0), (5, 5, 1))
    >>> def error(params, x):
    ...     return net.apply(params, jaxcnn.tap("image", x)).sum()
    >>> sweep = jaxcnn.value_grad_and_deltas(error)(params, jnp.ones((8, 5, 5, 1)))
    >>> sweep.deltas["image"].shape
    (8, 5, 5, 1)
    """
    if not callable(fun):
        raise TypeError(f"value_grad_and_deltas: fun expected a function, got {fun!r}")

    def swept(params: Any, *args: Any, **kwargs: Any) -> Sweep:
        def run(params: Any, probes: dict[str, Array]) -> tuple[Any, Collector]:
            collector = Collector(probes)
            with collector.collecting():
                return fun(params, *args, **kwargs), collector

        types: dict[str, Any] = {}

        def look() -> None:
            value, collector = run(params, {})
            _check_scalar(value)
            types.update(collector.types())

        jax.eval_shape(look)

        def probed(params: Any, probes: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
            value, collector = run(params, probes)
            return value, collector.found

        probes = {name: probe(kind) for name, kind in types.items()}
        run_back = jax.value_and_grad(probed, argnums=(0, 1), has_aux=True)
        (value, activations), (gradients, deltas) = run_back(params, probes)
        return Sweep(value, gradients, deltas, activations)

    return swept


def _check_scalar(value: Any) -> None:
    expected = "value_grad_and_deltas: fun expected to return a floating scalar"
    if not isinstance(value, Array | float | np.ndarray | np.generic):
        raise TypeError(f"{expected}, got {type(value).__name__}")
    kind = jax.typeof(value)
    if kind.shape or not jnp.issubdtype(kind.dtype, jnp.floating):
        raise TypeError(f"{expected}, got {kind.dtype}{list(kind.shape)}")
