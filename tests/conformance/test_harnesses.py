"""JAX's own test cases from the installed wheel: forward and gradient.

The forward pass is compared with the harness's function in float64 and with PyTorch. The gradient is compared only with
PyTorch, because stock JAX computes some gradients of convolutions wrong on CPU.
"""

import collections

import jax
import numpy as np
import pytest

from tests.cases import compiled
from tests.checks import TOLERANCE, assert_close
from tests.compare_torch import pulled, pulled_in_torch, random_delta
from tests.conformance import harnesses
from tests.conformance.summary import agreed, left_out

SOURCE = "JAX's own test cases"

with jax.enable_x64(True):  # without it the module omits float64 cases
    module = pytest.importorskip(
        "jax._src.internal_test_util.test_harnesses",
        reason="this jax has no test harnesses in its wheel",
        exc_type=ImportError,
    )
    CASES = harnesses.cases(module)

FOUND = {harness.fullname: harnesses.ours(harness) for harness in CASES}
CALLS = {name: call for name, call in FOUND.items() if isinstance(call, harnesses.Call)}
REASONS = [call for call in FOUND.values() if isinstance(call, str)]


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if not call.refused])
def test_case_of_jax(name, record_property):
    call = CALLS[name]
    within = TOLERANCE[np.dtype(call.coarsest)]
    wide = tuple(a.astype(np.float64) for a in call.arrays)
    delta = random_delta(jax.eval_shape(call.ours, *call.arrays))
    y, found = pulled(call.ours, call.arrays, delta)
    expected_y, expected = pulled_in_torch(call.oracle, wide, delta.astype(np.float64))
    assert_close([y], [compiled(call.theirs)(*wide)], within)
    assert_close([y, *found], [expected_y, *expected], within)
    assert [c.dtype for c in found] == [a.dtype for a in call.arrays]
    agreed(record_property, SOURCE, call.op)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.refused])
def test_case_that_we_refuse(name, record_property):
    """jaxcnn refuses cases where JAX returns an empty result or one that comes from padding only."""
    call = CALLS[name]
    with pytest.raises(ValueError, match=call.refused):
        call.ours(*call.arrays)
    left_out(record_property, SOURCE, f"refused: {call.refused}")


def test_cases_that_are_no_calls_of_ours(record_property):
    """Record the reasons and their counts; most cases with floating dtypes have a counterpart in jaxcnn."""
    reasons = collections.Counter(REASONS)
    for reason, cases in reasons.items():
        left_out(record_property, SOURCE, reason, cases)
    assert reasons.total() - reasons[harnesses.NO_FLOATS] - reasons[harnesses.AGAIN] < len(CALLS) / 4
