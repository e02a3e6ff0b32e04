"""The product of image and δ, the adjoint of `correlate` in w. It sums over the batch.

kernel_grad   w[k] = Σ_o x[o·s + k·d − lo]ᵀ · y[o]
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import onednn, unrolled, winograd
from jaxcnn.kernels.cost import cheapest, product
from jaxcnn.kernels.dtypes import wider
from jaxcnn.kernels.lowering import (
    MAX_SLICES,
    Lowering,
    applies,
    by_group,
    convolve,
    depth_slices,
    dot,
    images_per_block,
    is_small,
    joined_groups,
    pad_to_span,
    run_lowering,
    unsharded_image_dims,
    unsharded_kernel_dims,
    winograd_pays,
    without_depth,
)
from jaxcnn.kernels.materialize import materialize
from jaxcnn.kernels.split import mesh_of, run_whole
from jaxcnn.kernels.windows import as_tiles, tap_slices

#: Target size in bytes of a batch block of "rows" (the image patches of one kernel row, and δ): most of a core's L2
#: cache.
ROWS_BLOCK_BYTES = 5 << 18

#: Target size in bytes of a batch block of "patches", counting each element of the image as often as it occurs.
PATCHES_BLOCK_BYTES = 1 << 22

#: On GPU, a kernel may have up to this many times its taps, if the image is then not copied.
MAX_LARGER = 4


@functools.partial(jax.jit, static_argnums=0, inline=True)
def kernel_grad(c: Correlation, x: Array, y: Array) -> Array:
    """Apply the adjoint of `correlate` in w; the result is ``(*size, I/groups, O)``, in the promoted dtype."""
    dtype = wider(x.dtype, y.dtype)
    if x.size == 0 or y.size == 0:
        return jnp.zeros((*c.window.size, x.shape[-1] // c.groups, y.shape[-1]), dtype)
    mesh = mesh_of((x, y))
    if mesh is not None and (x.shape[0] == 1 or (c.groups > 1 and len(mesh.axis_names) > 1)):
        run = functools.partial(run_lowering, {"xla": _one_product}, "xla", c, dtype=dtype)
    else:
        cpu, gpu = choose_kernel_grad(c, x, y), choose_kernel_grad_on_gpu(c)
        native = onednn.choose_native("kernel_grad", cpu, c, x.shape, y.shape[-1], dtype)
        run = functools.partial(run_lowering, KERNEL_GRAD, cpu, c, dtype=dtype, native=native, cuda=gpu, rocm=gpu)
    return run_whole(run, (x, y), (unsharded_image_dims(c),) * 2, unsharded_kernel_dims(c))


def choose_kernel_grad(c: Correlation, x: Array, y: Array) -> str:
    """Choose the lowering of `kernel_grad` for CPU."""
    inputs, outputs = x.shape[-1], y.shape[-1]
    if is_small(c, x.shape[0], inputs, outputs):
        return "xla"
    if winograd_pays(c, x, inputs, outputs, one_block=False):
        return "winograd"
    return cheapest(product("kernel_grad", c, x.shape[0], inputs, outputs))


def choose_kernel_grad_on_gpu(c: Correlation) -> str:
    """Choose the lowering of `kernel_grad` for CUDA and ROCm.

    If the windows leave a remainder of the image, "xla" copies the image without it.
    """
    if without_remainder(c.window) == c.window:
        return "xla"
    if without_remainder(c.window).entries <= MAX_LARGER * c.window.entries:
        return "larger_kernel"
    return "pointwise" if applies("pointwise", c) else "xla"


def without_remainder(win: Window) -> Window:
    """Return windows with more taps, if necessary, and padding such that the last ends with the padded image."""
    dims = list(zip(win.shape, win.span, win.dilation, win.padding, strict=True))
    more = [max(-((span - lo - n) // d), 0) for n, span, d, (lo, _) in dims]
    size = tuple(k + m for k, m in zip(win.size, more, strict=True))
    pads = tuple((lo, span + m * d - lo - n) for (n, span, d, (lo, _)), m in zip(dims, more, strict=True))
    return win if not any(more) else dataclasses.replace(win, size=size, padding=pads)


def run_chosen(c: Correlation, x: Array, y: Array) -> Array:
    """Run the lowering that `choose_kernel_grad` picks, as part of another lowering."""
    return KERNEL_GRAD[choose_kernel_grad(c, x, y)](c, x, y)


def _xla(c: Correlation, x: Array, y: Array) -> Array:
    """Run a valid correlation of the image with δ; batch and channels change places, as do stride and dilation."""
    win = c.window
    x, pads = _with_valid_pads(win, x)
    spatial = tuple(range(1, win.ndim + 1))
    roles = lax.ConvDimensionNumbers(  # (batch, feature, *spatial) of x, of y as the kernel, and of w
        (x.ndim - 1, 0, *spatial), (x.ndim - 1, 0, *spatial), (win.ndim, win.ndim + 1, *range(win.ndim))
    )
    return lax.conv_general_dilated(
        x,
        y,
        window_strides=win.dilation,
        padding=pads,
        rhs_dilation=win.stride,
        dimension_numbers=roles,
        batch_group_count=c.groups,
        precision=c.precision,
    )


def _larger_kernel(c: Correlation, x: Array, y: Array) -> Array:
    """Run `_xla` for a kernel whose windows leave no remainder, and drop the taps that were added."""
    w = _xla(dataclasses.replace(c, window=without_remainder(c.window)), x, y)
    return lax.slice(w, (0,) * w.ndim, (*c.window.size, *w.shape[-2:]))


def _transposed(c: Correlation, x: Array, y: Array) -> Array:
    """Run `_xla` with explicit transposes: XLA:CPU inserts them itself, but neither in a loop nor in a branch.

    XLA exchanges x and δ if δ has more positions, unless x is padded before. It then takes up to 40 times as long: for
    64 images of 20 × 20 × 4 and 3 × 3 kernels with padding 2 and 15 outputs, 8.8 ms instead of 1.6 on one core.
    """
    win = c.window
    larger = math.prod(win.out) > math.prod(win.shape)
    x, pads = (pad_to_span(win, x), [(0, 0)] * win.ndim) if larger else _with_valid_pads(win, x)
    images, kernels = jnp.swapaxes(x, 0, -1), jnp.moveaxis(y, 0, -2)
    w = convolve(c, images, kernels, stride=win.dilation, padding=pads, w_dilation=win.stride, groups=1)
    return jnp.moveaxis(w, 0, -2)


def _with_valid_pads(win: Window, x: Array) -> tuple[Array, list[tuple[int, int]]]:
    """Return the image and its padding, which is never negative, not even once XLA has exchanged x and δ."""
    pads = [(lo, span - lo - n) for span, n, (lo, _) in zip(win.span, win.shape, win.padding, strict=True)]
    excess = [(out - 1) * s + 1 - n for out, s, n in zip(win.out, win.stride, win.shape, strict=True)]
    if any(min(lo, hi) < max(more, 0) for (lo, hi), more in zip(pads, excess, strict=True)):
        return pad_to_span(win, x), [(0, 0)] * win.ndim
    return x, pads


def _pointwise(c: Correlation, x: Array, y: Array) -> Array:
    """Run one GEMM with the left side transposed explicitly; XLA:CPU itself takes two to five times as long."""
    (entries,) = tap_slices(c.window, x, 0)
    w = dot(entries.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]), 1, 0, c)
    return w.reshape(*c.window.size, *w.shape)


def _rows(c: Correlation, x: Array, y: Array) -> Array:
    """Multiply the patches of one kernel row (K-major) by δ: one GEMM per kernel row and block of images.

    The blocks keep the patches in cache. K-major is the GEMM layout that runs fastest on CPU.
    """
    win, channels = c.window, x.shape[-1]
    *rows, width = win.size
    entries = width * channels * math.prod(win.span[:-1]) * win.out[-1] + math.prod(y.shape[1:])
    block = images_per_block(x.shape[0], entries * x.dtype.itemsize, ROWS_BLOCK_BYTES)

    def one_block(x: Array, y: Array) -> Array:
        x = pad_to_span(win, x)  # block by block, so that the whole batch is never copied with padding
        x = jnp.moveaxis(jnp.moveaxis(x, 0, -2), -1, 0)  # (I, *span, N)
        y = jnp.moveaxis(y, 0, -2)  # (*out, N, O)
        axis, s, d = win.ndim, win.steps[-1], win.dilation[-1]
        last = (win.out[-1] - 1) * s + 1
        patches = jnp.stack([lax.slice_in_dim(x, k * d, k * d + last, s, axis) for k in range(width)])
        products = []
        for tap in np.ndindex(*rows):
            starts = [k * d for k, d in zip(tap, win.dilation, strict=False)]
            ends = [start + (o - 1) * s + 1 for start, o, s in zip(starts, win.out, win.steps, strict=False)]
            row = lax.slice(
                patches,
                (0, 0, *starts, 0, 0),
                (*patches.shape[:2], *ends, *patches.shape[-2:]),
                (1, 1, *win.steps[:-1], 1, 1),
            )
            # Summed over (*out, N): XLA gathers a batch that is split over devices if these dims are one.
            over = tuple(range(2, row.ndim)), tuple(range(y.ndim - 1))
            products.append(lax.dot_general(row, y, (over, ((), ())), precision=c.precision))  # (width, I, O)
        return jnp.stack(products)

    w = _sum_of_blocks(one_block, block, x, y, (math.prod(rows), width, channels, y.shape[-1]))
    return w.reshape(*win.size, channels, y.shape[-1])


def _patches(c: Correlation, x: Array, y: Array) -> Array:
    """Multiply δᵀ by whole image patches, the taps concatenated: one GEMM per block of images.

    The patches are copied without a transpose. This takes longer than "rows" where patches overlap in most elements.
    """
    win, channels = c.window, x.shape[-1]
    entries = math.prod(win.out) * win.entries * channels
    block = images_per_block(x.shape[0], entries * x.dtype.itemsize, PATCHES_BLOCK_BYTES)

    def one_block(x: Array, y: Array) -> Array:
        if win.tiles:
            patches = _patches_of_tiles(win, x)
        elif win.entries > MAX_SLICES:
            patches = _patches_by_dim(win, x)
        else:
            patches = jnp.concatenate(list(tap_slices(win, x, 0)), -1)
        return dot(lax.collapse(y, 0, -1), lax.collapse(patches, 0, -1), 0, 0, c)

    w = _sum_of_blocks(one_block, block, x, y, (y.shape[-1], win.entries * channels))
    return w.T.reshape(*win.size, channels, y.shape[-1])


def _patches_of_tiles(win: Window, x: Array) -> Array:
    """Return the patches of windows that tile the image, ``(N, *out, entries · C)``: one transpose."""
    tiles = as_tiles(win, x)
    dims = (0, *range(1, 2 * win.ndim, 2), *range(2, 2 * win.ndim + 1, 2), 2 * win.ndim + 1)
    return lax.collapse(tiles.transpose(dims), win.ndim + 1)


def _patches_by_dim(win: Window, x: Array) -> Array:
    """Return patches ``(N, *out, entries · C)``, built dim by dim: one slice per element of each dim, not of all."""
    x = pad_to_span(win, x)
    for dim in reversed(range(win.ndim)):
        s, last = win.stride[dim], (win.out[dim] - 1) * win.stride[dim] + 1
        starts = (k * win.dilation[dim] for k in range(win.size[dim]))
        slices = [lax.slice_in_dim(x, start, start + last, s, dim + 1) for start in starts]
        x = materialize(jnp.stack(slices, win.ndim + 1))
    return lax.collapse(x, win.ndim + 1)


def _sum_of_blocks(
    one_block: Callable[[Array, Array], Array], block: int, x: Array, y: Array, shape: tuple[int, ...]
) -> Array:
    """Sum ``one_block`` over all blocks of ``block`` images; 0 for an empty batch."""

    def add_block(i: int, w: Array) -> Array:
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=i * block, slice_size=block)
        return w + one_block(part(x), part(y))

    blocks = x.shape[0] // block if block else 0
    zero = jnp.zeros(shape, y.dtype)
    return one_block(x, y) if blocks == 1 else lax.fori_loop(0, blocks, add_block, zero)


def _by_depth(c: Correlation, x: Array, y: Array) -> Array:
    """Run `kernel_grad` for each depth slice of the kernel."""
    flat, y = without_depth(c), y.reshape(-1, *y.shape[2:])
    return jnp.stack([run_chosen(flat, x_slice, y) for x_slice in depth_slices(c.window, x)])


def _by_group(c: Correlation, x: Array, y: Array) -> Array:
    return by_group(lambda c, x, y: run_chosen(c, materialize(x), materialize(y)), c, x, y)


def _joined(c: Correlation, x: Array, y: Array) -> Array:
    """Join neighboring groups, then drop the products of one group's x with another group's δ."""
    m = joined_groups(c, x.shape[-1], y.shape[-1])
    fewer = dataclasses.replace(c, groups=c.groups // m)
    name = choose_kernel_grad(fewer, x, y) if fewer.groups == 1 else "by_group"
    w = KERNEL_GRAD[name](fewer, x, y).reshape(*c.window.size, m, x.shape[-1] // c.groups, fewer.groups, m, -1)
    diagonal = jnp.stack([w[..., j, :, :, j, :] for j in range(m)], -2)  # (*size, I, groups / m, m, O)
    return diagonal.reshape(*c.window.size, x.shape[-1] // c.groups, y.shape[-1])


def _one_product(c: Correlation, x: Array, y: Array) -> Array:
    """Run one matrix product of all image patches and δ.

    XLA's partitioner gets ∂E/∂w entirely wrong for two kinds of convolution (jaxlib 0.10), which use this form. One is
    a batch of one image: `jax.vmap` over sharded images makes a group of each image. The other is a grouped convolution
    sharded over one axis of a multi-axis mesh.
    """
    win, groups, inputs = c.window, c.groups, x.shape[-1] // c.groups
    patches = pad_to_span(win, x)
    for dim in reversed(range(win.ndim)):  # dim by dim: fewer slices than one per tap
        axis, s, d = patches.ndim - 1 - win.ndim + dim, win.steps[dim], win.dilation[dim]
        last = (win.out[dim] - 1) * s + 1
        slices = [lax.slice_in_dim(patches, k * d, k * d + last, s, axis) for k in range(win.size[dim])]
        patches = jnp.stack(slices)
    positions = x.shape[0] * math.prod(win.out)
    patches = patches.reshape(win.entries, positions, groups, inputs)
    y = y.reshape(positions, groups, y.shape[-1] // groups)
    w = jnp.einsum("kpgi,pgo->kigo", patches, y, precision=c.precision)
    return w.reshape(*win.size, inputs, groups * y.shape[-1])


KERNEL_GRAD: dict[str, Lowering] = {
    "xla": _xla,
    "larger_kernel": _larger_kernel,
    "transposed": _transposed,
    "winograd": winograd.kernel_grad,
    "pointwise": _pointwise,
    "rows": _rows,
    "patches": _patches,
    "unrolled": unrolled.kernel_grad,
    "by_position": unrolled.kernel_grad_by_position,
    "by_depth": _by_depth,
    "by_group": _by_group,
    "joined": _joined,
    "onednn": onednn.kernel_grad,
}
