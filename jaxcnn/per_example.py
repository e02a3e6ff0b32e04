"""Per-example gradients from a and δ of one backward pass: a is a layer's input, δ the gradient at its output.

    conv     ∂E_n/∂w = a_n ⋆ δ_n        ∂E_n/∂b = Σ δ_n
    dense    ∂E_n/∂w = a_n ⊗ δ_n        ∂E_n/∂b = δ_n

The rule for the batch is the same products, summed over n. No convolution has one group per example; that is what makes
`jax.vmap` of `jax.grad` slow.
"""

import copy
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcnn import layers
from jaxcnn.arguments import array, bad_type, bad_value
from jaxcnn.backprop import value_grad_and_deltas
from jaxcnn.branches import Branches, Parallel, is_branches
from jaxcnn.geometry import Correlation
from jaxcnn.kernels import per_example as kernels
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.layers import Layer, Params
from jaxcnn.net import Loss, Serial, expect_loss, expect_net, in_a_row, is_custom, layers_of
from jaxcnn.ops import convolution, hidden, pooling
from jaxcnn.ops.mesh import automatic_inside, on_any_mesh, varying_alike
from jaxcnn.ops.normalization import dims_of
from jaxcnn.ops.rule import Rule
from jaxcnn.selection import Selection
from jaxcnn.taps import idle


@automatic_inside()
def per_example_gradients(
    net: Serial, loss: Loss, params: Params, x: ArrayLike, targets: Any, *, key: Array | None = None
) -> Params:
    """Return the gradient of each example's loss: a tree like ``params``, every array with a leading N.

    These are the gradients of `jax.vmap` of `jax.grad`, computed by one forward and backward pass over the batch and
    one matrix product per layer and example.

    A custom layer, or a net with a custom ``apply``, is applied to each example separately, so the examples cannot
    influence each other. Its gradients come from `jax.vjp` of its ``apply``, with a and δ of the whole layer.

    Inside `jax.shard_map` each device returns the gradients of its own examples, even for replicated parameters.

    Args:
        net: from `serial`. Its layers must process examples independently (batch norm does, with statistics from
            `calibrate`).
        loss: loss of each example, as in `make_train_step`: ``(outputs, targets)`` → ``(N, …)``. All dims after N are
            averaged. It must process examples independently; this is not checked.
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
    result = _collect("per_example_gradients", net, loss, params, x, targets, key)
    return result.tree({name: layer.each() for name, layer in result.gradients.items()}, result.norms_like.shape)


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
    return _collect("per_example_norms", net, loss, params, x, targets, key).norms()


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
    result = _collect("clipped_gradient", net, loss, params, x, targets, key)
    norms = result.norms()
    factors = jnp.where(norms > max_norm, max_norm / jnp.where(norms > 0, norms, 1), 1)
    return result.tree({name: layer.summed(factors) for name, layer in result.gradients.items()}, ())


# ---------------------------------------------------------------------------------------------------------------------
# The parameters that each layer reads


@dataclasses.dataclass(frozen=True)
class _EachExample(Layer):
    """A layer that is applied to each example separately.

    No example can influence the output of another. So δ at the output belongs to single examples, and the gradients are
    those of `jax.vmap` of `jax.grad` by construction.
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
            options = {"rules": Selection(None, f"{self.path}/")} if isinstance(self.layer, Serial) else {"rule": None}
        with idle():
            y = self.layer.apply(params, jax.tree.map(lambda a: a[None], x), key=key, **options)
        if self.path is not None and not jax.tree_util.all_leaves([y]):
            raise bad_type(self.path, "output", "an array", type(y).__name__)
        for a in jax.tree.leaves(y):
            if jnp.shape(a)[:1] != (1,):
                expected = "(1, …) for a batch of one example"
                raise bad_value(self.path or "net", "output", expected, f"shape {jnp.shape(a)}")
        return jax.tree.map(lambda a: jnp.asarray(a)[0], y)


#: Layers whose per-example gradients are products implemented in this file.
_WITH_PRODUCTS = layers_of("affine", "hidden")


def _has_products(layer: Layer) -> bool:
    """Whether the layer is one of these types, with an ``apply`` that neither a subclass nor an attribute overrides."""
    return isinstance(layer, _WITH_PRODUCTS) and not is_custom(layer)


def _is_known(layer: Layer) -> bool:
    """Whether this is an unmodified layer of this package; `_collect` rejects those that mix examples."""
    defined_here = type(layer).__module__ == layers.__name__ and not is_custom(layer)
    return defined_here or _has_products(layer)


def _separate_examples(net: Serial, path: str = "") -> Serial:
    """Return a net with the same layers and names in which custom layers are applied to each example separately."""

    def separate(name: str, layer: Layer) -> Layer:
        if in_a_row(layer) or _has_separate_branches(layer):
            return _separate_examples(layer, f"{name}/")
        return layer if _is_known(layer) else _EachExample(layer, name)

    separated = copy.copy(net)  # of a subclass with any __init__
    parts = tuple((name, separate(f"{path}{name}", layer)) for name, layer in net.layers)
    object.__setattr__(separated, "layers", parts)
    return separated


def _has_separate_branches(layer: Layer) -> TypeGuard[Branches]:
    """Whether the layer consists of branches with one input, whose outputs are concatenated or added."""
    return is_branches(layer) and not isinstance(layer, Parallel) and not callable(layer.join)


def _walk(net: Serial, params: Any, path: str = "", previous: str = "") -> Iterator[tuple[str, Layer, Any, str]]:
    """Yield (full name, layer, its parameters, name of its input) for each layer that is not a `Serial`.

    The input of the outermost net has the name "".
    """
    for name, layer in net.layers:
        full_name, layer_params = f"{path}{name}", _get(params, name)
        if isinstance(layer, Serial):
            yield from _walk(layer, layer_params, f"{full_name}/", previous)
        else:
            yield full_name, layer, layer_params, previous
        previous = previous if isinstance(net, Branches) else full_name


def _params_by_layer(net: Serial, params: Any) -> dict[str, Any]:
    """Return, by full name, the tree of parameters that each layer's ``apply`` reads."""

    def read(layer: Layer, layer_params: Any) -> Any:
        if _has_products(layer):
            return {name: layer_params[name] for name in ("weight", "bias") if layer_params.get(name) is not None}
        return layer_params

    return {name: read(layer, layer_params) for name, layer, layer_params, _ in _walk(net, params)}


def _leaf_indices(net: Serial, params: Any) -> dict[str, list[int]] | None:
    """Return, by layer, the index among the leaves of ``params`` for each leaf that it reads.

    The result is None if a layer reads anything but leaves of ``params``, or if two layers read the same leaf; a custom
    mapping may do so. Then the gradient at one layer is not the gradient of a parameter.
    """
    traced, by_layer = jax.make_jaxpr(functools.partial(_params_by_layer, net), return_shape=True)(params)
    index = {id(variable): i for i, variable in enumerate(traced.jaxpr.invars)}
    indices = [index.get(id(variable), -1) for variable in traced.jaxpr.outvars]
    if traced.jaxpr.eqns or -1 in indices or len(set(indices)) < len(indices):
        return None
    tree = jax.tree.unflatten(jax.tree.structure(by_layer), indices)
    return {name: jax.tree.leaves(layer) for name, layer in tree.items()}


def _arrays(op: str, params: Any) -> Any:
    """Return the parameters as a tree of arrays; a mapping that is not a JAX pytree becomes a dict."""

    def leaf(path: Any, value: Any) -> Any:
        if isinstance(value, Mapping):
            return jax.tree_util.tree_map_with_path(lambda inner, v: leaf((*path, *inner), v), dict(value))
        name = f"params{jax.tree_util.keystr(path)}"
        a = array(op, name, value)
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            raise bad_type(op, name, "a floating array", a.dtype)
        return a

    return jax.tree_util.tree_map_with_path(leaf, params)


def _get(params: Any, name: str) -> Any:
    """Return the parameters of the layer with this full name, or ``{}`` if there are none."""
    for part in name.split("/"):
        params = params.get(part, {}) if isinstance(params, Mapping) else {}
    return params


def _has_statistics(params: Any) -> bool:
    return isinstance(params, Mapping) and params.get("mean") is not None and params.get("var") is not None


def _on_devices(f: Callable[..., Any], *trees: Any) -> Any:
    """Return ``f(*trees)``, even for arrays that are sharded over devices; the first tree determines the sharding.

    Inside `jax.shard_map`, replicated arrays are marked as varying before ``f`` receives them: a derivative with
    respect to a replicated array would be a sum over devices, including other devices' examples.
    """
    leaves, tree = jax.tree.flatten(trees)
    return on_any_mesh(lambda _, *leaves: f(*jax.tree.unflatten(tree, leaves)), None, *varying_alike(tuple(leaves)))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of one layer, from its a and δ


class _LayerGradients(Protocol):
    """The per-example gradients of one layer, which are not materialized before a method is called."""

    def each(self) -> Any:
        """Return the gradients ``(N, …)`` of each parameter that the layer reads."""

    def squares(self) -> Array:
        """Return ``(N,)`` squared norms of the gradients, over all parameters of the layer."""

    def summed(self, factors: Array) -> Any:
        """Return Σ_n factor_n · gradient_n for each parameter."""


@dataclasses.dataclass(frozen=True)
class _ConvGradients:
    """A convolution: its inputs x, and δ at its output before further ops. For a transposed one, δ and x swap roles."""

    params: Params
    c: Correlation
    x: Array
    delta: Array
    transposed: bool = False

    def each(self) -> Params:
        w = on_any_mesh(kernels.kernel_grad_each, self.c, self.x, self.delta)
        return _cast_like(self.params, {"weight": w, "bias": _sum_positions(self._at_output())})

    def squares(self) -> Array:
        w = on_any_mesh(kernels.kernel_grad_squares, self.c, self.x, self.delta)
        return w + kernels.squares(_sum_positions(self._at_output())) if "bias" in self.params else w

    def summed(self, factors: Array) -> Params:
        w = on_any_mesh(convolution.kernel_grad, self.c, self.x, _scale(self.delta, factors))
        b = convolution.sum_pixels(_scale(self._at_output(), factors))
        return _cast_like(self.params, {"weight": w, "bias": b})

    def _at_output(self) -> Array:
        return self.x if self.transposed else self.delta


@dataclasses.dataclass(frozen=True)
class _DenseGradients:
    """A dense layer: rows x and δ, ``(N, positions, …)``."""

    params: Params
    x: Array
    delta: Array

    def each(self) -> Params:
        w, b = kernels.outer_each(self.x, self.delta), _sum_positions(self.delta)
        return _cast_like(self.params, {"weight": w, "bias": b})

    def squares(self) -> Array:
        w = kernels.outer_squares(self.x, self.delta)
        return w + kernels.squares(_sum_positions(self.delta)) if "bias" in self.params else w

    def summed(self, factors: Array) -> Params:
        delta = _scale(self.delta, factors)
        w = on_any_mesh(jnp.einsum, "npi,npo->io", self.x, delta)
        return _cast_like(self.params, {"weight": w, "bias": convolution.sum_pixels(delta)})


@dataclasses.dataclass(frozen=True)
class _OtherGradients:
    """Any other layer; its gradients come from its own rule, for each example separately."""

    gradients: Any

    def each(self) -> Any:
        return self.gradients

    def squares(self) -> Array:
        return functools.reduce(operator.add, map(kernels.squares, jax.tree.leaves(self.gradients)))

    def summed(self, factors: Array) -> Any:
        def leaf(g: Array) -> Array:
            return _scale(g.astype(accumulator(g.dtype)), factors).sum(0).astype(g.dtype)

        return jax.tree.map(leaf, self.gradients)


def _other_gradients(layer: Layer, params: Any, x: Any, delta: Any) -> _OtherGradients:
    run = layer.one if isinstance(layer, _EachExample) else lambda x, params: layer.apply(params, x[None])[0]

    def each(x: Any, delta: Any, params: Any) -> Any:
        return kernels.for_each(lambda x, delta: jax.vjp(functools.partial(run, x), params)[1](delta)[0], x, delta)

    return _OtherGradients(_on_devices(each, x, delta, params))


class _NetGradients(NamedTuple):
    """The gradients of all layers with parameters."""

    gradients: dict[str, _LayerGradients]
    #: By layer, the indices of its parameters among the leaves of ``params``.
    leaf_indices: dict[str, list[int]]
    params: Any
    norms_like: Array

    def norms(self) -> Array:
        """Return ``(N,)`` gradient norms over all layers."""
        squares = [layer.squares() for layer in self.gradients.values()]
        return jnp.sqrt(functools.reduce(operator.add, squares)) if squares else self.norms_like

    def tree(self, by_layer: Mapping[str, Any], batch: tuple[int, ...]) -> Any:
        """Return a tree like ``params`` from results by layer; a leaf that no layer reads has a gradient of 0."""
        by_leaf = {
            index: gradient
            for name, gradients in by_layer.items()
            for index, gradient in zip(self.leaf_indices[name], jax.tree.leaves(gradients), strict=True)
        }
        leaves, tree = jax.tree.flatten(self.params)
        for i, a in enumerate(leaves):
            if i not in by_leaf:
                by_leaf[i] = jnp.zeros((*batch, *a.shape), a.dtype)
        return jax.tree.unflatten(tree, [by_leaf[i] for i in range(len(leaves))])


def _collect(op: str, net: Serial, loss: Loss, params: Any, x: Any, targets: Any, key: Array | None) -> _NetGradients:
    """Run one forward and backward pass of the sum of the examples' losses, and pair a and δ of each layer."""
    expect_net(op, net)
    expect_loss(op, loss)
    params = _arrays(op, params)
    for name, layer in net.walk():
        if isinstance(layer, layers.BatchNorm) and (key is not None or not _has_statistics(_get(params, name))):
            expected = "used without a key and with statistics from jaxcnn.calibrate"
            raise bad_value(op, name, expected, "statistics of the batch, which mix examples")

    def total_loss(outputs: Any) -> Array:
        result, losses = "the result of loss", loss(outputs, targets)
        if not isinstance(losses, Array):
            raise bad_type(op, result, "an array", type(losses).__name__)
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise bad_type(op, result, "of a floating dtype", losses.dtype)
        varying = [tuple(jax.typeof(a).manual_axis_type.varying) for a in (losses, jax.tree.leaves(x)[0])]
        if set(varying[0]) - set(varying[1]):
            expected = f"varying over {varying[0]}, as {result} is (see jax.lax.pcast)"
            raise bad_value(op, "x", expected, f"an array that varies over {varying[1]}")
        if losses.shape[:1] != (n,):
            raise bad_value(op, result, f"({n}, …), a loss for each example", f"shape {losses.shape}")
        return losses.reshape(n, math.prod(losses.shape[1:])).mean(1).sum()

    x = _batch(op, x, (targets, params, key))
    n = next((a.shape[0] for a in jax.tree.leaves(x) if a.ndim), 0)
    separate = _separate_examples(net) if in_a_row(net) else None
    leaf_indices = None if separate is None else _leaf_indices(separate, params)
    if separate is None or leaf_indices is None:
        _refuse_key(op, "net", net, params, key)
        whole = _EachExample(net, None)
        outputs = whole.apply(params, x, key=key)
        gradients: dict[str, _LayerGradients] = {}
        if jax.tree.leaves(params):
            gradients[""] = _other_gradients(whole, params, x, jax.grad(total_loss)(outputs))
        return _NetGradients(gradients, {"": list(range(len(jax.tree.leaves(params))))}, params, jnp.zeros(n))

    by_layer = _params_by_layer(separate, params)
    for name, layer, *_ in _walk(separate, params):
        if isinstance(layer, _EachExample):
            _refuse_key(op, name, layer.layer, by_layer[name], key)
    result = value_grad_and_deltas(lambda _: total_loss(separate.apply(params, x, key=key)))(())
    gradients = {}
    for name, layer, _, previous in _walk(separate, params):
        a = result.activations[previous] if previous else x
        if isinstance(layer, layers.LayerNorm) and 0 in dims_of("layer_norm", layer.axes, a.ndim):
            raise bad_value(op, f"{name}: axes", "dims of one example", f"{layer.axes!r}, which mixes examples")
        if not jax.tree.leaves(by_layer[name]):
            continue
        if name in result.deltas:
            gradients[name] = _layer_gradients(layer, by_layer[name], a, result.deltas[name])
        elif jnp.iscomplexobj(result.activations[name]):
            raise bad_type(op, f"{name}: output", "a real array", result.activations[name].dtype)
        # No gradient passes an integer output.
    dtype = jax.tree.leaves(x)[0].dtype
    norms_like = jnp.zeros(n, dtype if jnp.issubdtype(dtype, jnp.floating) else None)
    return _NetGradients(gradients, leaf_indices, params, norms_like)


def _batch(op: str, x: Any, others: Any) -> Any:
    """Return x as an array, or a tree of arrays with a leading N, marked as varying over the devices of ``others``.

    Without that mark, δ of a replicated x would be a sum over devices.
    """
    leaves = jax.tree.leaves(x)
    x = jax.tree.map(jnp.asarray, x) if leaves and all(map(jnp.ndim, leaves)) else array(op, "x", x)
    leaves, tree = jax.tree.flatten(x)
    others = [a for a in jax.tree.leaves(others) if isinstance(a, Array)]
    return jax.tree.unflatten(tree, varying_alike((*leaves, *others))[: len(leaves)])


def _refuse_key(op: str, name: str, layer: Layer, params: Any, key: Array | None) -> None:
    """Raise ValueError for a custom layer with parameters if there is a key."""
    if key is not None and jax.tree.leaves(params):
        raise bad_value(op, name, "a layer of jaxcnn.layers if key is given", repr(layer))


def _layer_gradients(layer: Layer, params: Any, x: Array, delta: Array) -> _LayerGradients:
    known: Any = layer if _has_products(layer) else None
    match known:
        case layers.Conv():
            x, c = _correlation(known, x, params["weight"], known.groups)
            return _ConvGradients(params, c, x, delta)
        case layers.DepthwiseConv():
            x, c = _correlation(layer, x, params["weight"], x.shape[-1])
            return _ConvGradients(params, c, x, delta)
        case layers.ConvTranspose():
            x, c = _transposed(layer, x, params["weight"])
            return _ConvGradients(params, c, delta, x, transposed=True)
        case layers.HiddenLayer():
            x, c = _correlation(known, x, params["weight"], known.groups)
            win = pooling.pool_window(
                "hidden_layer", c.window.out, known.window, known.pool_stride, known.pool_padding, 1, False, "pool_"
            )
            # The same as in the forward pass; within one program it is computed once.
            static = hidden.Hidden(c, win)
            _, code = on_any_mesh(hidden.hidden_with_code, static, x, params["weight"], params["bias"])
            return _ConvGradients(params, c, x, on_any_mesh(pooling.scatter_to_winners, win, delta, code))
        case layers.Dense():
            positions = math.prod(x.shape[1:-1])
            return _DenseGradients(params, *(a.reshape(a.shape[0], positions, a.shape[-1]) for a in (x, delta)))
    return _other_gradients(layer, params, x, delta)


def _correlation(layer: Any, x: Array, w: Array, groups: int) -> tuple[Array, Correlation]:
    return convolution.correlation_of(
        type(layer).__name__, x, w, layer.stride, layer.padding, layer.dilation, groups, *_dtype_options(layer)
    )


def _transposed(layer: Any, x: Array, w: Array) -> tuple[Array, Correlation]:
    """Return the input, extended by zeros as in `conv_transpose`, and the geometry of the `conv` that it transposes."""
    options = (layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups)
    c = convolution.transposed_correlation_of("conv_transpose", x, w, *options, *_dtype_options(layer))
    ends = [(0, out - n) for n, out in zip(x.shape[1:-1], c.window.out, strict=True)]
    return (jnp.pad(x, ((0, 0), *ends, (0, 0))) if any(end for _, end in ends) else x), c


def _dtype_options(layer: Any) -> tuple[Any, Any]:
    return getattr(layer, "preferred_element_type", None), getattr(layer, "precision", None)


def _sum_positions(delta: Array) -> Array:
    """Return ``(N, O)``: each example's Σ δ."""
    return jnp.sum(delta, range(1, delta.ndim - 1))


def _scale(a: Array, factors: Array) -> Array:
    """Return ``a`` with each example multiplied by its factor."""
    return a * factors.reshape(-1, *(1,) * (a.ndim - 1)).astype(a.dtype)


def _cast_like(params: Params, gradients: Params) -> Params:
    """Return the gradients of ``params`` in their dtypes."""
    return {name: gradients[name].astype(a.dtype) for name, a in params.items()}
