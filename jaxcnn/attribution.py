"""Attribution: which pixels an output hangs on.  Rooms: imports `jaxcnn.net` and `jaxcnn.rules`.

`attribute` is the door; behind it stand one function for each method, and the composites: LRP's rules for a whole net,
as mappings for ``rules=``.  All of them are pure functions of arrays, with the net and the options static:

    heat = jax.jit(lambda params, x, target: attribute(net, params, x, target, rules=epsilon_plus()))

Everywhere x is ``(N, …)``, the net's outputs y are ``(N, classes)``, ``target`` is the class asked about, one int or
one for each example, and the map is of x's shape.  Dropout is off.  A target that jit traces cannot be looked at: where
it is out of range, the map is NaN.
"""

import dataclasses
import difflib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxcnn.folding import fold_batch_norm
from jaxcnn.geometry import PerDim, Window, fail, positive, static_float, static_int, window
from jaxcnn.layers import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DepthwiseConv,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    HiddenLayer,
    Layer,
    LpPool,
    MaxPool,
    Params,
    Relu,
    _Activation,
)
from jaxcnn.net import (
    Checked,
    IfThere,
    Residual,
    Rules,
    Serial,
    _check_matches,
    _check_rules,
    _located,
    _rule_for,
    _rule_of_sum,
    expect_net,
)
from jaxcnn.ops.mesh import automatic_inside
from jaxcnn.ops.rule import Call, Rule, array, arrays, autodiff, one_key, picture
from jaxcnn.rules.relevance import AlphaBeta, Epsilon, Gamma, ZBox, ZPlus, passed, rescale


def attribute(
    net: Serial,
    params: Params,
    x: ArrayLike,
    target: ArrayLike,
    *,
    method: str | None = None,
    rules: Rules | None = None,
    **options: Any,
) -> Array:
    """A map of what each pixel of ``x`` has to do with the output ``target``.

    Args:
        net: from `serial`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one for each example, ``(N,)``.
        method: "gradient", "gradient_times_input", "integrated_gradients", "smooth_grad", "grad_cam", "occlusion",
            "relevance" or "deep_lift": the function of this name in `jaxcnn.attribution`.  Without it "relevance" if
            there are rules, else "gradient".
        rules: other backward halves, as in `Serial.apply`; for "relevance" one of the composites, or your own.
        options: of that function, such as ``layer=`` for "grad_cam".

    Returns: an array of x's shape; "grad_cam" one number for each pixel of the layer, ``(N, *spatial)``.

    Raises: ValueError for a method, layer, target or shape that is not there; TypeError for dtypes, and for options
        that the method does not take.

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
    expect_net("attribute", net)
    method = ("gradient" if rules is None else "relevance") if method is None else method
    if method not in METHODS:
        _fail(f"method expected {', '.join(METHODS)}; got {method!r}")
    if rules is not None:
        options["rules"] = rules
    return METHODS[method](net, params, x, target, **options)


@automatic_inside()
def gradient(net: Serial, params: Params, x: ArrayLike, target: ArrayLike, *, rules: Rules | None = None) -> Array:
    """∂y_target/∂x.  With ``rules={Relu: guided_relu}`` guided backprop, and so on: δ starts as 1.

    Source: Simonyan et al. 2013.
    """
    return _swept(net, params, _examples(x), target, rules)


@automatic_inside()
def gradient_times_input(
    net: Serial, params: Params, x: ArrayLike, target: ArrayLike, *, rules: Rules | None = None
) -> Array:
    """``x ∘ ∂y_target/∂x``.  Source: Shrikumar et al. 2016."""
    x = _examples(x)
    return x * _swept(net, params, x, target, rules)


@automatic_inside()
def relevance(net: Serial, params: Params, x: ArrayLike, target: ArrayLike, *, rules: Rules) -> Array:
    """Layer-wise relevance propagation: δ starts as the output y_target itself, and rules hand it back to x.

    As zennit's ``Gradient(model, composite)(x, lambda y: y * one_hot)``.  Rules that conserve give a map whose sum is
    y_target.

    Args:
        net: from `serial`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one for each example.
        rules: `epsilon_plus`, `epsilon_alpha2_beta1`, `epsilon_gamma_box`, or a mapping of your own.  Max pooling and
            ReLU need no rule; a batch norm without one is folded into its neighbour first (`fold_batch_norm`), and
            taken by `Epsilon` where it has none.

    Raises: ValueError for other layers without a rule, whose gradient is no relevance, for rules that do not fit, and
        for batch norm without statistics; each names the layer.  Source: Bach et al. 2015.
    """
    x = _examples(x)
    if isinstance(rules, Mapping):
        _check_rules(rules, [name for name, _ in net.walk()])
        _check_matches(rules, net)
        whole, given = net, {name for name, layer in net.walk() if _rule_for(rules, name, layer) is not None}
        net, params = fold_batch_norm(net, params, leave=given)
        folded = {name for name, _ in whole.walk()} - {name for name, _ in net.walk()}
        rules = {key: rule for key, rule in rules.items() if key not in folded}
        rules = Checked({**rules, IfThere(BatchNorm): rules.get(BatchNorm, Epsilon())})
        _check_all_have_rules(net, rules)
    return _swept(net, params, x, target, rules, lambda y: y)


@automatic_inside()
def integrated_gradients(
    net: Serial,
    params: Params,
    x: ArrayLike,
    target: ArrayLike,
    *,
    baseline: ArrayLike = 0.0,
    steps: int = 50,
    rules: Rules | None = None,
) -> Array:
    """``(x − x₀) ∘ ∫₀¹ ∂y_target/∂x (x₀ + t(x − x₀)) dt``, whose sum is y_target(x) − y_target(x₀).

    Args:
        net: from `serial`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one for each example.
        baseline: x₀, of a shape that broadcasts to x's.
        steps: points of the integral, by Gauss and Legendre (as in captum).
        rules: other backward halves.

    Source: Sundararajan et al. 2017.
    """
    x = _examples(x)
    x0 = _like(x, "baseline", baseline)
    nodes, weights = np.polynomial.legendre.leggauss(_count("steps", steps))
    points = jnp.asarray((1 + nodes) / 2, x.dtype), jnp.asarray(weights / 2, x.dtype)

    def add(total: Array, point: tuple[Array, Array]) -> tuple[Array, None]:
        t, weight = point
        return total + weight * _swept(net, params, x0 + t * (x - x0), target, rules), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x), points)
    return (x - x0) * total


@automatic_inside()
def smooth_grad(
    net: Serial,
    params: Params,
    x: ArrayLike,
    target: ArrayLike,
    *,
    key: Array,
    samples: int = 25,
    noise: float = 0.15,
    rules: Rules | None = None,
) -> Array:
    """The mean gradient at x + noise: ``1/n Σ ∂y_target/∂x (x + σξ)``, ξ normal, σ = noise·(max x − min x).

    Args:
        net: from `serial`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one for each example.
        key: from `jax.random.key`; sample i draws with the ith of ``jax.random.split(key, samples)``.
        samples: how many.
        noise: σ as a part of the range of each example.
        rules: other backward halves.

    Source: Smilkov et al. 2017.
    """
    x = _examples(x)
    keys = jax.random.split(one_key("attribute", key), _count("samples", samples))
    of_example = tuple(range(1, x.ndim))
    sigma = static_float("attribute", "noise", noise) * (
        x.max(of_example, keepdims=True) - x.min(of_example, keepdims=True)
    )

    def add(total: Array, key: Array) -> tuple[Array, None]:
        xi = jax.random.normal(key, x.shape, x.dtype)
        return total + _swept(net, params, x + sigma * xi, target, rules), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x), keys)
    return total / samples


@automatic_inside()
def occlusion(
    net: Serial,
    params: Params,
    x: ArrayLike,
    target: ArrayLike,
    *,
    window: PerDim = 4,
    stride: PerDim | None = None,
    value: float = 0.0,
) -> Array:
    """How far y_target falls when a window of the picture is covered; a pixel gets the mean over its windows.

    Args:
        net: from `serial`.
        params: its parameters.
        x: pictures ``(N, *spatial, C)``.
        target: a class, or one for each example.
        window: entries that are covered at once, an int or one for each dim; the last one may reach past the border.
        stride: how far it moves; default ``window``, and not more.
        value: what it is covered with, in all channels.

    Source: Zeiler & Fergus 2014.
    """
    x = _examples(x)
    win = _covering(picture("attribute", x), window, stride)
    cover = static_float("attribute", "value", value)
    windows = _covered(win)
    covered = jnp.asarray(windows)
    y, seed = _output(net, params, x, target)
    full = (y * seed).sum(1)

    def fall(hidden: Array) -> Array:
        at = jnp.where(hidden[..., None], jnp.asarray(cover, x.dtype), x)
        return full - (net.apply(params, at) * seed).sum(1)

    falls = jax.lax.map(fall, covered)
    times = jnp.asarray(windows.sum(0), falls.dtype)
    heat = jnp.tensordot(falls, covered.astype(falls.dtype), (0, 0)) / times
    return jnp.broadcast_to(heat[..., None], x.shape).astype(x.dtype)


@automatic_inside()
def grad_cam(
    net: Serial,
    params: Params,
    x: ArrayLike,
    target: ArrayLike,
    *,
    layer: str,
    relu: bool = True,
    rules: Rules | None = None,
) -> Array:
    """Grad-CAM: ``max(Σ_c α_c a_c, 0)`` over the channels of a layer's output a, with α_c the mean of δ_c over space.

    Args:
        net: from `serial`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one for each example.
        layer: its name, "conv2" or "residual1/conv2"; its output is pictures.  Most often the last such layer.
        relu: whether what speaks against the class is left out, as in the paper.
        rules: other backward halves for the layers after it.

    Returns: ``(N, *spatial)`` of that layer, to be scaled up to x's size.

    Source: Selvaraju et al. 2017.
    """
    x = _examples(x)
    names = [name for name, _ in net.walk()]
    if layer not in names:
        near = difflib.get_close_matches(str(layer), names, n=3, cutoff=0.0)
        _fail(f"layer expected the name of a layer, got {layer!r}; the nearest are {', '.join(near)}")
    a = _until(net, layer).apply(params, x)
    if a.ndim < 3:
        _fail(f"layer expected one whose output is pictures, got {layer!r} with output {a.shape}")

    probed, path, rules = _with_probe(net, layer), layer.split("/"), _with_names(net, rules)

    def output(shift: Array) -> Array:
        return probed.apply(_put(params, [*path[:-1], f"{path[-1]} probe"], {"shift": shift}), x, rules=rules)

    y, pull = jax.vjp(output, jnp.zeros_like(a))
    seed = _seed(y, target)
    (delta,) = pull(seed)
    space = tuple(range(1, a.ndim - 1))
    heat = _told((a * delta.mean(space, keepdims=True)).sum(-1), seed)
    return jnp.maximum(heat, 0) if relu else heat


@automatic_inside()
def deep_lift(net: Serial, params: Params, x: ArrayLike, target: ArrayLike, *, reference: ArrayLike = 0.0) -> Array:
    """DeepLIFT with the rescale rule: ``(x − x₀) ∘ m``, whose sum is y_target(x) − y_target(x₀).

    m is δ by `jaxcnn.rules.rescale`, which looks at x and x₀ at once.

    Args:
        net: from `serial`.
        params: its parameters.
        x: ``(N, …)``.
        target: a class, or one for each example.
        reference: x₀, of a shape that broadcasts to x's.

    Source: Shrikumar et al. 2017.
    """
    x = _examples(x)
    x0 = _like(x, "reference", reference)
    rules = _with_names(net, rescale)
    y, pull = jax.vjp(lambda both: net.apply(params, both, rules=rules), jnp.concatenate([x, x0]))
    seed = _seed(y[: x.shape[0]], target)
    m = pull(jnp.concatenate([seed, seed]))[0][: x.shape[0]]
    return _told((x - x0) * m, seed)


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


def epsilon_plus(*, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> dict[Any, Rule]:
    """z⁺ for convolutions, ε for dense layers, average pooling and sums; R passes activations.

    As zennit's EpsilonPlus.  Convolutions of every kind; the sums are those of residual nets.  Max pooling keeps its
    exact rule, R to the winner.  Source: Montavon et al. 2019; Kohlbrenner et al. 2020.
    """
    return _composite(ZPlus(stabilizer), epsilon, stabilizer)


def epsilon_alpha2_beta1(*, epsilon: float = 1e-6, stabilizer: float = 1e-6) -> dict[Any, Rule]:
    """As `epsilon_plus`, with αβ (α = 2, β = 1) for convolutions.  As zennit's EpsilonAlpha2Beta1."""
    return _composite(AlphaBeta(2.0, 1.0, stabilizer), epsilon, stabilizer)


def epsilon_gamma_box(
    net: Serial,
    low: Any = None,
    high: Any = None,
    *,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    stabilizer: float = 1e-6,
) -> dict[Any, Rule]:
    """As `epsilon_plus`, with γ for convolutions and zᴮ for the first of them.  As zennit's EpsilonGammaBox.

    ``net`` tells which layer is the first convolution; ``low`` and ``high`` are the bounds of pixels, a number or one
    for each channel, after whatever scaling the net's inputs get.

    Raises: TypeError without bounds.
    """
    box = ZBox(low, high, stabilizer)
    first = [name for name, layer in net.walk() if isinstance(layer, _PATCHES)][:1]
    return {**dict.fromkeys(first, box), **_composite(Gamma(gamma, stabilizer), epsilon, stabilizer)}


def _composite(of_patches: Rule, epsilon: float, stabilizer: float) -> dict[Any, Rule]:
    return {
        **dict.fromkeys(map(IfThere, _PATCHES), of_patches),
        IfThere(Dense): Epsilon(epsilon),
        **dict.fromkeys(map(IfThere, (AvgPool, GlobalAvgPool, AdaptiveAvgPool, LpPool, Residual)), Epsilon(stabilizer)),
        IfThere(_Activation): passed,
        IfThere(Dropout): passed,
    }


_PATCHES = (Conv, DepthwiseConv, ConvTranspose, HiddenLayer)
#: Layers whose exact rule hands relevance on: to the winner, through an open ReLU, or all of it.
_NEED_NO_RULE = (MaxPool, GlobalMaxPool, AdaptiveMaxPool, Relu, Flatten, Dropout)


def _check_all_have_rules(net: Serial, rules: Mapping[Any, Rule]) -> None:
    for name, layer in (("the net", net), *net.walk()):
        if isinstance(layer, Residual):
            found, kind = _rule_of_sum(rules), "the sum of Residual"
        else:
            found, kind = _rule_for(rules, name, layer), type(layer).__name__
        if found is None and not (isinstance(layer, _NEED_NO_RULE) or type(layer) is Serial):
            _fail(f"{name}: expected a rule for {kind}, whose gradient is no relevance; rules has none")


# ---------------------------------------------------------------------------------------------------------------------
# What they share


def _swept(
    net: Serial,
    params: Params,
    x: Array,
    target: ArrayLike,
    rules: Rules | None,
    start: Callable[[Array], Any] = lambda y: 1,
) -> Array:
    """The net's δ of x, for δ of the outputs: ``start(y)`` at the target, 0 elsewhere."""
    rules = _with_names(net, rules)
    y, pull = jax.vjp(lambda x: net.apply(params, x, rules=rules), x)
    seed = _seed(y, target)
    return _told(pull(start(y) * seed)[0], seed)


@dataclasses.dataclass(frozen=True)
class _Named:
    """A rule that puts the name of its layer in front of what it raises."""

    rule: Rule
    name: str

    def __call__(self, call: Call, delta: Any) -> tuple[Any, ...]:
        with _located(self.name):
            return self.rule(call, delta)

    def __repr__(self) -> str:
        return f"{getattr(self.rule, '__name__', repr(self.rule))} of {self.name}"


def _with_names(net: Serial, rules: Rules | None) -> Rules | None:
    """The same rules, each with the name of its layer: on the way back no net stands around it to tell."""
    if rules is None or rules is autodiff:
        return rules
    if isinstance(rules, Mapping):
        _check_rules(rules, [name for name, _ in net.walk()])
        _check_matches(rules, net)

    def named(rule: Any, name: str) -> Any:
        fit = callable(rule) and isinstance(rule, Hashable) and rule is not autodiff
        return _Named(rule, name) if fit else rule

    leaves = {name: layer for name, layer in net.walk() if not isinstance(layer, Serial)}
    found: dict[Any, Rule | None] = {
        (lambda at, _, name=name: at == name): named(_rule_for(rules, name, layer), name)
        for name, layer in leaves.items()
    }
    return Checked({**found, Residual: named(_rule_of_sum(rules), "Residual")})


def _output(net: Serial, params: Params, x: Array, target: ArrayLike) -> tuple[Array, Array]:
    y = net.apply(params, x)
    return y, _seed(y, target)


def _seed(y: Array, target: Any) -> Array:
    """``(N, classes)``: 1 at the target, 0 elsewhere; NaN for a target that is none."""
    if y.ndim != 2:
        _fail(f"net expected outputs (N, classes), got {y.shape}")
    t = array("attribute", "target", target)
    n, classes = y.shape
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise TypeError(f"attribute: target expected ints, got {t.dtype}")
    if t.shape not in ((), (n,)):
        _fail(f"target expected an int or {n} of them, one for each example, got shape {t.shape}")
    if not isinstance(t, jax.core.Tracer) and t.size and not ((t >= 0) & (t < classes)).all():
        _fail(f"target expected ints in [0, {classes}), got {np.asarray(t).tolist()}")
    one_hot = jnp.broadcast_to(t, (n,))[:, None] == jnp.arange(classes, dtype=t.dtype)
    return jnp.where(one_hot.any(1, keepdims=True), one_hot.astype(y.dtype), jnp.asarray(jnp.nan, y.dtype))


def _told(heat: Array, seed: Array) -> Array:
    """The map, NaN throughout for a target that is none: a ReLU lets NaN pass only where it is open."""
    return heat + (0 * seed.sum(1)).reshape(-1, *(1,) * (heat.ndim - 1))


def _examples(x: Any) -> Array:
    (x,) = arrays("attribute", x=x)
    if x.ndim < 2:
        _fail(f"x expected (N, …), got shape {x.shape}")
    return x


def _like(x: Array, name: str, value: Any) -> Array:
    """A baseline in the shape and dtype of x."""
    a = array("attribute", name, value)
    try:
        return jnp.broadcast_to(a, x.shape).astype(x.dtype)
    except ValueError:
        _fail(f"{name} expected a shape that broadcasts to {x.shape}, got {a.shape}")


def _count(name: str, value: Any) -> int:
    n = static_int("attribute", name, value, value)
    if n < 1:
        _fail(f"{name} expected an int >= 1, got {n}")
    return n


def _covering(spatial: tuple[int, ...], size: PerDim, stride: PerDim | None) -> Window:
    """Windows that reach every pixel."""
    k = positive("attribute", "window", size, len(spatial))
    s = positive("attribute", "stride", k if stride is None else stride, len(spatial))
    if any(i > j for i, j in zip(s, k, strict=True)):
        _fail(f"stride expected at most the window {k}, so that no pixel is left out, got {s}")
    return window("attribute", spatial, k, stride=s, ceil_mode=True)


def _covered(win: Window) -> np.ndarray:
    """``(windows, *spatial)``: the pixels of each window."""
    covered = np.ones((), bool)
    for dim in range(win.ndim):
        at = np.arange(win.out[dim])[:, None] * win.stride[dim]
        pixel = np.arange(win.shape[dim])
        covered = np.multiply.outer(covered, (pixel >= at) & (pixel < at + win.size[dim]))
    # (out₁, n₁, out₂, n₂, …)
    order = [*range(0, 2 * win.ndim, 2), *range(1, 2 * win.ndim, 2)]
    return covered.transpose(order).reshape(-1, *win.shape)


@dataclasses.dataclass(frozen=True)
class _Probe(Layer):
    """``x + shift``, so that δ of shift is δ of x."""

    def apply(self, params: Params, x: Array, *, key: Array | None = None, rule: Rule | None = None) -> Array:
        return x + params["shift"]


def _with_probe(net: Serial, path: str) -> Serial:
    """The net with a `_Probe` after a layer."""
    at, _, rest = path.partition("/")
    layers: list[tuple[str, Layer]] = []
    for name, layer in net.layers:
        layers.append((name, _with_probe(layer, rest) if name == at and rest and isinstance(layer, Serial) else layer))
        if name == at and not rest:
            layers.append((f"{name} probe", _Probe()))
    return dataclasses.replace(net, layers=tuple(layers))


def _until(net: Serial, path: str) -> Serial:
    """The layers up to and with one of them; of a residual net, its branch."""
    at, _, rest = path.partition("/")
    names = [name for name, _ in net.layers]
    *before, (name, last) = net.layers[: names.index(at) + 1]
    return Serial((*before, (name, _until(last, rest) if rest and isinstance(last, Serial) else last)))


def _put(params: Params, path: list[str], value: Any) -> Params:
    """Parameters with one more entry."""
    head, *rest = path
    return {**params, head: _put(params.get(head, {}), rest, value) if rest else value}


def _fail(message: str) -> NoReturn:
    fail("attribute", message)
