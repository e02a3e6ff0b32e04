"""Every op with each dim of each array split over devices, and the analysis functions under explicit axes.

The unsplit result is the oracle: `tests/test_rules.py` holds it against PyTorch.
"""

import dataclasses
import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcnn
from jaxcnn.kernels import correlation
from tests.cases import Case, compiled, row, with_cotangents
from tests.checks import assert_close, cotangent, drawn, flat

AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])

#: Rows whose dims eight devices divide, most of them with one window along a dim, a stride larger than 1, or both.
ROWS = [
    row("conv", (1, 8, 8), (3, 8, 8), (8,)),
    row("conv", (1, 8, 2), (5, 2, 8), stride=4),  # one place
    row("conv", (1, 8, 8), (5, 4, 8), groups=2, stride=4),
    row("conv", (1, 8, 8, 1), (3, 3, 1, 1), stride=2, padding=1),
    row("conv", (1, 8, 2), (3, 2, 2), padding="REFLECT"),
    row("depthwise_conv", (1, 8, 8), (8, 1, 8)),
    row("conv_transpose", (1, 8, 2), (3, 2, 2), stride=2, padding=1),
    row("conv_transpose", (1, 8, 2), (2, 1, 2), dilation=3, output_padding=2),
    row("hidden_layer", (1, 8, 2), (2, 2, 8), (8,), window=7),
    row("max_pool", (1, 8, 8, 1), window=(4, 8)),
    row("max_pool", (1, 8, 8, 1), window=3, stride=2, padding=1),
    row("max_pool", (1, 16, 1), window=9, stride=16),
    row("max_pool_with_indices", (1, 8, 1), window=7, stride=3),
    row("max_unpool", (1, 8, 1), spatial_shape=(16,)),
    row("avg_pool", (1, 8, 8, 8), window=(8, 3)),
    row("avg_pool", (1, 72, 1), window=66, stride=3),
    row("lp_pool", (1, 8, 8, 1), window=(8, 7), stride=3),
    row("global_max_pool", (1, 8, 8, 1)),
    row("global_avg_pool", (1, 8, 8, 1)),
    row("adaptive_max_pool", (1, 8, 1), size=3),
    row("adaptive_avg_pool", (1, 8, 8, 1), size=(1, 3)),
    row("kron", (8, 1), (1, 8)),
    row("kron_up", (1, 8, 8), factor=2),
    row("block_sum", (1, 8, 8, 1), factor=(8, 2)),
    row("convolve", (16,), (8,)),
    row("correlate", (8, 8), (8, 8), mode="valid"),
    row("autocorrelate", (16,), method="fft"),
    row("match_template", (16,), (8,)),
    row("batch_norm", (8, 8), (8,), (8,)),
    row("layer_norm", (2, 8, 8), (8,), (8,)),
    row("group_norm", (1, 8, 8), (8,), (8,), groups=2),
    row("dense", (8, 8), (8, 8), (8,)),
    row("relu", (8, 8)),
    row("dropout", (8, 8), rate=0.3),
    row("squared_error", (8, 8), (8, 8)),
    row("softmax_cross_entropy", (8, 8), (8, 8)),
    row("softmax_cross_entropy_with_integer_labels", (8, 8)),
]

#: Dims that four and eight devices do not divide, which automatic axes allow.
UNEVEN = [
    row("conv", (3, 6, 3), (3, 3, 5), stride=2),
    row("conv_transpose", (2, 6, 2), (3, 3, 2), stride=2),
    row("global_max_pool", (2, 3, 5, 3)),
    row("avg_pool", (3, 7, 5), window=3, stride=2),
]


def split_in_turn(case: Case, axis_type: AxisType):
    """One program: ``case`` once for each dim, split over four devices or over two axes of the mesh, eight devices."""
    mesh = jax.make_mesh((2, 4), ("two", "four"), axis_types=(axis_type,) * 2)
    args, delta = drawn(case)
    expected = flat(case.run(args, delta))
    arrays = (*args, delta)
    turns = [(i, dim) for i, a in enumerate(arrays) for dim in range(a.ndim) if a.shape[dim] > 1]
    if axis_type is AxisType.Explicit:  # δ is split as y is
        turns = [(i, dim) for i, dim in turns if i < len(args) and arrays[i].shape[dim] % 8 == 0]

    def split(a, dim, over):
        spec = PartitionSpec(*[None] * dim, over)
        if axis_type is AxisType.Explicit:
            return jax.sharding.reshard(a, spec)
        return lax.with_sharding_constraint(a, NamedSharding(mesh, spec))

    def run(arrays):
        found = []
        for turn, (i, dim) in enumerate(turns):
            *args, delta = (split(a, dim, (("two", "four"), "four")[turn % 2]) if i == j else a for j, a in enumerate(arrays))
            y, back = jax.vjp(case.function, *args)
            if axis_type is AxisType.Explicit:
                delta = jax.sharding.reshard(delta, jax.typeof(y).sharding)
            found.append(flat((y, back(delta))))
        return found

    with jax.set_mesh(mesh):
        found = compiled(run)(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())))
    for (i, dim), one in zip(turns, found, strict=True):
        try:
            assert_close(one, expected, 1e-10)
        except AssertionError as error:
            raise AssertionError(f"array {i} split along dim {dim}: {error}") from None


@AXIS_TYPES
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_each_dim_split(case, axis_type):
    split_in_turn(case, axis_type)


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_each_dim_split_unevenly(case):
    split_in_turn(case, AxisType.Auto)
