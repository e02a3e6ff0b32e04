"""PyTorch, over geometries that Hypothesis draws: the same each time; `make fuzz` draws others, as many as wanted."""

import pytest

from tests.conformance import fuzz
from tests.conformance.geometries import SHARES, STRATEGIES
from tests.conformance.summary import agreed

#: Geometries in all.
COUNT = 400


@pytest.mark.parametrize("op", STRATEGIES)
def test_drawn_geometries(op, record_property):
    found = fuzz.turn(op, 0, COUNT * SHARES[op] // 100)
    assert not found.mismatches, "\n".join(found.mismatches)
    agreed(record_property, "PyTorch, geometries drawn by Hypothesis", op, len(found.compared))
