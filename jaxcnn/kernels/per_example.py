"""Per-example weight gradients of a convolution, and their squared norms.

    kernel_grad_each     w[n, k] = Σ_o x[n, o·s + k·d − lo]ᵀ · y[n, o]
    kernel_grad_squares  ‖w[n]‖²

The norm can be computed without w (*ghost norms*). With P the image patches under the windows,

    ‖w‖² = Σ_{o, o'} ⟨P[o], P[o']⟩ · ⟨y[o], y[o']⟩
    ⟨P[o], P[o']⟩ = Σ_k ⟨x[o·s + k·d − lo], x[o'·s + k·d − lo]⟩

where the last inner products, of pixels, are computed once for all patches. This is cheaper for large kernels and few
output positions; `ghost_is_cheaper` counts. Unlike ‖w‖² itself, its terms have signs and can cancel. If they do,
precision is lost, and w is computed after all.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcnn.geometry import Correlation
from jaxcnn.kernels import onednn
from jaxcnn.kernels.dtypes import accumulator, to_accumulator, wider
from jaxcnn.kernels.kernel_grad import KERNEL_GRAD, kernel_grad
from jaxcnn.kernels.lowering import pad_to_span
from jaxcnn.kernels.materialize import materialize
from jaxcnn.kernels.parallel import batched_product
from jaxcnn.kernels.shapes import is_symbolic
from jaxcnn.kernels.split import mesh_of
from jaxcnn.platforms import Fixed, platform_dependent

#: Smallest acceptable ratio of a ghost norm's sum to the sum of absolute terms. Real nets have 0.1 or more.
MIN_RATIO = 1 / 64

#: Up to this many bytes of image patches per example, all patches of a batch are worth their memory on CPU.
PER_EXAMPLE_PATCH_BYTES = 1 << 20

#: The same for the patches of the batch, where a matrix product in a loop over the examples can take their place.
BATCH_PATCH_BYTES = 1 << 22


def kernel_grad_each(c: Correlation, x: Array, y: Array) -> Array:
    """Return per-example weight gradients, ``(N, *size, I/groups, O)``, in the accumulation dtype of x and y.

    This is one product of all patches per example. Where the patches of a batch would be too large for CPU, it is a
    product for one example after the other there: its patches stay in cache. `jaxcnn.native` copies no patches.
    """
    x, y = _to_common_accumulator(x, y)
    native = onednn.choose_native("kernel_grad", "patches", c, x.shape, y.shape[-1], x.dtype)
    if native is None or mesh_of((x, y)) is not None:
        return _each_in_jax(c, x, y)
    in_jax = Fixed(_each_in_jax, (c,))
    return platform_dependent(x, y, default=in_jax, native=Fixed(onednn.kernel_grad_each, (c,)))


def _each_in_jax(c: Correlation, x: Array, y: Array) -> Array:
    patches_bytes = math.prod(c.window.out) * c.window.entries * x.shape[-1] * x.dtype.itemsize
    n = x.shape[0]
    fits = c.groups > 1 or is_symbolic(n) or n * patches_bytes <= BATCH_PATCH_BYTES
    if c.window.ndim == 1 or (patches_bytes <= PER_EXAMPLE_PATCH_BYTES and fits):
        return by_patches(c, x, y)
    return _in_turn_on_cpu(Fixed(one_by_one, (c,)), Fixed(by_patches, (c,)), x, y)


def _in_turn_on_cpu(in_turn: Fixed, at_once: Fixed, x: Array, y: Array) -> Array:
    """Return ``in_turn(x, y)`` on one CPU, and ``at_once(x, y)`` elsewhere.

    XLA gathers a batch that is split over devices once per example if a loop runs over it.
    """
    if mesh_of((x, y)) is not None:
        return at_once(x, y)
    return platform_dependent(x, y, default=at_once, cpu=in_turn)


def one_by_one(c: Correlation, x: Array, y: Array) -> Array:
    """Run one product for one example after the other; XLA:CPU runs matrix products in loops on all threads."""
    run = KERNEL_GRAD["rows"] if c.groups == 1 and c.window.ndim > 1 else kernel_grad
    return lax.map(lambda pair: run(c, pair[0][None], pair[1][None]), (x, y))


def by_patches(c: Correlation, x: Array, y: Array) -> Array:
    """Run one product of image patches and δ per example."""
    win, n, inputs, outputs, positions = c.window, x.shape[0], x.shape[-1], y.shape[-1], math.prod(c.window.out)
    # (N, I, *span): positions last, the layout that suits a GEMM
    patches = materialize(jnp.moveaxis(pad_to_span(win, x), -1, 1))
    for dim in reversed(range(win.ndim)):  # dim by dim: fewer slices than one per tap
        axis, s, last = dim - win.ndim, win.steps[dim], (win.out[dim] - 1) * win.steps[dim] + 1
        starts = range(0, win.size[dim] * win.dilation[dim], win.dilation[dim])
        patches = materialize(jnp.stack([lax.slice_in_dim(patches, k, k + last, s, axis) for k in starts], 1))
    patches = lax.collapse(patches, 2 + win.ndim)  # (N, *size, I, positions)
    if c.groups == 1:  # a special case: with a group dim of one, XLA:CPU transposes the product's result
        patches, y = lax.collapse(patches, 1, -1), y.reshape(n, positions, outputs)
        w = batched_product(patches, y, 2, 1, c.precision)
    else:
        patches = lax.collapse(patches, 1, -2).reshape(n, win.entries, c.groups, inputs // c.groups, positions)
        y = y.reshape(n, positions, c.groups, outputs // c.groups)
        w = jnp.einsum("nkgip,npgo->nkigo", patches, y, precision=c.precision)
    return w.reshape(n, *win.size, inputs // c.groups, outputs)


def kernel_grad_squares(c: Correlation, x: Array, y: Array) -> Array:
    """Return ``(N,)``: ‖kernel_grad_each(c, x, y)[n]‖²."""
    if ghost_is_cheaper(c, x.shape[-1], y.shape[-1]):
        x, y = _to_common_accumulator(x, y)
        return _sum_unless_cancelled(Fixed(_of_one, (c,)), Fixed(by_patches, (c,)), x, y, ghost_terms(c, x, y))
    return squares(kernel_grad_each(c, x, y))


def _of_one(c: Correlation, x: Array, y: Array) -> Array:
    return kernel_grad(c, x[None], y[None])


def ghost_is_cheaper(c: Correlation, inputs: int, outputs: int) -> bool:
    """Whether the ghost norm has fewer operations per example; those outside a GEMM count eight times as much."""
    win = c.window
    positions, pixels = math.prod(win.out), math.prod(win.span)
    direct = positions * win.entries * inputs * outputs // c.groups
    ghost = pixels**2 * (inputs + 8 * c.groups * win.size[0]) + positions**2 * (outputs + 8 * c.groups)
    return ghost < direct


def for_each(f: Callable[..., Any], *batches: Any) -> Any:
    """Apply ``f`` to each example of trees ``(N, …)``, by `jax.vmap` unless that makes a convolution with N groups.

    Such a convolution is slow. If the batch is sharded by automatic mesh axes, XLA also computes it incorrectly (jaxlib
    0.10.2: `jax.vmap` of `jax.grad` of a stock convolution has no correct digits). In that case examples are processed
    one after the other.
    """
    n = jax.tree.leaves(batches)[0].shape[0]
    if isinstance(n, int) and n > 1 and _has_groups_of(n, jax.make_jaxpr(jax.vmap(f))(*batches).jaxpr):
        return lax.map(lambda example: f(*example), batches)
    return jax.vmap(f)(*batches)


def _has_groups_of(n: int, jaxpr: Any) -> bool:
    """Whether a convolution in the jaxpr, at any depth, has a multiple of n groups."""

    def grouped(params: dict[str, Any]) -> bool:
        groups = max(params.get("feature_group_count", 1), params.get("batch_group_count", 1))
        inner = (a for a in jax.tree.leaves(params, is_leaf=_is_jaxpr) if _is_jaxpr(a))
        return (groups > 1 and groups % n == 0) or any(_has_groups_of(n, getattr(a, "jaxpr", a)) for a in inner)

    return any(grouped(eqn.params) for eqn in jaxpr.eqns)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def _sum_unless_cancelled(of_one: Fixed, at_once: Fixed, x: Array, y: Array, terms: Array) -> Array:
    """Return ``(N,)`` sums of each example's terms, or the squared norms of its gradient if the terms of any cancel.

    On one CPU, the gradients are computed by ``of_one`` for one example after the other: memory for all at once would
    be allocated even if it is not needed. Elsewhere ``at_once`` computes them for the batch.
    """
    dims = range(1, terms.ndim)
    total, size = terms.sum(dims), jnp.abs(terms).sum(dims)
    precise = jnp.all(total >= MIN_RATIO * size)

    def direct(x: Array, y: Array) -> Array:
        return _in_turn_on_cpu(Fixed(_squares_in_turn, (of_one,)), Fixed(_squares_at_once, (at_once,)), x, y)

    return lax.cond(precise, lambda x, y: total, direct, x, y)


def _squares_in_turn(of_one: Fixed, x: Array, y: Array) -> Array:
    return lax.map(lambda pair: squares(of_one(*pair)[None])[0], (x, y))


def _squares_at_once(at_once: Fixed, x: Array, y: Array) -> Array:
    return squares(at_once(x, y))


def ghost_terms(c: Correlation, x: Array, y: Array) -> Array:
    """Return ``(N, groups, positions, positions)`` terms, one per pair of positions; taps are summed dim by dim."""
    win, groups, n, inputs, outputs = c.window, c.groups, x.shape[0], x.shape[-1], y.shape[-1]
    pixels = pad_to_span(win, x).reshape(n, math.prod(win.span), groups, inputs // groups)
    pixel_products = jnp.einsum("npgi,nqgi->gnpq", pixels, pixels, precision=c.precision)
    patch_products = pixel_products.reshape(groups * n, *win.span, *win.span)
    for dim, (size, s, d, o) in enumerate(zip(win.size, win.steps, win.dilation, win.out, strict=True)):
        pair = (1 + dim, 1 + win.ndim + dim)
        patch_products = _sum_of_slices(
            patch_products, pair, [range(k * d, k * d + (o - 1) * s + 1, s) for k in range(size)]
        )
    y = y.reshape(n, math.prod(win.out), groups, outputs // groups)
    delta_products = jnp.einsum("npgo,nqgo->gnpq", y, y, precision=c.precision)
    return jnp.moveaxis(patch_products.reshape(delta_products.shape) * delta_products, 0, 1)


def _sum_of_slices(x: Array, axes: tuple[int, int], ranges: list[range]) -> Array:
    """Sum the slices of x given by each range, applied to both axes."""

    def part(at: range) -> Array:
        i, j = axes
        rows = lax.slice_in_dim(x, at.start, at.stop, at.step, i)
        return lax.slice_in_dim(rows, at.start, at.stop, at.step, j)

    return functools.reduce(operator.add, map(part, ranges))


def outer_each(x: Array, y: Array) -> Array:
    """Return ``(N, I, O)``: Σ over positions of x ⊗ y, for x ``(N, positions, I)`` and y ``(N, positions, O)``."""
    x, y = _to_common_accumulator(x, y)
    if x.shape[1] == 1:
        return x[:, 0, :, None] * y[:, 0, None, :]
    return jnp.einsum("npi,npo->nio", x, y)


def outer_squares(x: Array, y: Array) -> Array:
    """Return ``(N,)``: ‖outer_each(x, y)[n]‖²."""
    _, positions, inputs = x.shape
    if positions * (inputs + y.shape[-1]) >= inputs * y.shape[-1]:
        return squares(outer_each(x, y))
    x, y = _to_common_accumulator(x, y)
    if positions == 1:
        return squares(x) * squares(y)
    terms = jnp.einsum("npi,nqi->npq", x, x) * jnp.einsum("npo,nqo->npq", y, y)
    return _sum_unless_cancelled(Fixed(_outer_of_one, ()), Fixed(outer_each, ()), x, y, terms)


def _outer_of_one(x: Array, y: Array) -> Array:
    return x.T @ y


def squares(x: Array) -> Array:
    """Return ``(N,)``: the sum of squared absolute values of each example's elements."""
    if jnp.iscomplexobj(x):
        return squares(x.real) + squares(x.imag)
    return jnp.sum(jnp.square(to_accumulator(x)), range(1, x.ndim))


def _to_common_accumulator(x: Array, y: Array) -> tuple[Array, Array]:
    dtype = accumulator(wider(x.dtype, y.dtype))
    return x.astype(dtype), y.astype(dtype)
