"""PyTorch on geometries drawn by Hypothesis, the same every time; `make fuzz` draws any number of others.

Convolutions use the lowerings of larger ones, as in `make fuzz`. The case table uses those that XLA computes.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import compilation
from tests.cases import row
from tests.conformance.geometries import STRATEGIES, agree
from tests.conformance.summary import agreed
from tools import fuzz

#: Number of geometries and the first seed; `make fuzz` starts at seed 0.
COUNT, SEED = 600, 1


@pytest.fixture(scope="module", autouse=True)
def none_is_small():
    with compilation.none_is_small():
        yield


@pytest.mark.parametrize(("op", "turn"), [(turn[0], turn) for turn in fuzz.turns(COUNT, SEED, STRATEGIES, size=10)])
def test_drawn_geometries(op, turn, record_property):
    found = fuzz.turn(*turn)
    assert not found.mismatches, "\n".join(found.mismatches)
    agreed(record_property, "PyTorch, geometries drawn by Hypothesis", op, len(found.compared))


#: Mismatches that `make fuzz` has found: δ of repeated padding added in bfloat16, and sums that nearly cancel.
FOUND = [
    (row("depthwise_conv", (3, 1, 1, 1, 2), (3, 2, 3, 1, 4), (4,), stride=(3, 3, 1), padding="REPLICATE",
         dilation=(1, 3, 1)), jnp.bfloat16),
    (row("depthwise_conv", (1, 2, 2), (5, 1, 2), padding="REPLICATE", dilation=(1,)), jnp.bfloat16),
    (row("conv", (3, 16, 5), (3, 5, 1), (1,), stride=(1,), padding=((1, 2),), dilation=(3,)), np.float32),
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), FOUND, ids=str)
def test_found_geometries(case, dtype):
    agree([(case, dtype)])
