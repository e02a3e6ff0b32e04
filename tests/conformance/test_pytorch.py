"""PyTorch, over geometries that Hypothesis draws: the same each time; `make fuzz` draws others, as many as wanted."""

import pytest

from tests.conformance import fuzz
from tests.conformance.geometries import STRATEGIES
from tests.conformance.summary import agreed

#: Geometries in all, and where they begin: `make fuzz` begins at 0.
COUNT, SEED = 2000, 1


@pytest.mark.parametrize(("op", "seed", "count"), [*fuzz.turns(COUNT, SEED, STRATEGIES)])
def test_drawn_geometries(op, seed, count, record_property):
    found = fuzz.turn(op, seed, count)
    assert not found.mismatches, "\n".join(found.mismatches)
    agreed(record_property, "PyTorch, geometries drawn by Hypothesis", op, len(found.compared))
