"""Per-example gradients from the (a, δ) of one sweep: a is a layer's input, δ the gradient at its output.

    conv     ∂E_n/∂w = a_n ⋆ δ_n        ∂E_n/∂b = Σ δ_n
    dense    ∂E_n/∂w = a_n ⊗ δ_n        ∂E_n/∂b = δ_n

The rule for the batch is the same products, summed over n. Nothing here is vectorized over copies of a kernel. That is
what makes `jax.vmap` of `jax.grad` slow: it turns a convolution into one with a group per example.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcnn import layers
from jaxcnn.arguments import array, bad_type, bad_value
from jaxcnn.backprop import value_grad_and_deltas
from jaxcnn.geometry import Correlation
from jaxcnn.kernels import per_example as kernels
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.layers import Layer, Params
from jaxcnn.net import Residual, Serial, expect_loss, expect_net, in_a_row
from jaxcnn.ops import convolution, hidden, pooling
from jaxcnn.ops.mesh import automatic_inside, on_any_mesh, varying_alike
from jaxcnn.ops.normalization import dims_of
from jaxcnn.ops.rule import Rule
from jaxcnn.taps import idle


class Loss(Protocol):
    """Loss of each example: (outputs, targets) → (N, …); all dims after N are averaged."""

    def __call__(self, outputs: Any, targets: Any, /) -> Array:
        """Return the losses ``(N, …)``.

        Args:
            outputs: outputs of the net, ``(N, …)``.
            targets: targets, ``(N, …)``.

        Returns:
            The losses.
        """


@automatic_inside()
def per_example_gradients(
    net: Serial, loss: Loss, params: Params, x: ArrayLike, targets: Any, *, key: Array | None = None
) -> Params:
    """Return the gradient of each example's loss: a tree like ``params``, every array with a leading N.

    These are the gradients of `jax.vmap` of `jax.grad`, computed by one sweep over the batch and one matrix product per
    layer and example.

    A custom layer, or a net with an overridden ``apply``, is applied to each example separately, so the examples cannot
    influence each other. Its gradients come from `jax.vjp` of its ``apply``, with a and δ of the whole layer.

    Inside `jax.shard_map` each device returns the gradients of its own examples, even for replicated parameters.

    Args:
        net: from `serial`. Its layers must process examples independently (batch norm does, with statistics from
            `calibrate`).
        loss: loss of each example, as in `make_train_step`. It must process examples independently; this is not
            checked.
        params: parameters as made by its `init`, in a dict or any other mapping. All are floating-point arrays.
        x: a batch ``(N, …)``.
        targets: ``(N, …)``.
        key: from `jax.random.key`. If given, dropout is active, with a separate mask per example. A custom layer
            without parameters receives the key folded with the index of the example.

    Returns:
        Arrays ``(N, …)``, which `optax.contrib.differentially_private_aggregate` accepts as updates. The gradient of a
        parameter that no layer reads is 0, as in `jax.grad`.

    Raises:
        ValueError: if the loss does not return one value per example, if a norm mixes examples, or if a key is given
            and a custom layer has parameters.
        TypeError: if net or loss has the wrong type, or params contains anything other than floating-point arrays.

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
    meeting = _meet("per_example_gradients", net, loss, params, x, targets, key)
    return meeting.tree({name: m.each() for name, m in meeting.met.items()}, meeting.norms_like.shape)


@automatic_inside()
def per_example_norms(
    net: Serial, loss: Loss, params: Params, x: ArrayLike, targets: Any, *, key: Array | None = None
) -> Array:
    """Return ``(N,)`` norms of each example's gradient, over all parameters.

    Per-example gradients are not materialized where their norms are cheaper to compute directly: ‖∂E_n/∂w‖² = Σ_{o, o'}
    ⟨P[o], P[o']⟩·⟨δ[o], δ[o']⟩ with P the image patches at positions o, and ‖a_n‖²·‖δ_n‖² for a dense layer. The choice
    depends only on static shapes.

    Args:
        net: from `serial`. Its layers must process examples independently.
        loss: loss of each example, as in `make_train_step`.
        params: parameters as made by its `init`, in a dict or any other mapping.
        x: a batch ``(N, …)``.
        targets: ``(N, …)``.
        key: from `jax.random.key`; if given, dropout is active.

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
    return _meet("per_example_norms", net, loss, params, x, targets, key).norms()


@automatic_inside(like="params")
def clipped_gradient(
    net: Serial,
    loss: Loss,
    params: Params,
    x: ArrayLike,
    targets: Any,
    max_norm: ArrayLike,
    *,
    key: Array | None = None,
) -> Params:
    """Return the sum of all examples' gradients, each clipped: ``Σ_n g_n · min(1, max_norm / ‖g_n‖)``.

    For differentially private training, without materializing g_n: g_n is linear in δ_n, so each δ_n is scaled instead
    and the ordinary batch gradient gives the sum. The cost is an ordinary gradient plus `per_example_norms`. Divide by
    N for a mean; add noise before that.

    Inside `jax.shard_map` each device returns the sum over its own examples, even for replicated parameters.
    `jax.lax.psum` of the result is the sum over all examples.

    Args:
        net: from `serial`. Its layers must process examples independently.
        loss: loss of each example, as in `make_train_step`.
        params: parameters as made by its `init`, in a dict or any other mapping.
        x: a batch ``(N, …)``.
        targets: ``(N, …)``.
        max_norm: maximum norm of an example's gradient over all parameters together, above 0.
        key: from `jax.random.key`; if given, dropout is active.

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
    meeting = _meet("clipped_gradient", net, loss, params, x, targets, key)
    norms = meeting.norms()
    factors = jnp.where(norms > max_norm, max_norm / jnp.where(norms > 0, norms, 1), 1)
    return meeting.tree({name: m.summed(factors) for name, m in meeting.met.items()}, ())


# ---------------------------------------------------------------------------------------------------------------------
# The parameters that each layer reads


@dataclasses.dataclass(frozen=True)
class _Alone(Layer):
    """A layer, applied to each example separately.

    Whatever that layer computes, no example can influence the output of another. So δ at the output belongs to single
    examples, and the gradients are those of `jax.vmap` of `jax.grad` by construction.
    """

    layer: Layer
    #: Full name of the layer; None for the outermost net.
    path: str | None

    def apply(self, params: Any, x: Any, *, key: Array | None = None, rule: Rule | None = None) -> Any:
        """Return the outputs for a batch; with a key, example n gets that key folded with n."""
        n = jax.tree.leaves(x)[0].shape[0]
        keys = None if key is None else jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(n))

        def each(x: Any, params: Any, keys: Any) -> Any:
            return kernels.for_each(lambda x, key: self.one(x, params, key), x, keys)

        return _on_devices(each, x, params, keys)

    def one(self, x: Any, params: Any, key: Array | None = None) -> Any:
        """Return the output for one example, without the batch dim."""
        options: dict[str, Any] = {}
        if self.path is not None:
            options = {"rules": None, "path": f"{self.path}/"} if isinstance(self.layer, Serial) else {"rule": None}
        with idle():
            y = self.layer.apply(params, jax.tree.map(lambda a: a[None], x), key=key, **options)
        if self.path is not None and not jax.tree_util.all_leaves([y]):
            raise bad_type(self.path, "output", "an array", type(y).__name__)
        for a in jax.tree.leaves(y):
            if jnp.shape(a)[:1] != (1,):
                name = self.path or "net"
                raise ValueError(f"{name}: output must keep the batch dim, (1, …) for one example, got {jnp.shape(a)}")
        return jax.tree.map(lambda a: jnp.asarray(a)[0], y)


def _applies_as(layer: Layer, *kinds: type[Layer]) -> bool:
    """Whether ``apply`` is exactly that of one of these types, overridden by neither a subclass nor an attribute."""
    return "apply" not in vars(layer) and type(layer).apply in [kind.apply for kind in kinds]


def _product_of(layer: Layer) -> bool:
    """Whether the layer's per-example gradients are products implemented in this file."""
    kinds = (layers.Conv, layers.DepthwiseConv, layers.ConvTranspose, layers.HiddenLayer, layers.Dense)
    return _applies_as(layer, *kinds)


def _known_apart(layer: Layer) -> bool:
    """Whether this is an unmodified layer of this package; `_meet` rejects those that mix examples."""
    return _product_of(layer) or (type(layer).__module__ == layers.__name__ and "apply" not in vars(layer))


def _apart(net: Serial, path: str = "") -> Serial:
    """Return a net with the same layers and names in which custom layers are applied to each example separately."""

    def part(name: str, layer: Layer) -> Layer:
        if in_a_row(layer):
            return _apart(layer, f"{name}/")
        return layer if _known_apart(layer) else _Alone(layer, name)

    kind = Residual if _applies_as(net, Residual) else Serial
    return kind(tuple((name, part(f"{path}{name}", layer)) for name, layer in net.layers))


def _walk(net: Serial, params: Any, path: str = "", before: str = "") -> Iterator[tuple[str, Layer, Any, str]]:
    """Yield (full name, layer, its parameters, name of its input) for each layer that is not a `Serial`.

    The input of the outermost net has the name "".
    """
    for name, layer in net.layers:
        here, own = f"{path}{name}", _get(params, name)
        if isinstance(layer, Serial):
            yield from _walk(layer, own, f"{here}/", before)
        else:
            yield here, layer, own, before
        before = here


def _read(net: Serial, params: Any) -> dict[str, Any]:
    """Return, by full name, the tree of parameters that each layer's ``apply`` reads."""

    def of(layer: Layer, own: Any) -> Any:
        if _product_of(layer):
            return {name: own.get(name) for name in ("weight", "bias") if own.get(name) is not None}
        return own

    return {name: of(layer, own) for name, layer, own, _ in _walk(net, params)}


def _places(net: Serial, params: Any) -> dict[str, list[int]] | None:
    """Return, by layer, the index among the leaves of ``params`` for each leaf that it reads.

    The result is None if a layer reads anything but leaves of ``params``, or if two layers read the same leaf; a custom
    mapping may do so. Then the gradient at one layer is not the gradient of a parameter.
    """
    traced, read = jax.make_jaxpr(functools.partial(_read, net), return_shape=True)(params)
    number = {id(variable): i for i, variable in enumerate(traced.jaxpr.invars)}
    numbers = [number.get(id(variable), -1) for variable in traced.jaxpr.outvars]
    if traced.jaxpr.eqns or -1 in numbers or len(set(numbers)) < len(numbers):
        return None
    of_layers = jax.tree.unflatten(jax.tree.structure(read), numbers)
    return {name: jax.tree.leaves(of_layer) for name, of_layer in of_layers.items()}


def _arrays(op: str, params: Any) -> Any:
    """Return the parameters as a tree of arrays; a mapping that is not a JAX pytree becomes a dict."""

    def part(path: Any, value: Any) -> Any:
        if isinstance(value, Mapping):
            return jax.tree_util.tree_map_with_path(lambda inner, v: part((*path, *inner), v), dict(value))
        name = f"params{jax.tree_util.keystr(path)}"
        a = array(op, name, value)
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            raise bad_type(op, name, "a floating array", a.dtype)
        return a

    return jax.tree_util.tree_map_with_path(part, params)


def _get(params: Any, name: str) -> Any:
    """Return the parameters of the layer with this full name, or ``{}`` if there are none."""
    for part in name.split("/"):
        params = params.get(part, {}) if isinstance(params, Mapping) else {}
    return params


def _calibrated(own: Any) -> bool:
    return isinstance(own, Mapping) and own.get("mean") is not None and own.get("var") is not None


def _on_devices(f: Callable[..., Any], *trees: Any) -> Any:
    """Return ``f(*trees)``, even for arrays that are sharded over devices; the first tree determines the sharding.

    Inside `jax.shard_map`, replicated arrays are marked as varying before ``f`` receives them: a derivative with
    respect to a replicated array would be a sum over devices, including other devices' examples.
    """
    leaves, tree = jax.tree.flatten(trees)
    return on_any_mesh(lambda _, *leaves: f(*jax.tree.unflatten(tree, leaves)), None, *varying_alike(tuple(leaves)))


# ---------------------------------------------------------------------------------------------------------------------
# a and δ at a layer


class _Met(Protocol):
    """a and δ at one layer."""

    def each(self) -> Any:
        """Return the gradients ``(N, …)`` of each parameter that the layer reads."""

    def squares(self) -> Array:
        """Return ``(N,)`` squared norms of the gradients, over all parameters of the layer."""

    def summed(self, factors: Array) -> Any:
        """Return Σ_n factor_n · gradient_n for each parameter."""


@dataclasses.dataclass(frozen=True)
class _Patches:
    """A convolution: its inputs x, and δ at its output before further ops. For a transposed one, δ and x swap roles."""

    own: Params
    c: Correlation
    x: Array
    delta: Array
    transposed: bool = False

    def each(self) -> Params:
        w = on_any_mesh(kernels.kernel_grad_each, self.c, self.x, self.delta)
        return _of_dtypes(self.own, {"weight": w, "bias": _over_places(self._at_output())})

    def squares(self) -> Array:
        w = on_any_mesh(kernels.kernel_grad_squares, self.c, self.x, self.delta)
        return w + kernels.squares(_over_places(self._at_output())) if "bias" in self.own else w

    def summed(self, factors: Array) -> Params:
        w = on_any_mesh(convolution.kernel_grad, self.c, self.x, _times(self.delta, factors))
        return _of_dtypes(self.own, {"weight": w, "bias": convolution.sum_pixels(_times(self._at_output(), factors))})

    def _at_output(self) -> Array:
        return self.x if self.transposed else self.delta


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A dense layer: rows x and δ, ``(N, positions, …)``."""

    own: Params
    x: Array
    delta: Array

    def each(self) -> Params:
        return _of_dtypes(
            self.own, {"weight": kernels.outer_each(self.x, self.delta), "bias": _over_places(self.delta)}
        )

    def squares(self) -> Array:
        w = kernels.outer_squares(self.x, self.delta)
        return w + kernels.squares(_over_places(self.delta)) if "bias" in self.own else w

    def summed(self, factors: Array) -> Params:
        delta = _times(self.delta, factors)
        w = on_any_mesh(jnp.einsum, "npi,npo->io", self.x, delta)
        return _of_dtypes(self.own, {"weight": w, "bias": convolution.sum_pixels(delta)})


@dataclasses.dataclass(frozen=True)
class _Other:
    """Any other layer; its gradients come from its own rule, for each example separately."""

    gradients: Any

    def each(self) -> Any:
        return self.gradients

    def squares(self) -> Array:
        return functools.reduce(operator.add, map(kernels.squares, jax.tree.leaves(self.gradients)))

    def summed(self, factors: Array) -> Any:
        def of(g: Array) -> Array:
            return _times(g.astype(accumulator(g.dtype)), factors).sum(0).astype(g.dtype)

        return jax.tree.map(of, self.gradients)


def _other(layer: Layer, own: Any, x: Any, delta: Any) -> _Other:
    run = layer.one if isinstance(layer, _Alone) else lambda x, own: layer.apply(own, x[None])[0]

    def each(x: Any, delta: Any, own: Any) -> Any:
        return kernels.for_each(lambda x, delta: jax.vjp(functools.partial(run, x), own)[1](delta)[0], x, delta)

    return _Other(_on_devices(each, x, delta, own))


class _Meeting(NamedTuple):
    """The input/δ pairs of all layers with parameters."""

    met: dict[str, _Met]
    #: By layer, the indices of its parameters among the leaves of ``params``.
    places: dict[str, list[int]]
    params: Any
    norms_like: Array

    def norms(self) -> Array:
        """Return ``(N,)`` gradient norms over all layers."""
        squares = [m.squares() for m in self.met.values()]
        return jnp.sqrt(functools.reduce(operator.add, squares)) if squares else self.norms_like

    def tree(self, found: Mapping[str, Any], batch: tuple[int, ...]) -> Any:
        """Return a tree like ``params`` from results by layer; a leaf that no layer reads has a gradient of 0."""
        of_leaf = {
            number: gradient
            for name, of_layer in found.items()
            for number, gradient in zip(self.places[name], jax.tree.leaves(of_layer), strict=True)
        }
        leaves, tree = jax.tree.flatten(self.params)
        missing = {i: a for i, a in enumerate(leaves) if i not in of_leaf}
        return jax.tree.unflatten(
            tree,
            [
                jnp.zeros((*batch, *missing[i].shape), missing[i].dtype) if i in missing else of_leaf[i]
                for i in range(len(leaves))
            ],
        )


def _meet(op: str, net: Serial, loss: Loss, params: Any, x: Any, targets: Any, key: Array | None) -> _Meeting:
    """Pair a and δ of all layers with parameters, where E is the sum of the examples' losses."""
    expect_net(op, net)
    expect_loss(op, loss)
    params = _arrays(op, params)
    for name, layer in net.walk():
        if isinstance(layer, layers.BatchNorm) and (key is not None or not _calibrated(_get(params, name))):
            raise ValueError(
                f"{op}: {name}: batch norm by the batch's own statistics mixes examples; expected statistics from "
                f"jaxcnn.calibrate, and no key"
            )

    def total(outputs: Any) -> Array:
        errors = loss(outputs, targets)
        if not isinstance(errors, Array):
            raise TypeError(f"{op}: loss must return an array, got {type(errors).__name__}")
        if not jnp.issubdtype(errors.dtype, jnp.floating):
            raise TypeError(f"{op}: loss must return a floating array, got {errors.dtype}")
        varying = [jax.typeof(a).manual_axis_type.varying for a in (errors, jax.tree.leaves(x)[0])]
        if varying[0] - varying[1]:
            raise ValueError(f"{op}: x must vary over {tuple(varying[0])} as the errors do; use jax.lax.pcast")
        if errors.shape[:1] != (n,):
            raise ValueError(f"{op}: loss must return an error for each of {n} examples, got {errors.shape}")
        return errors.reshape(n, math.prod(errors.shape[1:])).mean(1).sum()

    x = _batch(op, x, (targets, params, key))
    n = next((a.shape[0] for a in jax.tree.leaves(x) if a.ndim), 0)
    apart = _apart(net) if in_a_row(net) else None
    places = None if apart is None else _places(apart, params)
    if apart is None or places is None:
        _refuse_key(op, "net", net, params, key)
        whole = _Alone(net, None)
        outputs = whole.apply(params, x, key=key)
        other: dict[str, _Met] = (
            {"": _other(whole, params, x, jax.grad(total)(outputs))} if jax.tree.leaves(params) else {}
        )
        return _Meeting(other, {"": list(range(len(jax.tree.leaves(params))))}, params, jnp.zeros(n))

    read = _read(apart, params)
    for name, layer, *_ in _walk(apart, params):
        if isinstance(layer, _Alone):
            _refuse_key(op, name, layer.layer, read[name], key)
    sweep = value_grad_and_deltas(lambda _: total(apart.apply(params, x, key=key)))(())
    met: dict[str, _Met] = {}
    for name, layer, _, before in _walk(apart, params):
        a = sweep.activations[before] if before else x
        if isinstance(layer, layers.LayerNorm) and 0 in dims_of("layer_norm", layer.axes, a.ndim):
            raise bad_value(op, f"{name}: axes", "dims of one example", f"{layer.axes!r}, which mixes examples")
        if not jax.tree.leaves(read[name]):
            continue
        if name in sweep.deltas:
            met[name] = _met(layer, read[name], a, sweep.deltas[name])
        elif jnp.iscomplexobj(sweep.activations[name]):
            raise bad_type(op, f"{name}: output", "a real array", sweep.activations[name].dtype)
        # No gradient passes an integer output.
    norms_like = jnp.zeros(n, x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else None)
    return _Meeting(met, places, params, norms_like)


def _batch(op: str, x: Any, others: Any) -> Any:
    """Return x as an array, or a tree of arrays with a leading N, marked as varying over the devices of ``others``.

    Without that mark, δ of a replicated x would be a sum over devices.
    """
    given = jax.tree.leaves(x)
    x = jax.tree.map(jnp.asarray, x) if given and all(map(jnp.ndim, given)) else array(op, "x", x)
    leaves, tree = jax.tree.flatten(x)
    others = [a for a in jax.tree.leaves(others) if isinstance(a, Array)]
    return jax.tree.unflatten(tree, varying_alike((*leaves, *others))[: len(leaves)])


def _refuse_key(op: str, name: str, layer: Layer, own: Any, key: Array | None) -> None:
    if key is not None and jax.tree.leaves(own):
        raise ValueError(f"{op}: {name}: expected layers of jaxcnn.layers while there is a key, got {layer!r}")


def _met(layer: Layer, own: Any, x: Array, delta: Array) -> _Met:
    known: Any = layer if _product_of(layer) else None
    match known:
        case layers.Conv():
            x, c = _correlation(known, x, own["weight"], known.groups)
            return _Patches(own, c, x, delta)
        case layers.DepthwiseConv():
            x, c = _correlation(layer, x, own["weight"], x.shape[-1])
            return _Patches(own, c, x, delta)
        case layers.ConvTranspose():
            x, c = _transposed(layer, x, own["weight"])
            return _Patches(own, c, delta, x, transposed=True)
        case layers.HiddenLayer():
            x, c = _correlation(known, x, own["weight"], known.groups)
            win = pooling.pool_window(
                "hidden_layer", c.window.out, known.window, known.pool_stride, known.pool_padding, 1, False, "pool_"
            )
            # The same as in the forward pass; within one program it is computed once.
            _, passed = on_any_mesh(hidden._hidden_with_code, hidden.Hidden(c, win), x, own["weight"], own["bias"])
            return _Patches(own, c, x, on_any_mesh(pooling.scatter_to_winners, win, delta, passed))
        case layers.Dense():
            places = math.prod(x.shape[1:-1])
            return _Rows(own, *(a.reshape(a.shape[0], places, a.shape[-1]) for a in (x, delta)))
    return _other(layer, own, x, delta)


def _correlation(layer: Any, x: Array, w: Array, groups: int) -> tuple[Array, Correlation]:
    op, more = type(layer).__name__, (getattr(layer, name, None) for name in ("preferred_element_type", "precision"))
    return convolution.correlation_of(op, x, w, layer.stride, layer.padding, layer.dilation, groups, *more)


def _transposed(layer: Any, x: Array, w: Array) -> tuple[Array, Correlation]:
    """Return the input, extended by zeros as in `conv_transpose`, and the geometry of the `conv` that it transposes."""
    options = (layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups)
    more = (getattr(layer, name, None) for name in ("preferred_element_type", "precision"))
    c = convolution._transposed_geometry("conv_transpose", x, w, *options, *more)
    ends = [(0, out - n) for n, out in zip(x.shape[1:-1], c.window.out, strict=True)]
    return (jnp.pad(x, ((0, 0), *ends, (0, 0))) if any(end for _, end in ends) else x), c


def _over_places(delta: Array) -> Array:
    """Return ``(N, O)``: each example's Σ δ."""
    return jnp.sum(delta, range(1, delta.ndim - 1))


def _times(delta: Array, factors: Array) -> Array:
    return delta * factors.reshape(-1, *(1,) * (delta.ndim - 1)).astype(delta.dtype)


def _of_dtypes(own: Params, found: Params) -> Params:
    return {name: found[name].astype(a.dtype) for name, a in own.items()}
