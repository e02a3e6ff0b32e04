"""Normalization: each group of elements is standardized, then scaled and shifted by learned parameters.

    x̂ = (x − m)·r        m = mean(x)        r = 1/√(mean((x − m)²) + ε)        y = γ·x̂ + β

The ops differ in the elements that share one m and one r:

    batch_norm   one channel, over the whole batch
    layer_norm   the channels of one pixel, or the dims ``axes``, of one example
    group_norm   a group of neighboring channels, over one example

The rule is the same. With g = δ·γ, and means over the elements that share m and r,

    δ_x = r·(g − mean(g) − x̂·mean(g·x̂))        ∂E/∂γ = Σ δ·x̂        ∂E/∂β = Σ δ

The family is closed under differentiation. The rule reads x, m and r. m and r come from `moments`, and Σ δ·x̂ from
`inner`, which have their own rules. The rest are products and means.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxcnn.arguments import array, arrays, bad_type, bad_value, static_float, static_int
from jaxcnn.kernels.dtypes import accumulator, to_accumulator
from jaxcnn.kernels.materialize import materialize, materialize_on_gpu, together_on_tpu
from jaxcnn.kernels.moments import mean_and_variance
from jaxcnn.kernels.reductions import sum_computed
from jaxcnn.ops.rule import Rule, apply_rule, custom_vjp


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis_name: str | tuple[str, ...] | None = None,
    rule: Rule | None = None,
) -> Array:
    """Batch normalization: ``y = γ·x̂ + β`` with ``x̂ = (x − m)/√(v + ε)``, for each channel separately.

    m and v are the batch's mean and variance (Σ (x − m)²/n) over all dims but the last, unless ``mean`` and ``var`` are
    given. There is no hidden state; `jaxcnn.calibrate` computes the statistics of the training data.

    Backward, with the batch's statistics: ``δ_x = r(g − mean(g) − x̂·mean(g·x̂))`` with g = δ·γ and r = 1/√(v + ε).
    With given statistics: ``δ_x = g·r``, ``∂E/∂mean = −Σ g·r``, ``∂E/∂var = −½ Σ g·x̂·r²``. In both cases
    ``∂E/∂γ = Σ δ·x̂``, ``∂E/∂β = Σ δ``.

    For 16-bit inputs, statistics are computed in float32. Under `jax.shard_map` the batch is the device's shard unless
    ``axis_name`` is given. Under jit with a sharded batch it is the whole batch.

    Args:
        x: input ``(N, …, C)``, any float dtype.
        scale: γ, ``(C,)``, of the same dtype; default 1.
        bias: β, ``(C,)``, of the same dtype; default 0.
        mean: ``(C,)``, of x's dtype, or float32 if x is 16-bit. Give both ``mean`` and ``var`` or neither.
        var: as ``mean``.
        eps: ε, at least 0.
        axis_name: one or several axes of `jax.shard_map`, `jax.pmap` or `jax.vmap`. The batch then spans the devices
            along these axes, in the statistics and in the means of δ_x. It has no effect if ``mean`` and ``var`` are
            given.
        rule: replacement for the backward rule; see `jaxcnn.rules`. Its inputs are (x, scale, bias), then mean and var
            if given.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        ValueError: if shapes or options do not fit.
        TypeError: if an argument has the wrong type or dtype.

    Source: Ioffe & Szegedy 2015.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.batch_norm(jnp.array([[1.0, 5.0], [3.0, 5.0]]), eps=0.0001).round(3).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    >>> jaxcnn.batch_norm(jnp.array([[1.0], [3.0]]), None, None, jnp.array([1.0]), jnp.array([4.0]), eps=0.0).tolist()
    [[0.0], [1.0]]
    """
    op = "batch_norm"
    x, scale, bias = _input_scale_bias(op, x, scale, bias)
    if x.ndim < 2:
        raise bad_value(op, "x", "(N, …, C)", f"shape {x.shape}")
    norm = Normalization(tuple(range(x.ndim - 1)), (x.ndim - 1,), _checked_eps(op, eps))
    _check_shapes(op, x.shape[-1:], "one number for each channel", scale=scale, bias=bias)
    names = _axis_names(op, axis_name)
    if mean is None and var is None:
        for name in names:
            if not is_bound(name):
                raise bad_value(op, "axis_name", "an axis of shard_map, pmap or vmap around the call", repr(name))
        norm = dataclasses.replace(norm, axis_names=names, devices=math.prod(map(lax.axis_size, names)))
        return apply_rule(_normalize, rule, _normalize_reference, op)(norm, x, scale, bias)
    if mean is None or var is None:
        raise bad_value(op, "mean and var", "given together", "only mean" if var is None else "only var")
    mean, var = _mean_and_var(op, x, mean=mean, var=var)
    _check_shapes(op, x.shape[-1:], "one number for each channel", mean=mean, var=var)
    normalize = apply_rule(_normalize_by_statistics, rule, _normalize_by_statistics_reference, op)
    return normalize(norm, x, scale, bias, mean, var)


def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axes: int | Sequence[int] = -1,
    eps: float = 1e-5,
    rule: Rule | None = None,
) -> Array:
    """Layer normalization: ``y = γ·x̂ + β`` with ``x̂ = (x − m)/√(v + ε)``, m and v over ``axes``.

    Backward: ``δ_x = r(g − mean(g) − x̂·mean(g·x̂))`` with g = δ·γ, r = 1/√(v + ε) and means over ``axes``;
    ``∂E/∂γ = Σ δ·x̂``, ``∂E/∂β = Σ δ`` over all other dims. For 16-bit inputs, statistics are computed in float32.

    Args:
        x: array of any shape and float dtype.
        scale: γ, of the shape that x has along ``axes`` and of its dtype; default 1.
        bias: β, of the same shape and dtype as ``scale``; default 0.
        axes: the dims to normalize over, by default only the channels; ``(1, 2, 3)`` is a whole image.
        eps: ε, at least 0.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        ValueError: if shapes or options do not fit.
        TypeError: if an argument has the wrong type or dtype.

    Source: Ba et al. 2016.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]]), eps=0.0).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    op = "layer_norm"
    x, scale, bias = _input_scale_bias(op, x, scale, bias)
    dims = dims_of(op, axes, x.ndim)
    norm = Normalization(dims, dims, _checked_eps(op, eps))
    _check_shapes(op, tuple(x.shape[d] for d in dims), f"that of x along axes {dims}", scale=scale, bias=bias)
    return apply_rule(_normalize, rule, _normalize_reference, op)(norm, x, scale, bias)


def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    groups: int = 32,
    eps: float = 1e-5,
    rule: Rule | None = None,
) -> Array:
    """Group normalization: ``y = γ·x̂ + β`` with ``x̂ = (x − m)/√(v + ε)``, m and v per example and channel group.

    Backward: ``δ_x = r(g − mean(g) − x̂·mean(g·x̂))`` with g = δ·γ, r = 1/√(v + ε) and means over the group;
    ``∂E/∂γ = Σ δ·x̂``, ``∂E/∂β = Σ δ`` over batch and space. For 16-bit inputs, statistics are computed in float32.

    Args:
        x: input ``(N, …, C)``, any float dtype.
        scale: γ, ``(C,)``, of the same dtype; default 1.
        bias: β, ``(C,)``, of the same dtype; default 0.
        groups: number of groups; channels ``g·C/groups …`` form one. With ``groups`` = C this is instance
            normalization.
        eps: ε, at least 0.
        rule: replacement for the backward rule; see `jaxcnn.rules`.

    Returns:
        An array with the shape and dtype of x.

    Raises:
        ValueError: if shapes or options do not fit.
        TypeError: if an argument has the wrong type or dtype.

    Source: Wu & He 2018.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), groups=2, eps=0.0).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """
    op = "group_norm"
    x, scale, bias = _input_scale_bias(op, x, scale, bias)
    if x.ndim < 2:
        raise bad_value(op, "x", "(N, …, C)", f"shape {x.shape}")
    groups = static_int(op, "groups", groups, least=1)
    if x.shape[-1] % groups:
        raise bad_value(op, "groups", f"a divisor of the {x.shape[-1]} channels of x {x.shape}", groups)
    norm = Normalization((*range(1, x.ndim - 1), x.ndim), (x.ndim - 1, x.ndim), _checked_eps(op, eps), groups)
    _check_shapes(op, x.shape[-1:], "one number for each channel", scale=scale, bias=bias)
    return apply_rule(_normalize, rule, _normalize_reference, op)(norm, x, scale, bias)


@dataclasses.dataclass(frozen=True)
class Normalization:
    """The elements that share a mean and a variance. Dims are those of `view`."""

    #: The dims that mean and variance are taken over.
    over: tuple[int, ...]
    #: The dims of scale and bias.
    along: tuple[int, ...]
    eps: float
    #: If given, channels are reshaped to ``(groups, C/groups)``.
    groups: int | None = None
    #: Named axes of devices that mean and variance also span.
    axis_names: tuple[str, ...] = ()
    #: Number of devices along these axes.
    devices: int = 1

    @property
    def sampled_dim(self) -> int | None:
        """A spatial dim, if means are taken over the batch and spatial dims."""
        return 1 if self.over[:2] == (0, 1) else None

    @property
    def common(self) -> tuple[int, ...]:
        """The dims that means are taken over, except those of scale and bias; in x they have the same numbers."""
        return tuple(dim for dim in self.over if dim not in self.along)

    def view(self, x: Array) -> Array:
        """Return x with its channels in groups."""
        return x if self.groups is None else x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)

    def per_channel(self, a: Array, x: Array) -> Array:
        """Return a statistic ``a``, one number per group, with a shape that broadcasts against x."""
        if self.groups is None:
            return a
        # Materialized, because XLA:CPU's loops would not run along channels.
        groups = jnp.broadcast_to(a, (*a.shape[:-1], x.shape[-1] // self.groups))
        return materialize(groups.reshape(*a.shape[:-2], x.shape[-1]))

    def expand(self, a: Array, x: Array) -> Array:
        """Return scale or bias ``a`` with a shape that broadcasts against x, in its dtype."""
        shape = tuple(n if dim in self.along else 1 for dim, n in enumerate(x.shape))
        return a.astype(x.dtype).reshape(shape)

    def reduce(self, x: Array, a: Array) -> Array:
        """Apply the adjoint of `expand`: sum over all other dims, in the shape and dtype of ``a``."""
        return x.sum(self.other_dims(x)).reshape(a.shape).astype(a.dtype)

    def other_dims(self, x: Array) -> tuple[int, ...]:
        """Return the dims of x that scale and bias do not have."""
        return tuple(dim for dim in range(x.ndim) if dim not in self.along)


# ---------------------------------------------------------------------------------------------------------------------
# Normalization by the input's own mean and variance


@custom_vjp
def _normalize(norm: Normalization, x: Array, scale: Array | None, bias: Array | None) -> Array:
    m, r = moments(norm, norm.view(x))
    return _normalized(norm, x, m, r, scale, bias)


def _normalized(norm: Normalization, x: Array, m: Array, r: Array, scale: Array | None, bias: Array | None) -> Array:
    """Return d·(r·γ) + β with d = x − m, so that x̂ = r·d."""
    d = to_accumulator(norm.view(x)) - m
    y = d * (r if scale is None else r * norm.expand(scale, d))
    return (y if bias is None else y + norm.expand(bias, y)).reshape(x.shape).astype(x.dtype)


def _normalize_fwd(norm: Normalization, x: Array, scale: Array | None, bias: Array | None) -> Any:
    # XLA:GPU would recompute m and r in each fusion that reads them, and store x̂·δ for the sum over the batch.
    m, r = map(materialize_on_gpu, moments(norm, norm.view(x)))
    y = _normalized(norm, x, m, r, scale, bias)
    if norm.common:
        # If δ is an argument of the program, XLA:TPU would sum δ·d together with d². It would not have read δ by then.
        m, r = together_on_tpu(m, r)
    return y, (x, m, r, scale, bias)


def _normalize_bwd(norm: Normalization, saved: Any, delta: Array) -> Any:
    """δ_x = r(g − mean(g) − x̂·mean(g·x̂)) with g = δ·γ; ∂E/∂γ = Σ δ·x̂; ∂E/∂β = Σ δ.

    x̂ = r·d with d = x − m. Over the dims that all these sums have in common, δ and δ·x̂ are summed once.
    """
    x, m, r, scale, bias = saved
    m, r = norm.per_channel(m, x), norm.per_channel(r, x)
    d, delta = to_accumulator(x) - m, to_accumulator(delta)
    gamma = 1 if scale is None else norm.expand(scale, d)
    if norm.common or norm.groups is not None:
        s, t = _sums(norm, delta, d, r)
        n = _count(norm, norm.view(x))
        mean_g, mean_g_x_hat = (norm.per_channel(_sum(norm, norm.view(gamma * a)) / n, x) for a in (s, t))
        delta_x = r * gamma * delta - d * (r * (r * mean_g_x_hat)) - r * mean_g
    else:
        g, x_hat = delta * gamma, d * r
        s, t = delta, delta * x_hat
        delta_x = r * (g - _mean(norm, g) - x_hat * _mean(norm, g * x_hat))
    grad_scale = None if scale is None else sum_computed(norm.other_dims(x), t).reshape(scale.shape).astype(scale.dtype)
    grad_bias = None if bias is None else norm.reduce(s, bias)
    return delta_x.astype(x.dtype), grad_scale, grad_bias


_normalize.defvjp(_normalize_fwd, _normalize_bwd)


def _sums(norm: Normalization, delta: Array, d: Array, r: Array) -> tuple[Array, Array]:
    """Return Σ δ and Σ δ·x̂ over the common dims, which stay with size 1, with x̂ = r·d."""
    s = delta.sum(norm.common, keepdims=True)
    return s, r * jnp.expand_dims(inner(norm.common, delta, d), norm.common)


@custom_vjp
def inner(dims: tuple[int, ...], a: Array, b: Array) -> Array:
    """Return Σ a·b over dims."""
    return sum_computed(dims, a * b)


def _inner_fwd(dims: tuple[int, ...], a: Array, b: Array) -> Any:
    return inner(dims, a, b), (a, b)


def _inner_bwd(dims: tuple[int, ...], saved: Any, xi: Array) -> Any:
    """⟨inner(a, b), ξ⟩ = ⟨a, ξ·b⟩ = ⟨b, ξ·a⟩."""
    a, b = saved
    xi = jnp.expand_dims(xi, dims)
    return xi * b, xi * a


inner.defvjp(_inner_fwd, _inner_bwd)


@custom_vjp
def moments(norm: Normalization, x: Array) -> tuple[Array, Array]:
    """Return the mean m over each group of elements of a view x, and r = 1/√(mean((x − m)²) + ε).

    The dims that the means are taken over stay, with size 1. Both are in the dtype of sums.
    """
    if norm.axis_names:
        x = to_accumulator(x)
        m = _mean(norm, x)
        v = _mean(norm, jnp.square(x - m))
    else:
        m, v = mean_and_variance(norm.over, norm.sampled_dim, x)
    return m, lax.rsqrt(v + norm.eps)


def _moments_fwd(norm: Normalization, x: Array) -> Any:
    m, r = moments(norm, x)
    return (m, r), (x, m, r)


def _moments_bwd(norm: Normalization, saved: Any, deltas: Any) -> Any:
    """With δ_m and δ_r, summed over the devices that share m and r: δ_x = (δ_m − δ_r·r²·x̂)/n."""
    x, m, r = saved
    delta_m, delta_r = (_sum_devices(norm, delta) for delta in deltas)
    x_hat = (to_accumulator(x) - m) * r
    return (((delta_m - delta_r * r**2 * x_hat) / _count(norm, x)).astype(x.dtype),)


moments.defvjp(_moments_fwd, _moments_bwd)


def _mean(norm: Normalization, x: Array) -> Array:
    return _sum(norm, x) / _count(norm, x)


def _sum(norm: Normalization, x: Array) -> Array:
    """Return Σ x over the elements that share a mean, on all devices."""
    return _sum_devices(norm, x.sum(norm.over, keepdims=True))


def _sum_devices(norm: Normalization, x: Array) -> Array:
    """Return Σ x over the named axes, one copy per device, so that each copy's δ is that device's contribution."""
    if not norm.axis_names:
        return x
    index = functools.reduce(operator.add, map(lax.axis_index, norm.axis_names))
    return lax.psum(x, norm.axis_names) + (0 * index).astype(x.dtype)


def _count(norm: Normalization, x: Array) -> int:
    """Return the number of elements that share a mean, at least 1 so that the mean of no elements is 0, not NaN."""
    return max(math.prod(x.shape[dim] for dim in norm.over), 1) * norm.devices


def _scale_and_shift(norm: Normalization, x_hat: Array, scale: Array | None, bias: Array | None) -> Array:
    y = x_hat if scale is None else x_hat * norm.expand(scale, x_hat)
    return y if bias is None else y + norm.expand(bias, y)


def _normalize_reference(norm: Normalization, x: Array, scale: Array | None, bias: Array | None) -> Array:
    view = to_accumulator(norm.view(x))
    m, v = jnp.mean(view, norm.over, keepdims=True), jnp.var(view, norm.over, keepdims=True)
    if norm.axis_names:
        m = lax.pmean(m, norm.axis_names)
        v = lax.pmean(jnp.mean(jnp.square(view - m), norm.over, keepdims=True), norm.axis_names)
    return _scale_and_shift(norm, (view - m) / jnp.sqrt(v + norm.eps), scale, bias).reshape(x.shape).astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Normalization by given statistics


@custom_vjp
def _normalize_by_statistics(
    norm: Normalization, x: Array, scale: Array | None, bias: Array | None, mean: Array, var: Array
) -> Array:
    return _normalize_by_statistics_reference(norm, x, scale, bias, mean, var)


def _normalize_by_statistics_fwd(
    norm: Normalization, x: Array, scale: Array | None, bias: Array | None, mean: Array, var: Array
) -> Any:
    return _normalize_by_statistics(norm, x, scale, bias, mean, var), (x, scale, bias, mean, var)


def _normalize_by_statistics_bwd(norm: Normalization, saved: Any, delta: Array) -> Any:
    """With g = δ·γ, r = 1/√(var + ε): δ_x = g·r; ∂E/∂mean = −Σ g·r; ∂E/∂var = −½ Σ g·x̂·r²; ∂E/∂γ and ∂E/∂β as above.

    γ and r have one number per channel, so that all sums follow from Σ δ and Σ δ·x̂.
    """
    x, scale, bias, mean, var = saved
    delta = to_accumulator(delta)
    d = to_accumulator(x) - norm.expand(mean, delta)
    r = lax.rsqrt(norm.expand(var, delta) + norm.eps)
    r_gamma = r if scale is None else r * norm.expand(scale, delta)
    s, t = _sums(norm, delta, d, r)
    grad_scale = None if scale is None else norm.reduce(t, scale)
    grad_bias = None if bias is None else norm.reduce(s, bias)
    grad_mean, grad_var = norm.reduce(-r_gamma * s, mean), norm.reduce(-r_gamma * r * t / 2, var)
    return (r_gamma * delta).astype(x.dtype), grad_scale, grad_bias, grad_mean, grad_var


_normalize_by_statistics.defvjp(_normalize_by_statistics_fwd, _normalize_by_statistics_bwd)


def _normalize_by_statistics_reference(
    norm: Normalization, x: Array, scale: Array | None, bias: Array | None, mean: Array, var: Array
) -> Array:
    view = to_accumulator(x)
    x_hat = (view - norm.expand(mean, view)) * lax.rsqrt(norm.expand(var, view) + norm.eps)
    return _scale_and_shift(norm, x_hat, scale, bias).astype(x.dtype)


def scale_and_shift(eps: float, scale: Any, bias: Any, mean: Array, var: Array) -> tuple[Array, Array]:
    """Return a = γ/√(v + ε) and c = β − a·m: with given statistics, batch norm is y = a·x + c."""
    a = 1 / jnp.sqrt(var + eps)
    a = a if scale is None else a * scale
    c = -a * mean
    return a, c if bias is None else c + bias


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _input_scale_bias(
    op: str, x: ArrayLike, scale: ArrayLike | None, bias: ArrayLike | None
) -> tuple[Array, Array | None, Array | None]:
    """Return x, scale and bias as arrays; scale and bias may be None."""
    given = {name: a for name, a in (("scale", scale), ("bias", bias)) if a is not None}
    x, *others = arrays(op, x=x, **given)
    parameters = dict(zip(given, others, strict=True))
    return x, parameters.get("scale"), parameters.get("bias")


def _mean_and_var(op: str, x: Array, **named: ArrayLike) -> tuple[Array, ...]:
    """Return mean and variance, in x's dtype or in the dtype of the statistics."""
    statistics = {name: array(op, name, a) for name, a in named.items()}
    allowed = {x.dtype, accumulator(x.dtype)}
    for name, a in statistics.items():
        if a.dtype not in allowed:
            dtypes = " or ".join(str(d) for d in sorted(allowed, key=str))
            raise bad_type(op, name, f"of dtype {dtypes} for x of dtype {x.dtype}", a.dtype)
    return tuple(statistics.values())


def _check_shapes(op: str, shape: tuple[int, ...], what: str, **named: Array | None) -> None:
    for name, a in named.items():
        if a is not None and a.shape != shape:
            raise bad_value(op, name, f"of shape {shape}, {what}", a.shape)


def dims_of(op: str, axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return the dims ``axes`` as sorted non-negative ints."""
    each = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
    ints = [static_int(op, "axes", a, axes) for a in each]
    if not ints or any(not -ndim <= a < ndim for a in ints) or len({a % ndim for a in ints}) < len(ints):
        raise bad_value(op, "axes", f"one or more distinct axes of an array with {ndim} dims", repr(axes))
    return tuple(sorted(a % ndim for a in ints))


def is_bound(name: str) -> bool:
    """Whether a named axis is bound around the call."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def _axis_names(op: str, axis_name: Any) -> tuple[str, ...]:
    names = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, list | tuple) else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise bad_type(op, "axis_name", "a str, several of them or None", repr(axis_name))
    return names


def _checked_eps(op: str, eps: float) -> float:
    number = static_float(op, "eps", eps)
    if not 0 <= number < float("inf"):
        raise bad_value(op, "eps", "a finite number >= 0", eps)
    return number
