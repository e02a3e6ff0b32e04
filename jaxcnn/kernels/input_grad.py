"""The product of δ and the flipped kernel, the adjoint of `correlate` in x.

input_grad    x[i] = Σ_{o·s + k·d − lo = i} y[o] · w[k]ᵀ
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import correlate, onednn, unrolled, winograd
from jaxcnn.kernels.cost import cheapest, product
from jaxcnn.kernels.dtypes import wider
from jaxcnn.kernels.lowering import (
    Lowering,
    by_group,
    convolve,
    dot,
    images_per_block,
    is_small,
    one_loop_on_gpu,
    run_lowering,
    unsharded_image_dims,
    unsharded_kernel_dims,
    winograd_pays,
    without_depth,
)
from jaxcnn.kernels.parallel import on_all_threads
from jaxcnn.kernels.shapes import known_at_most
from jaxcnn.kernels.split import run_whole
from jaxcnn.kernels.windows import at_tap, interleaved, pad_axis, phase_shape, phase_taps, phase_window, untile

#: A kernel is large, on GPU, if the image has up to this many times its elements.
LARGE_KERNEL = 5

#: Target size in bytes of a batch block's products ("products"): larger than any cache, but few page faults.
PRODUCTS_BLOCK_BYTES = 1 << 23


@functools.partial(jax.jit, static_argnums=0, inline=True)
def input_grad(c: Correlation, y: Array, w: Array) -> Array:
    """Apply the adjoint of `correlate` in x; the result is ``(N, *shape, I)``, in the promoted dtype."""
    dtype = wider(y.dtype, w.dtype)
    image = (y.shape[0], *c.window.shape, w.shape[-2] * c.groups)
    if y.size == 0 or w.size == 0:
        return jnp.zeros(image, dtype)
    cpu, gpu = choose_input_grad(c, y, w), choose_input_grad_on_gpu(c, y, w)
    native = onednn.choose_native("input_grad", cpu, c, image, w.shape[-1], dtype)
    run = functools.partial(
        run_lowering, INPUT_GRAD, cpu, c, dtype=dtype, native=native, tpu="xla_reverse", cuda=gpu, rocm=gpu
    )
    image_dims = unsharded_image_dims(c)
    return run_whole(run, (y, w), (image_dims, unsharded_kernel_dims(c)), image_dims)


def choose_input_grad(c: Correlation, y: Array, w: Array) -> str:
    """Choose the lowering of `input_grad` for CPU."""
    inputs, outputs = w.shape[-2] * c.groups, w.shape[-1]
    if is_small(c, y.shape[0], inputs, outputs):
        return "xla"
    if winograd_pays(c, y, *w.shape[-2:], one_block=True):
        return "winograd"
    return cheapest(product("input_grad", c, y.shape[0], inputs, outputs))


def choose_input_grad_on_gpu(c: Correlation, y: Array, w: Array) -> str:
    """Choose the lowering of `input_grad` for CUDA and ROCm.

    With stride 1, "xla" lets the sum of a residual connection fuse into the convolution, but copies the kernel once
    more. For large kernels that costs more.
    """
    inputs = w.shape[-2] * c.groups
    if one_loop_on_gpu(c, inputs, w.shape[-1]):
        return "unrolled"
    large = known_at_most(y.shape[0] * math.prod(c.window.shape) * inputs, LARGE_KERNEL * w.size)
    return "xla_reverse" if c.window.strided or large else "xla"


def run_chosen(c: Correlation, y: Array, w: Array) -> Array:
    """Run the lowering that `choose_input_grad` picks, as part of another lowering."""
    return INPUT_GRAD[choose_input_grad(c, y, w)](c, y, w)


def _xla(c: Correlation, y: Array, w: Array) -> Array:
    """Correlate δ, dilated by the stride, in full with the kernel flipped by 180° and its channels swapped."""
    return _full(c, y, flip(w, c.groups), w.shape[-2] * c.groups)


def _xla_reverse(c: Correlation, y: Array, w: Array) -> Array:
    """Run `_xla` with the channels swapped by the convolution's dimension numbers, not by a transpose, as in stock JAX.

    XLA:GPU recognizes this form as cuDNN's gradient of the input, and does not dilate δ. XLA:TPU needs 0.94 to 1.16 of
    its cycles for `_xla`, counted for both passes.
    """
    inputs = w.shape[-2] * c.groups
    if c.groups > 1:  # (*size, I, groups, O) to (*size, groups · I, O)
        grouped = w.reshape(*w.shape[:-1], c.groups, w.shape[-1] // c.groups)
        w = jnp.swapaxes(grouped, -3, -2).reshape(*w.shape[:-2], inputs, -1)
    return _full(c, y, lax.rev(w, range(w.ndim - 2)), inputs, swapped=True)


def _full(c: Correlation, y: Array, w: Array, inputs: int, *, swapped: bool = False) -> Array:
    """Correlate δ, dilated by the stride, in full with the flipped kernel ``w``."""
    win = c.window
    y, pads = _reaching(win, y)
    if 0 in y.shape:
        return jnp.zeros((y.shape[0], *win.shape, inputs), y.dtype)
    accepted = padding_that_xla_accepts(win, pads)
    x = convolve(
        c, y, w,
        padding=accepted, x_dilation=win.stride, w_dilation=win.dilation, groups=c.groups, swapped=swapped,
    )  # fmt: skip
    if accepted == pads:
        return x
    return lax.slice(x, (0,) * x.ndim, (x.shape[0], *win.shape, x.shape[-1]))


def flip(w: Array, groups: int) -> Array:
    """Return the kernel flipped by 180°, with the input and output channels of each group swapped."""
    flipped = lax.rev(w, range(w.ndim - 2))
    grouped = flipped.reshape(*w.shape[:-1], groups, w.shape[-1] // groups)
    return jnp.swapaxes(grouped, -3, -1).reshape(*w.shape[:-2], w.shape[-1] // groups, -1)


def padding_that_xla_accepts(win: Window, pads: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return the padding of dilated images, with one extra element where XLA would otherwise abort the process.

    XLA mistakes a dim with kernel size 2, stride 2 and no padding for a group dim. If the kernel is larger than the
    image, XLA then exchanges the two and rejects its own result as malformed (jaxlib 0.10–0.12).
    """
    dims = zip(win.size, win.stride, win.dilation, pads, strict=True)
    return tuple((lo, hi + ((k, s, d, lo, hi) == (2, 2, 1, 0, 0))) for k, s, d, (lo, hi) in dims)


def _all_threads(c: Correlation, y: Array, w: Array) -> Array:
    """Run `_xla` on all threads (see `kernels.parallel`)."""
    return on_all_threads(_xla(c, y, w), y, w)


def _reaching(win: Window, y: Array) -> tuple[Array, tuple[tuple[int, int], ...]]:
    """Return δ of the windows that reach the image, none if all are in the padding, and the padding of δ."""
    starts, ends, pads = zip(*(_reaching_outputs(win, dim) for dim in range(win.ndim)), strict=True)
    starts = tuple(map(min, starts, win.out))
    ends = tuple(map(max, starts, ends))
    if (starts, ends) == ((0,) * win.ndim, win.out):
        return y, pads
    return lax.slice(y, (0, *starts, 0), (y.shape[0], *ends, y.shape[-1])), pads


def _reaching_outputs(win: Window, dim: int) -> tuple[int, int, tuple[int, int]]:
    """Return the range ``start … end`` of outputs whose windows reach the image, and their padding (never negative).

    Outputs whose windows are entirely in the padding are dropped, so the remaining padding is smaller than the kernel.
    """
    n, s, (lo, _) = win.shape[dim], win.stride[dim], win.padding[dim]
    reach = win.extent[dim] - 1
    start = max(-(-(lo - reach) // s), 0)
    end = min(win.out[dim], -(-(lo + n) // s))
    before = reach - lo + start * s
    after = n + lo - 1 - (end - 1) * s
    return start, end, (before, after)


def _pointwise(c: Correlation, y: Array, w: Array) -> Array:
    x = dot(y, w.reshape(w.shape[-2:]), y.ndim - 1, 1, c)
    (tap,) = c.window.taps()
    return at_tap(c.window, tap, x)


def _products(c: Correlation, y: Array, w: Array) -> Array:
    """Multiply every δ by the whole kernel in one GEMM per block of images, then sum the products of each position.

    No product has a zero of the stride as a factor.
    """
    win = c.window
    example_bytes = math.prod(win.out) * win.entries * w.shape[-2] * y.dtype.itemsize
    block = images_per_block(y.shape[0], example_bytes, PRODUCTS_BLOCK_BYTES)

    def one_block(y: Array) -> Array:
        products = dot(y, w, y.ndim - 1, w.ndim - 1, c)  # (N, *out, *size, I)
        if win.tiles:
            pairs = [axis for dim in range(1, win.ndim + 1) for axis in (dim, win.ndim + dim)]
            return untile(win, products.transpose(0, *pairs, products.ndim - 1))
        for dim in range(win.ndim):
            products = _scatter_dim(win, dim, products)
        return products

    if block == y.shape[0]:
        return one_block(y)
    x = lax.map(one_block, y.reshape(-1, block, *y.shape[1:]))
    return x.reshape(y.shape[0], *x.shape[2:])


def _scatter_dim(win: Window, dim: int, products: Array) -> Array:
    """Sum over the first remaining kernel dim, adding the contributions to each input position along ``dim``.

    Positions that are a multiple of the stride apart receive the same taps, so they are one sum of shifted slices.
    """
    axis, taps, n, s = dim + 1, win.ndim + 1, win.shape[dim], win.stride[dim]
    length = -(-n // s)
    before, after = products.shape[:axis], (*products.shape[axis + 1 : taps], *products.shape[taps + 1 :])
    sums = [jnp.zeros((*before, length, *after), products.dtype)] * s
    for tap in range(win.size[dim]):
        shift, phase = divmod(tap * win.dilation[dim] - win.padding[dim][0], s)
        begin, end = max(-shift, 0), min(win.out[dim], length - shift)
        if begin < end:  # otherwise this tap is always in the padding, as are the elements cut off here
            of_tap = lax.index_in_dim(products, tap, taps, keepdims=False)
            term = lax.slice_in_dim(of_tap, begin, end, axis=axis)
            sums[phase] += pad_axis(term, axis, begin + shift, length - end - shift)
    x = jnp.stack(sums, axis + 1) if s > 1 else sums[0]
    return lax.slice_in_dim(x.reshape(*before, length * s, *after), 0, n, axis=axis)


def _phases(c: Correlation, y: Array, w: Array) -> Array:
    """Run one convolution of undilated δ per remainder by the stride: positions that share it receive the same taps."""
    win = c.window
    phases = itertools.product(*(phase_taps(win, dim) for dim in range(win.ndim)))
    return interleaved(win, [_phase(c, y, w, taps) for taps in phases])


def _phase(c: Correlation, y: Array, w: Array, taps: Sequence[Sequence[tuple[int, int]]]) -> Array:
    """Compute the positions with one remainder by the stride; ``taps`` are, per dim, pairs of a tap and its shift."""
    win = c.window
    found = phase_window(win, taps)
    if found is None:
        return jnp.zeros((y.shape[0], *phase_shape(win), w.shape[-2]), y.dtype)
    starts, undilated = found
    steps = [pairs[1][0] - pairs[0][0] if len(pairs) > 1 else 1 for pairs in taps]
    first, last = ([pairs[i][0] for pairs in taps] for i in (0, -1))
    part = lax.slice(w, (*first, 0, 0), (*(k + 1 for k in last), *w.shape[-2:]), (*steps, 1, 1))
    flipped = jnp.swapaxes(lax.rev(part, range(win.ndim)), -1, -2)
    ends = (start + n for start, n in zip(starts, undilated.shape, strict=True))
    y = lax.slice(y, (0, *starts, 0), (y.shape[0], *ends, y.shape[-1]))
    return correlate.run_chosen(dataclasses.replace(c, window=undilated, dtype=y.dtype), y, flipped)


def _unrolled(c: Correlation, y: Array, w: Array) -> Array:
    """Sum δ times the taps. With stride 1, this is the program of a forward pass, and XLA compiles equal ones once."""
    win = c.window
    if win.strided:
        return unrolled.input_grad(c, y, w)
    y, pads = _reaching(win, y)
    if 0 in y.shape:
        return jnp.zeros((y.shape[0], *win.shape, w.shape[-2] * c.groups), y.dtype)
    full = Window(y.shape[1:-1], win.size, win.stride, pads, win.dilation)
    return unrolled.correlate(dataclasses.replace(c, window=full, dtype=y.dtype), y, flip(w, c.groups))


def _by_depth(c: Correlation, y: Array, w: Array) -> Array:
    """Apply the adjoint of the 3-D correlation slice by slice, each added at its depth."""
    flat, win = without_depth(c), c.window
    depth, k, s, d, out, (lo, hi) = (
        win.shape[0], win.size[0], win.stride[0], win.dilation[0], win.out[0], win.padding[0],
    )  # fmt: skip
    rest = lo + depth + hi - ((out - 1) * s + 1)
    slices = y.reshape(-1, *y.shape[2:])
    x = jnp.zeros((), y.dtype)
    for tap in range(k):
        term = run_chosen(flat, slices, w[tap])
        x += pad_axis(term.reshape(y.shape[0], out, *term.shape[1:]), 1, tap * d, rest - tap * d, s - 1)
    return lax.slice_in_dim(x, lo, lo + depth, axis=1)


def _by_group(c: Correlation, y: Array, w: Array) -> Array:
    return by_group(run_chosen, c, y, w)


INPUT_GRAD: dict[str, Lowering] = {
    "xla": _xla,
    "xla_reverse": _xla_reverse,
    "winograd": winograd.input_grad,
    "all_threads": _all_threads,
    "pointwise": _pointwise,
    "products": _products,
    "phases": _phases,
    "unrolled": _unrolled,
    "by_depth": _by_depth,
    "by_group": _by_group,
    "onednn": onednn.input_grad,
}
