"""Images and kernels: the three products of a convolution layer, each linear in both arguments.

    correlate   y[o] = Σ_k x[o·s + k·d − lo] · w[k]          image and kernel
    input_grad      x[i] = Σ_{o·s + k·d − lo = i} y[o] · w[k]ᵀ    its adjoint in x: δ and the flipped kernel
    kernel_grad       w[k] = Σ_o x[o·s + k·d − lo]ᵀ · y[o]          its adjoint in w: image and δ

`kernel_grad` sums over the batch. ⟨correlate(x, w), y⟩ = ⟨x, input_grad(y, w)⟩ = ⟨w, kernel_grad(x, y)⟩.

Each product has several *lowerings*, functions with the same signature, in the table below it. On CPU, one `choose_…`
function per product picks among them by static shape. Other platforms run "xla": one `lax.conv_general_dilated`. Its
padding is never negative, because XLA:CPU computes negative padding incorrectly (openxla/xla#48713).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import unrolled, winograd
from jaxcnn.kernels.dtypes import accumulator, wider
from jaxcnn.kernels.materialize import materialize
from jaxcnn.kernels.parallel import ONE_THREAD, on_all_threads
from jaxcnn.kernels.shapes import at_most, symbolic
from jaxcnn.kernels.split import mesh_of, run_whole
from jaxcnn.kernels.windows import at_tap, divisor, interleaved, meeting, pad_axis, tap_slices

Lowering = Callable[[Correlation, Array, Array], Array]

#: Target size in bytes of a batch block (the image patches of one kernel row, and δ): most of a core's L2 cache.
BLOCK_BYTES = 5 << 18

#: The same for whole image patches, counting each element as often as it occurs.
PATCHES_BYTES = 1 << 22

#: Target size in bytes of the product of a batch block's δ with the whole kernel: larger than any cache, but few page
#: faults.
PRODUCT_BYTES = 1 << 23

#: Groups are joined up to this many channels: one float32 vector, and few enough for jaxlib 0.10 to use all threads.
JOINED = 16

#: Up to this kernel size in one dim, one slice per element is written out.
LONGEST = 64

#: From this value of inputs · outputs, XLA:CPU divides a convolution between threads without help.
DIVIDED = 9000

#: Up to this many multiplications, XLA's convolution is used: other forms take five times as long to compile.
SMALL = 1 << 14

#: Precisions that request speed at the cost of accuracy; the strings are values of ``jax_default_matmul_precision``.
FASTEST = (lax.Precision.DEFAULT, "default", "bfloat16")

#: Limits for unrolling a product: channels per group; for one group, multiplications per position; for weight
#: gradients, number of sums over all positions.
UNROLLED = {"channels": 15, "multiplications": 640, "sums": 160}


@functools.partial(jax.jit, static_argnums=0, inline=True)
def correlate(c: Correlation, x: Array, w: Array) -> Array:
    """Correlate ``x`` with ``w``; the result is ``(N, *out, O)``, in ``c.dtype``."""
    if x.size == 0 or w.size == 0:
        return jnp.zeros((x.shape[0], *c.window.out, w.shape[-1]), c.dtype)
    run = functools.partial(_run, CORRELATE, choose_correlate(c, x, w), c, dtype=c.dtype)
    return run_whole(run, (x, w), (places(c), taps(c)), places(c))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def input_grad(c: Correlation, y: Array, w: Array) -> Array:
    """Apply the adjoint of `correlate` in x; the result is ``(N, *shape, I)``, in the promoted dtype."""
    dtype = wider(y.dtype, w.dtype)
    if y.size == 0 or w.size == 0:
        return jnp.zeros((y.shape[0], *c.window.shape, w.shape[-2] * c.groups), dtype)
    run = functools.partial(_run, INPUT_GRAD, choose_input_grad(c, y, w), c, dtype=dtype)
    return run_whole(run, (y, w), (places(c), taps(c)), places(c))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def kernel_grad(c: Correlation, x: Array, y: Array) -> Array:
    """Apply the adjoint of `correlate` in w; the result is ``(*size, I/groups, O)``, in the promoted dtype."""
    dtype = wider(x.dtype, y.dtype)
    if x.size == 0 or y.size == 0:
        return jnp.zeros((*c.window.size, x.shape[-1] // c.groups, y.shape[-1]), dtype)
    mesh = mesh_of((x, y))
    if mesh is not None and (x.shape[0] == 1 or (c.groups > 1 and len(mesh.axis_names) > 1)):
        run = functools.partial(_run, {"xla": _kernel_grad_one}, "xla", c, dtype=dtype)
    else:
        run = functools.partial(_run, KERNEL_GRAD, choose_kernel_grad(c, x, y), c, dtype=dtype)
    return run_whole(run, (x, y), (places(c), places(c)), taps(c))


def places(c: Correlation) -> slice:
    """Return the dims of images and results that must not be sharded; with groups, this includes channels."""
    return slice(1, -1 if c.groups == 1 else None)


def taps(c: Correlation) -> slice:
    """Return the dims of kernels that must not be sharded."""
    return slice(0, -2 if c.groups == 1 else None)


def _run(table: dict[str, Lowering], cpu: str, c: Correlation, a: Array, b: Array, dtype: np.dtype) -> Array:
    """Run lowering ``cpu`` on CPU and "xla" elsewhere.

    On CPU, 16-bit floats accumulate in float32. Other platforms do so in hardware.
    """
    wide = wider(a.dtype, b.dtype, dtype)
    sums = accumulator(wide)

    def on_cpu(a: Array, b: Array) -> Array:
        return table[cpu](c, a.astype(sums), b.astype(sums)).astype(dtype)

    def elsewhere(a: Array, b: Array) -> Array:
        return table["xla"](c, a.astype(wide), b.astype(wide)).astype(dtype)

    if cpu == "xla" and wide == sums:
        return elsewhere(a, b)
    return lax.platform_dependent(a, b, cpu=on_cpu, default=elsewhere)


def applies(lowering: str, c: Correlation, inputs: int) -> bool:
    """Whether a lowering supports the product for ``inputs`` channels; `choose_…` picks among the supported ones."""
    can = {
        "pointwise": c.groups == 1 and c.window.entries == 1 and not c.window.padded,
        "spare_channel": c.groups == 1,
        "rows": c.groups == 1,
        "patches": c.groups == 1,
        "turned": c.groups == 1,
        "products": c.groups == 1,
        "phases": c.groups == 1,
        "winograd": winograd.applies(c),
        "by_depth": c.window.ndim == 3,
    }
    return can.get(lowering, True)


def _small(c: Correlation, batch: int, inputs: int, outputs: int) -> bool:
    """Whether the product is so small that compile time dominates.

    Grouped convolutions are excluded: XLA:CPU joins the groups, so a NaN or infinity in one reaches all of them.
    """
    return c.groups == 1 and at_most(batch * math.prod(c.window.out) * c.window.entries * inputs * outputs, SMALL)


def _choose_grouped(c: Correlation, inputs: int, outputs: int) -> str:
    """Choose a lowering for more than one group, in `correlate` and `input_grad`."""
    inputs, outputs = inputs // c.groups, outputs // c.groups
    return "unrolled" if max(inputs, outputs) <= UNROLLED["channels"] else "by_group"


def _unrolled_pays(c: Correlation, inputs: int, outputs: int) -> bool:
    """Whether to unroll for one group, in `correlate` and `input_grad`: few channels, and terms that fit one loop."""
    terms = c.window.entries * inputs
    return terms <= unrolled.TERMS and terms * outputs <= UNROLLED["multiplications"]


# ---------------------------------------------------------------------------------------------------------------------
# correlate


def choose_correlate(c: Correlation, x: Array, w: Array) -> str:
    """Choose the lowering of `correlate` for CPU."""
    inputs = x.shape[-1]
    if _small(c, x.shape[0], inputs, w.shape[-1]):
        return "xla"
    if c.groups > 1:
        return _choose_grouped(c, inputs, w.shape[-1])
    if applies("pointwise", c, inputs):
        return "pointwise"
    if _unrolled_pays(c, inputs, w.shape[-1]):
        return "unrolled"
    if applies("by_depth", c, inputs):
        return "by_depth"
    if _winograd_pays(c, x, *w.shape[-2:], whole=True):
        return "winograd"
    if _spare_channel_pays(c, inputs, w.shape[-1]):
        return "spare_channel"
    return "all_threads" if _all_threads_pay(c, x, w.shape[-1], c.window.out) else "xla"


def _winograd_pays(c: Correlation, a: Array, inputs: int, outputs: int, *, whole: bool) -> bool:
    """Whether Winograd's form is allowed (`_fastest`) and at least halves the multiplications of a product.

    For 3 × 3 kernels the saving outweighs the transforms only from 64 channels on. If the alternative is XLA's
    convolution (``whole``), the batch must also fit in one block, so that the transforms are shared with the layer's
    other products.
    """
    if not _fastest(c) or wider(a.dtype, c.dtype).itemsize > 4 or not applies("winograd", c, inputs):
        return False
    if symbolic(a.shape[0]):  # its blocks of images need a number
        return False
    if c.window.size == (3, 3):
        if min(inputs, outputs) < 64 or (whole and not winograd.in_one_block(c, a, inputs, outputs)):
            return False
    elif c.window.size != (5, 5):
        return False
    direct = a.shape[0] * math.prod(c.window.out) * c.window.entries * inputs * outputs
    return direct >= 2 * winograd.cost(c, a.shape[0], inputs, outputs)


def _fastest(c: Correlation) -> bool:
    """Whether the caller explicitly requests speed at the cost of accuracy.

    The request is `lax.Precision.DEFAULT` ("fastest") for both operands, as the argument or as
    ``jax_default_matmul_precision``. If both are None, nothing is requested, and every sum is computed directly.
    """
    wanted = c.precision
    if wanted is None:
        wanted = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    both = wanted if isinstance(wanted, tuple) else (wanted,)
    return all(one in FASTEST for one in both)


def _all_threads_pay(c: Correlation, a: Array, outputs: int, after: tuple[int, ...]) -> bool:
    """Whether jaxlib 0.10 runs a long convolution of ``a``, to images of size ``after``, on one thread.

    Eigen runs convolutions that enlarge an image, and those of at most 16 channels, on all threads. With many channels
    the other library divides the convolution without help.
    """
    batch, *before, inputs = a.shape
    if not ONE_THREAD or c.window.ndim != 2 or any(more > n for more, n in zip(after, before, strict=True)):
        return False
    if max(inputs, outputs) <= 16 or inputs * outputs > DIVIDED:
        return False
    return not at_most(batch * math.prod(after) * c.window.entries * inputs * outputs, (1 << 24) - 1)


def _spare_channel_pays(c: Correlation, inputs: int, outputs: int) -> bool:
    """Whether jaxlib 0.10 is slow for these channels: an odd number of inputs, and 17 to 32 outputs."""
    return ONE_THREAD and c.window.ndim == 2 and inputs >= 3 and inputs % 2 == 1 and 16 < outputs <= 32


def _correlate_xla(c: Correlation, x: Array, w: Array) -> Array:
    win = c.window
    return _conv(c, x, w, stride=win.stride, padding=win.padding, w_dilation=win.dilation, groups=c.groups)


def _correlate_all_threads(c: Correlation, x: Array, w: Array) -> Array:
    """Run XLA's convolution on all threads (see `kernels.parallel`)."""
    return on_all_threads(_correlate_xla(c, x, w), x, w)


def _correlate_spare_channel(c: Correlation, x: Array, w: Array) -> Array:
    """Add a channel of zeros: jaxlib 0.10 takes two to seven times as long for 3 channels (RGB) as for 4."""
    whole = ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, ((0, 0), *whole, (0, 1)))
    return _correlate_all_threads(c, x, jnp.pad(w, (*whole, (0, 1), (0, 0))))


def _correlate_pointwise(c: Correlation, x: Array, w: Array) -> Array:
    """Multiply by a 1 × 1 kernel, which is a matrix."""
    (entries,) = tap_slices(c.window, x, 0)
    return _dot(entries, w.reshape(w.shape[-2:]), entries.ndim - 1, 0, c)


def _correlate_by_depth(c: Correlation, x: Array, w: Array) -> Array:
    """Sum the 2-D correlations with each depth slice of the kernel: XLA's 3-D convolution takes five times as long."""
    flat = _flat(c)
    found = [
        CORRELATE[choose_correlate(flat, at, of_w)](flat, at, of_w)
        for at, of_w in zip(_depth_slices(c.window, x), w, strict=True)
    ]
    return sum(found[1:], found[0]).reshape(x.shape[0], *c.window.out, w.shape[-1])


def _correlate_by_group(c: Correlation, x: Array, w: Array) -> Array:
    one = dataclasses.replace(c, groups=1)
    parts = zip(_split(x, c.groups), _split(w, c.groups), strict=True)
    return jnp.concatenate([CORRELATE[choose_correlate(one, a, b)](one, a, b) for a, b in parts], -1)


CORRELATE: dict[str, Lowering] = {
    "xla": _correlate_xla,
    "winograd": winograd.correlate,
    "all_threads": _correlate_all_threads,
    "spare_channel": _correlate_spare_channel,
    "pointwise": _correlate_pointwise,
    "unrolled": unrolled.correlate,
    "by_depth": _correlate_by_depth,
    "by_group": _correlate_by_group,
}

# ---------------------------------------------------------------------------------------------------------------------
# spread


def choose_input_grad(c: Correlation, y: Array, w: Array) -> str:
    """Choose the lowering of `input_grad` for CPU."""
    inputs = w.shape[-2] * c.groups
    if _small(c, y.shape[0], inputs, w.shape[-1]):
        return "xla"
    if c.groups > 1:
        return _choose_grouped(c, inputs, w.shape[-1])
    if applies("pointwise", c, inputs):
        return "pointwise"
    if _unrolled_pays(c, w.shape[-1], inputs):
        return "unrolled"
    if applies("by_depth", c, inputs) and not _few_meet(c.window):
        return "by_depth"
    if _products_pay(c.window, inputs):
        return "products"
    if _phases_pay(c.window, inputs, w.shape[-1]):
        return "phases"
    if _winograd_pays(c, y, *w.shape[-2:], whole=True):
        return "winograd"
    if _padded_to_twice(c.window) and _products_fit(c.window, inputs):
        return "products"
    return "all_threads" if _all_threads_pay(c, y, inputs, c.window.shape) else "xla"


def _products_pay(win: Window, inputs: int) -> bool:
    """Whether "products" pays: each δ yields few products, or XLA's convolution is slow (3-D, or strided δ).

    It also pays for small kernels if δ of windows in the padding would have to be sliced off first, which is a copy.
    """
    if not _products_fit(win, inputs):
        return False
    if win.ndim == 3 or all(k <= s for k, s in zip(win.size, win.stride, strict=True)):
        return True
    if any(s > 1 for s in win.stride):
        return win.entries * inputs <= 160
    cut = any(_reached(win, dim)[:2] != (0, out) for dim, out in enumerate(win.out))
    return inputs <= 6 or (cut and win.entries <= 3)


def _products_fit(win: Window, inputs: int) -> bool:
    """Whether the program stays short and the products of a single image's δ with the whole kernel fit in memory."""
    return max(win.size) <= LONGEST and math.prod(win.out) * win.entries * inputs <= PRODUCT_BYTES


def _padded_to_twice(win: Window) -> bool:
    """Whether XLA's convolution would multiply as many zeros around δ as elements of δ; "products" multiplies none."""
    once = all(s == 1 for s in win.stride)
    return win.ndim == 2 and once and math.prod(win.shape) >= 2 * math.prod(win.out)


def _phases_pay(win: Window, inputs: int, outputs: int) -> bool:
    """Whether there are zeros between the elements of δ, which cost XLA 10 to 80 % of the time."""
    strided = win.ndim == 2 and any(s > 1 for s in win.stride)
    return strided and (inputs * outputs <= DIVIDED or any(d > 1 for d in win.dilation))


def _few_meet(win: Window) -> bool:
    """Whether windows overlap, but not in all of their taps."""
    return any(1 < s < k for k, s in zip(win.size, win.stride, strict=True))


def _input_grad_xla(c: Correlation, y: Array, w: Array) -> Array:
    """Correlate δ, dilated by the stride, in full with the kernel flipped by 180° and its channels swapped."""
    win = c.window
    starts, ends, pads = zip(*(_reached(win, dim) for dim in range(win.ndim)), strict=True)
    if any(end <= start for start, end in zip(starts, ends, strict=True)):  # every window is in the padding
        return jnp.zeros((y.shape[0], *win.shape, w.shape[-2] * c.groups), y.dtype)
    y = lax.slice(y, (0, *starts, 0), (y.shape[0], *ends, y.shape[-1]))
    flipped = lax.rev(w, range(win.ndim))
    grouped = flipped.reshape(*w.shape[:-1], c.groups, w.shape[-1] // c.groups)
    swapped = jnp.swapaxes(grouped, -3, -1).reshape(*w.shape[:-2], w.shape[-1] // c.groups, -1)
    wanted, pads = pads, never_of_groups(win, pads)
    x = _conv(c, y, swapped, padding=pads, y_dilation=win.stride, w_dilation=win.dilation, groups=c.groups)
    if pads == wanted:
        return x
    return lax.slice(x, (0,) * x.ndim, (x.shape[0], *win.shape, x.shape[-1]))


def never_of_groups(win: Window, pads: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return the padding of dilated images, with one extra element where XLA would otherwise abort the process.

    XLA mistakes a dim with kernel size 2, stride 2 and no padding for a group dim. If the kernel is larger than the
    image, XLA then exchanges the two and rejects its own result as malformed (jaxlib 0.10–0.12).
    """
    dims = zip(win.size, win.stride, win.dilation, pads, strict=True)
    return tuple((lo, hi + ((k, s, d, lo, hi) == (2, 2, 1, 0, 0))) for k, s, d, (lo, hi) in dims)


def _input_grad_all_threads(c: Correlation, y: Array, w: Array) -> Array:
    """Run `_input_grad_xla` on all threads (see `kernels.parallel`)."""
    return on_all_threads(_input_grad_xla(c, y, w), y, w)


def _reached(win: Window, dim: int) -> tuple[int, int, tuple[int, int]]:
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


def _input_grad_pointwise(c: Correlation, y: Array, w: Array) -> Array:
    x = _dot(y, w.reshape(w.shape[-2:]), y.ndim - 1, 1, c)
    (tap,) = c.window.taps()
    return at_tap(c.window, tap, x)


def _input_grad_products(c: Correlation, y: Array, w: Array) -> Array:
    """Multiply every δ by the whole kernel in one GEMM per block of images, then sum the products of each position.

    No product has a zero of the stride as a factor.
    """
    win = c.window
    bytes_each = math.prod(win.out) * win.entries * w.shape[-2] * y.dtype.itemsize
    block = divisor(y.shape[0], PRODUCT_BYTES // max(bytes_each, 1))

    def one_block(y: Array) -> Array:
        products = _dot(y, w, y.ndim - 1, w.ndim - 1, c)  # (N, *out, *size, I)
        for dim in range(win.ndim):
            products = _met(win, dim, products)
        return products

    if block == y.shape[0]:
        return one_block(y)
    x = lax.map(one_block, y.reshape(-1, block, *y.shape[1:]))
    return x.reshape(y.shape[0], *x.shape[2:])


def _input_grad_phases(c: Correlation, y: Array, w: Array) -> Array:
    """Run one convolution of undilated δ per remainder by the stride: positions that share it meet the same taps."""
    win = c.window
    met = itertools.product(*(meeting(win, dim) for dim in range(win.ndim)))
    return interleaved(win, [_phase(c, y, w, pairs) for pairs in met])


def _phase(c: Correlation, y: Array, w: Array, pairs: Sequence[Sequence[tuple[int, int]]]) -> Array:
    """Compute the positions with one remainder by the stride; ``pairs`` are taps and shifts of δ per dim."""
    win = c.window
    length = [-(-n // s) for n, s in zip(win.shape, win.stride, strict=True)]
    # The shift of δ decreases with the tap, so the kernel is flipped.
    bounds = [(of[-1][1], of[0][1] + n) if of else (0, 0) for of, n in zip(pairs, length, strict=True)]
    starts = [max(low, 0) for low, _ in bounds]
    ends = [min(high, out) for (_, high), out in zip(bounds, win.out, strict=True)]
    if any(end <= start for start, end in zip(starts, ends, strict=True)):
        return jnp.zeros((y.shape[0], *length, w.shape[-2]), y.dtype)
    pads = tuple((max(-low, 0), max(high - out, 0)) for (low, high), out in zip(bounds, win.out, strict=True))
    dilation = tuple(of[0][1] - of[1][1] if len(of) > 1 else 1 for of in pairs)
    steps = [of[1][0] - of[0][0] if len(of) > 1 else 1 for of in pairs]
    first, last = ([of[i][0] for of in pairs] for i in (0, -1))
    taps = lax.slice(w, (*first, 0, 0), (*(k + 1 for k in last), *w.shape[-2:]), (*steps, 1, 1))
    turned = jnp.swapaxes(lax.rev(taps, range(win.ndim)), -1, -2)
    y = lax.slice(y, (0, *starts, 0), (y.shape[0], *ends, y.shape[-1]))
    sizes, ones = tuple(map(len, pairs)), (1,) * win.ndim
    plain = dataclasses.replace(c, window=Window(y.shape[1:-1], sizes, ones, pads, dilation), dtype=y.dtype)
    return CORRELATE[choose_correlate(plain, y, turned)](plain, y, turned)


def _met(win: Window, dim: int, products: Array) -> Array:
    """Sum over the first remaining kernel dim, adding the contributions to each input position along ``dim``.

    Positions that are a multiple of the stride apart meet the same taps, so they are one sum of shifted slices.
    """
    axis, taps, n, s = dim + 1, win.ndim + 1, win.shape[dim], win.stride[dim]
    length = -(-n // s)
    before, after = products.shape[:axis], (*products.shape[axis + 1 : taps], *products.shape[taps + 1 :])
    sums = [jnp.zeros((*before, length, *after), products.dtype)] * s
    for tap in range(win.size[dim]):
        shift, start = divmod(tap * win.dilation[dim] - win.padding[dim][0], s)
        begin, end = max(-shift, 0), min(win.out[dim], length - shift)
        if begin < end:  # otherwise this tap is always in the padding, as are the elements cut off here
            one = lax.slice_in_dim(lax.index_in_dim(products, tap, taps, keepdims=False), begin, end, axis=axis)
            sums[start] += pad_axis(one, axis, begin + shift, length - end - shift)
    x = jnp.stack(sums, axis + 1) if s > 1 else sums[0]
    return lax.slice_in_dim(x.reshape(*before, length * s, *after), 0, n, axis=axis)


def _input_grad_by_depth(c: Correlation, y: Array, w: Array) -> Array:
    """Apply the adjoint of `_correlate_by_depth`: each depth slice's contribution is added at its position."""
    flat, win = _flat(c), c.window
    depth, k, s, d, out, (lo, hi) = (
        win.shape[0], win.size[0], win.stride[0], win.dilation[0], win.out[0], win.padding[0],
    )  # fmt: skip
    rest = lo + depth + hi - ((out - 1) * s + 1)
    slices = y.reshape(-1, *y.shape[2:])
    x = jnp.zeros((), y.dtype)
    for tap in range(k):
        one = INPUT_GRAD[choose_input_grad(flat, slices, w[tap])](flat, slices, w[tap])
        x += pad_axis(one.reshape(y.shape[0], out, *one.shape[1:]), 1, tap * d, rest - tap * d, s - 1)
    return lax.slice_in_dim(x, lo, lo + depth, axis=1)


def _input_grad_by_group(c: Correlation, y: Array, w: Array) -> Array:
    one = dataclasses.replace(c, groups=1)
    parts = zip(_split(y, c.groups), _split(w, c.groups), strict=True)
    return jnp.concatenate([INPUT_GRAD[choose_input_grad(one, a, b)](one, a, b) for a, b in parts], -1)


INPUT_GRAD: dict[str, Lowering] = {
    "xla": _input_grad_xla,
    "winograd": winograd.input_grad,
    "all_threads": _input_grad_all_threads,
    "pointwise": _input_grad_pointwise,
    "products": _input_grad_products,
    "phases": _input_grad_phases,
    "unrolled": unrolled.input_grad,
    "by_depth": _input_grad_by_depth,
    "by_group": _input_grad_by_group,
}

# ---------------------------------------------------------------------------------------------------------------------
# match


def choose_kernel_grad(c: Correlation, x: Array, y: Array) -> str:
    """Choose the lowering of `kernel_grad` for CPU."""
    inputs = x.shape[-1]
    if _small(c, x.shape[0], inputs, y.shape[-1]):
        return "xla"
    if c.groups == inputs > 1:
        return "unrolled"
    if c.groups > 1:
        return "joined" if _neighbours(c, inputs, y.shape[-1]) >= 4 else "by_group"  # two do not pay
    if applies("pointwise", c, inputs):
        return "pointwise"
    if inputs == 1 and c.window.entries * y.shape[-1] <= UNROLLED["sums"]:
        return "unrolled"
    if applies("by_depth", c, inputs):
        return "by_depth"
    if _winograd_pays(c, x, inputs, y.shape[-1], whole=False):
        return "winograd"
    if c.window.ndim > 1 and any(s > 1 for s in c.window.stride):
        return "patches"
    few = c.window.ndim == 2 and y.shape[-1] <= 16  # output channels: few for a GEMM
    return "turned" if few or c.window.ndim == 1 else "rows"


def _kernel_grad_xla(c: Correlation, x: Array, y: Array) -> Array:
    """Run a valid correlation of the image with δ; batch and channels change places, as do stride and dilation."""
    win = c.window
    x, pads = _kernel_grad_pads(win, x)
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


def _kernel_grad_turned(c: Correlation, x: Array, y: Array) -> Array:
    """Run the same with explicit transposes: XLA:CPU inserts them itself, but neither in a loop nor in a branch."""
    win = c.window
    x, pads = _kernel_grad_pads(win, x)
    w = _conv(
        c,
        jnp.swapaxes(x, 0, -1),
        jnp.moveaxis(y, 0, -2),
        padding=pads,
        groups=1,
        w_dilation=win.stride,
        stride=win.dilation,
    )
    return jnp.moveaxis(w, 0, -2)


def _kernel_grad_pads(win: Window, x: Array) -> tuple[Array, list[tuple[int, int]]]:
    """Return the image and its padding, which is never negative, not even once XLA has exchanged x and δ."""
    pads = [(lo, span - lo - n) for span, n, (lo, _) in zip(win.span, win.shape, win.padding, strict=True)]
    longer = [(out - 1) * s + 1 - n for out, s, n in zip(win.out, win.stride, win.shape, strict=True)]
    if any(min(lo, hi) < max(more, 0) for (lo, hi), more in zip(pads, longer, strict=True)):
        return fit(win, x), [(0, 0)] * win.ndim
    return x, pads


def _kernel_grad_pointwise(c: Correlation, x: Array, y: Array) -> Array:
    """Run one GEMM with the left side transposed explicitly; XLA:CPU itself takes two to five times as long."""
    (entries,) = tap_slices(c.window, x, 0)
    w = _dot(entries.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]), 1, 0, c)
    return w.reshape(*c.window.size, *w.shape)


def _kernel_grad_rows(c: Correlation, x: Array, y: Array) -> Array:
    """Multiply the patches of one kernel row (K-major) by δ: one GEMM per kernel row and block of images.

    The blocks keep the patches in cache. K-major is the GEMM layout that runs fastest on CPU.
    """
    win, channels = c.window, x.shape[-1]
    *rows, width = win.size
    entries = width * channels * math.prod(win.span[:-1]) * win.out[-1] + math.prod(y.shape[1:])
    block = divisor(x.shape[0], BLOCK_BYTES // max(entries * x.dtype.itemsize, 1))

    def one_block(x: Array, y: Array) -> Array:
        x = fit(win, x)  # block by block, so that the whole batch is never copied with padding
        x = jnp.moveaxis(jnp.moveaxis(x, 0, -2), -1, 0)  # (I, *span, N)
        y = jnp.moveaxis(y, 0, -2).reshape(-1, y.shape[-1])  # (*out·N, O)
        axis, s, d = win.ndim, win.steps[-1], win.dilation[-1]
        last = (win.out[-1] - 1) * s + 1
        patches = jnp.stack([lax.slice_in_dim(x, k * d, k * d + last, s, axis) for k in range(width)])
        found = []
        for tap in np.ndindex(*rows):
            starts = [k * d for k, d in zip(tap, win.dilation, strict=False)]
            ends = [at + (o - 1) * s + 1 for at, o, s in zip(starts, win.out, win.steps, strict=False)]
            row = lax.slice(
                patches,
                (0, 0, *starts, 0, 0),
                (*patches.shape[:2], *ends, *patches.shape[-2:]),
                (1, 1, *win.steps[:-1], 1, 1),
            )
            found.append(_dot(row.reshape(width * channels, -1), y, 1, 0, c))
        return jnp.stack(found)

    w = _sum_of_blocks(one_block, block, x, y, (math.prod(rows), width * channels, y.shape[-1]))
    return w.reshape(*win.size, channels, y.shape[-1])


def _kernel_grad_patches(c: Correlation, x: Array, y: Array) -> Array:
    """Multiply δᵀ by whole image patches, the taps concatenated: one GEMM per block of images.

    The patches are copied without a transpose. This takes longer than `rows` where patches overlap in most elements.
    """
    win, channels = c.window, x.shape[-1]
    entries = math.prod(win.out) * win.entries * channels
    block = divisor(x.shape[0], PATCHES_BYTES // max(entries * x.dtype.itemsize, 1))

    def one_block(x: Array, y: Array) -> Array:
        patches = _patches(win, x) if win.entries > LONGEST else jnp.concatenate(list(tap_slices(win, x, 0)), -1)
        return _dot(lax.collapse(y, 0, -1), lax.collapse(patches, 0, -1), 0, 0, c)

    w = _sum_of_blocks(one_block, block, x, y, (y.shape[-1], win.entries * channels))
    return w.T.reshape(*win.size, channels, y.shape[-1])


def _patches(win: Window, x: Array) -> Array:
    """Return patches ``(N, *out, entries · C)``, built dim by dim: one slice per element of each dim, not of all."""
    x = fit(win, x)
    for dim in reversed(range(win.ndim)):
        s, last = win.stride[dim], (win.out[dim] - 1) * win.stride[dim] + 1
        starts = (k * win.dilation[dim] for k in range(win.size[dim]))
        x = materialize(jnp.stack([lax.slice_in_dim(x, at, at + last, s, dim + 1) for at in starts], win.ndim + 1))
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


def _kernel_grad_by_depth(c: Correlation, x: Array, y: Array) -> Array:
    """Run `kernel_grad` for each depth slice of the kernel."""
    flat = _flat(c)
    y = y.reshape(-1, *y.shape[2:])
    return jnp.stack([KERNEL_GRAD[choose_kernel_grad(flat, at, y)](flat, at, y) for at in _depth_slices(c.window, x)])


def _kernel_grad_by_group(c: Correlation, x: Array, y: Array) -> Array:
    one = dataclasses.replace(c, groups=1)
    parts = zip(map(materialize, _split(x, c.groups)), map(materialize, _split(y, c.groups)), strict=True)
    return jnp.concatenate([KERNEL_GRAD[choose_kernel_grad(one, a, b)](one, a, b) for a, b in parts], -1)


def _kernel_grad_one(c: Correlation, x: Array, y: Array) -> Array:
    """Run one matrix product of all image patches and δ.

    XLA's partitioner gets ∂E/∂w entirely wrong for two kinds of convolution (jaxlib 0.10), which use this form. One is
    a batch of one image: `jax.vmap` over sharded images makes a group of each image. The other is a grouped convolution
    sharded over one axis of a multi-axis mesh.
    """
    win, groups, inputs = c.window, c.groups, x.shape[-1] // c.groups
    patches = fit(win, x)
    for dim in reversed(range(win.ndim)):  # dim by dim: fewer slices than one per tap
        axis, s, d = patches.ndim - 1 - win.ndim + dim, win.steps[dim], win.dilation[dim]
        last = (win.out[dim] - 1) * s + 1
        slices = [lax.slice_in_dim(patches, k * d, k * d + last, s, axis) for k in range(win.size[dim])]
        patches = jnp.stack(slices)
    places = x.shape[0] * math.prod(win.out)
    patches = patches.reshape(win.entries, places, groups, inputs)
    y = y.reshape(places, groups, y.shape[-1] // groups)
    w = jnp.einsum("kpgi,pgo->kigo", patches, y, precision=c.precision)
    return w.reshape(*win.size, inputs, groups * y.shape[-1])


def _neighbours(c: Correlation, inputs: int, outputs: int) -> int:
    """Return how many neighboring groups together have up to `JOINED` channels."""
    return max(divisor(c.groups, JOINED * c.groups // max(inputs, outputs, 1)), 1)


def _kernel_grad_joined(c: Correlation, x: Array, y: Array) -> Array:
    """Join neighboring groups, then drop the products of one group's x with another group's δ."""
    m = _neighbours(c, x.shape[-1], y.shape[-1])
    fewer = dataclasses.replace(c, groups=c.groups // m)
    name = choose_kernel_grad(fewer, x, y) if fewer.groups == 1 else "by_group"
    w = KERNEL_GRAD[name](fewer, x, y).reshape(*c.window.size, m, x.shape[-1] // c.groups, fewer.groups, m, -1)
    own = jnp.stack([w[..., j, :, :, j, :] for j in range(m)], -2)  # (*size, I, groups / m, m, O)
    return own.reshape(*c.window.size, x.shape[-1] // c.groups, y.shape[-1])


KERNEL_GRAD: dict[str, Lowering] = {
    "xla": _kernel_grad_xla,
    "turned": _kernel_grad_turned,
    "winograd": winograd.kernel_grad,
    "pointwise": _kernel_grad_pointwise,
    "rows": _kernel_grad_rows,
    "patches": _kernel_grad_patches,
    "unrolled": unrolled.kernel_grad,
    "by_depth": _kernel_grad_by_depth,
    "by_group": _kernel_grad_by_group,
    "joined": _kernel_grad_joined,
}

# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _conv(
    c: Correlation,
    x: Array,
    w: Array,
    *,
    padding: Sequence[tuple[int, int]],
    groups: int,
    w_dilation: Sequence[int],
    stride: Sequence[int] | None = None,
    y_dilation: Sequence[int] | None = None,
) -> Array:
    channels = c.window.ndim + 1
    spatial = tuple(range(1, channels))
    picture = (0, channels, *spatial)
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=stride or (1,) * c.window.ndim,
        padding=padding,
        lhs_dilation=y_dilation,
        rhs_dilation=w_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(picture, (channels, channels - 1, *range(c.window.ndim)), picture),
        feature_group_count=groups,
        precision=c.precision,
    )


def fit(win: Window, x: Array) -> Array:
    """Return the part of the padded image that the windows cover, ``(N, *win.span, C)``: padded first, then cut."""
    ends = [max(span - lo - n, 0) for span, n, (lo, _) in zip(win.span, win.shape, win.padding, strict=True)]
    pads = [(lo, end, 0) for (lo, _), end in zip(win.padding, ends, strict=True)]
    x = lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    return lax.slice(x, (0,) * x.ndim, (x.shape[0], *win.span, x.shape[-1]))


def _dot(a: Array, b: Array, over_a: int, over_b: int, c: Correlation) -> Array:
    return lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), precision=c.precision)


def _flat(c: Correlation) -> Correlation:
    """Return ``c`` without the first spatial dim, the depth."""
    win = c.window
    flat = Window(win.shape[1:], win.size[1:], win.stride[1:], win.padding[1:], win.dilation[1:])
    return dataclasses.replace(c, window=flat)


def _depth_slices(win: Window, x: Array) -> list[Array]:
    """Return, for every depth tap, the image slices that it meets, one after the other: ``(N·out, *spatial, C)``."""
    x = pad_axis(x, 1, *win.padding[0])
    s, last = win.steps[0], (win.out[0] - 1) * win.steps[0] + 1
    starts = [k * win.dilation[0] for k in range(win.size[0])]
    return [lax.collapse(lax.slice_in_dim(x, at, at + last, s, 1), 0, 2) for at in starts]


def _split(a: Array, groups: int) -> list[Array]:
    return jnp.split(a, groups, axis=-1)
