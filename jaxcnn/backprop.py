"""One forward and backward pass that returns the loss, its gradients, and every layer's activation and δ by name."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.arguments import bad_type, expect_function, expect_scalar, static_bool
from jaxcnn.explicit import explicit
from jaxcnn.net import Loss, Model, Serial, expect_loss, expect_model
from jaxcnn.taps import Collector, probe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackpropResult:
    """The result of `backprop`.

    The names are those of the taps. For a net they are the full names of its layers, as in `Serial.walk`: those of
    inner nets ("residual1") as well as those of their layers ("residual1/conv2"). As in all JAX trees, they are in
    alphabetical order.
    """

    #: E, a scalar.
    loss: Array
    #: ∂E/∂params, a tree like the parameters.
    gradients: Any
    #: δ = ∂E/∂(activation) by name; integer arrays have none.
    deltas: dict[str, Array]
    #: The activations by name.
    activations: dict[str, Array]


def backprop(
    net: Model,
    loss: Loss,
    params: Any,
    x: ArrayLike,
    targets: Any,
    *,
    key: Array | None = None,
    rules: Any = None,
) -> BackpropResult:
    """Return a net's loss, its gradients, and every layer's activation and δ by name.

    For a function, such as ``apply`` of a Flax module, these are the operations and names of `jaxcnn.explicit`.

    δ = ∂E/∂(the layer's output). The gradients are those of `jax.grad`. No extra computation is done; intermediate
    values that `jax.grad` discards are kept. Under jit, return only the parts of the result that you need: XLA then
    drops the rest. Errors of the net and of ``loss`` propagate.

    Args:
        net: a net from `serial`, or any function of ``params`` and ``x``.
        loss: as in `make_train_step`, a function of outputs and targets that returns an array, whose mean is E. Each
            example's δ has the factor 1/N. A scalar E is accepted as well.
        params: its parameters.
        x: a batch ``(N, …)``.
        targets: passed to ``loss``.
        key: from `jax.random.key`; if given, the net is in training mode (dropout is active). Functions take none.
        rules: replacement backward rules, as in `Serial.apply` for a net and `jaxcnn.explicit` for a function; the
            result has the δ that they produce.

    Returns:
        A `BackpropResult`.

    Raises:
        TypeError: if net or loss has the wrong type, or loss does not return a floating-point array.
        ValueError: as in `tap`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Conv(4, 3), jaxcnn.Relu(), jaxcnn.Flatten(), jaxcnn.Dense(2))
    >>> params = net.init(jax.random.key(0), (5, 5, 1))
    >>> x, target = jnp.ones((8, 5, 5, 1)), jnp.zeros((8, 2))
    >>> result = jaxcnn.backprop(net, jaxcnn.squared_error, params, x, target)
    >>> sorted(result.deltas)
    ['conv1', 'dense1', 'flatten1', 'relu1']
    >>> result.deltas["relu1"].shape, result.gradients["conv1"]["weight"].shape
    ((8, 3, 3, 4), (3, 3, 1, 4))
    """
    expect_model("backprop", net)
    expect_loss("backprop", loss)
    if isinstance(net, Serial):
        run: Callable[[Any, Any], Any] = functools.partial(net.apply, key=key, rules=rules)
    elif key is None:
        run = explicit(net, rules=rules)
    else:
        raise bad_type("backprop", "key", "None for a function, which reads keys from params or x", repr(key))

    def mean_loss(params: Any) -> Array:
        losses = jnp.asarray(loss(run(params, x), targets))
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise bad_type("backprop", "the result of loss", "of a floating dtype", losses.dtype)
        return losses.mean()

    return value_grad_and_deltas(mean_loss)(params)


@overload
def value_grad_and_deltas(
    fun: Callable[..., Any], *, has_aux: Literal[False] = False
) -> Callable[..., BackpropResult]: ...
@overload
def value_grad_and_deltas(
    fun: Callable[..., Any], *, has_aux: Literal[True]
) -> Callable[..., tuple[BackpropResult, Any]]: ...
def value_grad_and_deltas(fun: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function like `jax.value_and_grad` of ``fun`` that also returns the value and δ at every `tap` in it.

    Args:
        fun: a function of parameters (any tree) and further arguments that returns a scalar. It is called twice, the
            first time to find the taps.
        has_aux: whether ``fun`` returns a pair of the scalar and further results, as in `jax.value_and_grad`.

    Returns:
        A function of the same arguments that returns a `BackpropResult`, whose gradients are with respect to the first
        argument; with ``has_aux`` a pair of it and the further results. It raises TypeError if ``fun`` does not return
        a floating-point scalar, and ValueError as in `tap`.

    Raises:
        TypeError: if fun is not callable or has_aux is not a bool.

    Tapping the input of a net gives the saliency map:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Conv(4, 3), jaxcnn.Relu(), jaxcnn.Flatten(), jaxcnn.Dense(2))
    >>> params = net.init(jax.random.key(0), (5, 5, 1))
    >>> def loss(params, x):
    ...     return net.apply(params, jaxcnn.tap("image", x)).sum()
    >>> result = jaxcnn.value_grad_and_deltas(loss)(params, jnp.ones((8, 5, 5, 1)))
    >>> result.deltas["image"].shape
    (8, 5, 5, 1)
    """
    expect_function("value_grad_and_deltas", "fun", fun)
    static_bool("value_grad_and_deltas", "has_aux", has_aux)

    def with_deltas(params: Any, *args: Any, **kwargs: Any) -> Any:
        def run(params: Any, probes: dict[str, Array]) -> tuple[Any, Any, Collector]:
            collector = Collector(probes)
            with collector.collecting():
                result = fun(params, *args, **kwargs)
            value, aux = result if has_aux else (result, None)
            return value, aux, collector

        types: dict[str, Any] = {}

        def look() -> None:
            value, _, collector = run(params, {})
            expect_scalar("value_grad_and_deltas", "the result of fun", value)
            types.update(collector.types())

        jax.eval_shape(look)

        def probed(params: Any, probes: dict[str, Array]) -> tuple[Any, Any]:
            value, aux, collector = run(params, probes)
            return value, (aux, collector.values)

        probes = {name: probe(kind) for name, kind in types.items()}
        run_back = jax.value_and_grad(probed, argnums=(0, 1), has_aux=True)
        (value, (aux, activations)), (gradients, deltas) = run_back(params, probes)
        result = BackpropResult(value, gradients, deltas, activations)
        return (result, aux) if has_aux else result

    return with_deltas
