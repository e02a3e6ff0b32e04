"""One forward and backward pass that returns the loss, its gradients, and every layer's activation and δ by name."""

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
    """The result of a sweep.

    The names are those of the taps. For a net they are the full names of its layers, as in `Serial.walk`: those of
    inner nets ("residual1") as well as those of their layers ("residual1/conv2"). As in all JAX trees, they are in
    alphabetical order.
    """

    #: E, a scalar.
    error: Array
    #: ∂E/∂params, a tree like the parameters.
    gradients: Any
    #: δ = ∂E/∂(activation) by name; integer arrays have none.
    deltas: dict[str, Array]
    #: The activations by name.
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
    """Return a net's loss, its gradients, and every layer's activation and δ by name.

    δ = ∂E/∂(the layer's output). The gradients are those of `jax.grad`. No extra computation is done; intermediate
    values that `jax.grad` discards are kept. Under jit, return only the parts of the sweep that you need: XLA then
    drops the rest. Errors of the net and of ``error`` propagate.

    Args:
        net: from `serial`.
        params: parameters as made by its `init`.
        x: a batch ``(N, …)``.
        error: a function of the net's outputs that returns a scalar E, or an array whose mean is E. For a ``loss`` of
            `make_train_step`, this is ``lambda outputs: loss(outputs, targets)``. Each example's δ then has the factor
            1/N.
        key: from `jax.random.key`; if given, the net is in training mode (dropout is active).
        rules: replacement backward rules, as in `Serial.apply`; the sweep returns the δ that they produce.

    Returns:
        A `Sweep`.

    Raises:
        TypeError: if net or error has the wrong type, or error does not return a floating-point array.
        ValueError: as in `tap`.

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
    """Return a function like `jax.value_and_grad` of ``fun`` that also returns the value and δ at every `tap` in it.

    Args:
        fun: a function of parameters (any tree) and further arguments that returns a scalar. It is called twice, the
            first time to find the taps.

    Returns:
        A function of the same arguments that returns a `Sweep`, whose gradients are with respect to the first argument.
        It raises TypeError if ``fun`` does not return a floating-point scalar, and ValueError as in `tap`.

    Raises:
        TypeError: if fun is not callable.

    Tapping the input of a net gives the saliency map:

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
