"""Activations, losses, norms and `lp_pool` of the case table with the lowerings for TPU and GPU, computed on CPU."""

import dataclasses

import pytest

from jaxcnn.ops.kinds import KINDS
from tests import checks, compilation
from tests.cases import CASES

OPS = (*KINDS["activation"], *KINDS["loss"], *KINDS["norm"], "lp_pool")
rows = pytest.mark.parametrize("case", [case for case in CASES if case.op in OPS], ids=str)


@pytest.fixture(scope="module", autouse=True, params=["tpu", "cuda"])
def platform(request):
    with compilation.lowered_for(request.param):
        yield


@pytest.fixture
def copy(case):
    """Return a copy of a row, because a row keeps its compiled functions."""
    return dataclasses.replace(case)


@rows
def test_rule_against_pytorch(copy):
    checks.rule_against_pytorch(copy)


@rows
def test_rule_of_rule_against_pytorch(copy):
    checks.rule_of_rule_against_pytorch(copy)


@rows
def test_vmap_equals_a_loop(copy):
    checks.vmap_equals_a_loop(copy)


@rows
def test_sixteen_bits_are_float32_rounded(copy):
    checks.sixteen_bits_are_float32_rounded(copy)
