"""Which dtypes sums are taken in, and what two arrays meet in."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def accumulator(dtype: np.dtype) -> np.dtype:
    """What sums of this dtype are taken in: float32 for 16-bit floats, otherwise itself."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else np.dtype(dtype)


def wider(*dtypes: DTypeLike) -> np.dtype:
    """The narrowest dtype that holds all; JAX's own promotion refuses to find it where people have set it to strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(np.dtype(dtype) for dtype in dtypes))
