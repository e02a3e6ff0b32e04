"""Rules for training: another kernel in the backward pass, or another δ.

The first two replace w by another kernel where δ is propagated, and keep ∂E/∂w = x ⋆ δ. They fit `conv`,
`depthwise_conv`, `conv_transpose`, `dense` and `hidden_layer`. The others change δ before it enters the exact rule, and
fit every op.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.arguments import bad_value, static_bool, static_float, static_int
from jaxcnn.kernels.dtypes import to_accumulator
from jaxcnn.ops.rule import Call
from jaxcnn.rules.compose import fits


@dataclasses.dataclass(frozen=True)
class FeedbackAlignment:
    """Feedback alignment: ``δ_x = B ∗ δ`` with a fixed random kernel B in place of w.

    The elements of B are uniform from −√(6/fan-in) to √(6/fan-in), with variance 2/fan-in, as in He initialization. B
    depends only on the seed and the shape of w, so it is the same in every step and dtype. Layers of equal shape share
    B unless given different seeds. Fan-in is the number of elements of w per index of its last dim.

    Args:
        seed: an int from 0 to 2³² − 1.

    Raises:
        TypeError: if seed is not an int.
        ValueError: if seed is out of range, or when the rule is applied to another op.

    Source: Lillicrap et al. 2016.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> rule = jaxcnn.rules.FeedbackAlignment(seed=1)
    >>> back = [jax.vjp(lambda x: jaxcnn.dense(x, w, rule=rule), jnp.ones((1, 3)))[1](jnp.ones((1, 4)))[0] for w in (
    ...     jnp.ones((3, 4)), jnp.zeros((3, 4)))]
    >>> bool((back[0] == back[1]).all())  # whatever w is
    True
    """

    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self)

    @fits("affine", part="conv")
    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """Compute δ_x with `kernel` in place of w, and the other cotangents by the exact rule."""
        return _with_kernel(self.kernel, call, delta)

    def kernel(self, w: Array) -> Array:
        """Return B, with the shape and dtype of w."""
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(str(w.shape).encode()))
        bound = np.float32(math.sqrt(6 / math.prod(w.shape[:-1])))
        # Rounded only once, so that every program draws the same bits.
        return (bound * (2 * jax.random.uniform(key, w.shape, np.float32) - 1)).astype(w.dtype)


@fits("affine", part="conv")
def sign_symmetric(call: Call, delta: Array) -> tuple[Any, ...]:
    """Sign-symmetric feedback: ``δ_x = (sign(w)·mean|w|) ∗ δ``, which uses only the signs of w.

    The mean over all of w preserves the scale of δ.

    Args:
        call: the call of the op.
        delta: δ of the op's output.

    Returns:
        One cotangent per input of the op.

    Raises:
        ValueError: if applied to another op.

    Source: Liao et al. 2016; the scale, Rastegari et al. 2016.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> w = jnp.array([[1.0, -3.0]])
    >>> rule = jaxcnn.rules.sign_symmetric
    >>> jax.vjp(lambda x: jaxcnn.dense(x, w, rule=rule), jnp.ones((1, 1)))[1](jnp.array([[5.0, 1.0]]))[0].tolist()
    [[8.0]]
    """
    return _with_kernel(lambda w: jnp.sign(w) * jnp.abs(w).mean(), call, delta)


def _with_kernel(kernel: Callable[[Array], Array], call: Call, delta: Array) -> tuple[Any, ...]:
    """Return δ_x with ``kernel(w)`` in place of w, and the exact cotangents of the parameters."""
    x, w, b = call.inputs
    delta_x, *_ = call.at(x, kernel(w), b).exact(delta)
    _, *params_grad = call.exact(delta)
    return delta_x, *params_grad


@dataclasses.dataclass(frozen=True)
class ClipDelta:
    """Clip δ per example: ``δ_n · min(1, norm / ‖δ_n‖)``, followed by the exact rule.

    The first dim is the batch. If E is a mean, every δ contains the factor 1/N, so scale ``norm`` accordingly. Fits
    every op.

    Args:
        norm: the largest norm of an example's δ, a finite number > 0.

    Raises:
        TypeError: if norm is not a number.
        ValueError: if norm is not finite or not > 0.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> rule = jaxcnn.rules.ClipDelta(norm=1.0)
    >>> jax.vjp(lambda x: jaxcnn.relu(x, rule=rule), jnp.ones((2, 2)))[1](jnp.array([[3.0, 4.0], [0.3, 0.4]]))[0]
    Array([[0.6, 0.8],
           [0.3, 0.4]], dtype=float32)
    """

    norm: float

    def __post_init__(self) -> None:
        if not 0 < static_float("ClipDelta", "norm", self.norm) < float("inf"):
            raise bad_value("ClipDelta", "norm", "a finite number > 0", self.norm)

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """Apply the exact rule to `clipped` δ."""
        return call.exact(self.clipped(delta))

    def clipped(self, delta: Array) -> Array:
        """Return δ_n · min(1, norm / ‖δ_n‖)."""
        wide = to_accumulator(delta)
        size = jnp.sqrt(jnp.sum(jnp.square(wide), range(1, delta.ndim), keepdims=True))
        return jnp.where(size > self.norm, wide * (self.norm / jnp.where(size > 0, size, 1)), wide).astype(delta.dtype)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The numbers of a dtype: ``bits`` after the point, smallest exponent (None for integers), largest number."""

    bits: int
    lowest: int | None
    largest: float
    #: Whether δ is first scaled so that its largest element comes near the largest number.
    scaled: bool


_GRIDS = {
    # bfloat16's smallest exponent is −126, but its step there is a subnormal float32, which CPUs flush to zero.
    "bfloat16": _Grid(7, -119, 255 * 2.0**120, False),
    "float8_e4m3fn": _Grid(3, -6, 448.0, True),
    "int8": _Grid(0, None, 127.0, True),
}


@dataclasses.dataclass(frozen=True)
class QuantizedDelta:
    """Round δ to the grid of a shorter dtype, then apply the exact rule: ``δ_q = s·t·⌊|δ| / (s·t) + u⌋·sign δ``.

    t is the step of the grid at that size, and u is uniform on [0, 1). The probability of rounding up is the fractional
    distance from the lower grid point, so E[δ_q] = δ (stochastic rounding). "int8" and "float8_e4m3fn" have a scale s,
    shared by all elements of δ: the smallest power of two for which no element of δ / s exceeds the dtype's range.
    "bfloat16" has none, s = 1. Elements that are not finite are left unchanged. The exact rule runs in the dtype of δ.

    u is drawn from the seed and the bits of δ. It therefore differs in every step and layer without a counter, and the
    same δ is always rounded in the same way. Rounding starts from float32. Fits every op.

    Args:
        dtype: "bfloat16", "float8_e4m3fn" or "int8".
        stochastic: whether to round stochastically; False rounds to the nearest number, ties to even.
        seed: an int from 0 to 2³² − 1.

    Raises:
        TypeError: if stochastic is not a bool or seed is not an int.
        ValueError: if dtype is not one of these or seed is out of range.

    Source: Gupta et al. 2015, for the rounding.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> rule = jaxcnn.rules.QuantizedDelta("int8", stochastic=False)
    >>> jax.vjp(lambda x: jaxcnn.relu(x, rule=rule), jnp.ones(4))[1](jnp.array([127.0, 0.4, -3.7, 1.0]))[0].tolist()
    [127.0, 0.0, -4.0, 1.0]
    """

    dtype: str = "bfloat16"
    stochastic: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in _GRIDS:
            raise bad_value("QuantizedDelta", "dtype", f"one of {', '.join(_GRIDS)}", repr(self.dtype))
        static_bool("QuantizedDelta", "stochastic", self.stochastic)
        _check_seed(self)

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """Apply the exact rule to `quantized` δ."""
        return call.exact(self.quantized(delta))

    def quantized(self, delta: Array) -> Array:
        """Return δ_q."""
        grid, wide = _GRIDS[self.dtype], delta.astype(np.float32)
        finite = jnp.isfinite(wide)
        size = jnp.where(finite, jnp.abs(wide), 0)
        s = _scale(grid, size.max(initial=0)) if grid.scaled else 1
        t = _step(grid, size / s)
        steps = size / s / t
        steps = jnp.floor(steps + self._uniform(wide)) if self.stochastic else jnp.rint(steps)
        largest = np.finfo(np.float32).max if grid.scaled else grid.largest
        rounded = jnp.sign(wide) * jnp.minimum(steps * t * s, largest)
        return jnp.where(finite, rounded.astype(delta.dtype), delta)

    def _uniform(self, delta: Array) -> Array:
        bits = jnp.sum(lax.bitcast_convert_type(delta, np.uint32), dtype=np.uint32)  # in any order, on any devices
        return jax.random.uniform(jax.random.fold_in(jax.random.key(self.seed), bits), delta.shape, np.float32)


def _scale(grid: _Grid, size: Array) -> Array:
    """Return the smallest power of two s for which size <= largest·s and s·t is a normal float32."""
    (fraction, exponent), (largest_fraction, largest_exponent) = jnp.frexp(size), math.frexp(grid.largest)
    s = jnp.maximum(exponent - largest_exponent + (fraction > largest_fraction), -110)
    return jnp.ldexp(np.float32(1), s)


def _step(grid: _Grid, size: Array) -> Array:
    """Return the distance between the grid's numbers at this size: 2^(exponent − bits)."""
    if grid.lowest is None:
        return jnp.ones_like(size)
    _, above = jnp.frexp(size)  # size < 2^above
    return jnp.ldexp(jnp.ones_like(size), jnp.maximum(above - 1, grid.lowest) - grid.bits)


def _check_seed(rule: Any) -> None:
    op = type(rule).__name__
    if not 0 <= static_int(op, "seed", rule.seed) < 2**32:
        raise bad_value(op, "seed", f"0 … {2**32 - 1}", rule.seed)
