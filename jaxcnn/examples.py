"""Gradients of each example alone, from the (a, δ) of one sweep: a comes in at a layer, δ stands at what comes out.

    conv     ∂E_n/∂w = a_n ⋆ δ_n        ∂E_n/∂b = Σ δ_n
    dense    ∂E_n/∂w = a_n ⊗ δ_n        ∂E_n/∂b = δ_n

The batch's own rule is the same products, summed over n.  Nothing here is vectorised over copies of a patch, which is
what makes `jax.vmap` of `jax.grad` slow: it turns a convolution into one with a group for each example.

Rooms: imports `jaxcnn.backprop`, and for the products `jaxcnn.kernels`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcnn import layers
from jaxcnn.backprop import Sweep, value_grad_and_deltas
from jaxcnn.geometry import Correlation
from jaxcnn.kernels import examples as kernels
from jaxcnn.layers import Layer, Params
from jaxcnn.net import Residual, Serial, expect_loss, expect_net
from jaxcnn.ops import convolution, hidden, pooling
from jaxcnn.ops.mesh import automatic_inside, on_any_mesh


class Loss(Protocol):
    """Error of each example: (outputs, targets) → (N, …); what comes after N is averaged."""

    def __call__(self, outputs: Any, targets: Any, /) -> Array:
        """``(N, …)``."""


@automatic_inside()
def per_example_gradients(
    net: Serial, params: Params, x: ArrayLike, y: Any, loss: Loss, *, key: Array | None = None
) -> Params:
    """The gradient of each example's error: a tree like ``params``, every array with a leading N.

    As `jax.vmap` of `jax.grad` gives, by one sweep over the batch and one matrix product a layer and example.

    Args:
        net: from `serial`; its layers must treat examples apart (batch norm does with statistics from `calibrate`).
        params: as its `init` made them.
        x: a batch ``(N, …)``.
        y: targets ``(N, …)``.
        loss: as in `make_train_step`, an error for each example.
        key: from `jax.random.key`; its presence means training (dropout is on, one mask for each example).

    Returns: arrays ``(N, …)``; what `optax.contrib.differentially_private_aggregate` takes for updates.

    Raises: ValueError for a loss that is not one error for each example, for batch norm that mixes examples, and for
        layers with parameters that are not of this package while there is a key; what net and loss raise.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.HiddenLayer(4, 3), jaxcnn.Flatten(), jaxcnn.Dense(2))
    >>> params = net.init(jax.random.key(0), (6, 6, 1))
    >>> x, labels = jnp.ones((8, 6, 6, 1)), jnp.zeros(8, int)
    >>> loss = jaxcnn.softmax_cross_entropy_with_integer_labels
    >>> jaxcnn.per_example_gradients(net, params, x, labels, loss)["hidden_layer1"]["w"].shape
    (8, 3, 3, 1, 4)
    """
    met = _meet("per_example_gradients", net, params, x, y, loss, key)
    found = {f"{name}/{part}": value for name, m in met.items() for part, value in m.each().items()}
    return _like(params, found, jnp.shape(x)[:1])


@automatic_inside()
def per_example_norms(
    net: Serial, params: Params, x: ArrayLike, y: Any, loss: Loss, *, key: Array | None = None
) -> Array:
    """``(N,)``: the norm of each example's gradient, over all parameters.

    A layer's gradients are not made where their norms can be had for less: ‖∂E_n/∂w‖² = Σ_{o, o'} ⟨P[o], P[o']⟩·
    ⟨δ[o], δ[o']⟩ with P the patches at places o; for a dense layer ‖a_n‖²·‖δ_n‖².  Which, the static shapes decide.

    Args: as in `per_example_gradients`.  Raises: as `per_example_gradients`.

    Source: Goodfellow 2015 for dense layers; Rochette et al. 2019 and Bu et al. 2022 for convolutions.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Dense(1))
    >>> params = {"dense1": {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)}}
    >>> x, target = jnp.array([[3.0, 0.0], [0.0, 0.0]]), jnp.ones((2, 1))
    >>> jaxcnn.per_example_norms(net, params, x, target, jaxcnn.squared_error) ** 2  # (2·3)² + 2², 2²
    Array([40.,  4.], dtype=float32)
    """
    met = _meet("per_example_norms", net, params, x, y, loss, key)
    return _norms(met, jnp.asarray(x))


@automatic_inside(like="params")
def clipped_gradient(
    net: Serial, params: Params, x: ArrayLike, y: Any, loss: Loss, max_norm: ArrayLike, *, key: Array | None = None
) -> Params:
    """The sum of all examples' gradients, each clipped: ``Σ_n g_n · min(1, max_norm / ‖g_n‖)``.

    For private training, without g_n: what is clipped is δ_n, of which g_n is a linear function, and the batch's own
    products sum up.  Costs an ordinary gradient and `per_example_norms`.  Divide by N for a mean; add noise before.

    Args:
        net: as in `per_example_gradients`, and so for ``params``, ``x``, ``y``, ``loss`` and ``key``.
        params: …
        x: …
        y: …
        loss: …
        max_norm: above 0; over all parameters together.
        key: …

    Returns: a tree like ``params``.

    Raises: as `per_example_gradients`; ValueError for a max_norm that is not above 0.

    Source: Abadi et al. 2016, alg. 1; Bu et al. 2023 ("book-keeping") for the way.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> net = jaxcnn.serial(jaxcnn.Dense(1, bias=False))
    >>> params = {"dense1": {"w": jnp.zeros((1, 1))}}
    >>> x, target = jnp.array([[0.1], [3.0]]), jnp.ones((2, 1))
    >>> jaxcnn.clipped_gradient(net, params, x, target, jaxcnn.squared_error, 1.0)["dense1"]["w"]  # −0.2, and −6 → −1
    Array([[-1.2]], dtype=float32)
    """
    if not isinstance(max_norm, jax.core.Tracer) and not np.all(np.asarray(max_norm) > 0):
        raise ValueError(f"clipped_gradient: max_norm expected a number > 0, got {max_norm}")
    met = _meet("clipped_gradient", net, params, x, y, loss, key)
    norms = _norms(met, jnp.asarray(x))
    factors = jnp.where(norms > max_norm, max_norm / jnp.where(norms > 0, norms, 1), 1)
    found = {f"{name}/{part}": value for name, m in met.items() for part, value in m.summed(factors).items()}
    return _like(params, found, ())


# ---------------------------------------------------------------------------------------------------------------------
# What meets at a layer


class _Met(Protocol):
    """a and δ at one layer."""

    def each(self) -> Params:
        """For each of the layer's parameters the gradients, ``(N, …)``."""

    def squares(self) -> Array:
        """``(N,)``: their squared norms, over all parameters of the layer."""

    def summed(self, factors: Array) -> Params:
        """For each parameter Σ_n factor_n · gradient_n."""


@dataclasses.dataclass(frozen=True)
class _Patches:
    """A convolution: pictures x, and δ at its output before anything else."""

    own: Params
    c: Correlation
    x: Array
    delta: Array

    def each(self) -> Params:
        w = kernels.match_each(self.c, self.x, self.delta)
        return _of_dtypes(self.own, {"w": w, "b": _over_places(self.delta)})

    def squares(self) -> Array:
        w = kernels.match_squares(self.c, self.x, self.delta)
        return w + kernels.squares(_over_places(self.delta)) if "b" in self.own else w

    def summed(self, factors: Array) -> Params:
        delta = _times(self.delta, factors)
        w = on_any_mesh(convolution.match, self.c, self.x, delta)
        return _of_dtypes(self.own, {"w": w, "b": convolution.sum_pixels(delta)})


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A dense layer: rows x and δ, ``(N, places, …)``."""

    own: Params
    x: Array
    delta: Array

    def each(self) -> Params:
        return _of_dtypes(self.own, {"w": kernels.outer_each(self.x, self.delta), "b": _over_places(self.delta)})

    def squares(self) -> Array:
        w = kernels.outer_squares(self.x, self.delta)
        return w + kernels.squares(_over_places(self.delta)) if "b" in self.own else w

    def summed(self, factors: Array) -> Params:
        delta = _times(self.delta, factors)
        w = on_any_mesh(jnp.einsum, "npi,npo->io", self.x, delta)
        return _of_dtypes(self.own, {"w": w, "b": convolution.sum_pixels(delta)})


@dataclasses.dataclass(frozen=True)
class _Other:
    """Any other layer: its own rule, for each example alone."""

    own: Params
    layer: Layer
    x: Array
    delta: Array

    def each(self) -> Params:
        def one(x: Array, delta: Array) -> Params:
            return jax.vjp(lambda own: self.layer.apply(own, x[None]), self.own)[1](delta[None])[0]

        return jax.vmap(one)(self.x, self.delta)

    def squares(self) -> Array:
        return functools.reduce(operator.add, map(kernels.squares, jax.tree.leaves(self.each())))

    def summed(self, factors: Array) -> Params:
        return jax.vjp(lambda own: self.layer.apply(own, self.x), self.own)[1](_times(self.delta, factors))[0]


def _meet(op: str, net: Serial, params: Params, x: ArrayLike, y: Any, loss: Loss, key: Array | None) -> dict[str, _Met]:
    """By name of the layer, for all layers with parameters; E is the sum of the examples' errors."""
    expect_net(op, net)
    expect_loss(op, loss)
    for name, layer in net.walk():
        if isinstance(layer, layers.BatchNorm) and (key is not None or "mean" not in _own(params, name)):
            raise ValueError(
                f"{op}: {name}: batch norm by the batch's own statistics mixes examples; expected statistics from "
                f"jaxcnn.calibrate, and no key"
            )
    x = jnp.asarray(x)

    def total(nothing: tuple[()]) -> Array:
        errors = loss(net.apply(params, x, key=key), y)
        if errors.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"{op}: loss expected to return an error for each of {len(x)} examples, got {errors.shape}"
            )
        return errors.reshape(len(x), math.prod(errors.shape[1:])).mean(1).sum()

    sweep = value_grad_and_deltas(total)(())
    return {
        name: _met(op, name, layer, own, a, delta, key) for name, layer, own, a, delta in _pairs(net, params, x, sweep)
    }


def _norms(met: dict[str, _Met], x: Array) -> Array:
    squares = [m.squares() for m in met.values()]
    return jnp.sqrt(functools.reduce(operator.add, squares)) if squares else jnp.zeros(x.shape[:1], x.dtype)


def _pairs(net: Serial, params: Params, x: Array, sweep: Sweep, path: str = "") -> Iterator[tuple[Any, ...]]:
    """(name, layer, its parameters, a, δ): what comes in at a layer is what came out of the one before it."""
    for name, layer in net.layers:
        here, own = f"{path}{name}", params.get(name, {})
        if isinstance(layer, Serial) and type(layer).apply in (Serial.apply, Residual.apply):
            yield from _pairs(layer, own, x, sweep, f"{here}/")
        elif jax.tree.leaves(own):
            yield here, layer, own, x, sweep.deltas[here]
        x = sweep.activations[here]


def _met(op: str, name: str, layer: Layer, own: Params, x: Array, delta: Array, key: Array | None) -> _Met:
    match layer:
        case layers.Conv() if type(layer).apply is layers.Conv.apply:
            x, c = _correlation(layer, x, own["w"], layer.groups)
            return _Patches(own, c, x, delta)
        case layers.DepthwiseConv() if type(layer).apply is layers.DepthwiseConv.apply:
            x, c = _correlation(layer, x, own["w"], x.shape[-1])
            return _Patches(own, c, x, delta)
        case layers.HiddenLayer() if type(layer).apply is layers.HiddenLayer.apply:
            x, c = _correlation(layer, x, own["w"], layer.groups)
            win = pooling.pool_window(
                "hidden_layer", c.window.out, layer.window, layer.pool_stride, layer.pool_padding, 1, False, "pool_"
            )
            # As in the forward half; one program computes it once.
            _, passed = hidden._hidden_with_code(hidden.Hidden(c, win), x, own["w"], own["b"])
            return _Patches(own, c, x, pooling.place(win, delta, passed))
        case layers.Dense() if type(layer).apply is layers.Dense.apply:
            places = math.prod(x.shape[1:-1])
            return _Rows(own, *(a.reshape(len(x), places, a.shape[-1]) for a in (x, delta)))
    if key is not None and type(layer).__module__ != layers.__name__:
        raise ValueError(f"{op}: {name}: expected layers of jaxcnn.layers while there is a key, got {layer!r}")
    return _Other(own, layer, x, delta)


def _correlation(layer: Any, x: Array, w: Array, groups: int) -> tuple[Array, Correlation]:
    op = type(layer).__name__
    return convolution.geometry(op, x, w, layer.stride, layer.padding, layer.dilation, groups, None, None)


def _over_places(delta: Array) -> Array:
    """``(N, O)``: each example's Σ δ."""
    return jnp.sum(delta, range(1, delta.ndim - 1))


def _times(delta: Array, factors: Array) -> Array:
    return delta * factors.reshape(-1, *(1,) * (delta.ndim - 1)).astype(delta.dtype)


def _of_dtypes(own: Params, found: Params) -> Params:
    return {name: found[name].astype(a.dtype) for name, a in own.items()}


def _own(params: Params, name: str) -> Params:
    for part in name.split("/"):
        params = params.get(part, {})
    return params


def _like(params: Mapping[str, Any], found: Mapping[str, Any], batch: tuple[int, ...], path: str = "") -> Params:
    """A tree like ``params`` of what was found; zeros for what no layer reads."""

    def part(name: str, value: Any) -> Any:
        here = f"{path}{name}"
        if isinstance(value, Mapping):
            return _like(value, found, batch, f"{here}/")
        return found[here] if here in found else jnp.zeros((*batch, *jnp.shape(value)), value.dtype)

    return {name: part(name, value) for name, value in params.items()}
