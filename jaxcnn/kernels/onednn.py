"""The three products in oneDNN, on CPUs for which `jaxcnn.native` is built."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcnn.geometry import Correlation
from jaxcnn.kernels.cost import VECTOR, Product, cost
from jaxcnn.kernels.dtypes import accumulator
from jaxcnn.kernels.lowering import is_small
from jaxcnn.kernels.shapes import is_symbolic
from jaxcnn.native import library
from jaxcnn.platforms import UNCHANGED, Fixed, platform_dependent

#: oneDNN may cost this many times as much as a sum with written-out terms, which XLA compiles longer than a call.
SHORT_PROGRAM = 1.25

#: Least bytes of a result for which `in_large_pages` asks.
LARGE_RESULT = 1 << 22


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
    p = Product(product, c, image[0], image[-1], outputs)
    most = cost(p, cpu) * (SHORT_PROGRAM if cpu in {"unrolled", "by_position"} else 1)
    return "onednn" if native_cost(p) < most else None


def native_cost(p: Product) -> float:
    """Return the cost of a product in oneDNN in microseconds; inf without a kernel.

    `input_grad` has vectors of half the length where its kernel is for AVX2, and that of `correlate` for AVX-512, as
    for most strides of 3.
    """
    p = computed(p)
    kernel = kernel_of(p)
    half = p.name == "input_grad" and "avx512" not in kernel
    factor = 2 if half and "avx512" in kernel_of(dataclasses.replace(p, name="correlate")) else 1
    return factor * cost(p, "onednn", kernel)


def computed(p: Product) -> Product:
    """Return the product that oneDNN computes for ``p``: with x and δ swapped in `kernel_grad`, if that pays."""
    if p.name != "kernel_grad" or not exchange_pays(p.c, _image(p), p.outputs):
        return p
    return Product(p.name, exchanged(p.c), p.batch, p.outputs, p.inputs)


def kernel_of(p: Product) -> str:
    """Return oneDNN's name of its kernel for a product; "" if it cannot compute it."""
    return implementation(p.name, p.c, _image(p), p.outputs)


def _image(p: Product) -> tuple[int, ...]:
    return (p.batch, *p.c.window.shape, p.inputs)


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


def in_large_pages(c: Correlation, batch: int, w: Array) -> Array:
    """Return a kernel w, whose result in XLA then has pages of 2 MB if it is large.

    A program for one CPU device has its temporary memory in one piece, and new pages in each call. oneDNN's calls ask
    for large ones before they write their result. A result of 25 MB that XLA writes first cost 18 ms more per step.
    """
    if w.dtype != np.float32 or is_symbolic(batch) or not library.is_enabled():
        return w
    if batch * math.prod(c.window.out) * w.shape[-1] * 4 < LARGE_RESULT:
        return w
    return platform_dependent(w, default=UNCHANGED, native=Fixed(_copy, ()))


def _copy(w: Array) -> Array:
    like = jax.ShapeDtypeStruct(w.shape, w.dtype)
    return jax.ffi.ffi_call(library.COPY_TARGET, like, vmap_method="broadcast_all")(w)


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
    kernel = implementation("kernel_grad", exchanged(c), (image[0], *win.out, outputs), inputs)
    return bool(kernel) and "ref" not in kernel


def exchanged(c: Correlation) -> Correlation:
    """Return the product whose image is δ and whose δ is x, padded in full; its kernel is flipped."""
    win = c.window
    pads = tuple((e - 1 - lo, e - 1 - hi) for e, (lo, hi) in zip(win.extent, win.padding, strict=True))
    return dataclasses.replace(c, window=dataclasses.replace(win, shape=win.out, padding=pads))
