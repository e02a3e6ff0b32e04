"""Accumulation dtypes and dtype promotion."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike


def accumulator(dtype: np.dtype) -> np.dtype:
    """Return the dtype that sums of ``dtype`` are accumulated in: float32 for 16-bit floats, otherwise ``dtype``."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else np.dtype(dtype)


def to_accumulator(a: Array) -> Array:
    """Return ``a`` in the dtype that its sums are accumulated in."""
    return a.astype(accumulator(a.dtype))


def wider(*dtypes: DTypeLike) -> np.dtype:
    """Return the promoted dtype of all arguments, even where ``jax_numpy_dtype_promotion`` is "strict"."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(np.dtype(dtype) for dtype in dtypes))
