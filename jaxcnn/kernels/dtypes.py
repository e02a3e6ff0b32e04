"""Accumulation dtypes and dtype promotion."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxcnn.platforms import Fixed, platform_dependent


def accumulator(dtype: np.dtype) -> np.dtype:
    """Return the dtype that sums of ``dtype`` are accumulated in: float32 for 16-bit floats, otherwise ``dtype``."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else np.dtype(dtype)


def to_accumulator(a: Array) -> Array:
    """Return ``a`` in the dtype that its sums are accumulated in."""
    return a.astype(accumulator(a.dtype))


def widened_on_tpu(function: Callable[..., Array], static: Any, *arrays: Array) -> Array:
    """Return ``function(static, *arrays)`` in the dtype of the last array.

    On TPU, 16-bit floats are converted to float32 before the call, and the result is converted back. XLA:TPU joins two
    elementwise kernels that read one array only if both end in a conversion or neither does.
    """
    if accumulator(arrays[-1].dtype) == arrays[-1].dtype:
        return function(static, *arrays)
    wide = Fixed(_in_float32, (function, static))
    return platform_dependent(*arrays, default=Fixed(function, (static,)), tpu=wide)


def _in_float32(function: Callable[..., Array], static: Any, *arrays: Array) -> Array:
    wide = (to_accumulator(a) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays)
    return function(static, *wide).astype(arrays[-1].dtype)


def wider(*dtypes: DTypeLike) -> np.dtype:
    """Return the promoted dtype of all arguments, even where ``jax_numpy_dtype_promotion`` is "strict"."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(np.dtype(dtype) for dtype in dtypes))
