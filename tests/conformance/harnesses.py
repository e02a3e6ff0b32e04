"""JAX's own test cases for convolutions and windows, as calls of jaxcnn.

`jax._src.internal_test_util.test_harnesses` describes how JAX tests its primitives on every platform: a function of
`jax.lax`, its arrays and its static arguments. `ours` returns the call that must give the same result, or the reason
why there is none.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array, lax

import jaxcnn
from tests import oracles

#: The primitives that jaxcnn has a counterpart for.
GROUPS = (
    "conv_general_dilated", "reduce_window_add", "reduce_window_max", "reduce_window_min", "reduce_window_mul",
    "select_and_gather_add", "select_and_scatter_add",
)  # fmt: skip

#: Reasons why a case has no counterpart in jaxcnn.
NO_FLOATS = "whole or complex numbers"
AGAIN = "once more, for jax2tf"
BATCH_GROUPS = "batch groups"
SPACED_BOTH = "a spaced image that is cut or strided too"
SPACED_WINDOWS = "windows over a spaced image"
PRODUCTS = "products of windows"
#: Error messages for cases that jaxcnn refuses.
LARGER = "must be at most the padded spatial dims"
IN_PADDING = "a window is entirely in the padding"


@dataclasses.dataclass(frozen=True)
class Call:
    """Three functions of the differentiable arrays that must agree: ours, the harness's, and PyTorch's."""

    op: str
    ours: Callable[..., Array]
    theirs: Callable[..., Any]
    oracle: Callable[..., torch.Tensor]
    arrays: tuple[np.ndarray, ...]
    #: The dtype with the largest rounding error.
    coarsest: Any
    #: The error message if jaxcnn refuses the case, otherwise empty.
    refused: str = ""


def cases(module: Any) -> list[Any]:
    """Return the harnesses of a module that belong to `GROUPS`."""
    return [h for h in module.all_harnesses if h.group_name in GROUPS]


def ours(harness: Any) -> Call | str:
    """Return our counterpart of a harness, or the reason why there is none."""
    p, dtypes = harness.params, [harness.dtype, harness.params.get("preferred_element_type")]
    if not all(d is None or jnp.issubdtype(d, jnp.floating) for d in dtypes):
        return NO_FLOATS
    if p.get("enable_xla", True) is False:
        return AGAIN
    if harness.group_name == "conv_general_dilated":
        return _convolution(harness)
    if harness.group_name == "reduce_window_mul":
        return PRODUCTS
    return _windows(harness)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions


def _convolution(harness: Any) -> Call | str:
    p = harness.params
    if p["batch_group_count"] > 1:
        return BATCH_GROUPS
    of_x, of_w, _ = p["dimension_numbers"]
    space = [d for d in of_w if d not in "OI"]
    size = [p["rhs_shape"][of_w.index(d)] for d in space]
    extent = [(k - 1) * d + 1 for k, d in zip(size, p["rhs_dilation"], strict=True)]
    spatial = [p["lhs_shape"][of_x.index(d)] for d in space]
    pads = lax.padtype_to_pads(spatial, extent, p["window_strides"], p["padding"]) \
        if isinstance(p["padding"], str) else p["padding"]  # fmt: skip
    spaced = [(n - 1) * d + 1 for n, d in zip(spatial, p["lhs_dilation"], strict=True)]
    larger = any(e > lo + n + hi for n, e, (lo, hi) in zip(spaced, extent, pads, strict=True))
    options = {"precision": p["precision"], "preferred_element_type": p["preferred_element_type"]}
    options |= {"dilation": p["rhs_dilation"], "groups": p["feature_group_count"]}
    arrays = tuple(_drawn(harness)[:2])
    if math.prod(p["lhs_dilation"]) > 1:
        return _transposed(harness, options, extent, pads, arrays)
    layouts = tuple(p["dimension_numbers"])
    options |= {"stride": p["window_strides"], "padding": p["padding"], "dimension_numbers": layouts}
    f, oracle = functools.partial(jaxcnn.conv, **options), functools.partial(oracles.conv, **options)
    return Call("conv", f, _of_harness(harness), oracle, arrays, _coarsest(harness), LARGER if larger else "")


def _transposed(harness: Any, options: Any, extent: Any, pads: Any, arrays: Any) -> Call | str:
    """Translate a convolution of a dilated input.

    It is the adjoint of a strided convolution, with the kernel flipped and I and O exchanged.
    """
    p = harness.params
    cut = [(e - 1 - lo, e - 1 - hi) for e, (lo, hi) in zip(extent, pads, strict=True)]
    more = [max(-hi, 0) for _, hi in cut]
    fits = all(lo >= 0 and m < s for (lo, _), m, s in zip(cut, more, p["lhs_dilation"], strict=True))
    if math.prod(p["window_strides"]) > 1 or p["feature_group_count"] > 1 or not fits:
        return SPACED_BOTH
    of_x, of_w, of_y = p["dimension_numbers"]
    options |= {"stride": p["lhs_dilation"], "padding": [(lo, max(hi, 0)) for lo, hi in cut], "output_padding": more}
    options |= {"dimension_numbers": (of_x, of_w.translate(str.maketrans("IO", "OI")), of_y)}
    turn = [axis for axis, d in enumerate(of_w) if d not in "OI"]
    return Call(
        "conv_transpose",
        lambda x, w: jaxcnn.conv_transpose(x, jnp.flip(w, turn), **options),
        _of_harness(harness),
        lambda x, w: oracles.conv_transpose(x, w.flip(turn), **options),
        arrays,
        _coarsest(harness),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def _windows(harness: Any) -> Call | str:
    p = harness.params
    if any(d > 1 for d in p.get("base_dilation") or ()):
        return SPACED_WINDOWS
    shape, size, stride = p["shape"], tuple(p["window_dimensions"]), tuple(p["window_strides"])
    dilation = tuple(p.get("window_dilation") or (1,) * len(shape))
    extent = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    pads = p["padding"]
    pads = lax.padtype_to_pads(shape, extent, stride, pads) if isinstance(pads, str) else pads
    places = zip(shape, size, stride, dilation, pads, strict=True)
    refused = "" if all(_meets(*place) for place in places) else IN_PADDING
    # Treat inputs as having no batch and channels, unless there are too many dims.
    spatial = slice(None) if len(shape) <= 3 else slice(1, -1)
    pick = {"window": size, "stride": stride, "dilation": dilation, "padding": tuple(map(tuple, pads))}
    options = {name: value[spatial] for name, value in pick.items()}
    as_image = (1, *shape, 1) if len(shape) <= 3 else shape
    static = [d.value for d in harness.arg_descriptors if hasattr(d, "value")]
    flipped = any(value is least for value in static for least in (lax.min, lax.le_p))  # pooling of −x in that case

    def pooled(pool: Callable[..., Any], x: Any) -> Any:
        sign = -1 if flipped else 1
        y = sign * pool(sign * x.reshape(as_image), **options)
        return y if as_image == shape else y.reshape(y.shape[1:-1])

    most = functools.partial(pooled, jaxcnn.max_pool), functools.partial(pooled, oracles.max_pool)
    mean = functools.partial(pooled, jaxcnn.avg_pool), functools.partial(pooled, oracles.avg_pool)
    of_harness, coarsest = _of_harness(harness), harness.dtype
    if harness.group_name == "select_and_scatter_add":  # the rule of max pooling
        delta, x = _drawn(harness)[:2]
        of_delta = functools.partial(sent, most[0], x), functools.partial(sent_in_torch, most[1], x)
        return Call("rule of max_pool", of_delta[0], lambda d: of_harness(d, _wide(x)), of_delta[1], (delta,), coarsest)
    if harness.group_name == "select_and_gather_add":  # the rule of that rule
        xi, x = _drawn(harness)[:2]
        found = functools.partial(read, most[0], x), functools.partial(read_in_torch, most[1], x)
        return Call("rule of its rule", found[0], lambda xi: of_harness(xi, _wide(x)), found[1], (xi,), coarsest)
    arrays, init = tuple(_drawn(harness)[:1]), float(p["init_value"])
    if harness.group_name == "reduce_window_add":
        total, of_torch = ((lambda x, f=f: init + math.prod(size) * f(x)) for f in mean)
        return Call("avg_pool", total, of_harness, of_torch, arrays, coarsest, refused)
    if math.isfinite(init):  # it wins over all smaller values
        clip, clip_torch = (jnp.minimum, torch.clamp_max) if flipped else (jnp.maximum, torch.clamp_min)
        at_least = lambda x: clip(most[0](x), jnp.asarray(init, x.dtype))  # noqa: E731
        return Call("max_pool", at_least, of_harness, lambda x: clip_torch(most[1](x), init), arrays, coarsest)
    return Call("max_pool", most[0], of_harness, most[1], arrays, coarsest)


def _meets(n: int, size: int, stride: int, dilation: int, pads: tuple[int, int]) -> bool:
    """Return whether every window position holds an element of the input."""
    (lo, hi), reach = pads, (size - 1) * dilation
    starts = range(-lo, n + hi - reach, stride)
    return all(any(0 <= at < n for at in range(start, start + reach + 1, dilation)) for start in starts)


def sent(f: Callable[..., Array], x: Array, delta: Array) -> Array:
    """Apply the δ rule of f at x."""
    return jax.vjp(f, x)[1](delta)[0]


def read(f: Callable[..., Array], x: Array, xi: Array) -> Array:
    """Apply the adjoint of that rule, by the rule of the rule."""
    y = jax.eval_shape(f, x)
    return jax.vjp(functools.partial(sent, f, x), jnp.zeros(y.shape, y.dtype))[1](xi)[0]


def sent_in_torch(f: Callable[..., torch.Tensor], x: np.ndarray, delta: torch.Tensor) -> torch.Tensor:
    leaf = torch.tensor(_wide(x), requires_grad=True)
    return torch.autograd.grad(f(leaf), leaf, delta, create_graph=True)[0]


def read_in_torch(f: Callable[..., torch.Tensor], x: np.ndarray, xi: torch.Tensor) -> torch.Tensor:
    y = f(torch.tensor(_wide(x)))
    delta = torch.zeros_like(y, requires_grad=True)
    return torch.autograd.grad(sent_in_torch(f, x, delta), delta, xi, create_graph=True)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def _drawn(harness: Any) -> list[np.ndarray]:
    """Return the arrays of a harness, drawn by the harness."""
    return harness.dyn_args_maker(np.random.RandomState(0))


def _of_harness(harness: Any) -> Callable[..., Any]:
    """Return the function of a harness in float64, with its static arguments bound."""
    static = [d.value for d in harness.arg_descriptors if hasattr(d, "value")]
    static = [_wide(s) if isinstance(s, np.ndarray) else s for s in static]
    if harness.group_name == "conv_general_dilated":
        static[-1] = None  # preferred_element_type
    return lambda *arrays: harness.fun(*arrays, *static)


def _wide(a: np.ndarray) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


def _coarsest(harness: Any) -> Any:
    kinds = [jnp.dtype(d) for d in (harness.dtype, harness.params["preferred_element_type"]) if d is not None]
    return max(kinds, key=lambda d: float(jnp.finfo(d).eps))
