"""Functions with the signatures of `jax.lax`, for modules that take one as an option."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxcnn.tracing import evaluate, trace


def conv_general_dilated(
    lhs: ArrayLike,
    rhs: ArrayLike,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **options: Any,
) -> Array:
    """`jax.lax.conv_general_dilated`, computed by `jaxcnn.conv` or `jaxcnn.conv_transpose` with its rule.

    For ``flax.linen.Conv(conv_general_dilated=jaxcnn.lax.conv_general_dilated)``, ``flax.nnx.Conv`` and others that
    take such a function. What neither op can express, such as integers or four spatial dims, JAX computes.

    Args:
        lhs: input, in the layout of ``dimension_numbers``.
        rhs: kernel.
        window_strides: as in `jax.lax`, and so on for the other arguments.
        padding: "SAME", "VALID", "SAME_LOWER", or a pair for each spatial dim; negative numbers crop the input.
        lhs_dilation: distance between the elements of the input; with it the convolution is a transposed one.
        rhs_dilation: distance between the elements of the kernel.
        dimension_numbers: layouts of input, kernel and result; default ``("NCHW", "OIHW", "NCHW")``.
        feature_group_count: number of groups of channels.
        batch_group_count: number of groups of the batch.
        precision: as in `jaxcnn.conv`.
        preferred_element_type: dtype of the result.
        **options: further arguments of JAX's function.

    Returns:
        The result, as JAX's function.

    Raises:
        ValueError: as JAX's function.
        TypeError: as JAX's function.

    >>> import jax.numpy as jnp
    >>> import jaxcnn
    >>> jaxcnn.lax.conv_general_dilated(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), (1, 1), "SAME").shape
    (1, 4, 8, 8)
    """

    def conv(lhs: Array, rhs: Array) -> Array:
        return jax.lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
            batch_group_count, precision, preferred_element_type, **options,
        )  # fmt: skip

    traced = trace(conv, jnp.asarray(lhs), jnp.asarray(rhs))
    program = traced.program.map(lambda operation: dataclasses.replace(operation, tapped=False))
    return traced.result(evaluate(program, traced.arrays))
