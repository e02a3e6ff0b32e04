"""Relevance (LRP): how much each input had to do with an output, told backwards layer by layer.

Here δ is R, the relevance of the op's outputs, and what a rule sends back is the relevance of x.  Each rule divides R
among the inputs by their shares in z = x·w + b (or in what the rule puts in its place):

    R_x = Σ over the terms of z  (term's x) ∘ (term's w)ᵀ (R / z)

where wᵀ is the op's own transpose, the exact rule at that w.  What b holds of z is not handed on.  A fraction is made
safe by ``stabilised``: R / (z + ε·sign z) with sign 0 = 1.  Parameters get no cotangent, which is zero.

x⁺ = max(x, 0) and x⁻ = min(x, 0), entry by entry, and so for w and b.  Conventions are those of zennit 0.5.1,
with whose numbers the rules agree.  `hidden_layer` is taken as the three ops that it is: R goes to the winner of each
window, through the ReLU as it is, and is then divided by the convolution's rule.

``zero_params`` names the parameters that a rule takes to be 0: "w", "b" or both; zennit's names "weight" and "bias"
mean the same.  With b = 0 the bias keeps no share of R.

The sum of a residual net is the op "add" with the terms x and y, both of which get their share.  What has no x·w, such
as a pool, an "add" or a batch norm by given statistics, is divided by `Epsilon`; `Flat` fits the sums among them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcnn.geometry import fail, static_float
from jaxcnn.ops import hidden
from jaxcnn.ops.rule import Call

#: Ops z = x·w + b.
PATCHES = ("conv", "depthwise_conv", "conv_transpose", "dense")
#: Ops that weigh their inputs by constants.
SUMS = ("avg_pool", "global_avg_pool", "adaptive_avg_pool", "block_sum", "kron_up", "add")
#: Ops that send δ to the winner.
MAXIMA = ("max_pool", "global_max_pool", "adaptive_max_pool")


#: Names of parameters: one, or several.
ZeroParams = str | Sequence[str]
#: Their places among the inputs of an op; of `batch_norm`, scale and bias.
_PLACES = {"w": 1, "weight": 1, "b": 2, "bias": 2}


class _Relevance:
    """What the rules share: which ops they fit, and a hidden layer taken apart."""

    #: The ops it fits, beside `hidden_layer`.
    fits: ClassVar[tuple[str, ...]] = PATCHES
    #: A field of every rule.
    zero_params: ZeroParams

    def __repr__(self) -> str:
        """As of a dataclass, without ``zero_params`` where there are none."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "zero_params" or self.zero_params]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in fields)})"

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        if call.name == "hidden_layer":
            call, _, pool = hidden.parts(call)
            (delta,) = pool.exact(delta)
        elif call.name not in self.fits:
            ops = ", ".join((*self.fits, "hidden_layer"))
            fail(call.name, f"rule {self!r}: expected as a rule of {ops}{_instead(call.name)}")
        if call.name == "add":
            return self.of_sum(call, delta)
        if _by_the_batch(call):
            fail(call.name, f"rule {self!r}: {STATISTICS}")
        return _of_x(call, self.relevance(call, delta))

    def zeroed(self, call: Call) -> Call:
        """The call with zeros for ``zero_params``."""
        places = {_PLACES[name] for name in self.zero_params if call.name in (*PATCHES, "batch_norm")}
        inputs = [a if a is None or i not in places else jnp.zeros_like(a) for i, a in enumerate(call.inputs)]
        return call.at(*inputs) if places else call

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x."""
        raise NotImplementedError

    def of_sum(self, call: Call, delta: Array) -> tuple[Array, Array]:
        """R_x and R_y, for the sum x + y."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, repr=False)
class Epsilon(_Relevance):
    """LRP-ε: ``R_x = x ∘ wᵀ(R / (z + ε·sign z))``, z = x·w + b.

    A larger ε keeps what was weak or contradicts itself from the input.  With ε = 0 it is LRP-0, and gradient × input
    in a net of ReLUs and max pooling whose last R is a logit.  For sums such as `avg_pool` w is the constant that they
    weigh with (zennit's Norm); for the sum of a residual net ``R_x = x ∘ s``, ``R_y = y ∘ s``.  `lp_pool` is divided by
    the shares of xᵖ in Σ xᵖ; `batch_norm` by given statistics is x·w + b with one w for each channel.  Conserves Σ R
    but for the shares of ε and b.

    Args:
        epsilon: ε, a finite number >= 0.
        zero_params: parameters that the rule takes to be 0: "w", "b", or both in a tuple.  Of `batch_norm` w is the
            scale and b the bias; sums have neither.

    Raises: TypeError or ValueError, when it is made, for an epsilon that is no finite number >= 0 and for names that
    are not among these; ValueError, when R comes, for an op it does not fit.  Source: Bach et al. 2015, eq. 58.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> x, w = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [1.0]])
    >>> y, pull = jax.vjp(lambda x: jaxcnn.dense(x, w, rule=jaxcnn.rules.Epsilon()), x)
    >>> [round(float(r), 3) for r in pull(y)[0][0]]  # of z = 3 + 2
    [3.0, 2.0]
    """

    epsilon: float = 1e-6
    zero_params: ZeroParams = ()
    fits: ClassVar[tuple[str, ...]] = (*PATCHES, *SUMS, "lp_pool", "batch_norm")

    def __post_init__(self) -> None:
        _check(self, "epsilon")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = x ∘ wᵀ(R / (z + ε·sign z))."""
        call = self.zeroed(call)
        x, *_ = call.inputs
        s = delta / stabilised(call.output, self.epsilon)
        return x * call.exact(s)[0]

    def of_sum(self, call: Call, delta: Array) -> tuple[Array, Array]:
        """R_x = x ∘ s, R_y = y ∘ s, s = R / (z + ε·sign z), z = x + y."""
        x, y = call.inputs
        s = delta / stabilised(call.output, self.epsilon)
        return x * s, y * s


@dataclasses.dataclass(frozen=True, repr=False)
class ZPlus(_Relevance):
    """LRP-z⁺: ``R_x = x⁺ ∘ w⁺ᵀ(s) + x⁻ ∘ w⁻ᵀ(s)``, ``s = R / z⁺``, ``z⁺ = x⁺·w⁺ + x⁻·w⁻ + b⁺``.

    Only what speaks for an output is counted, so that R stays positive where it was.  αβ with α = 1, β = 0.  Conserves
    Σ R but for the share of b⁺, where z⁺ > 0.

    Raises: as `Epsilon`.  Source: Bach et al. 2015; Montavon et al. 2017, eq. 11, for x >= 0.
    """

    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()

    def __post_init__(self) -> None:
        _check(self, "stabilizer")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = x⁺ ∘ w⁺ᵀ(s) + x⁻ ∘ w⁻ᵀ(s)."""
        return _for_and_against(self.zeroed(call), delta, self.stabilizer)[0]


@dataclasses.dataclass(frozen=True, repr=False)
class AlphaBeta(_Relevance):
    """LRP-αβ: what speaks for an output, α times, less what speaks against it, β times; α − β = 1.

    ``R_x = α (x⁺ ∘ w⁺ᵀ(s⁺) + x⁻ ∘ w⁻ᵀ(s⁺)) − β (x⁺ ∘ w⁻ᵀ(s⁻) + x⁻ ∘ w⁺ᵀ(s⁻))`` with ``s⁺ = R / z⁺``,
    ``s⁻ = R / z⁻``, ``z⁺ = x⁺·w⁺ + x⁻·w⁻ + b⁺``, ``z⁻ = x⁺·w⁻ + x⁻·w⁺ + b⁻``.  Conserves Σ R but for the shares of b,
    where z⁺ > 0 and z⁻ < 0.

    Raises: as `Epsilon`; ValueError unless α − β = 1.  Source: Bach et al. 2015, eq. 60.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()

    def __post_init__(self) -> None:
        _check(self, "alpha", "beta", "stabilizer")
        if self.alpha - self.beta != 1:
            fail("AlphaBeta", f"alpha − beta expected 1, got alpha {self.alpha}, beta {self.beta}")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = α · for − β · against."""
        speaks_for, against = _for_and_against(self.zeroed(call), delta, self.stabilizer)
        return self.alpha * speaks_for - self.beta * against


@dataclasses.dataclass(frozen=True, repr=False)
class Gamma(_Relevance):
    """LRP-γ: what speaks for an output's sign counts 1 + γ times.

    With ``w↑ = w + γw⁺`` and ``w↓ = w + γw⁻``, and so for b:
    ``R_x = x⁺ ∘ (w↑ᵀ(s⁺) + w↓ᵀ(s⁻)) + x⁻ ∘ (w↓ᵀ(s⁺) + w↑ᵀ(s⁻))``, where
    ``s⁺ = R / (x⁺·w↑ + x⁻·w↓ + b↑)`` where z > 0 and ``s⁻ = R / (x⁺·w↓ + x⁻·w↑ + b↓)`` where z < 0, else 0.  γ = 0 is
    LRP-0.  Conserves Σ R but for the share of b.

    Raises: as `Epsilon`.  Source: Montavon et al. 2019, for x >= 0; of either sign, Andéol et al. 2021.
    """

    gamma: float = 0.25
    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()

    def __post_init__(self) -> None:
        _check(self, "gamma", "stabilizer")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = x⁺ ∘ (w↑ᵀ(s⁺) + w↓ᵀ(s⁻)) + x⁻ ∘ (w↓ᵀ(s⁺) + w↑ᵀ(s⁻))."""
        z, call = call.output, self.zeroed(call)  # whose sign is that of the whole z, as in zennit
        x, w, b = call.inputs
        (x_pos, x_neg), (w_pos, w_neg), (b_pos, b_neg) = _signs(x), _signs(w), _signs(b)
        w_up, w_down = w + self.gamma * w_pos, w + self.gamma * w_neg
        b_up, b_down = (None, None) if b is None else (b + self.gamma * b_pos, b + self.gamma * b_neg)
        zero = jnp.zeros_like(delta)
        up = call.at(x_pos, w_up, b_up), call.at(x_neg, w_down, None)
        down = call.at(x_pos, w_down, b_down), call.at(x_neg, w_up, None)
        s_up = jnp.where(z > 0, delta, zero) / stabilised(up[0].output + up[1].output, self.stabilizer)
        s_down = jnp.where(z < 0, delta, zero) / stabilised(down[0].output + down[1].output, self.stabilizer)
        return x_pos * (up[0].exact(s_up)[0] + down[0].exact(s_down)[0]) + x_neg * (
            up[1].exact(s_up)[0] + down[1].exact(s_down)[0]
        )


@dataclasses.dataclass(frozen=True, repr=False)
class WSquare(_Relevance):
    """LRP-w²: ``R_x = (w²)ᵀ(R / (1·w² + b²))``: by the patch alone, whatever x is.

    For a first layer whose inputs have no bounds.  Conserves Σ R but for the share of b².

    Raises: as `Epsilon`.  Source: Montavon et al. 2017, eq. 12.
    """

    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()

    def __post_init__(self) -> None:
        _check(self, "stabilizer")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = (w²)ᵀ(R / (1·w² + b²))."""
        x, w, b = self.zeroed(call).inputs
        squares = call.at(jnp.ones_like(x), w * w, None if b is None else b * b)
        return squares.exact(delta / stabilised(squares.output, self.stabilizer))[0]


@dataclasses.dataclass(frozen=True, repr=False)
class Flat(_Relevance):
    """LRP-flat: ``R_x = 1ᵀ(R / 1·1)``: the same to every input that an output saw.

    For sums as for patches, whose entries and bias are taken to be 1 and 0.  Conserves Σ R.

    Raises: as `Epsilon`.  Source: Lapuschkin et al. 2019.
    """

    stabilizer: float = 1e-6
    zero_params: ZeroParams = ()
    fits: ClassVar[tuple[str, ...]] = PATCHES + SUMS

    def __post_init__(self) -> None:
        _check(self, "stabilizer")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = 1ᵀ(R / 1·1)."""
        x, *rest = call.inputs
        one = jnp.zeros_like if {"w", "weight"} & set(self.zero_params) else jnp.ones_like
        ones = call.at(jnp.ones_like(x), *(None if i else one(w) for i, w in enumerate(rest)))
        return ones.exact(delta / stabilised(ones.output, self.stabilizer))[0]

    def of_sum(self, call: Call, delta: Array) -> tuple[Array, Array]:
        """R_x = R_y = R / 2."""
        half = delta / stabilised(2 * jnp.ones_like(delta), self.stabilizer)
        return half, half


@dataclasses.dataclass(frozen=True, repr=False)
class ZBox(_Relevance):
    """LRP-zᴮ, for a first layer whose inputs x lie between bounds l and h.

    ``R_x = x ∘ wᵀ(s) − l ∘ w⁺ᵀ(s) − h ∘ w⁻ᵀ(s)``, ``s = R / z``, ``z = x·w − l·w⁺ − h·w⁻``; b cancels.  Conserves
    Σ R.

    Args:
        low: the smallest value a pixel can have: a number, or one for each channel.
        high: the largest.
        stabilizer: ε of the fraction.
        zero_params: as in `Epsilon`.

    Raises: TypeError without bounds or for bounds that are no numbers; ValueError for low > high; else as `Epsilon`.
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
            fail("ZBox", f"low expected at most high, got low {self.low}, high {self.high}")

    def relevance(self, call: Call, delta: Array) -> Array:
        """R_x = x ∘ wᵀ(s) − l ∘ w⁺ᵀ(s) − h ∘ w⁻ᵀ(s)."""
        call = self.zeroed(call)
        x, w, b = call.inputs
        (w_pos, w_neg), (b_pos, b_neg) = _signs(w), _signs(b)
        low, high = self._spread("low", x), self._spread("high", x)
        lowest, highest = call.at(low, w_pos, b_pos), call.at(high, w_neg, b_neg)
        s = delta / stabilised(call.output - lowest.output - highest.output, self.stabilizer)
        return x * call.exact(s)[0] - low * lowest.exact(s)[0] - high * highest.exact(s)[0]

    def _spread(self, name: str, x: Array) -> Array:
        """A bound in the shape of x."""
        bound = np.asarray(getattr(self, name), x.dtype)
        if bound.ndim and bound.shape != x.shape[-1:]:
            fail("ZBox", f"{name} expected one number or {x.shape[-1]}, one for each channel, got {bound.size}")
        return jnp.broadcast_to(bound, x.shape)


def passed(call: Call, delta: Array) -> tuple[Any, ...]:
    """``R_x = R``: relevance passes an activation, a dropout or a norm as it is.

    Raises: ValueError for an op that changes the shape, or that mixes entries by parameters.

    >>> import jax, jaxcnn
    >>> y, pull = jax.vjp(lambda x: jaxcnn.tanh(x, rule=jaxcnn.rules.passed), 2.0)
    >>> float(pull(1.0)[0])
    1.0
    """
    x, *others = call.inputs
    mixes = any(a is not None and jnp.issubdtype(a.dtype, jnp.floating) for a in others) and call.name not in NORMS
    if mixes or jnp.shape(delta) != x.shape:
        fail(call.name, "rule passed: expected as a rule of an activation, of dropout or of a norm, entry by entry")
    return _of_x(call, delta)


def rescale(call: Call, delta: Array) -> tuple[Any, ...]:
    """DeepLIFT's rescale rule, for a batch of examples and after them, in the same order, their references x₀.

    Where the op is linear δ goes back by its exact rule.  Through an activation ``δ_x = δ ∘ (y − y₀) / (x − x₀)``, the
    slope between the two points instead of the slope at one; g'(x) where they meet.  Through max pooling what y gains
    on y₀ goes to the winner in x, what it loses to the winner in x₀.  Then Σ δ_x ∘ (x − x₀) = Σ δ ∘ (y − y₀) at every
    op, and at last over the whole net.

    `jaxcnn.attribution.deep_lift` doubles the batch and uses it.  The second half of what comes back equals the first.

    Raises: ValueError for a batch that is no pairs, and for ops it does not know.
    Source: Shrikumar et al. 2017, §3.5.1; for max pooling as in captum.
    """
    if call.name == "hidden_layer":
        conv, relu, pool = hidden.parts(call)
        (delta,) = rescale(pool, delta)
        (delta,) = rescale(relu, delta)
        return _of_x(call, conv.exact(delta)[0])
    if call.name == "add":
        return call.exact(delta)
    if _by_the_batch(call):
        fail(call.name, f"rule rescale: {STATISTICS}")
    if call.name in (*PATCHES, *SUMS, "dropout", "batch_norm"):
        return _of_x(call, call.exact(delta)[0])
    x, *others = call.inputs
    if others or (call.name not in MAXIMA and call.output.shape != x.shape):
        fail(call.name, "rule rescale: expected as a rule of an activation, max_pool or a linear op")
    if x.ndim < 1 or x.shape[0] % 2:
        fail(call.name, f"rule rescale: expected examples and as many references after them, got x {x.shape}")
    dx, dy = _differences(x), _differences(call.output)
    d, _ = jnp.split(delta, 2)
    if call.name in MAXIMA:
        gain, loss = jnp.maximum(dy, 0), jnp.minimum(dy, 0)
        at_x, at_reference = jnp.split(call.exact(jnp.concatenate([d * gain, d * loss]))[0], 2)
        total = at_x + at_reference
    else:
        total = d * dy
    met = jnp.abs(dx) < _MET
    slope, _ = jnp.split(call.exact(delta)[0], 2)
    m = jnp.where(met, slope, total / jnp.where(met, 1, dx))
    return _of_x(call, jnp.concatenate([m, m]))


#: Points nearer than this have one slope.  As in captum.
_MET = 1e-10


def _differences(x: Array) -> Array:
    """Each example less its reference, x − x₀."""
    x, reference = jnp.split(x, 2)
    return x - reference


def stabilised(z: Array, epsilon: float) -> Array:
    """``z + ε·sign z`` with sign 0 = 1, to divide by."""
    return z + jnp.where(z < 0, jnp.asarray(-epsilon, z.dtype), jnp.asarray(epsilon, z.dtype))


def _for_and_against(call: Call, delta: Array, stabilizer: float) -> tuple[Array, Array]:
    """R by the terms of z that are positive, and R by those that are negative."""
    x, w, b = call.inputs
    (x_pos, x_neg), (w_pos, w_neg), (b_pos, b_neg) = _signs(x), _signs(w), _signs(b)

    def shares(w_of_pos: Array, w_of_neg: Array, b: Any) -> Array:
        of_pos, of_neg = call.at(x_pos, w_of_pos, b), call.at(x_neg, w_of_neg, None)
        s = delta / stabilised(of_pos.output + of_neg.output, stabilizer)
        return x_pos * of_pos.exact(s)[0] + x_neg * of_neg.exact(s)[0]

    return shares(w_pos, w_neg, b_pos), shares(w_neg, w_pos, b_neg)


def _signs(a: Any) -> tuple[Any, Any]:
    """a⁺ and a⁻; None of None."""
    return (None, None) if a is None else (jnp.maximum(a, 0), jnp.minimum(a, 0))


def _of_x(call: Call, relevance: Array) -> tuple[Any, ...]:
    """The relevance of the first input; the others have none."""
    return (relevance, *(None,) * (len(call.inputs) - 1))


NORMS = ("batch_norm", "layer_norm", "group_norm")
#: Of batch norm.
STATISTICS = "expected statistics from jaxcnn.calibrate; by the batch's own, examples mix"


def _by_the_batch(call: Call) -> bool:
    """Whether a batch norm mixes examples: beside x, scale and bias no mean and var went in."""
    return call.name == "batch_norm" and len(call.inputs) < 5


def _instead(op: str) -> str:
    """What does fit an op."""
    if op in MAXIMA:
        return f"; {op} keeps its exact rule, R to the winner"
    if op in SUMS:
        return f"; Epsilon and Flat fit {op}"
    if op in Epsilon.fits:
        return f"; Epsilon fits {op}"
    return "; rules.passed fits activations, dropout and norms"


def _check(rule: Any, *names: str) -> None:
    """Options as finite floats >= 0, and ``zero_params`` as a tuple of names."""
    for name in names:
        value = static_float(type(rule).__name__, name, getattr(rule, name))
        if not 0 <= value < math.inf:
            fail(type(rule).__name__, f"{name} expected a finite number >= 0, got {value}")
        object.__setattr__(rule, name, value)
    given = rule.zero_params
    names_given = (given,) if isinstance(given, str) else given
    expected = f"zero_params must be 'w', 'b' or a sequence of them, got {given!r}"
    if not isinstance(names_given, Sequence) or not all(isinstance(name, str) for name in names_given):
        raise TypeError(f"{type(rule).__name__}: {expected}")
    if not set(names_given) <= set(_PLACES):
        fail(type(rule).__name__, expected)
    object.__setattr__(rule, "zero_params", tuple(names_given))


def _bound(name: str, value: Any) -> float | tuple[float, ...]:
    if value is None:
        raise TypeError("ZBox: expected low and high, the bounds that pixels lie between, such as ZBox(0.0, 1.0)")
    each = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(each, list | tuple):
        return tuple(static_float("ZBox", name, number) for number in each)
    return static_float("ZBox", name, each)
