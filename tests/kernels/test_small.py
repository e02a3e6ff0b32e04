"""Convolutions of the case table with the lowerings of larger ones; by default XLA computes the small ones."""

import dataclasses

import jax
import pytest

from jaxcnn.kernels import lowering
from tests import checks
from tests.cases import CASES, covering

# Copies, because a case caches its compiled functions.
FAMILY = [dataclasses.replace(case) for case in CASES if case.op in ("conv", "depthwise_conv", "conv_transpose")]
FEW = list(covering(FAMILY))
ONE_EACH = [next(case for case in FAMILY if case.op == op) for op in dict.fromkeys(case.op for case in FAMILY)]


@pytest.fixture(scope="module", autouse=True)
def none_is_small():
    """Disable the limit for small products, and clear JAX's caches, which hold earlier choices."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(lowering, "SMALL", 0)
        jax.clear_caches()
        yield
    jax.clear_caches()


def rows(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


@rows(FAMILY)
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
