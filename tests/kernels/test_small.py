"""Convolutions of the case table with the lowerings of larger ones; by default XLA computes the small ones.

`tests/conformance/test_pytorch.py` compares drawn geometries in the same way.
"""

import dataclasses

import pytest

from tests import checks, compilation
from tests.cases import CASES, covering

# Copies, because a case caches its compiled functions.
FAMILY = [dataclasses.replace(case) for case in CASES if case.op in ("conv", "depthwise_conv", "conv_transpose")]
FEW = list(covering(FAMILY))
ONE_EACH = [next(case for case in FAMILY if case.op == op) for op in dict.fromkeys(case.op for case in FAMILY)]


@pytest.fixture(scope="module", autouse=True)
def none_is_small():
    with compilation.none_is_small():
        yield


def rows(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


@rows(FEW)
def test_rule_against_pytorch(case):
    checks.rule_against_pytorch(case)


@rows(FEW)
def test_rule_of_rule_against_pytorch(case):
    checks.rule_of_rule_against_pytorch(case)


@rows(FEW)
def test_vmap_equals_a_loop(case):
    checks.vmap_equals_a_loop(case)


@rows(ONE_EACH)
def test_vmap_over_each_argument_equals_a_loop(case):
    checks.vmap_over_each_equals_a_loop(case)


@rows(ONE_EACH)
def test_shard_map_equals_its_shards(case):
    checks.shard_map_equals_its_shards(case)


@rows(ONE_EACH)
def test_scan_and_checkpoint_equal_a_loop(case):
    checks.scan_and_checkpoint_equal_a_loop(case)


@rows(ONE_EACH)
def test_sixteen_bits_are_float32_rounded(case):
    checks.sixteen_bits_are_float32_rounded(case)


@rows([case for case in FEW if case.batched])
def test_not_finite_stays_within_reach(case):
    checks.not_finite_stays_within_reach(case)
