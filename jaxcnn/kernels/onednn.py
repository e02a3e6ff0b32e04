"""The three products in oneDNN, on CPUs for which `jaxcnn.native` is built."""

import jax
import numpy as np
from jax import Array

from jaxcnn.geometry import Correlation
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.kernels.lowering import is_small, multiplications
from jaxcnn.kernels.shapes import is_symbolic
from jaxcnn.native import library

#: Parts of the names of slow kernels in oneDNN: loops without vectors, and a GEMM for each image and group, which takes
#: 10 ms instead of 4.4 for 64 images of 16 × 16 × 64 in 16 groups.
SLOW = ("ref", "gemm:")

#: Up to this many multiplications, XLA computes gradients of kernels with one output.
SHORT = 3 << 20


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
    if is_narrow(product, c, image[0], image[-1], outputs):
        return None
    name = implementation(product, c, image, outputs)
    return "onednn" if name and not any(slow in name for slow in SLOW) else None


def is_narrow(product: str, c: Correlation, batch: int, inputs: int, outputs: int) -> bool:
    """Return whether a product has too few channels for oneDNN's vectors, or a stride between single elements.

    For example, XLA takes a third to a half of oneDNN's time for the gradient of images with 3 channels, and two
    thirds for 1 × 1 kernels with stride 2. For the gradient of kernels with one output, it takes two thirds, but for
    long sums over large arrays ten times as long.
    """
    is_single = all(k == 1 for k in c.window.size)
    has_stride = any(s > 1 for s in c.window.stride)
    if c.groups > 1:
        return False
    if product == "kernel_grad":  # in up to two dims the library's own code, in vectors of outputs
        few = inputs > 1 and outputs == 1 and not has_stride
        short = multiplications(c, batch, c.window.out, inputs, outputs) <= SHORT
        return few and short and not is_single and c.window.ndim <= 2
    if is_single and (has_stride or inputs * outputs < 8):
        return True
    return product == "input_grad" and inputs < (16 if has_stride else 8)


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
    return _call("kernel_grad", c, _kernel_shape(c, x.shape[-1], y.shape[-1]), x, y)


def kernel_grad_each(c: Correlation, x: Array, y: Array) -> Array:
    """Return the `kernel_grad` of each example, ``(N, *size, I/groups, O)``."""
    return _call("kernel_grad", c, (x.shape[0], *_kernel_shape(c, x.shape[-1], y.shape[-1])), x, y)
