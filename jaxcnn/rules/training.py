"""Rules to train with: another patch on the way back, or another δ.

The first two put another patch in w's place where δ is sent back, and leave ∂E/∂w = x ⋆ δ as it is; they fit `conv`,
`depthwise_conv`, `conv_transpose`, `dense` and `hidden_layer`.  The others change δ before the exact rule reads it, and
fit every op.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import fail, static_bool, static_float, static_int
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.ops.rule import Call
from jaxcnn.rules.fitting import InHiddenLayer, check_fits

PATCHES = ("conv", "depthwise_conv", "conv_transpose", "dense", "hidden_layer")


@dataclasses.dataclass(frozen=True)
class FeedbackAlignment:
    """Feedback alignment: ``δ_x = B ∗ δ`` with a fixed random patch B in place of w.

    The entries of B are uniform from −√(6/fan-in) to √(6/fan-in), of variance 2/fan-in, as those of a new patch are.  B
    is drawn from the seed and the shape of w: the same in every step and dtype, and in layers of one shape unless each
    is given a seed of its own.  Fan-in is what w has entries for one of its last dim.

    Raises: TypeError or ValueError, when it is made, for a seed that is no int from 0 to 2³² − 1; ValueError, when δ
    comes, for another op.  Source: Lillicrap et al. 2016.

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

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """δ_x by `patch`, all else by the exact rule."""
        return _with_patch(self, call, delta)

    def patch(self, w: Array) -> Array:
        """B, for a patch of the shape and dtype of w."""
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(str(w.shape).encode()))
        most = np.float32(math.sqrt(6 / math.prod(w.shape[:-1])))
        # Rounded once only, so that every program draws the same bits.
        return (most * (2 * jax.random.uniform(key, w.shape, np.float32) - 1)).astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class SignSymmetric:
    """Sign-symmetric feedback: ``δ_x = (sign(w)·mean|w|) ∗ δ``, of each entry of w its sign alone.

    The mean over all of w keeps δ at its scale.

    Raises: ValueError, when δ comes, for another op.  Source: Liao et al. 2016; the scale, Rastegari et al. 2016.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> w = jnp.array([[1.0, -3.0]])
    >>> rule = jaxcnn.rules.SignSymmetric()
    >>> jax.vjp(lambda x: jaxcnn.dense(x, w, rule=rule), jnp.ones((1, 1)))[1](jnp.array([[5.0, 1.0]]))[0].tolist()
    [[8.0]]
    """

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """δ_x by `patch`, all else by the exact rule."""
        return _with_patch(self, call, delta)

    def patch(self, w: Array) -> Array:
        """What stands in for w."""
        return jnp.sign(w) * jnp.abs(w).mean()


def _with_patch(rule: Any, call: Call, delta: Array) -> tuple[Any, ...]:
    if call.name == "hidden_layer":
        return InHiddenLayer(conv=rule)(call, delta)
    check_fits(rule, call, *PATCHES)
    x, w, b = call.inputs
    delta_x, *_ = call.at(x, rule.patch(w), b).exact(delta)
    _, *of_parameters = call.exact(delta)
    return delta_x, *of_parameters


@dataclasses.dataclass(frozen=True)
class ClipDelta:
    """δ clipped, each example's for itself: ``δ_n · min(1, norm / ‖δ_n‖)``, then the exact rule.

    The first dim is the batch.  Where E is a mean, every δ has the factor 1/N, and so must the norm.  Fits every op.

    Raises: TypeError or ValueError, when it is made, for a norm that is no finite number > 0.

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
            fail("ClipDelta", f"norm expected a finite number > 0, got {self.norm}")

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """The exact rule, of `clipped` δ."""
        return call.exact(self.clipped(delta))

    def clipped(self, delta: Array) -> Array:
        """δ_n · min(1, norm / ‖δ_n‖)."""
        wide = delta.astype(accumulator(delta.dtype))
        size = jnp.sqrt(jnp.sum(jnp.square(wide), range(1, delta.ndim), keepdims=True))
        return jnp.where(size > self.norm, wide * (self.norm / jnp.where(size > 0, size, 1)), wide).astype(delta.dtype)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The numbers of a dtype: ``bits`` after the point, smallest exponent (integers have none), largest number."""

    bits: int
    lowest: int | None
    largest: float
    #: Whether δ is first scaled so that its largest entry comes near the largest number.
    scaled: bool


_GRIDS = {
    # bfloat16's own smallest exponent is −126; its step there is no normal float32, and CPUs take it for zero.
    "bfloat16": _Grid(7, -119, 255 * 2.0**120, False),
    "float8_e4m3fn": _Grid(3, -6, 448.0, True),
    "int8": _Grid(0, None, 127.0, True),
}


@dataclasses.dataclass(frozen=True)
class QuantisedDelta:
    """δ on the grid of a shorter dtype, then the exact rule in its own: ``δ_q = s·t·⌊|δ| / (s·t) + u⌋·sign δ``.

    t is the step of the grid at that size, u uniform on [0, 1): rounding up is as probable as δ is near, so that δ_q is
    δ on average.  "int8" and "float8_e4m3fn" have a scale s, one for all of the δ that comes: the least power of two
    for which no entry of δ / s is beyond the dtype's numbers.  "bfloat16" has none, s = 1.  What is not finite stays.

    u is drawn from the seed and the bits of δ: another in every step and layer with no counter to hand on, and the same
    δ is always rounded alike.  Rounding starts from float32.  Fits every op.

    Args:
        dtype: "bfloat16", "float8_e4m3fn" or "int8".
        stochastic: False rounds to the nearest number instead, ties to even.
        seed: an int.

    Raises: when it is made: ValueError for a dtype that is none of these or a seed out of range, TypeError for what is
    no bool or int.  Source: Gupta et al. 2015, for the rounding.

    >>> import jax, jaxcnn
    >>> import jax.numpy as jnp
    >>> rule = jaxcnn.rules.QuantisedDelta("int8", stochastic=False)
    >>> jax.vjp(lambda x: jaxcnn.relu(x, rule=rule), jnp.ones(4))[1](jnp.array([127.0, 0.4, -3.7, 1.0]))[0].tolist()
    [127.0, 0.0, -4.0, 1.0]
    """

    dtype: str = "bfloat16"
    stochastic: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in _GRIDS:
            fail("QuantisedDelta", f"dtype expected one of {', '.join(_GRIDS)}, got {self.dtype!r}")
        static_bool("QuantisedDelta", "stochastic", self.stochastic)
        _check_seed(self)

    def __call__(self, call: Call, delta: Array) -> tuple[Any, ...]:
        """The exact rule, of `quantised` δ."""
        return call.exact(self.quantised(delta))

    def quantised(self, delta: Array) -> Array:
        """δ_q."""
        grid, wide = _GRIDS[self.dtype], delta.astype(np.float32)
        finite = jnp.isfinite(wide)
        size = jnp.where(finite, jnp.abs(wide), 0)
        s = _scale(grid, size.max(initial=0)) if grid.scaled else 1
        t = _step(grid, size / s)
        steps = size / s / t
        steps = jnp.floor(steps + self._uniform(wide)) if self.stochastic else jnp.rint(steps)
        found = jnp.sign(wide) * jnp.minimum(steps * t * s, np.finfo(np.float32).max if grid.scaled else grid.largest)
        return jnp.where(finite, found.astype(delta.dtype), delta)

    def _uniform(self, delta: Array) -> Array:
        bits = jnp.sum(lax.bitcast_convert_type(delta, np.uint32), dtype=np.uint32)  # in any order, on any devices
        return jax.random.uniform(jax.random.fold_in(jax.random.key(self.seed), bits), delta.shape, np.float32)


def _scale(grid: _Grid, size: Array) -> Array:
    """The least power of two, s, for which size <= largest·s; not so small that s·t is no normal float32."""
    (fraction, exponent), (of_largest, its_exponent) = jnp.frexp(size), math.frexp(grid.largest)
    s = jnp.maximum(exponent - its_exponent + (fraction > of_largest), -110)
    return jnp.ldexp(np.float32(1), s)


def _step(grid: _Grid, size: Array) -> Array:
    """How far apart the grid's numbers are at this size: 2^(exponent − bits)."""
    if grid.lowest is None:
        return jnp.ones_like(size)
    _, above = jnp.frexp(size)  # size < 2^above
    return jnp.ldexp(jnp.ones_like(size), jnp.maximum(above - 1, grid.lowest) - grid.bits)


def _check_seed(rule: Any) -> None:
    op = type(rule).__name__
    if not 0 <= static_int(op, "seed", rule.seed, rule.seed) < 2**32:
        fail(op, f"seed expected 0 to {2**32 - 1}, got {rule.seed}")
