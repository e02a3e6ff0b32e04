"""The product of image and kernel, the forward pass of a convolution layer.

    correlate     y[o] = Σ_k x[o·s + k·d − lo] · w[k]

It is linear in both arguments. `input_grad` is its adjoint in x, and `kernel_grad` its adjoint in w:
⟨correlate(x, w), y⟩ = ⟨x, input_grad(y, w)⟩ = ⟨w, kernel_grad(x, y)⟩.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcnn.geometry import Correlation
from jaxcnn.kernels import onednn, unrolled, winograd
from jaxcnn.kernels.cost import cheapest, product
from jaxcnn.kernels.dtypes import wider
from jaxcnn.kernels.lowering import (
    Lowering,
    by_group,
    convolve,
    depth_slices,
    dot,
    is_small,
    one_loop_on_gpu,
    run_lowering,
    unsharded_image_dims,
    unsharded_kernel_dims,
    winograd_pays,
    without_depth,
)
from jaxcnn.kernels.parallel import on_all_threads
from jaxcnn.kernels.split import run_whole
from jaxcnn.kernels.windows import tap_slices


@functools.partial(jax.jit, static_argnums=0, inline=True)
def correlate(c: Correlation, x: Array, w: Array) -> Array:
    """Correlate ``x`` with ``w``; the result is ``(N, *out, O)``, in ``c.dtype``."""
    if x.size == 0 or w.size == 0:
        return jnp.zeros((x.shape[0], *c.window.out, w.shape[-1]), c.dtype)
    cpu, gpu = choose_correlate(c, x, w), choose_correlate_on_gpu(c, x, w)
    native = onednn.choose_native("correlate", cpu, c, x.shape, w.shape[-1], wider(x.dtype, w.dtype, c.dtype))
    w = onednn.in_large_pages(c, x.shape[0], w) if native is None else w
    run = functools.partial(run_lowering, CORRELATE, cpu, c, dtype=c.dtype, native=native, cuda=gpu, rocm=gpu)
    image_dims = unsharded_image_dims(c)
    return run_whole(run, (x, w), (image_dims, unsharded_kernel_dims(c)), image_dims)


def choose_correlate(c: Correlation, x: Array, w: Array) -> str:
    """Choose the lowering of `correlate` for CPU."""
    inputs, outputs = x.shape[-1], w.shape[-1]
    if is_small(c, x.shape[0], inputs, outputs):
        return "xla"
    if winograd_pays(c, x, *w.shape[-2:], one_block=True):
        return "winograd"
    return cheapest(product("correlate", c, x.shape[0], inputs, outputs))


def choose_correlate_on_gpu(c: Correlation, x: Array, w: Array) -> str:
    """Choose the lowering of `correlate` for CUDA and ROCm."""
    return "unrolled" if one_loop_on_gpu(c, x.shape[-1], w.shape[-1]) else "xla"


def run_chosen(c: Correlation, x: Array, w: Array) -> Array:
    """Run the lowering that `choose_correlate` picks, as part of another lowering."""
    return CORRELATE[choose_correlate(c, x, w)](c, x, w)


def _xla(c: Correlation, x: Array, w: Array) -> Array:
    win = c.window
    return convolve(c, x, w, stride=win.stride, padding=win.padding, w_dilation=win.dilation, groups=c.groups)


def _all_threads(c: Correlation, x: Array, w: Array) -> Array:
    """Run XLA's convolution on all threads (see `kernels.parallel`)."""
    return on_all_threads(_xla(c, x, w), x, w)


def _spare_channel(c: Correlation, x: Array, w: Array) -> Array:
    """Add a channel of zeros: jaxlib 0.10 takes two to seven times as long for 3 channels (RGB) as for 4."""
    spatial = ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, ((0, 0), *spatial, (0, 1)))
    return _all_threads(c, x, jnp.pad(w, (*spatial, (0, 1), (0, 0))))


def _pointwise(c: Correlation, x: Array, w: Array) -> Array:
    """Multiply by a 1 × 1 kernel, which is a matrix."""
    (entries,) = tap_slices(c.window, x, 0)
    return dot(entries, w.reshape(w.shape[-2:]), entries.ndim - 1, 0, c)


def _patches(c: Correlation, x: Array, w: Array) -> Array:
    """Multiply whole image patches, the taps concatenated, by the kernel as a matrix."""
    patches = jnp.concatenate(list(tap_slices(c.window, x, 0)), -1)
    return dot(patches, lax.collapse(w, 0, -1), patches.ndim - 1, 0, c)


def _by_depth(c: Correlation, x: Array, w: Array) -> Array:
    """Sum the 2-D correlations with each depth slice of the kernel: XLA's 3-D convolution takes five times as long."""
    flat = without_depth(c)
    terms = [run_chosen(flat, x_slice, w_slice) for x_slice, w_slice in zip(depth_slices(c.window, x), w, strict=True)]
    return sum(terms[1:], terms[0]).reshape(x.shape[0], *c.window.out, w.shape[-1])


def _by_group(c: Correlation, x: Array, w: Array) -> Array:
    return by_group(run_chosen, c, x, w)


CORRELATE: dict[str, Lowering] = {
    "xla": _xla,
    "winograd": winograd.correlate,
    "all_threads": _all_threads,
    "spare_channel": _spare_channel,
    "pointwise": _pointwise,
    "patches": _patches,
    "unrolled": unrolled.correlate,
    "by_depth": _by_depth,
    "by_group": _by_group,
    "onednn": onednn.correlate,
}
