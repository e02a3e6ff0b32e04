"""Attribution: which pixels an output depends on.

`attribute` is the entry point. Each method has its own function. The composites are LRP's rules for a whole net, as
mappings for ``rules=``. All of them are pure functions of arrays, with the net and the options static:

    heat = jax.jit(lambda params, x, target: attribute(net, params, x, target, rules=epsilon_plus()))

Throughout, x is ``(N, …)`` and the net's outputs y are ``(N, classes)``. ``target`` is the class to explain: one int in
``[0, classes)``, or one per example. The map has the shape of x. Dropout is inactive. The value of a traced target is
unknown during tracing; if it is out of range, the map of that example is NaN.

Custom layers are exact under the methods that need only the gradient. `deep_lift` and `relevance` need more: they raise
an error that names a layer that computes anything outside the ops that receive the rule.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import ArrayLike

from jaxcnn.arguments import (
    array,
    arrays,
    bad_type,
    bad_value,
    check_range,
    integers,
    nearest,
    one_key,
    positive,
    spatial_dims,
    static_bool,
    static_float,
    static_int,
)
from jaxcnn.folding import fold_batch_norm
from jaxcnn.geometry import PerDim, Window, window
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.layers import Activation, BatchNorm, Dense, Dropout, Flatten, Layer, LpPool, Params, Relu
from jaxcnn.net import Model, Residual, Serial, expect_model, is_custom, layers_of, located, ops_of
from jaxcnn.ops.mesh import automatic_inside
from jaxcnn.ops.rule import Call, Rule, autodiff, rule_name
from jaxcnn.propagation import for_relevance, for_rescale, reads
from jaxcnn.rules.relevance import AlphaBeta, Epsilon, Flat, Gamma, ZBox, ZeroParams, ZPlus, pass_through, rescale
from jaxcnn.selection import (
    Checked,
    First,
    IfThere,
    Rules,
    Selection,
    check_matches,
    check_rules,
    rule_for,
    rule_of_sum,
)
from jaxcnn.taps import Collector, probe, tapped_name
from jaxcnn.tracing import Operation, Program, Traced, Value, evaluate
from jaxcnn.tracing.affine import Chain, channel_dims, run_chains
from jaxcnn.tracing.replace import OfOps, with_rules
from jaxcnn.tracing.replace import check_rules as check_function_rules
from jaxcnn.tracing.trace import trace_call


def attribute(
    net: Model,
    params: Any,
    x: ArrayLike,
    target: ArrayLike,
    *,
    method: str | None = None,
    rules: Rules | None = None,
    **options: Any,
) -> Array:
    """Return a map of how much each pixel of ``x`` contributes to the output ``target``.

    Args:
        net: a net from `serial`, or any function of ``params`` and ``x`` that returns ``(N, classes)``, such as
            ``apply`` of a Flax module. A function is traced, as by `jaxcnn.explicit`.
        params: its parameters, any tree.
        x: ``(N, …)``.
        target: a class, or one per example, ``(N,)``.
        method: "gradient", "gradient_times_input", "integrated_gradients", "smooth_grad", "grad_cam", "occlusion",
            "relevance" or "deep_lift": the function of this name in `jaxcnn.attribution`. None selects "relevance" if
            there are rules, and "gradient" otherwise.
        rules: replacement backward rules, as in `Serial.apply` for a net and `jaxcnn.explicit` for a function; for
            "relevance", one of the composites or your own.
        **options: keyword arguments of that function, such as ``layer=`` for "grad_cam".

    Returns:
        An array of x's shape; for "grad_cam" one number per pixel of the layer, ``(N, *spatial)``.

    Raises:
        ValueError: if the method, layer or target does not exist, or a shape does not fit.
        TypeError: if an argument has the wrong type or dtype, an option is not one of the method's, or a required
            option is missing.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> from jaxcnn import attribution
    >>> net = jaxcnn.serial(jaxcnn.HiddenLayer(4, 3), jaxcnn.Flatten(), jaxcnn.Dense(10))
    >>> params = net.init(jax.random.key(0), (28, 28, 1))
    >>> x = jax.random.uniform(jax.random.key(1), (2, 28, 28, 1))
    >>> heat = jaxcnn.attribute(net, params, x, target=3, rules=attribution.epsilon_plus())
    >>> heat.shape
    (2, 28, 28, 1)
    >>> bool(jnp.allclose(heat.sum((1, 2, 3)), net.apply(params, x)[:, 3], rtol=1e-3))  # relevance is conserved
    True
    >>> jaxcnn.attribute(net, params, x, jnp.array([3, 7]), method="grad_cam", layer="hidden_layer1").shape
    (2, 13, 13)
    """
    expect_model("attribute", net)
    method = ("gradient" if rules is None else "relevance") if method is None else method
    if not isinstance(method, str) or method not in METHODS:
        raise bad_value("attribute", "method", f"one of {', '.join(METHODS)}", repr(method))
    if rules is not None:
        options["rules"] = rules
    _check_options(method, options)
    return METHODS[method](net, params, x, target, **options)


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(METHODS[method]).parameters.values()
    is_required = {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in options:
        if name not in is_required:
            raise bad_type("attribute", f"options of method {method!r}", f"among {', '.join(is_required)}", name)
    for name, required in is_required.items():
        if required and name not in options:
            raise bad_type("attribute", name, f"given for method {method!r}", "none")


@automatic_inside()
def gradient(net: Model, params: Any, x: ArrayLike, target: ArrayLike, *, rules: Rules | None = None) -> Array:
    """Return ∂y_target/∂x; δ starts as 1.

    With ``rules={Relu: guided_relu}`` this is guided backprop, and so on.

    Args:
        net: a net or function, as in `attribute`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one per example.
        rules: replacement backward rules, as in `Serial.apply`.

    Returns:
        An array of x's shape.

    Source: Simonyan et al. 2013.
    """
    x = _check_batch(x)
    model = _model(net, params, x)
    return _delta_of_input(model, params, x, _targets(model, params, x, target), rules)


@automatic_inside()
def gradient_times_input(
    net: Model, params: Any, x: ArrayLike, target: ArrayLike, *, rules: Rules | None = None
) -> Array:
    """Return ``x ∘ ∂y_target/∂x``.

    Args:
        net: a net or function, as in `attribute`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one per example.
        rules: replacement backward rules, as in `Serial.apply`.

    Returns:
        An array of x's shape.

    Source: Shrikumar et al. 2016.
    """
    x = _check_batch(x)
    model = _model(net, params, x)
    return x * _delta_of_input(model, params, x, _targets(model, params, x, target), rules)


@automatic_inside()
def relevance(net: Model, params: Any, x: ArrayLike, target: ArrayLike, *, rules: Rules) -> Array:
    """Run layer-wise relevance propagation: δ starts as the output y_target itself, and rules propagate it to x.

    This corresponds to zennit's ``Gradient(model, composite)(x, lambda y: y * one_hot)``. Rules that conserve relevance
    give a map whose sum is y_target.

    Args:
        net: a net or function, as in `attribute`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one per example.
        rules: `epsilon_plus`, `epsilon_alpha2_beta1`, `epsilon_gamma_box`, or your own mapping. Max pooling and ReLU
            need no rule. A batch norm without a rule is first folded into an adjacent layer (`fold_batch_norm`);
            without such a layer, it uses `Epsilon`.

    Returns:
        An array of x's shape.

    Raises:
        ValueError: if another layer has no rule, because its gradient is not a relevance; if a rule does not fit its
            layer; if a batch norm has no statistics; if a net has a custom ``apply``; or if a custom layer has a path
            outside the ops that receive its rule. The message names the layer.
        TypeError: if rules is None.

    Source: Bach et al. 2015.
    """
    x = _check_batch(x)
    if rules is None:
        raise bad_type("attribute", "rules", "given for method 'relevance'", "None")
    model = _model(net, params, x)
    targets = _targets(model, params, x, target)
    if isinstance(model, _Function):
        return targets.nan_if_invalid(model.relevance(x, rules, targets.select))
    if not isinstance(rules, Mapping):
        rules = {Layer: rules}
    check_rules(rules, [name for name, _ in model.walk()])
    check_matches(rules, model)
    _check_custom_relevance(model, params, x, rules)
    names = {name for name, _ in model.walk()}
    with_rule = {name for name, layer in model.walk() if rule_for(rules, name, layer) is not None}
    folded_net, params = fold_batch_norm(model, params, leave=with_rule)
    folded = names - {name for name, _ in folded_net.walk()}
    rules = {key: rule for key, rule in rules.items() if key not in folded}
    rules = Checked({**rules, IfThere(BatchNorm): rules.get(BatchNorm, Epsilon())})
    _check_all_have_rules(folded_net, rules)
    return _delta_of_input(folded_net, params, x, targets, rules, lambda y: y)


@automatic_inside()
def integrated_gradients(
    net: Model,
    params: Any,
    x: ArrayLike,
    target: ArrayLike,
    *,
    baseline: ArrayLike = 0.0,
    steps: int = 50,
    rules: Rules | None = None,
) -> Array:
    """Return ``(x − x₀) ∘ ∫₀¹ ∂y_target/∂x (x₀ + t(x − x₀)) dt``, whose sum is y_target(x) − y_target(x₀).

    Args:
        net: a net or function, as in `attribute`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one per example.
        baseline: x₀, of a shape that broadcasts to x's.
        steps: number of quadrature points, by Gauss and Legendre (as in captum).
        rules: replacement backward rules.

    Returns:
        An array of x's shape.

    Source: Sundararajan et al. 2017.
    """
    x = _check_batch(x)
    x0 = _broadcast_baseline(x, "baseline", baseline)
    model = _model(net, params, x)
    targets = _targets(model, params, x, target)
    nodes, weights = np.polynomial.legendre.leggauss(static_int("attribute", "steps", steps, least=1))
    points = jnp.asarray((1 + nodes) / 2, x.dtype), jnp.asarray(weights / 2, x.dtype)

    def add(total: Array, point: tuple[Array, Array]) -> tuple[Array, None]:
        t, weight = point
        return total + weight * _delta_of_input(model, params, x0 + t * (x - x0), targets, rules), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x), points)
    return (x - x0) * total


@automatic_inside()
def smooth_grad(
    net: Model,
    params: Any,
    x: ArrayLike,
    target: ArrayLike,
    *,
    key: Array,
    samples: int = 25,
    noise: float = 0.15,
    rules: Rules | None = None,
) -> Array:
    """Return the mean gradient at x + noise: ``1/n Σ ∂y_target/∂x (x + σξ)``, ξ normal, σ = noise·(max x − min x).

    Args:
        net: a net or function, as in `attribute`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one per example.
        key: from `jax.random.key`; sample i uses the i-th of ``jax.random.split(key, samples)``.
        samples: number of samples.
        noise: σ as a fraction of the range of each example.
        rules: replacement backward rules.

    Returns:
        An array of x's shape.

    Source: Smilkov et al. 2017.
    """
    x = _check_batch(x)
    keys = jax.random.split(one_key("attribute", key), static_int("attribute", "samples", samples, least=1))
    fraction = static_float("attribute", "noise", noise)
    if not 0 <= fraction < float("inf"):
        raise bad_value("attribute", "noise", "a finite number >= 0", noise)
    model = _model(net, params, x)
    targets = _targets(model, params, x, target)
    dims = tuple(range(1, x.ndim))
    sigma = fraction * (x.max(dims, keepdims=True) - x.min(dims, keepdims=True))

    def add(total: Array, key: Array) -> tuple[Array, None]:
        xi = jax.random.normal(key, x.shape, x.dtype)
        return total + _delta_of_input(model, params, x + sigma * xi, targets, rules), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x), keys)
    return total / samples


@automatic_inside()
def occlusion(
    net: Model,
    params: Any,
    x: ArrayLike,
    target: ArrayLike,
    *,
    window: PerDim = 4,
    stride: PerDim | None = None,
    value: float = 0.0,
) -> Array:
    """Return the decrease of y_target when a window of the image is covered; a pixel gets the mean over its windows.

    Args:
        net: a net or function, as in `attribute`.
        params: its parameters.
        x: images ``(N, *spatial, C)``.
        target: a class, or one per example.
        window: size of the covered window, an int or one per dim; the last window may extend beyond the border.
        stride: step of the window, at most ``window``; defaults to ``window``.
        value: value of the covered pixels, in all channels.

    Returns:
        An array of x's shape.

    Source: Zeiler & Fergus 2014.
    """
    x = _check_batch(x)
    win = _covering_windows(spatial_dims("attribute", x), window, stride)
    cover = jnp.asarray(static_float("attribute", "value", value), x.dtype)
    model = _model(net, params, x)
    targets = _targets(model, params, x, target)

    def output(x: Array) -> Array:
        return targets.select(_outputs(model, params, x, None)).sum(1)

    uncovered = output(x)

    def add(total: Array, first: Array) -> tuple[Array, None]:
        """Add one window's result. Its mask is made from its position, so only one mask is in memory at a time."""
        mask = _window_mask(win, first)
        decrease = uncovered - output(jnp.where(mask, cover, x))
        return total + jnp.where(mask, jnp.expand_dims(decrease, range(1, x.ndim)).astype(total.dtype), 0), None

    start = jnp.zeros_like(x[..., :1], accumulator(uncovered.dtype))
    total, _ = jax.lax.scan(add, start, jnp.asarray(_window_starts(win)))
    heat = total / jnp.asarray(_window_counts(win), total.dtype)[None]
    return targets.nan_if_invalid(jnp.broadcast_to(heat, x.shape).astype(x.dtype))


@automatic_inside()
def grad_cam(
    net: Model,
    params: Any,
    x: ArrayLike,
    target: ArrayLike,
    *,
    layer: str,
    relu: bool = True,
    rules: Rules | None = None,
) -> Array:
    """Return the Grad-CAM ``max(Σ_c α_c a_c, 0)`` of a layer's output a, with α_c the mean of δ_c over space.

    Args:
        net: a net or function, as in `attribute`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one per example.
        layer: name of a layer whose output is images, such as "conv2" or "residual1/conv2"; usually the last one. For
            a function, the name of an operation, as in `jaxcnn.operations`, or of a `tap`.
        relu: whether to drop negative evidence, as in the paper.
        rules: replacement backward rules for the layers after it.

    Returns:
        ``(N, *spatial)`` of that layer, to be scaled up to x's size.

    Raises:
        ValueError: if the layer does not exist, its output is not images, or `Serial.apply` does not run it (a net with
            a custom ``apply`` may call it in another way).

    Source: Selvaraju et al. 2017.
    """
    x = _check_batch(x)
    relu = static_bool("attribute", "relu", relu)
    model = _model(net, params, x)
    names = model.tap_names() if isinstance(model, _Function) else [name for name, _ in model.walk()]
    if layer not in names:
        near = nearest(str(layer), names)
        expected = "the name of a layer" if isinstance(model, Serial) else "the name of an operation or tap"
        raise bad_value("attribute", "layer", expected, f"{layer!r}; the nearest are {', '.join(near)}")
    rules = rules if isinstance(model, _Function) else _with_names(model, rules)

    def tapped(probes: Mapping[str, Array]) -> tuple[Array, Collector]:
        collector = Collector(probes)
        with collector.collecting():
            return _outputs(model, params, x, rules), collector

    types: dict[str, Any] = {}

    def look() -> Array:
        y, collector = tapped({})
        types.update(collector.types())
        return y

    targets = _check_targets(x, jax.eval_shape(look), target)
    if layer not in types:
        runs = "Serial.apply" if isinstance(model, Serial) else "the function"
        expected = f"one that {runs} runs and whose output has a floating dtype"
        raise bad_value("attribute", "layer", expected, repr(layer))
    if types[layer].ndim < 3:
        got = f"{layer!r} with output {types[layer].shape}"
        raise bad_value("attribute", "layer", "one whose output is (N, *spatial, C)", got)

    def output(shift: Array) -> tuple[Array, Array]:
        y, collector = tapped({layer: shift})
        return y, collector.values[layer]

    y, pull, a = jax.vjp(output, probe(types[layer]), has_aux=True)
    (delta,) = pull(targets.select(jnp.ones_like(y)))
    channel = model.channel(layer) if isinstance(model, _Function) else -1
    a, delta = jnp.moveaxis(a, channel, -1), jnp.moveaxis(delta, channel, -1)
    alpha = delta.mean(tuple(range(1, a.ndim - 1)), keepdims=True)
    heat = (a * alpha).sum(-1)
    return targets.nan_if_invalid(jnp.maximum(heat, 0) if relu else heat)


@automatic_inside()
def deep_lift(net: Model, params: Any, x: ArrayLike, target: ArrayLike, *, reference: ArrayLike = 0.0) -> Array:
    """Run DeepLIFT with the rescale rule: ``(x − x₀) ∘ m``, whose sum is y_target(x) − y_target(x₀).

    m is δ by `jaxcnn.rules.rescale`, which uses x and x₀ at once.

    Args:
        net: a net or function, as in `attribute`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one per example.
        reference: x₀, of a shape that broadcasts to x's.

    Returns:
        An array of x's shape.

    Raises:
        ValueError: if the rule does not fit an op, or if a custom layer is not linear outside the ops that receive its
            rule. The message names the layer.

    Source: Shrikumar et al. 2017.
    """
    x = _check_batch(x)
    x0 = _broadcast_baseline(x, "reference", reference)
    model = _model(net, params, x)
    targets = _targets(model, params, x, target)
    both = jnp.concatenate([x, x0])
    if isinstance(model, _Function):
        y, pull = model.rescaled(params, both)
    else:
        _check_custom_rescale(model, params, x)
        rules = _with_names(model, rescale)
        y, pull = jax.vjp(lambda both: _outputs(model, params, both, rules), both)
    delta = targets.select(jnp.ones_like(y[: x.shape[0]]))
    m = pull(jnp.concatenate([delta, delta]))[0][: x.shape[0]]
    return targets.nan_if_invalid((x - x0) * m)


#: The methods of `attribute` by name.
METHODS: Mapping[str, Callable[..., Array]] = {
    f.__name__: f
    for f in (
        gradient,
        gradient_times_input,
        integrated_gradients,
        smooth_grad,
        grad_cam,
        occlusion,
        relevance,
        deep_lift,
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Composites: LRP's rules for a whole net

#: Layers of the form x·w + b, and the convolutions among them.
_AFFINE = layers_of("affine", "hidden")
_CONVOLUTIONS = tuple(layer for layer in _AFFINE if layer is not Dense)
#: Layers whose exact rule propagates relevance: to the winner, through an active ReLU, or all of it.
_NEED_NO_RULE = (*layers_of("max", "dropout"), Relu, Flatten)


def epsilon_plus(*, epsilon: float = 1e-6, stabilizer: float = 1e-6, zero_params: ZeroParams = ()) -> dict[Any, Rule]:
    """Return z⁺ for convolutions, and ε for dense layers, average pooling and sums; R passes activations unchanged.

    This corresponds to zennit's EpsilonPlus. z⁺ applies to all kinds of convolutions. The sums are those of residual
    nets. Max pooling keeps its exact rule, R to the winner.

    Args:
        epsilon: ε of dense layers.
        stabilizer: ε of all other fractions.
        zero_params: parameters that the rules of convolutions and dense layers treat as 0, as in `Epsilon`.

    Returns:
        A mapping for ``rules=``.

    Source: Montavon et al. 2019; Kohlbrenner et al. 2020.
    """
    return _composite(ZPlus(stabilizer, zero_params), epsilon, stabilizer, zero_params)


def epsilon_plus_flat(
    net: Model, *, epsilon: float = 1e-6, stabilizer: float = 1e-6, zero_params: ZeroParams = ()
) -> dict[Any, Rule]:
    """Return `epsilon_plus` with the flat rule for the first layer, corresponding to zennit's EpsilonPlusFlat.

    Args:
        net: the net or function, in which the first convolution or dense layer gets the flat rule.
        epsilon: ε of dense layers.
        stabilizer: ε of all other fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.

    Source: Lapuschkin et al. 2019.
    """
    first = _for_first(net, _AFFINE, Flat(stabilizer, zero_params))
    return {**first, **epsilon_plus(epsilon=epsilon, stabilizer=stabilizer, zero_params=zero_params)}


def epsilon_alpha2_beta1(
    *, epsilon: float = 1e-6, stabilizer: float = 1e-6, zero_params: ZeroParams = ()
) -> dict[Any, Rule]:
    """Return `epsilon_plus` with αβ (α = 2, β = 1) for convolutions, corresponding to zennit's EpsilonAlpha2Beta1.

    Args:
        epsilon: ε of dense layers.
        stabilizer: ε of all other fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.
    """
    return _composite(AlphaBeta(2.0, 1.0, stabilizer, zero_params), epsilon, stabilizer, zero_params)


def epsilon_alpha2_beta1_flat(
    net: Model, *, epsilon: float = 1e-6, stabilizer: float = 1e-6, zero_params: ZeroParams = ()
) -> dict[Any, Rule]:
    """Return `epsilon_alpha2_beta1` with the flat rule for the first layer.

    This corresponds to zennit's EpsilonAlpha2Beta1Flat.

    Args:
        net: the net or function, in which the first convolution or dense layer gets the flat rule.
        epsilon: ε of dense layers.
        stabilizer: ε of all other fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.
    """
    first = _for_first(net, _AFFINE, Flat(stabilizer, zero_params))
    return {**first, **epsilon_alpha2_beta1(epsilon=epsilon, stabilizer=stabilizer, zero_params=zero_params)}


def epsilon_gamma_box(
    net: Model,
    low: Any = None,
    high: Any = None,
    *,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    stabilizer: float = 1e-6,
    zero_params: ZeroParams = (),
) -> dict[Any, Rule]:
    """Return `epsilon_plus` with γ for convolutions and zᴮ for the first, corresponding to zennit's EpsilonGammaBox.

    Args:
        net: the net or function, in which the first convolution gets zᴮ.
        low: the smallest value of a pixel after scaling of the net's inputs, a number or one per channel.
        high: the largest value of a pixel.
        epsilon: ε of dense layers.
        gamma: γ of the convolutions.
        stabilizer: ε of all other fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.

    Raises:
        TypeError: if low or high is missing.
    """
    first = _for_first(net, _CONVOLUTIONS, ZBox(low, high, stabilizer, zero_params))
    return {**first, **_composite(Gamma(gamma, stabilizer, zero_params), epsilon, stabilizer, zero_params)}


def excitation_backprop(*, stabilizer: float = 1e-6, zero_params: ZeroParams = ()) -> dict[Any, Rule]:
    """Return z⁺ for convolutions and dense layers, and ε for average pooling and sums; activations stay exact.

    This corresponds to zennit's ExcitationBackprop.

    Args:
        stabilizer: ε of all fractions.
        zero_params: parameters to treat as 0, as in `epsilon_plus`.

    Returns:
        A mapping for ``rules=``.

    Source: Zhang et al. 2016.
    """
    return {
        **_for_types(_AFFINE, ZPlus(stabilizer, zero_params)),
        **_for_sums(stabilizer),
        **_for_types((Activation,), _exact),
        **_for_types((Dropout,), pass_through),
    }


def _composite(conv_rule: Rule, epsilon: float, stabilizer: float, zero_params: ZeroParams) -> dict[Any, Rule]:
    return {
        **_for_types(_CONVOLUTIONS, conv_rule),
        **_for_types((Dense,), Epsilon(epsilon, zero_params)),
        **_for_sums(stabilizer),
        **_for_types((Activation, Dropout), pass_through),
    }


def _for_sums(stabilizer: float) -> dict[Any, Rule]:
    return _for_types((*layers_of("sum"), LpPool, Residual), Epsilon(stabilizer))


def _for_types(types: tuple[type, ...], rule: Rule) -> dict[Any, Rule]:
    """Return the rule for each of these layer types, none of which a net has to contain."""
    return dict.fromkeys(map(IfThere, types), rule)


def _for_first(net: Model, types: tuple[type, ...], rule: Rule) -> dict[Any, Rule]:
    """Return the rule under the name of the first layer of these types, if there is one.

    The operations of a function are known once it is called; until then the key is a `First`.
    """
    expect_model("attribute", net)
    if not isinstance(net, Serial):
        return {First(types): rule}
    return dict.fromkeys([name for name, layer in net.walk() if isinstance(layer, types)][:1], rule)


def _exact(call: Call, delta: Any) -> tuple[Any, ...]:
    """Return the exact δ, for composites that select it explicitly."""
    return call.exact(delta)


def _check_all_have_rules(net: Serial, rules: Mapping[Any, Rule]) -> None:
    for name, layer in (("the net", net), *net.walk()):
        if _ends_in_sum(layer):
            rule, where = rule_of_sum(rules, layer), f"the sum of {name}"
        elif isinstance(layer, Serial) or (isinstance(layer, _NEED_NO_RULE) and not is_custom(layer)):
            continue
        else:
            rule, where = rule_for(rules, name, layer), name
        if rule in (None, autodiff):
            expected = "given for each layer whose gradient is not a relevance"
            raise bad_value("attribute", "rules", expected, f"none for {where}, a {type(layer).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# Shared parts


def _delta_of_input(
    net: "Serial | _Function",
    params: Any,
    x: Array,
    targets: "_Targets",
    rules: Rules | None,
    start: Callable[[Array], Array] = jnp.ones_like,
) -> Array:
    """Return the net's δ of x, where δ of the outputs is ``start(y)`` at the target and 0 elsewhere."""
    if isinstance(net, Serial):
        rules = _with_names(net, rules)
    y, pull = jax.vjp(lambda x: _outputs(net, params, x, rules), x)
    return targets.nan_if_invalid(pull(targets.select(start(y)))[0])


def _outputs(net: "Serial | _Function", params: Any, x: Array, rules: Rules | None) -> Array:
    if isinstance(net, _Function):
        return net.outputs(x, rules)
    return net.apply(params, x) if rules is None else net.apply(params, x, rules=rules)


@dataclasses.dataclass(frozen=True)
class _Named:
    """A rule that puts the name of its layer in front of its error messages."""

    rule: Rule
    name: str

    def __call__(self, call: Call, delta: Any) -> tuple[Any, ...]:
        with located(self.name):
            return self.rule(call, delta)

    def __repr__(self) -> str:
        return f"{rule_name(self.rule)} of {self.name}"


def _with_names(net: Serial, rules: Rules | None) -> Rules | None:
    """Wrap each rule so that its errors name the layer, which is unknown in the backward pass."""
    if rules is None or rules is autodiff:
        return rules
    if not isinstance(rules, Mapping) and not callable(rules):
        raise bad_type("attribute", "rules", "a rule or a mapping from layers to rules", repr(rules))
    if isinstance(rules, Mapping):
        check_rules(rules, [name for name, _ in net.walk()])
        check_matches(rules, net)

    def named(rule: Any, name: str) -> Any:
        is_rule = callable(rule) and isinstance(rule, Hashable) and rule is not autodiff
        return _Named(rule, name) if is_rule else rule

    layers = {name: layer for name, layer in net.walk() if not isinstance(layer, Serial)}
    by_name: dict[Any, Any] = {name: named(rule_for(rules, name, layer), name) for name, layer in layers.items()}
    sums = {type(layer): layer for layer in (net, *(layer for _, layer in net.walk())) if _ends_in_sum(layer)}
    # The first key that matches wins, so a subclass comes before its base class.
    for_sums: dict[Any, Any] = {
        kind: named(rule_of_sum(rules, sums[kind]), kind.__name__) for kind in sorted(sums, key=_depth)[::-1]
    }
    for_layers: dict[Any, Any] = {(lambda at, _, name=name: at == name): rule for name, rule in by_name.items()}
    # None for a sum stays: without it, the key of a base class would match.
    return Checked({key: rule for key, rule in for_layers.items() if rule is not None} | for_sums)


def _ends_in_sum(layer: Layer) -> bool:
    """Whether the layer is a net whose last operation is a sum, which takes a rule."""
    return isinstance(layer, Serial) and bool(layer.sum_keys)


def _depth(kind: type) -> int:
    """Return the number of classes that a class inherits from."""
    return len(kind.__mro__)


@dataclasses.dataclass(frozen=True)
class _Targets:
    """The classes to explain, checked against the net's outputs."""

    #: ``()`` or ``(N,)``.
    target: Any
    classes: int
    #: Whether every target is known to be a class.
    known: bool

    def select(self, y: Array) -> Array:
        """Return ``(N, classes)``: y at the target and 0 elsewhere, even where y is not finite."""
        target = jnp.expand_dims(jnp.broadcast_to(self.target, y.shape[:1]), 1)
        return jnp.where(target == jnp.arange(self.classes, dtype=target.dtype)[None], y, 0)

    def nan_if_invalid(self, heat: Array) -> Array:
        """Return the map, with NaN throughout if the target is not a class."""
        if self.known:
            return heat
        valid = (self.target >= 0) & (self.target < self.classes)
        return jnp.where(jnp.expand_dims(valid, range(valid.ndim, heat.ndim)), heat, jnp.nan)


def _targets(net: "Serial | _Function", params: Any, x: Array, target: Any) -> _Targets:
    """Return the targets, checked before anything is computed."""
    if isinstance(net, _Function):
        return _check_targets(x, net.result_type(), target)
    return _check_targets(x, jax.eval_shape(lambda: net.apply(params, x)), target)


def _check_targets(x: Array, y: Any, target: Any) -> _Targets:
    shape, result = getattr(y, "shape", None), "the result of net"
    if shape is None:
        raise bad_type("attribute", result, "one array (N, classes)", type(y).__name__)
    if len(shape) != 2 or shape[0] != x.shape[0]:
        raise bad_value("attribute", result, f"({x.shape[0]}, classes), a row for each example", f"shape {shape}")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise bad_type("attribute", result, "of a floating dtype", y.dtype)
    n, classes = shape
    if target is None or isinstance(target, str):
        raise bad_type("attribute", "target", "an array", repr(target))
    known = _is_known(target)
    values = _concrete(target) if known else integers("attribute", "target", target)
    if values.shape not in ((), (n,)):
        raise bad_value("attribute", "target", f"an int or {n} of them, one for each example", f"shape {values.shape}")
    if known:
        check_range("attribute", "target", values, classes)
        values = values.astype(np.int32)
    return _Targets(values, classes, known)


def _is_known(target: Any) -> bool:
    """Whether the value of an array, or of each array in a list, is known: not traced, and all on this process."""
    return not any(
        isinstance(a, jax.core.Tracer) or (isinstance(a, jax.Array) and not a.is_fully_addressable)
        for a in jax.tree.leaves(target)
    )


def _concrete(target: Any) -> np.ndarray:
    """Return a known target as integers that stay known inside jit and scan; ops of `jax.numpy` would trace it."""
    try:
        values = np.asarray(target)
    except (TypeError, ValueError):
        raise bad_type("attribute", "target", "an array", type(target).__name__) from None
    if not np.issubdtype(values.dtype, np.integer):
        raise bad_type("attribute", "target", "of an integer dtype", values.dtype)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Functions


def _model(net: Any, params: Any, x: Array) -> "Serial | _Function":
    """Return a net as it is, and a function as it is traced for these parameters and this x."""
    expect_model("attribute", net)
    return net if isinstance(net, Serial) else _Function(net, trace_call("attribute", net, (params, x)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Function:
    """A function of parameters and x, traced for one call of `attribute`."""

    fun: Callable[..., Any]
    traced: Traced

    @property
    def x(self) -> Value:
        """Return the input x, which is the last argument."""
        return self.traced.program.inputs[-1]

    def result_type(self) -> Any:
        """Return the type of the function's result."""
        return self.traced.result(
            [jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in self.traced.program.outputs]
        )

    def outputs(self, x: Array, rules: Rules | None) -> Any:
        """Return the function's result for another x."""
        return self._evaluated(with_rules("attribute", self.traced.program, self._keyed(rules)), x)

    def _evaluated(self, program: Program, x: Array) -> Any:
        run = run_chains if any(isinstance(step.form, Chain) for step in program.operations()) else None
        return self.traced.result(evaluate(program, (*self.traced.arrays[:-1], x), run))

    def relevance(self, x: Array, rules: Any, select: Callable[[Array], Array]) -> Array:
        """Return relevance, which starts as ``select(y)``."""
        keyed = self._keyed(rules)
        program = for_relevance(with_rules("attribute", self.traced.program, keyed), self.x, keyed)
        y, pull = jax.vjp(functools.partial(self._evaluated, program), x)
        return pull(select(y))[0]

    def rescaled(self, params: Any, both: Array) -> tuple[Array, Any]:
        """Return outputs and VJP of DeepLIFT for examples followed by references."""
        doubled = _Function(self.fun, trace_call("attribute", self.fun, (params, both)))
        program = for_rescale(doubled.traced.program, doubled.x)
        return jax.vjp(functools.partial(doubled._evaluated, program), both)

    def tap_names(self) -> list[str]:
        """Return the names of all operations and taps."""
        return list(self._tapped())

    def channel(self, name: str) -> int:
        """Return the dim of the channels in the value at a tap."""
        value = self._tapped()[name]
        return channel_dims(self.traced.program).get(value, len(value.shape) - 1)

    def _tapped(self) -> dict[str, Value]:
        program = self.traced.program
        taps = {name: step.outputs[0] for step in program.steps if (name := _tap_name(step)) is not None}
        return {step.name: step.output for step in program.operations() if step.tapped} | taps

    def _keyed(self, rules: Any) -> Any:
        """Return rules whose keys are those of `jaxcnn.explicit`, with the keys of composites as op names."""
        if not isinstance(rules, Mapping):
            check_function_rules("attribute", rules)
            return rules
        keyed: dict[Any, Any] = {}
        for key, rule in rules.items():
            if isinstance(key, First):
                names = [step.name for step in self._dependent() if step.form.kind in ops_of(*key.kinds)]
                keyed |= dict.fromkeys(names[:1], rule)
            else:
                keyed.setdefault(OfOps(ops_of(key.kind)) if isinstance(key, IfThere) else key, rule)
        check_function_rules("attribute", keyed)
        return keyed

    def _dependent(self) -> list[Operation]:
        """Return the operations that depend on x, in order."""
        program = self.traced.program.without_checkpoints()
        data = program.dependents([self.x])
        return [step for step in program.steps if isinstance(step, Operation) and reads(step, data)]


def _tap_name(step: Any) -> str | None:
    return None if isinstance(step, Operation) else tapped_name(step.eqn)


# ---------------------------------------------------------------------------------------------------------------------
# Custom layers and nets


def _check_custom_relevance(net: Serial, params: Params, x: Array, rules: Mapping[Any, Rule]) -> None:
    """Raise ValueError for a layer through which relevance would pass by the gradient, entirely or in part."""
    for name, layer in (("the net", net), *net.walk()):
        if callable(join := getattr(layer, "join", None)):
            raise bad_value("attribute", f"{name}: join", "'concatenate' or 'add' for relevance", repr(join))
        if isinstance(layer, Serial) and is_custom(layer):
            expected = "a net without a custom apply, because no rule divides the sums and products in it"
            raise bad_value("attribute", name, expected, type(layer).__name__)

    def check(name: str, layer: Layer, params: Params, x: Array) -> None:
        if rule_for(rules, name, layer) in (None, autodiff):
            return
        back = _input_delta(lambda x, params: layer.apply(params, x, rule=_stop))
        if _dependencies(back, x, params)[-1]:
            expected = "a composition of ops that receive its rule"
            got = f"{type(layer).__name__}, whose output depends on x in another way"
            raise bad_value("attribute", f"apply of {name}", expected, got)

    _check_custom_layers(net, params, x, check)


def _check_custom_rescale(net: Serial, params: Params, x: Array) -> None:
    """Raise ValueError for a layer whose slope, outside the ops that get `rescale`, is not constant."""
    rules = _with_names(net, _constant)

    def check(name: str, layer: Layer, params: Params, x: Array) -> None:
        if isinstance(layer, Serial):
            options: dict[str, Any] = {"rules": Selection(rules, f"{name}/") if name else rules}
        else:
            options = {"rule": _constant}
        back = _input_delta(lambda x, params: layer.apply(params, x, **options))
        if _dependencies(back, x, params)[0]:
            expected = "linear outside of the ops that receive its rule"
            got = f"{type(layer).__name__}, whose slope depends on x"
            raise bad_value("attribute", f"apply of {name or 'the net'}", expected, got)

    _check_custom_layers(net, params, x, check)


def _check_custom_layers(
    net: Serial, params: Params, x: Array, check: Callable[[str, Layer, Params, Array], None]
) -> None:
    """Run ``check(name, layer, params, x)`` for each custom layer and net, without computing anything."""
    if any(map(is_custom, (net, *(layer for _, layer in net.walk())))):
        jax.eval_shape(lambda: _with_check(net, check).apply(params, x))


def _with_check(layer: Layer, check: Callable[..., None], name: str = "") -> Layer:
    """Return the layer with `_CheckedLayer` around each custom layer."""
    if is_custom(layer):
        return _CheckedLayer(layer, check, name)
    if not isinstance(layer, Serial):
        return layer
    path = f"{name}/" if name else ""
    net = copy.copy(layer)  # of a subclass with any __init__
    layers = tuple((inner, _with_check(each, check, f"{path}{inner}")) for inner, each in layer.layers)
    object.__setattr__(net, "layers", layers)
    return net


@dataclasses.dataclass(frozen=True)
class _CheckedLayer(Layer):
    """A layer that is checked before it is applied."""

    layer: Layer
    check: Callable[..., None]
    full_name: str

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        self.check(self.full_name, self.layer, params, x)
        return self.layer.apply(params, x)


def _input_delta(f: Callable[[Array, Params], Array]) -> Callable[..., Array]:
    """Return δ of x as a function of x, of the parameters and of a factor of δ."""

    def back(x: Array, params: Params, factor: Array) -> Array:
        y, pull = jax.vjp(lambda x: f(x, params), x)
        if not jnp.issubdtype(y.dtype, jnp.floating):
            return x * factor  # there is no slope: depend on everything
        return pull(factor.astype(y.dtype) * jnp.ones_like(y))[0]

    return back


def _dependencies(back: Callable[..., Array], x: Array, params: Params) -> tuple[bool, bool]:
    """Whether δ of x, by `_input_delta`, depends on x, and whether it depends on δ of the output."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), (x, params))
    jaxpr = jax.make_jaxpr(back)(*shapes, jax.ShapeDtypeStruct((), x.dtype)).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return used[0], used[-1]


def _stop(call: Call, delta: Array) -> tuple[Any, ...]:
    """Send nothing to x; other inputs get a value, which is detected if they depend on x."""
    n = _data_inputs(call)
    return (*(None,) * n, *(_broadcast_like(a, delta.sum()) for a in call.inputs[n:]))


def _constant(call: Call, delta: Array) -> tuple[Any, ...]:
    """Send a number that does not depend on x; other inputs get one that does, which is detected."""
    n = _data_inputs(call)
    return (*(_broadcast_like(a, delta.sum()) for a in call.inputs[:n]), *call.inputs[n:])


def _data_inputs(call: Call) -> int:
    """Return the number of leading inputs that are not parameters."""
    return 2 if call.name == "add" else 1


def _broadcast_like(a: Any, number: Array) -> Any:
    return None if a is None else jnp.broadcast_to(number, a.shape)


def _check_batch(x: Any) -> Array:
    (x,) = arrays("attribute", x=x)
    if x.ndim < 2:
        raise bad_value("attribute", "x", "(N, …)", f"shape {x.shape}")
    return x


def _broadcast_baseline(x: Array, name: str, value: Any) -> Array:
    """Return a baseline in the shape and dtype of x."""
    a = array("attribute", name, value)
    if not jnp.issubdtype(a.dtype, jnp.floating) and not jnp.issubdtype(a.dtype, jnp.integer):
        raise bad_type("attribute", name, "of a real dtype", a.dtype)
    try:
        return jnp.broadcast_to(a, x.shape).astype(x.dtype)
    except ValueError:
        raise bad_value("attribute", name, f"of a shape that broadcasts to {x.shape}", a.shape) from None


def _covering_windows(spatial: tuple[int, ...], size: PerDim, stride: PerDim | None) -> Window:
    """Return windows that cover every pixel."""
    k = positive("attribute", "window", size, len(spatial))
    s = positive("attribute", "stride", k if stride is None else stride, len(spatial))
    if any(i > j for i, j in zip(s, k, strict=True)):
        raise bad_value("attribute", "stride", f"at most the window {k}, so that no pixel is left out", s)
    return window("attribute", spatial, k, stride=s, ceil_mode=True)


def _window_starts(win: Window) -> np.ndarray:
    """Return ``(windows, dims)``: the first pixel of each window."""
    return np.indices(win.out, np.int32).reshape(win.ndim, -1).T * np.asarray(win.stride, np.int32)


def _window_mask(win: Window, first: Array) -> Array:
    """Return ``(1, *spatial, 1)``: a mask of the window whose first pixel is ``first``."""
    mask = jnp.ones((1,) * (win.ndim + 2), bool)
    for dim, (n, size) in enumerate(zip(win.shape, win.size, strict=True)):
        offset = jnp.arange(n, dtype=first.dtype) - first[dim]
        mask &= jnp.expand_dims((offset >= 0) & (offset < size), [d for d in range(win.ndim + 2) if d != dim + 1])
    return mask


def _window_counts(win: Window) -> np.ndarray:
    """Return ``(*spatial, 1)``: the number of windows that contain each pixel."""
    counts = np.ones((), int)
    for n, size, stride, out in zip(win.shape, win.size, win.stride, win.out, strict=True):
        offset = np.arange(n) - np.arange(out)[:, None] * stride
        counts = np.multiply.outer(counts, ((offset >= 0) & (offset < size)).sum(0))
    return counts[..., None]
