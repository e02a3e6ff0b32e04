"""Every row of `tests/cases.py` in every check of `tests/checks.py`.

Checks that compile much, and that depend on an op and its options more than on numbers, run on `covering` rows: each
op, rank, option and named value of an option at least once. Checks that depend only on the op run on one row of each.
"""

import jax
import numpy as np
import pytest

from tests import checks
from tests.cases import CASES, LONG_SUMS, Case, covering, one_each

FEW = list(covering(CASES))
ONE_EACH = one_each(CASES)


def rows(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def smooth(case: Case) -> bool:
    """Return whether a small step has a small effect: no ties, and results not rounded to float32."""
    return "ties" not in str(case) and case.options.get("preferred_element_type") != "float32"


@rows(CASES)
def test_shapes_and_dtypes(case):
    checks.shapes_and_dtypes(case)


# jax.random draws float64 if it is enabled
@rows([case for case in CASES if case.op != "dropout" and "float64" not in case.options.values()])
def test_float32_stays_float32(case):
    checks.float32_stays_float32(case)


@rows(CASES)
def test_weak_types_change_nothing(case):
    checks.weak_types_change_nothing(case)


@rows([case for case in CASES if case.plain is not None])
def test_rule_against_autodiff(case):
    checks.rule_against_autodiff(case)


@rows([case for case in CASES if case.plain is None and case.takes_rule])
def test_value_of_autodiff(case):
    checks.value_of_autodiff(case)


@rows(CASES)
def test_rule_against_pytorch(case):
    checks.rule_against_pytorch(case)


@rows([case for case in FEW if case.plain is not None])
def test_rule_of_rule_against_autodiff(case):
    checks.rule_of_rule_against_autodiff(case)


@rows(CASES)
def test_rule_of_rule_against_pytorch(case):
    checks.rule_of_rule_against_pytorch(case)


@rows([case for case in CASES if smooth(case)])
def test_rules_by_differences(case):
    checks.rules_by_differences(case)


@rows(ONE_EACH)
def test_third_order_by_differences(case):
    checks.third_order_by_differences(case)


@rows([case for case in CASES if case.linear])
def test_adjoint(case):
    checks.adjoint(case)


@rows(ONE_EACH)
def test_jit_equals_eager(case):
    checks.jit_equals_eager(case)
    checks.equal_geometry_compiles_once(case)  # here, because the functions that run op by op are already compiled


@rows([case for case in FEW if len(case.shapes) > 1])
def test_vmap_over_each_argument_equals_a_loop(case):
    checks.vmap_over_each_equals_a_loop(case)


@rows(FEW)
def test_vmap_equals_a_loop(case):
    checks.vmap_equals_a_loop(case)


@rows([case for case in FEW if case.batched])
def test_mesh_equals_one_device(case):
    checks.mesh_equals_one_device(case)


@rows([case for case in ONE_EACH if case.batched])
def test_shard_map_equals_its_shards(case):
    checks.shard_map_equals_its_shards(case)


@rows(ONE_EACH)
def test_scan_and_checkpoint_equal_a_loop(case):
    checks.scan_and_checkpoint_equal_a_loop(case)


# The indices and labels of other ops are NumPy arrays, which have no symbolic shape; see test_export.py
BATCHED = [case for case in FEW if case.batched and "unpool" not in case.op and "labels" not in case.op]


@rows(BATCHED)
def test_traces_with_a_symbolic_batch(case):
    checks.traces_with_a_symbolic_batch(case)


@rows({case.op: case for case in BATCHED}.values())
def test_exported_equals_direct(case):
    checks.exported_equals_direct(case)


@rows(ONE_EACH)
def test_second_derivative_through_scan(case):
    checks.second_derivative_through_scan(case)


@rows([*FEW, *LONG_SUMS])
def test_sixteen_bits_are_float32_rounded(case):
    checks.sixteen_bits_are_float32_rounded(case)


@rows(ONE_EACH)
def test_float16_is_float32_rounded(case):
    checks.sixteen_bits_are_float32_rounded(case, np.float16)


@rows([case for case in FEW if case.batched])
def test_no_images_no_gradient(case):
    checks.no_images_no_gradient(case)


@rows([case for case in ONE_EACH if case.takes_rule])
def test_rule_is_used(case):
    checks.rule_is_used(case)


@rows([case for case in FEW if case.batched or case.op == "kron"])
def test_not_finite_stays_within_reach(case):
    checks.not_finite_stays_within_reach(case)


@rows(FEW)
def test_no_nan_is_made_where_results_are_finite(case):
    args, delta = checks.drawn(case)
    with jax.debug_nans(True):
        y, gradients = case.run(args, delta)
    assert all(np.isfinite(np.asarray(a)).all() for a in checks.flat((y, gradients)))
