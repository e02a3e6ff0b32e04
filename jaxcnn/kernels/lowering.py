"""Shared parts of the lowerings of the three products: dispatch by platform, and conditions for the choice.

The products are in `correlate`, `input_grad` and `kernel_grad`. Each has several *lowerings*, functions with the same
signature, in one table per file. The file's `choose_…` functions pick one per platform by static shape: on CPU the one
with the smallest `cost`. Platforms without a choice run "xla": one `lax.conv_general_dilated`. Its padding is never
negative, because XLA:CPU computes negative padding incorrectly (openxla/xla#48713).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation, Window
from jaxcnn.kernels import winograd
from jaxcnn.kernels.dtypes import accumulator, wider
from jaxcnn.kernels.shapes import is_symbolic, known_at_most, largest_divisor
from jaxcnn.kernels.windows import pad_axis
from jaxcnn.platforms import Fixed, platform_dependent, program

Lowering = Callable[[Correlation, Array, Array], Array]

#: Up to this many slices are written out; for more, the program would become long.
MAX_SLICES = 64

#: Up to this many multiplications, XLA's convolution is used: on two cores, other forms save less than a tenth of a
#: millisecond per call, and take about three times as long to compile.
SMALL = 1 << 17

#: Precisions that request speed at the cost of accuracy; the strings are values of ``jax_default_matmul_precision``.
FASTEST = (lax.Precision.DEFAULT, "default", "bfloat16")

#: Up to this many taps, reading them all from the cache of a GPU takes about as long as reading the image from memory.
GPU_TAPS = 27

#: Groups are joined up to this many channels: one float32 vector, and few enough for jaxlib 0.10 to use all threads.
JOINED_CHANNELS = 16


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
    return c.groups == 1 and known_at_most(multiplications(c, batch, inputs, outputs), SMALL)


def multiplications(c: Correlation, batch: int, inputs: int, outputs: int) -> int:
    """Return the number of multiplications of a product with one group."""
    return batch * math.prod(c.window.out) * c.window.entries * inputs * outputs


def one_loop_on_gpu(c: Correlation, inputs: int, outputs: int) -> bool:
    """Whether a depthwise product is computed as one loop on GPU: XLA fuses it with its neighbors, but not cuDNN's."""
    return c.groups == inputs == outputs and c.window.entries <= GPU_TAPS


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
    direct = multiplications(c, a.shape[0], inputs, outputs)
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


def images_per_block(images: int, example_bytes: int, block_bytes: int) -> int:
    """Return how many images a loop over blocks of a batch processes at once, for blocks of up to ``block_bytes``.

    These are all images if several devices share the program: XLA gathers a batch that is split over them for a loop.
    """
    return images if program().devices > 1 else largest_divisor(images, block_bytes // max(example_bytes, 1))


def joined_groups(c: Correlation, inputs: int, outputs: int) -> int:
    """Return how many neighboring groups together have up to `JOINED_CHANNELS` channels."""
    return max(largest_divisor(c.groups, JOINED_CHANNELS * c.groups // max(inputs, outputs, 1)), 1)


def by_group(run: Lowering, c: Correlation, a: Array, b: Array) -> Array:
    """Run one product per group, and concatenate the results along the channels."""
    one_group = dataclasses.replace(c, groups=1)
    pairs = zip(*(jnp.split(factor, c.groups, axis=-1) for factor in (a, b)), strict=True)
    return jnp.concatenate([run(one_group, *pair) for pair in pairs], -1)
