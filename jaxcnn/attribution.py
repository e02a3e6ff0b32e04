"""Attribution: which pixels an output depends on.

`attribute` is the entry point. Each method has its own function. All of them are pure functions of arrays, with the net
and the options static:

    heat = jax.jit(lambda params, x, target: attribute(net, params, x, target, rules=epsilon_plus()))

Throughout, x is ``(N, …)`` and the net's outputs y are ``(N, classes)``. ``target`` is the class to explain: one int in
``[0, classes)``, or one per example. The map has the shape of x. Dropout is inactive. The value of a traced target is
unknown during tracing; if it is out of range, the map of that example is NaN.

A net is traced like any other function, so the operations in custom layers are those of the trace. `deep_lift` and
`relevance` need a rule at each step that depends on x: they raise an error that names a step without.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
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
from jaxcnn.composites import epsilon_alpha2_beta1 as epsilon_alpha2_beta1
from jaxcnn.composites import epsilon_alpha2_beta1_flat as epsilon_alpha2_beta1_flat
from jaxcnn.composites import epsilon_gamma_box as epsilon_gamma_box
from jaxcnn.composites import epsilon_plus as epsilon_plus
from jaxcnn.composites import epsilon_plus_flat as epsilon_plus_flat
from jaxcnn.composites import excitation_backprop as excitation_backprop
from jaxcnn.geometry import PerDim, Window, window
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.net import Model, expect_model
from jaxcnn.ops.mesh import automatic_inside
from jaxcnn.selection import Rules
from jaxcnn.taps import Collector, probe
from jaxcnn.traced_model import TracedModel, function_of, traced_model


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
    model = traced_model(net, params, x, rules)
    return _delta_of_input(model, x, _check_targets(x, model.result_type(), target))


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
    model = traced_model(net, params, x, rules)
    return x * _delta_of_input(model, x, _check_targets(x, model.result_type(), target))


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
            need no rule. A batch norm without a rule is part of the convolution or dense layer before it; without such
            a layer, it uses `Epsilon`.

    Returns:
        An array of x's shape.

    Raises:
        ValueError: if another op has no rule, because its gradient is not a relevance; if a rule does not fit its op;
            if a batch norm has no statistics; or if another step depends on x and is neither y = a ∘ x + c nor moves
            elements. The message names the layer.
        TypeError: if rules is None.

    Source: Bach et al. 2015.
    """
    x = _check_batch(x)
    if rules is None:
        raise bad_type("attribute", "rules", "given for method 'relevance'", "None")
    model = traced_model(net, params, x, rules)
    targets = _check_targets(x, model.result_type(), target)
    return targets.nan_if_invalid(model.relevance(x, targets.select))


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
    model = traced_model(net, params, x, rules)
    targets = _check_targets(x, model.result_type(), target)
    nodes, weights = np.polynomial.legendre.leggauss(static_int("attribute", "steps", steps, least=1))
    points = jnp.asarray((1 + nodes) / 2, x.dtype), jnp.asarray(weights / 2, x.dtype)

    def add(total: Array, point: tuple[Array, Array]) -> tuple[Array, None]:
        t, weight = point
        return total + weight * _delta_of_input(model, x0 + t * (x - x0), targets), None

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
    model = traced_model(net, params, x, rules)
    targets = _check_targets(x, model.result_type(), target)
    dims = tuple(range(1, x.ndim))
    sigma = fraction * (x.max(dims, keepdims=True) - x.min(dims, keepdims=True))

    def add(total: Array, key: Array) -> tuple[Array, None]:
        xi = jax.random.normal(key, x.shape, x.dtype)
        return total + _delta_of_input(model, x + sigma * xi, targets), None

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
    model = traced_model(net, params, x)
    targets = _check_targets(x, model.result_type(), target)

    def output(x: Array) -> Array:
        return targets.select(model.outputs(x)).sum(1)

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
        layer: name of a layer whose output is images, such as "conv2" or "residual1/conv2"; usually the last one; or
            the name of an operation, as in `jaxcnn.operations`, or of a `tap`.
        relu: whether to drop negative evidence, as in the paper.
        rules: replacement backward rules for the layers after it.

    Returns:
        ``(N, *spatial)`` of that layer, to be scaled up to x's size.

    Raises:
        ValueError: if the layer does not exist, or its output is not images.

    Source: Selvaraju et al. 2017.
    """
    x = _check_batch(x)
    relu = static_bool("attribute", "relu", relu)
    model = traced_model(net, params, x, rules)
    names = model.tap_names()
    if layer not in names:
        near = ", ".join(nearest(str(layer), names))
        raise bad_value(
            "attribute", "layer", "the name of a layer, operation or tap", f"{layer!r}; the nearest are {near}"
        )

    def tapped(probes: Mapping[str, Array]) -> tuple[Array, Collector]:
        collector = Collector(probes)
        with collector.collecting():
            return model.outputs(x), collector

    types: dict[str, Any] = {}

    def look() -> Array:
        y, collector = tapped({})
        types.update(collector.types())
        return y

    targets = _check_targets(x, jax.eval_shape(look), target)
    if layer not in types:
        raise bad_value("attribute", "layer", "one whose output has a floating dtype", repr(layer))
    if types[layer].ndim < 3:
        got = f"{layer!r} with output {types[layer].shape}"
        raise bad_value("attribute", "layer", "one whose output is (N, *spatial, C)", got)

    def output(shift: Array) -> tuple[Array, Array]:
        y, collector = tapped({layer: shift})
        return y, collector.values[layer]

    y, pull, a = jax.vjp(output, probe(types[layer]), has_aux=True)
    (delta,) = pull(targets.select(jnp.ones_like(y)))
    channel = model.channel(layer)
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
        ValueError: if the rule does not fit an op, or if another step is not linear in x. The message names the layer.

    Source: Shrikumar et al. 2017.
    """
    x = _check_batch(x)
    x0 = _broadcast_baseline(x, "reference", reference)
    both = jnp.concatenate([x, x0])
    model = traced_model(net, params, both)
    targets = _check_targets(x, jax.eval_shape(functools.partial(function_of(net), params), x), target)
    y, pull = model.rescaled(both)
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
# Shared parts


def _delta_of_input(model: TracedModel, x: Array, targets: "_Targets") -> Array:
    """Return δ of x, where δ of the outputs is 1 at the target and 0 elsewhere."""
    y, pull = jax.vjp(model.outputs, x)
    return targets.nan_if_invalid(pull(targets.select(jnp.ones_like(y)))[0])


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
