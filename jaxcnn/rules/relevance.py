"""Relevance (LRP): how much each input contributed to an output, propagated backward layer by layer.

Here δ is R, the relevance of the op's outputs, and a rule returns the relevance of x. Each rule divides R among the
inputs according to their shares of z = x·w + b (or of the sum that the rule uses instead):

    R_x = Σ over the terms of z  (term's x) ∘ (term's w)ᵀ (R / z)

where wᵀ is the op's own transpose, the exact rule at that w. The bias's share of z is not propagated. ``stabilized``
avoids division by zero: R / (z + ε·sign z) with sign 0 = 1. Parameters get no cotangent, which means zero.

x⁺ = max(x, 0) and x⁻ = min(x, 0), elementwise, and likewise for w and b. Conventions and numbers are those of zennit
0.5.1. `hidden_layer` is treated as its three ops: R goes to the winner of each window, passes the ReLU unchanged, and
is then distributed by the convolution's rule.

``zero_params`` names the parameters that a rule replaces by 0: "weight", "bias" or both. With b = 0 the bias keeps no
share of R.

The sum in a residual net is the op "add" with the terms x and y, each of which receives its share. `Epsilon` handles
ops without x·w, such as pools, "add" and batch norm with given statistics. `Flat` handles the sums among them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcnn.arguments import bad_type, bad_value, static_float
from jaxcnn.ops.kinds import kind_of
from jaxcnn.ops.rule import Call, rule_name
from jaxcnn.rules.compose import HiddenLayerRules, check_fits, fits

#: One parameter name, or several.
ZeroParams = str | Sequence[str]
#: Positions of parameters among the inputs of an op; for `batch_norm`, of scale and bias.
_POSITIONS = {"weight": 1, "bias": 2}


class _Relevance:
    """Base of the rules: checks that a rule fits the op, and applies it to the convolution of a hidden layer."""

    #: Names and kinds of the ops that the rule fits, in addition to `hidden_layer`.
    fits: ClassVar[tuple[str, ...]] = ("affine",)
    #: Parameters that the rule replaces by 0; every rule has this field.
    zero_params: ZeroParams

    def __repr__(self) -> str:
        """Return the dataclass repr, without ``zero_params`` if it is empty."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "zero_params" or self.zero_params]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in fields)})"

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        if call.name == "hidden_layer":
            return HiddenLayerRules(conv=self, relu=_unchanged)(call, delta)
        check_fits(self, call, (*self.fits, "hidden_layer"), _hint(call.name))
        if call.name == "add":
            return self.of_sum(call, delta)
        _expect_statistics(self, call)
        return _for_x(call, self.relevance(call, delta))

    def zeroed(self, call: Call) -> Call:
        """Return the call with zeros for ``zero_params``."""
        if not self.zero_params or (call.kind != "affine" and call.name != "batch_norm"):
            return call
        positions = {_POSITIONS[name] for name in self.zero_params}
        return call.at(
            *(jnp.zeros_like(a) if i in positions and a is not None else a for i, a in enumerate(call.inputs))
        )

    def relevance(self, call: Call, delta: Array) -> Array:
        """Return R_x."""
        raise NotImplementedError

    def of_sum(self, call: Call, delta: Array) -> tuple[Array, Array]:
        """Return R_x and R_y for the sum x + y."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, repr=False)
class Epsilon(_Relevance):
    """LRP-ε: ``R_x = x ∘ wᵀ(R / (z + ε·sign z))``, z = x·w + b.

    A larger ε suppresses weak or contradictory contributions. With ε = 0 the rule is LRP-0. In a net of ReLUs and max
    pooling whose last R is a logit, LRP-0 equals gradient × input.

    For sums such as `avg_pool`, w is their constant weight (zennit's Norm). For the sum of a residual net
    ``R_x = x ∘ s``, ``R_y = y ∘ s``. For `lp_pool`, R is divided according to the shares of xᵖ in Σ xᵖ. `batch_norm`
    with given statistics is x·w + b with one w per channel. Conserves Σ R except for the shares of ε and b.

    Args:
        epsilon: ε, a finite number >= 0.
        zero_params: parameters that the rule replaces by 0: "weight", "bias", or both. For `batch_norm`, w is the
            scale and b the bias; sums have neither.

    Raises:
        TypeError: if epsilon is not a number, or zero_params does not consist of strings.
        ValueError: if epsilon is negative or not finite, zero_params contains an unknown name, or the rule is applied
            to an op that it does not fit.

    Source: Bach et al. 2015, eq. 58.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x, w = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [1.0]])
    >>> y, pull = jax.vjp(lambda x: jaxcnn.dense(x, w, rule=jaxcnn.rules.Epsilon()), x)
    >>> [round(float(r), 3) for r in pull(y)[0][0]]  # of z = 3 + 2
    [3.0, 2.0]
    """

    epsilon: float = 1e-6
    zero_params: ZeroParams = ()
    fits: ClassVar[tuple[str, ...]] = ("affine", "sum", "lp_pool", "batch_norm")

    def __post_init__(self) -> None:
        _check(self, "epsilon")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = x ∘ wᵀ(R / (z + ε·sign z))."""
        call = self.zeroed(call)
        x, *_ = call.inputs
        s = delta / stabilized(call.output, self.epsilon)
        return x * call.exact(s)[0]

    def of_sum(self, call: Call, delta: Array) -> tuple[Array, Array]:
        """R_x = x ∘ s, R_y = y ∘ s, s = R / (z + ε·sign z), z = x + y."""
        x, y = call.inputs
        s = delta / stabilized(call.output, self.epsilon)
        return x * s, y * s


@dataclasses.dataclass(frozen=True, repr=False)
class ZPlus(_Relevance):
    """LRP-z⁺: ``R_x = x⁺ ∘ w⁺ᵀ(s) + x⁻ ∘ w⁻ᵀ(s)``, ``s = R / z⁺``, ``z⁺ = x⁺·w⁺ + x⁻·w⁻ + b⁺``.

    Only positive evidence for an output counts, so R keeps its sign where it was positive. This is αβ with α = 1,
    β = 0. Conserves Σ R except for the share of b⁺, where z⁺ > 0.

    Args:
        stabilizer: ε of the fraction, a finite number >= 0.
        zero_params: as in `Epsilon`.

    Raises:
        TypeError: as `Epsilon`.
        ValueError: as `Epsilon`.

    Source: Bach et al. 2015; Montavon et al. 2017, eq. 11, for x >= 0.
    """

    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()

    def __post_init__(self) -> None:
        _check(self, "stabilizer")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = x⁺ ∘ w⁺ᵀ(s) + x⁻ ∘ w⁻ᵀ(s)."""
        return _positive_and_negative(self.zeroed(call), delta, self.stabilizer)[0]


@dataclasses.dataclass(frozen=True, repr=False)
class AlphaBeta(_Relevance):
    """LRP-αβ: positive evidence for an output, times α, minus negative evidence, times β; α − β = 1.

    ``R_x = α (x⁺ ∘ w⁺ᵀ(s⁺) + x⁻ ∘ w⁻ᵀ(s⁺)) − β (x⁺ ∘ w⁻ᵀ(s⁻) + x⁻ ∘ w⁺ᵀ(s⁻))`` with ``s⁺ = R / z⁺``, ``s⁻ = R / z⁻``,
    ``z⁺ = x⁺·w⁺ + x⁻·w⁻ + b⁺``, ``z⁻ = x⁺·w⁻ + x⁻·w⁺ + b⁻``. Conserves Σ R except for the shares of b, where z⁺ > 0 and
    z⁻ < 0.

    Args:
        alpha: α, a finite number >= 0.
        beta: β, a finite number >= 0, equal to α − 1.
        stabilizer: ε of the fractions, a finite number >= 0.
        zero_params: as in `Epsilon`.

    Raises:
        TypeError: as `Epsilon`.
        ValueError: as `Epsilon`, and unless α − β = 1.

    Source: Bach et al. 2015, eq. 60.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()

    def __post_init__(self) -> None:
        _check(self, "alpha", "beta", "stabilizer")
        if self.alpha - self.beta != 1:
            raise bad_value("AlphaBeta", "alpha − beta", "1", f"alpha {self.alpha}, beta {self.beta}")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = α · positive evidence − β · negative evidence."""
        positive, negative = _positive_and_negative(self.zeroed(call), delta, self.stabilizer)
        return self.alpha * positive - self.beta * negative


@dataclasses.dataclass(frozen=True, repr=False)
class Gamma(_Relevance):
    """LRP-γ: contributions with the same sign as the output count 1 + γ times.

    With ``w↑ = w + γw⁺`` and ``w↓ = w + γw⁻``, and likewise for b:
    ``R_x = x⁺ ∘ (w↑ᵀ(s⁺) + w↓ᵀ(s⁻)) + x⁻ ∘ (w↓ᵀ(s⁺) + w↑ᵀ(s⁻))``, where ``s⁺ = R / (x⁺·w↑ + x⁻·w↓ + b↑)`` where z > 0
    and ``s⁻ = R / (x⁺·w↓ + x⁻·w↑ + b↓)`` where z < 0, else 0. γ = 0 is LRP-0. Conserves Σ R except for the share of b.

    Args:
        gamma: γ, a finite number >= 0.
        stabilizer: ε of the fractions, a finite number >= 0.
        zero_params: as in `Epsilon`.

    Raises:
        TypeError: as `Epsilon`.
        ValueError: as `Epsilon`.

    Source: Montavon et al. 2019, for x >= 0; for either sign, Andéol et al. 2021.
    """

    gamma: float = 0.25
    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()

    def __post_init__(self) -> None:
        _check(self, "gamma", "stabilizer")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = x⁺ ∘ (w↑ᵀ(s⁺) + w↓ᵀ(s⁻)) + x⁻ ∘ (w↓ᵀ(s⁺) + w↑ᵀ(s⁻))."""
        z, call = call.output, self.zeroed(call)  # the sign is that of z before zeroing, as in zennit
        x, w, b = call.inputs
        (x_pos, x_neg), (w_pos, w_neg), (b_pos, b_neg) = _signs(x), _signs(w), _signs(b)
        w_up, w_down = w + self.gamma * w_pos, w + self.gamma * w_neg
        b_up, b_down = (None, None) if b is None else (b + self.gamma * b_pos, b + self.gamma * b_neg)
        zero = jnp.zeros_like(delta)
        up = call.at(x_pos, w_up, b_up), call.at(x_neg, w_down, None)
        down = call.at(x_pos, w_down, b_down), call.at(x_neg, w_up, None)
        s_up = jnp.where(z > 0, delta, zero) / stabilized(up[0].output + up[1].output, self.stabilizer)
        s_down = jnp.where(z < 0, delta, zero) / stabilized(down[0].output + down[1].output, self.stabilizer)
        return x_pos * (up[0].exact(s_up)[0] + down[0].exact(s_down)[0]) + x_neg * (
            up[1].exact(s_up)[0] + down[1].exact(s_down)[0]
        )


@dataclasses.dataclass(frozen=True, repr=False)
class WSquare(_Relevance):
    """LRP-w²: ``R_x = (w²)ᵀ(R / (1·w² + b²))``, determined by the kernel and independent of x.

    For a first layer whose inputs have no bounds. Conserves Σ R except for the share of b².

    Args:
        stabilizer: ε of the fraction, a finite number >= 0.
        zero_params: as in `Epsilon`.

    Raises:
        TypeError: as `Epsilon`.
        ValueError: as `Epsilon`.

    Source: Montavon et al. 2017, eq. 12.
    """

    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()

    def __post_init__(self) -> None:
        _check(self, "stabilizer")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = (w²)ᵀ(R / (1·w² + b²))."""
        x, w, b = self.zeroed(call).inputs
        squares = call.at(jnp.ones_like(x), w * w, None if b is None else b * b)
        return squares.exact(delta / stabilized(squares.output, self.stabilizer))[0]


@dataclasses.dataclass(frozen=True, repr=False)
class Flat(_Relevance):
    """LRP-flat: ``R_x = 1ᵀ(R / 1·1)``, an equal share for every input that an output depends on.

    It handles sums and kernels alike: all weights are replaced by 1 and the bias by 0. Conserves Σ R.

    Args:
        stabilizer: ε of the fraction, a finite number >= 0.
        zero_params: as in `Epsilon`.

    Raises:
        TypeError: as `Epsilon`.
        ValueError: as `Epsilon`.

    Source: Lapuschkin et al. 2019.
    """

    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()
    fits: ClassVar[tuple[str, ...]] = ("affine", "sum")

    def __post_init__(self) -> None:
        _check(self, "stabilizer")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = 1ᵀ(R / 1·1)."""
        x, *rest = call.inputs
        one = jnp.zeros_like if "weight" in self.zero_params else jnp.ones_like
        ones = call.at(jnp.ones_like(x), *(None if i else one(w) for i, w in enumerate(rest)))
        return ones.exact(delta / stabilized(ones.output, self.stabilizer))[0]

    def of_sum(self, call: Call, delta: Array) -> tuple[Array, Array]:
        """R_x = R_y = R / 2."""
        half = delta / stabilized(2 * jnp.ones_like(delta), self.stabilizer)
        return half, half


@dataclasses.dataclass(frozen=True, repr=False)
class ZBox(_Relevance):
    """LRP-zᴮ, for a first layer whose inputs x have bounds l and h.

    ``R_x = x ∘ wᵀ(s) − l ∘ w⁺ᵀ(s) − h ∘ w⁻ᵀ(s)``, ``s = R / z``, ``z = x·w − l·w⁺ − h·w⁻``; b cancels. Conserves Σ R.

    Args:
        low: the smallest value of a pixel: a number, or one per channel.
        high: the largest value of a pixel: a number, or one per channel.
        stabilizer: ε of the fraction, a finite number >= 0.
        zero_params: as in `Epsilon`.

    Raises:
        TypeError: if a bound is missing or not a number; otherwise as `Epsilon`.
        ValueError: if low > high; otherwise as `Epsilon`.

    Source: Montavon et al. 2017, eq. 13.
    """

    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()

    def __post_init__(self) -> None:
        _check(self, "stabilizer")
        for name in ("low", "high"):
            object.__setattr__(self, name, _bound(name, getattr(self, name)))
        if np.any(np.greater(self.low, self.high)):  # type: ignore[arg-type]
            raise bad_value("ZBox", "low", "at most high", f"low {self.low}, high {self.high}")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = x ∘ wᵀ(s) − l ∘ w⁺ᵀ(s) − h ∘ w⁻ᵀ(s)."""
        call = self.zeroed(call)
        x, w, b = call.inputs
        (w_pos, w_neg), (b_pos, b_neg) = _signs(w), _signs(b)
        low, high = self._broadcast("low", x), self._broadcast("high", x)
        lowest, highest = call.at(low, w_pos, b_pos), call.at(high, w_neg, b_neg)
        s = delta / stabilized(call.output - lowest.output - highest.output, self.stabilizer)
        return x * call.exact(s)[0] - low * lowest.exact(s)[0] - high * highest.exact(s)[0]

    def _broadcast(self, name: str, x: Array) -> Array:
        """Return a bound, broadcast to the shape of x."""
        bound = np.asarray(getattr(self, name), x.dtype)
        if bound.ndim and bound.shape != x.shape[-1:]:
            raise bad_value("ZBox", name, f"one number or {x.shape[-1]}, one for each channel", bound.size)
        return jnp.broadcast_to(bound, x.shape)


@fits("activation", "dropout", "norm")
def pass_through(call: Call, delta: Array) -> tuple[Any, ...]:
    """``R_x = R``: relevance passes an activation, a dropout or a norm unchanged.

    Args:
        call: the call of the op.
        delta: R of the op's output.

    Returns:
        One cotangent per input of the op; only the first is not None.

    Raises:
        ValueError: if applied to another op.

    >>> import jax, jaxcnn
    >>> y, pull = jax.vjp(lambda x: jaxcnn.tanh(x, rule=jaxcnn.rules.pass_through), 2.0)
    >>> float(pull(1.0)[0])
    1.0
    """
    return _for_x(call, delta)


@fits("affine", "hidden_layer", "sum", "max", "activation", "dropout", "batch_norm")
def rescale(call: Call, delta: Array) -> tuple[Any, ...]:
    """DeepLIFT's rescale rule, for a batch of examples followed by their references x₀ in the same order.

    If the op is linear, δ is propagated by its exact rule. Through an activation ``δ_x = δ ∘ (y − y₀) / (x − x₀)``, the
    slope between the two points instead of the slope at one; g'(x) where they coincide. Through max pooling, the gain
    of y over y₀ goes to the winner in x, and the loss to the winner in x₀. Then Σ δ_x ∘ (x − x₀) = Σ δ ∘ (y − y₀) at
    every op, and therefore over the whole net.

    `jaxcnn.attribution.deep_lift` doubles the batch and uses this rule. The second half of the result equals the first.

    Args:
        call: the call of the op, on examples followed by references.
        delta: δ of the op's output.

    Returns:
        One cotangent per input of the op; only the first is not None, except for a sum.

    Raises:
        ValueError: if applied to another op, if a batch norm has no statistics, or if the batch does not consist of
            examples and as many references.

    Source: Shrikumar et al. 2017, §3.5.1; for max pooling as in captum.
    """
    if call.name == "hidden_layer":
        return HiddenLayerRules(conv=rescale, relu=rescale, pool=rescale)(call, delta)
    if call.name == "add":
        return call.exact(delta)
    _expect_statistics(rescale, call)
    if call.kind not in ("max", "activation"):
        return _for_x(call, call.exact(delta)[0])
    (x,) = call.inputs
    if x.ndim < 1 or x.shape[0] % 2:
        expected = "examples followed by as many references, for rule rescale"
        raise bad_value(call.name, "x", expected, f"shape {x.shape}")
    dx, dy = _differences(x), _differences(call.output)
    d, _ = jnp.split(delta, 2)
    if call.kind == "max":
        gain, loss = jnp.maximum(dy, 0), jnp.minimum(dy, 0)
        at_x, at_reference = jnp.split(call.exact(jnp.concatenate([d * gain, d * loss]))[0], 2)
        total = at_x + at_reference
    else:
        total = d * dy
    equal = jnp.abs(dx) < _MIN_DIFFERENCE
    slope, _ = jnp.split(call.exact(delta)[0], 2)
    m = jnp.where(equal, slope, total / jnp.where(equal, 1, dx))
    return _for_x(call, jnp.concatenate([m, m]))


#: Points closer than this use the slope at x instead of the quotient. As in captum.
_MIN_DIFFERENCE = 1e-10


def _differences(x: Array) -> Array:
    """Return each example minus its reference, x − x₀."""
    x, reference = jnp.split(x, 2)
    return x - reference


def stabilized(z: Array, epsilon: float) -> Array:
    """Return the denominator ``z + ε·sign z`` with sign 0 = 1."""
    return z + jnp.where(z < 0, jnp.asarray(-epsilon, z.dtype), jnp.asarray(epsilon, z.dtype))


def _positive_and_negative(call: Call, delta: Array, stabilizer: float) -> tuple[Array, Array]:
    """Return R distributed by the positive terms of z, and R distributed by the negative terms."""
    x, w, b = call.inputs
    (x_pos, x_neg), (w_pos, w_neg), (b_pos, b_neg) = _signs(x), _signs(w), _signs(b)

    def shares(w_for_pos: Array, w_for_neg: Array, b: Any) -> Array:
        at_pos, at_neg = call.at(x_pos, w_for_pos, b), call.at(x_neg, w_for_neg, None)
        s = delta / stabilized(at_pos.output + at_neg.output, stabilizer)
        return x_pos * at_pos.exact(s)[0] + x_neg * at_neg.exact(s)[0]

    return shares(w_pos, w_neg, b_pos), shares(w_neg, w_pos, b_neg)


def _signs(a: Any) -> tuple[Any, Any]:
    """Return a⁺ and a⁻; None if a is None."""
    return (None, None) if a is None else (jnp.maximum(a, 0), jnp.minimum(a, 0))


def _for_x(call: Call, relevance: Array) -> tuple[Any, ...]:
    """Return R for the first input and None for the others."""
    return (relevance, *(None,) * (len(call.inputs) - 1))


def _unchanged(call: Call, delta: Array) -> tuple[Array]:
    """R_x = R, for the ReLU of a hidden layer."""
    return (delta,)


def _expect_statistics(rule: Any, call: Call) -> None:
    """Raise ValueError for a batch norm without given mean and var."""
    if call.name == "batch_norm" and len(call.inputs) < 5:
        why = "because statistics of the batch mix examples (see jaxcnn.calibrate)"
        raise bad_value("batch_norm", "mean and var", f"given for rule {rule_name(rule)}, {why}", "neither")


def _hint(op: str) -> str:
    """Return the end of an error message: the rules that fit an op."""
    kind = kind_of(op)
    if kind == "max":
        return f"; {op} keeps its exact rule, R to the winner"
    if kind == "sum":
        return f"; Epsilon and Flat fit {op}"
    if op in Epsilon.fits:
        return f"; Epsilon fits {op}"
    return f"; rules.pass_through fits {op}" if kind in ("activation", "dropout", "norm") else ""


def _check(rule: Any, *names: str) -> None:
    """Convert options to finite floats >= 0, and ``zero_params`` to a tuple of names."""
    for name in names:
        value = static_float(type(rule).__name__, name, getattr(rule, name))
        if not 0 <= value < math.inf:
            raise bad_value(type(rule).__name__, name, "a finite number >= 0", value)
        object.__setattr__(rule, name, value)
    names_given = (rule.zero_params,) if isinstance(rule.zero_params, str) else rule.zero_params
    message = (type(rule).__name__, "zero_params", "'weight', 'bias' or a sequence of them", repr(rule.zero_params))
    if not isinstance(names_given, Sequence) or not all(isinstance(name, str) for name in names_given):
        raise bad_type(*message)
    if not set(names_given) <= set(_POSITIONS):
        raise bad_value(*message)
    object.__setattr__(rule, "zero_params", tuple(names_given))


def _bound(name: str, value: Any) -> float | tuple[float, ...]:
    if value is None:
        raise bad_type("ZBox", name, "given, as in ZBox(0.0, 1.0)", "None")
    each = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(each, list | tuple):
        return tuple(static_float("ZBox", name, number) for number in each)
    return static_float("ZBox", name, each)
