"""Shared parts of the lowerings of the three products: dispatch by platform, and conditions for the choice.

The products are in `correlate`, `input_grad` and `kernel_grad`. Each has several *lowerings*, functions with the same
signature, in one table per file. The file's `choose_…` functions pick one per platform by static shape. Platforms
without a choice run "xla": one `lax.conv_general_dilated`. Its padding is never negative, because XLA:CPU computes
negative padding incorrectly (openxla/xla#48713).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import unrolled, winograd
from jaxcnn.kernels.dtypes import accumulator, wider
from jaxcnn.kernels.parallel import ONE_THREAD
from jaxcnn.kernels.shapes import is_symbolic, known_at_most
from jaxcnn.kernels.windows import pad_axis
from jaxcnn.platforms import Fixed, platform_dependent

Lowering = Callable[[Correlation, Array, Array], Array]

#: Up to this many slices are written out; for more, the program would become long.
MAX_SLICES = 64

#: From this value of inputs · outputs, XLA:CPU divides a convolution between threads without help.
DIVIDED_BY_XLA = 9000

#: Up to this many multiplications, XLA's convolution is used: on two cores, other forms save less than a tenth of a
#: millisecond per call, and take about three times as long to compile.
SMALL = 1 << 17

#: Up to this many multiplications, `gemm_pays` prefers XLA's convolution.
GEMM_MULTIPLICATIONS = 1 << 21

#: The same if there are few positions.
FEW_POSITIONS_MULTIPLICATIONS = 1 << 24

#: Precisions that request speed at the cost of accuracy; the strings are values of ``jax_default_matmul_precision``.
FASTEST = (lax.Precision.DEFAULT, "default", "bfloat16")

#: Up to this many channels per group, a grouped product is unrolled.
UNROLLED_CHANNELS = 15

#: Up to this many taps, reading them all from the cache of a GPU takes about as long as reading the image from memory.
GPU_TAPS = 27

#: Up to this many elements, a 1 × 1 kernel is unrolled: a GEMM takes up to six times as long.
UNROLLED_MATRIX, UNROLLED_MATRIX_IN_3D = 64, 40

#: Up to this many multiplications per position, a product with one group is unrolled.
UNROLLED_MULTIPLICATIONS = 640


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


def run_lowering(
    table: dict[str, Lowering],
    cpu: str,
    c: Correlation,
    a: Array,
    b: Array,
    dtype: np.dtype,
    native: str | None = None,
    **accelerators: str,
) -> Array:
    """Run lowering ``cpu`` on CPU, those of ``accelerators`` ("tpu", "cuda", "rocm") there, and "xla" elsewhere.

    Programs for one CPU device run lowering ``native``, if there is one. On CPU, 16-bit floats accumulate in float32.
    Other platforms do so in hardware, except in sums that are written out.
    """
    wide = wider(a.dtype, b.dtype, dtype)
    sums = accumulator(wide)

    elsewhere = Fixed(_run, (table["xla"], c, wide, dtype))
    others = {
        platform: Fixed(_run, (table[name], c, sums if name == "unrolled" else wide, dtype))
        for platform, name in accelerators.items()
        if name != "xla"
    }
    if cpu != "xla" or wide != sums:
        others["cpu"] = Fixed(_run, (table[cpu], c, sums, dtype))
    compiled = None if native is None else Fixed(_run, (table[native], c, sums, dtype))
    return platform_dependent(a, b, default=elsewhere, native=compiled, **others)


def _run(lowering: Lowering, c: Correlation, wide: np.dtype, dtype: np.dtype, a: Array, b: Array) -> Array:
    """Run a lowering in the dtype ``wide``."""
    return lowering(c, a.astype(wide), b.astype(wide)).astype(dtype)


def unsharded_image_dims(c: Correlation) -> slice:
    """Return the dims of images and results that must not be sharded; with groups, these include the channels."""
    return slice(1, -1 if c.groups == 1 else None)


def unsharded_kernel_dims(c: Correlation) -> slice:
    """Return the dims of kernels that must not be sharded."""
    return slice(0, -2 if c.groups == 1 else None)


# ---------------------------------------------------------------------------------------------------------------------
# Conditions for the choice


def applies(lowering: str, c: Correlation) -> bool:
    """Whether a lowering supports the product; each `choose_…` picks among the supported ones."""
    supported = {
        "pointwise": c.groups == 1 and c.window.entries == 1 and not c.window.padded,
        "spare_channel": c.groups == 1,
        "rows": c.groups == 1,
        "patches": c.groups == 1,
        "transposed": c.groups == 1,
        "products": c.groups == 1,
        "phases": c.groups == 1,
        "winograd": winograd.applies(c),
        "by_depth": c.window.ndim == 3,
    }
    return supported.get(lowering, True)


def is_small(c: Correlation, batch: int, inputs: int, outputs: int) -> bool:
    """Whether the product is so small that compile time dominates.

    Grouped convolutions are excluded: XLA:CPU joins the groups, so a NaN or infinity in one reaches all of them.
    """
    return c.groups == 1 and known_at_most(multiplications(c, batch, c.window.out, inputs, outputs), SMALL)


def multiplications(c: Correlation, batch: int, positions: tuple[int, ...], inputs: int, outputs: int) -> int:
    """Return the number of multiplications of a product with one group."""
    return batch * math.prod(positions) * c.window.entries * inputs * outputs


def choose_pointwise(c: Correlation, inputs: int, outputs: int) -> str | None:
    """Choose a lowering for 1 × 1 kernels, in `correlate` and `input_grad`; None for a few channels.

    In 3-D, XLA's convolution takes 10 to 45 % less time than its GEMM.
    """
    if c.window.ndim == 3 and not c.window.strided:
        return "xla" if inputs * outputs > UNROLLED_MATRIX_IN_3D else None
    return "pointwise" if inputs * outputs > UNROLLED_MATRIX else None


def one_loop_on_gpu(c: Correlation, inputs: int, outputs: int) -> bool:
    """Whether a depthwise product is computed as one loop on GPU: XLA fuses it with its neighbors, but not cuDNN's."""
    return c.groups == inputs == outputs and c.window.entries <= GPU_TAPS


def choose_grouped(c: Correlation, inputs: int, outputs: int) -> str:
    """Choose a lowering for more than one group, in `correlate` and `input_grad`."""
    inputs, outputs = inputs // c.groups, outputs // c.groups
    return "unrolled" if max(inputs, outputs) <= UNROLLED_CHANNELS else "by_group"


def unrolling_pays(c: Correlation, inputs: int, outputs: int) -> bool:
    """Whether to unroll for one group, in `correlate` and `input_grad`: few channels, and terms that fit one loop."""
    terms = c.window.entries * inputs
    return terms <= unrolled.TERMS and terms * outputs <= UNROLLED_MULTIPLICATIONS


def gemm_pays(c: Correlation, batch: int, sizes: Sequence[int], inputs: int, outputs: int) -> bool:
    """Whether one GEMM pays, and the kernel is larger than the images (of ``sizes``) that XLA's convolution would read.

    jaxlib 0.10 then takes 5 to 40 times as long as for one GEMM of patches, or of products: 191 and 4.4 ms for 8 images
    of 2 × 2 × 512, 3 × 3 kernels and 512 outputs. For few multiplications the GEMM does not pay for its compile time.
    """
    win = c.window
    larger = all(extent > n for extent, n in zip(win.extent, sizes, strict=True))
    work = multiplications(c, batch, win.out, inputs, outputs)
    pays = larger or has_few_positions(c, batch, inputs, outputs)
    return pays and win.entries <= MAX_SLICES and not known_at_most(work, GEMM_MULTIPLICATIONS)


def has_one_column(win: Window) -> bool:
    """Whether windows with several columns have one position along the last dim."""
    return win.out[-1] == 1 < win.size[-1]


def has_few_positions(c: Correlation, batch: int, inputs: int, outputs: int) -> bool:
    """Whether there are few positions for the outputs, or only one along the last dim, the columns.

    Convolutions divide columns into blocks, and read the whole kernel for each. 2 images of 13 × 10 × 136, 7 × 7
    kernels and 492 outputs: 2.8 ms in oneDNN, 1.5 as one GEMM; 52 × 7 × 311, 3 × 3 kernels with dilation 3 and 124
    outputs: 0.59 and 0.32 ms. The GEMM takes longer to compile, which does not pay for few multiplications.
    """
    win = c.window
    if c.groups > 1 or win.entries == 1:
        return False
    if known_at_most(multiplications(c, batch, win.out, inputs, outputs), FEW_POSITIONS_MULTIPLICATIONS):
        return False
    return has_one_column(win) or known_at_most(4 * batch * math.prod(win.out), outputs)


def winograd_pays(c: Correlation, a: Array, inputs: int, outputs: int, *, one_block: bool) -> bool:
    """Whether Winograd's form is requested and at least halves the multiplications of a product.

    For 3 × 3 kernels the saving outweighs the transforms only from 64 channels on. If the alternative is XLA's
    convolution (``one_block``), the batch must also fit in one block, so that the transforms are shared with the
    layer's other products.
    """
    if not _speed_requested(c) or wider(a.dtype, c.dtype).itemsize > 4 or not applies("winograd", c):
        return False
    if is_symbolic(a.shape[0]):  # its blocks of images need a number
        return False
    if c.window.size == (3, 3):
        if min(inputs, outputs) < 64 or (one_block and not winograd.in_one_block(c, a, inputs, outputs)):
            return False
    elif c.window.size != (5, 5):
        return False
    direct = multiplications(c, a.shape[0], c.window.out, inputs, outputs)
    return direct >= 2 * winograd.cost(c, a.shape[0], inputs, outputs)


def _speed_requested(c: Correlation) -> bool:
    """Whether the caller explicitly requests speed at the cost of accuracy.

    The request is `lax.Precision.DEFAULT` ("fastest") for both operands, as the argument or as
    ``jax_default_matmul_precision``. If both are None, nothing is requested, and every sum is computed directly.
    """
    precision = c.precision
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    per_operand = precision if isinstance(precision, tuple) else (precision,)
    return all(p in FASTEST for p in per_operand)


def all_threads_pay(c: Correlation, a: Array, outputs: int, positions: tuple[int, ...]) -> bool:
    """Whether jaxlib 0.10 runs a long convolution of ``a``, to images of size ``positions``, on one thread.

    Eigen runs convolutions that enlarge an image, and those of at most 16 channels, on all threads. With many channels
    the other library divides the convolution without help.
    """
    batch, *spatial, inputs = a.shape
    if not ONE_THREAD or c.window.ndim != 2 or any(out > n for out, n in zip(positions, spatial, strict=True)):
        return False
    if max(inputs, outputs) <= 16 or inputs * outputs > DIVIDED_BY_XLA:
        return False
    return not known_at_most(multiplications(c, batch, positions, inputs, outputs), (1 << 24) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def convolve(
    c: Correlation,
    x: Array,
    w: Array,
    *,
    padding: Sequence[tuple[int, int]],
    groups: int,
    stride: Sequence[int] | None = None,
    x_dilation: Sequence[int] | None = None,
    w_dilation: Sequence[int] | None = None,
    swapped: bool = False,
) -> Array:
    """Run `lax.conv_general_dilated` on channels-last arrays, with the precision of ``c``.

    If ``swapped``, the kernel is ``(*size, O, I)``.
    """
    channels = c.window.ndim + 1
    image = (0, channels, *range(1, channels))
    inputs, outputs = (channels, channels - 1) if swapped else (channels - 1, channels)
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=stride or (1,) * c.window.ndim,
        padding=padding,
        lhs_dilation=x_dilation,
        rhs_dilation=w_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(image, (outputs, inputs, *range(c.window.ndim)), image),
        feature_group_count=groups,
        precision=c.precision,
    )


def pad_to_span(win: Window, x: Array) -> Array:
    """Return the part of the padded image that the windows cover, ``(N, *win.span, C)``: padded first, then cut."""
    ends = [max(span - lo - n, 0) for span, n, (lo, _) in zip(win.span, win.shape, win.padding, strict=True)]
    pads = [(lo, end, 0) for (lo, _), end in zip(win.padding, ends, strict=True)]
    x = lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    return lax.slice(x, (0,) * x.ndim, (x.shape[0], *win.span, x.shape[-1]))


def dot(a: Array, b: Array, over_a: int, over_b: int, c: Correlation) -> Array:
    """Multiply two arrays, summed over one dim of each, with the precision of ``c``."""
    return lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), precision=c.precision)


def without_depth(c: Correlation) -> Correlation:
    """Return ``c`` without the first spatial dim, the depth."""
    win = c.window
    flat = Window(win.shape[1:], win.size[1:], win.stride[1:], win.padding[1:], win.dilation[1:])
    return dataclasses.replace(c, window=flat)


def depth_slices(win: Window, x: Array) -> list[Array]:
    """Return, for every depth tap, the image slices that it reads, depth in the batch: ``(N·out, *spatial, C)``."""
    x = pad_axis(x, 1, *win.padding[0])
    s, last = win.steps[0], (win.out[0] - 1) * win.steps[0] + 1
    starts = [k * win.dilation[0] for k in range(win.size[0])]
    return [lax.collapse(lax.slice_in_dim(x, start, start + last, s, 1), 0, 2) for start in starts]


def by_group(run: Lowering, c: Correlation, a: Array, b: Array) -> Array:
    """Run one product per group, and concatenate the results along the channels."""
    one_group = dataclasses.replace(c, groups=1)
    pairs = zip(*(jnp.split(factor, c.groups, axis=-1) for factor in (a, b)), strict=True)
    return jnp.concatenate([run(one_group, *pair) for pair in pairs], -1)
