"""The three products in oneDNN, on CPUs for which `jaxcnn.native` is built."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation
from jaxcnn.kernels import unrolled
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.kernels.lowering import has_few_positions, has_one_column, is_small, multiplications
from jaxcnn.kernels.shapes import is_symbolic
from jaxcnn.native import library

#: Parts of the names of slow kernels of grouped products: loops without vectors, and a GEMM for each image and group,
#: which takes 10 ms instead of 4.4 for 64 images of 16 × 16 × 64 in 16 groups.
SLOW = ("ref", "gemm:")

#: Number of float32 elements of a vector of AVX-512.
VECTOR = 16

#: Up to this many multiplications, XLA computes the gradient of an image with a stride faster, and oneDNN 1 × 1 kernels
#: with many outputs. For groups, oneDNN is then used because it compiles faster.
FEW_MULTIPLICATIONS = 1 << 20

#: The sum of one GEMM's products takes as long as this many multiplications per product.
SUM_OF_PRODUCTS = 100


def choose_native(
    product: str, cpu: str, c: Correlation, image: tuple[int, ...], outputs: int, dtype: np.dtype
) -> str | None:
    """Choose the lowering for programs on one CPU device, for images of shape ``image``; None: lowering ``cpu``.

    Winograd's form, which is chosen on request only, multiplies less than oneDNN's direct sums.
    """
    if cpu == "winograd" or accumulator(dtype) != np.float32 or not library.is_enabled():
        return None
    if any(map(is_symbolic, image)) or is_small(c, image[0], image[-1], outputs):
        return None
    if is_narrow(product, c, image, outputs) or has_few_positions(c, image[0], image[-1], outputs):
        return None
    if product == "input_grad" and c.groups == 1 and has_half_vectors(c, image, outputs):
        return None
    return "onednn" if is_fast(implementation(product, c, image, outputs), product, c, image, outputs) else None


def has_half_vectors(c: Correlation, image: tuple[int, ...], outputs: int) -> bool:
    """Return whether oneDNN's `input_grad` has vectors of AVX2 where `correlate` has those of AVX-512.

    That is so for most strides of 3. 16 images of 91 × 53 × 24, 3 × 3 kernels and 74 outputs: 2.1 ms, and 1.4 in XLA.
    """
    names = (implementation(product, c, image, outputs) for product in ("correlate", "input_grad"))
    return ["avx512" in name for name in names] == [True, False]


def is_fast(name: str, product: str, c: Correlation, image: tuple[int, ...], outputs: int) -> bool:
    """Return whether oneDNN's kernel of this name is faster than sums in XLA."""
    if c.groups == 1:
        may_be_gemm = outputs >= 4 and product != "correlate"
        return bool(name) and "ref" not in name and (may_be_gemm or "gemm:" not in name)
    if name.startswith("jit:") and product != "kernel_grad":
        # Vectors of a few channels per group are mostly empty. 103 groups of 1 → 2: 3.8 ms, and 1.5 ms in XLA. For few
        # multiplications that does not pay for its compile time.
        inputs = image[-1]
        each, summed = (inputs, outputs) if product == "input_grad" else (outputs, inputs)
        many = each // c.groups > 3 or c.window.entries * summed // c.groups > unrolled.LOOPED["terms"]
        return many or _has_few_multiplications(c, image, outputs)
    return bool(name) and not any(slow in name for slow in SLOW)


def is_narrow(product: str, c: Correlation, image: tuple[int, ...], outputs: int) -> bool:
    """Return whether a product has too few channels for oneDNN's vectors, or a stride between single elements.

    For example, XLA takes a third to two thirds of oneDNN's time for the gradient of images with 3 channels, and two
    thirds for 1 × 1 kernels with stride 2 or with 16 times as many outputs as inputs. For the gradient of images with
    152 channels, 2 × 2 kernels and 2 outputs, sums of 8 products, it takes 0.58 ms, and oneDNN 0.69. For 16 images of
    131 × 11 × 161, 4 × 4 kernels and 6 outputs it takes 1.9 ms, and oneDNN 2.4.
    """
    win, inputs = c.window, image[-1]
    is_dilated = any(d > 1 for d in win.dilation)
    if product == "kernel_grad":  # in up to two dims without dilation the library's own code, in vectors of outputs
        return c.groups == 1 and win.ndim < 3 and (inputs * outputs <= 2 or (inputs == 1 and is_dilated))
    few = _has_few_multiplications(c, image, outputs)
    if c.groups > 1:
        return inputs == outputs == c.groups <= VECTOR // 2 and not few
    if win.entries == 1 and (win.strided or win.ndim == 3 or inputs * outputs <= VECTOR):
        return True
    if win.entries == 1 and outputs >= VECTOR * inputs and not (few and product == "correlate"):
        return True
    if product == "correlate":
        few_in_3d = win.ndim == 3 and outputs <= 4 and win.entries * inputs <= unrolled.LOOPED["terms"]
        one_column = has_one_column(win) and outputs < 4
        return few_in_3d or one_column or (inputs == 1 and is_dilated) or win.entries == outputs == 1
    if win.strided:  # each δ yields one product per tap and input, if XLA multiplies it by the whole kernel
        empty = -inputs % VECTOR
        return few or outputs * empty > SUM_OF_PRODUCTS * inputs
    more = VECTOR if win.entries == 1 or win.ndim == 3 else 4
    short = win.entries * outputs <= 8 and inputs > 4 * VECTOR
    narrow = win.shape[-1] < VECTOR and 4 < outputs < 10 and inputs > 8 * VECTOR
    return inputs == 1 or (inputs < 8 and outputs > more * inputs) or (win.entries > 1 and (short or narrow))


def _has_few_multiplications(c: Correlation, image: tuple[int, ...], outputs: int) -> bool:
    return multiplications(c, image[0], c.window.out, image[-1], outputs) <= FEW_MULTIPLICATIONS * c.groups


def implementation(product: str, c: Correlation, image: tuple[int, ...], outputs: int) -> str:
    """Return oneDNN's name of its kernel for a product; "" if it cannot compute it."""
    kernel = _kernel_shape(c, image[-1], outputs)
    return library.implementation(product, image, kernel, (image[0], *c.window.out, outputs), *_geometry(c), c.groups)


def _kernel_shape(c: Correlation, inputs: int, outputs: int) -> tuple[int, ...]:
    return (*c.window.size, inputs // c.groups, outputs)


def _geometry(c: Correlation) -> tuple[tuple[int, ...], ...]:
    """Return the stride, the padding at the low and the high ends, and the dilation.

    The high ends are those that the windows reach; oneDNN accepts negative ones, for a remainder of the stride.
    """
    win = c.window
    low = tuple(lo for lo, _ in win.padding)
    high = tuple(span - lo - n for span, lo, n in zip(win.span, low, win.shape, strict=True))
    return win.stride, low, high, win.dilation


def _call(product: str, c: Correlation, shape: tuple[int, ...], a: Array, b: Array) -> Array:
    lists = dict(zip(("stride", "low", "high", "dilation"), _geometry(c), strict=True))
    run = jax.ffi.ffi_call(library.TARGET, jax.ShapeDtypeStruct(shape, np.float32), vmap_method="sequential")
    return run(
        a,
        b,
        product=np.int64(library.PRODUCTS.index(product)),
        groups=np.int64(c.groups),
        **{name: np.array(values, np.int64) for name, values in lists.items()},
    )


def correlate(c: Correlation, x: Array, w: Array) -> Array:
    """Correlate float32 arrays."""
    return _call("correlate", c, (x.shape[0], *c.window.out, w.shape[-1]), x, w)


def input_grad(c: Correlation, y: Array, w: Array) -> Array:
    """Apply the adjoint of `correlate` in x to float32 arrays."""
    return _call("input_grad", c, (y.shape[0], *c.window.shape, w.shape[-2] * c.groups), y, w)


def kernel_grad(c: Correlation, x: Array, y: Array) -> Array:
    """Apply the adjoint of `correlate` in w to float32 arrays."""
    return _kernel_grad(c, (), x, y)


def kernel_grad_each(c: Correlation, x: Array, y: Array) -> Array:
    """Return the `kernel_grad` of each example, ``(N, *size, I/groups, O)``."""
    return _kernel_grad(c, x.shape[:1], x, y)


def _kernel_grad(c: Correlation, batch: tuple[int, ...], x: Array, y: Array) -> Array:
    """Return the gradients ``(*batch, *size, I/groups, O)``, with x and δ swapped if that pays."""
    inputs, outputs = x.shape[-1], y.shape[-1]
    if not exchange_pays(c, x.shape, outputs):
        return _call("kernel_grad", c, (*batch, *_kernel_shape(c, inputs, outputs)), x, y)
    w = _call("kernel_grad", exchanged(c), (*batch, *_kernel_shape(c, outputs, inputs)), y, x)
    return jnp.swapaxes(lax.rev(w, range(len(batch), w.ndim - 2)), -1, -2)


def exchange_pays(c: Correlation, image: tuple[int, ...], outputs: int) -> bool:
    """Return whether swapping x and δ in `kernel_grad` pays: few outputs leave most of a vector unused.

    30 inputs and 1 output, 7 × 7, 16 images of 61 × 9, two cores: 0.92 and 0.12 ms. With a large dilation, oneDNN has
    no fast kernel for the swapped product.
    """
    win, inputs = c.window, image[-1]
    if c.groups > 1 or win.strided or outputs >= VECTOR:
        return False
    if any(max(pair) >= e for pair, e in zip(win.padding, win.extent, strict=True)):
        return False
    work = math.prod(win.out) * inputs * VECTOR
    other = math.prod(win.shape) * outputs * -(-inputs // VECTOR) * VECTOR
    if work <= 2 * other:
        return False
    delta, swapped = (image[0], *win.out, outputs), exchanged(c)
    return is_fast(implementation("kernel_grad", swapped, delta, inputs), "kernel_grad", swapped, delta, inputs)


def exchanged(c: Correlation) -> Correlation:
    """Return the product whose image is δ and whose δ is x, padded in full; its kernel is flipped."""
    win = c.window
    pads = tuple((e - 1 - lo, e - 1 - hi) for e, (lo, hi) in zip(win.extent, win.padding, strict=True))
    return dataclasses.replace(c, window=dataclasses.replace(win, shape=win.out, padding=pads))
