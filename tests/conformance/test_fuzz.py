"""The fuzzer finds mismatches, prints them as rows that can be pasted, and continues; the counts add up."""

import collections
import dataclasses
import functools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from tests import cases
from tests.checks import doubled
from tests.conformance import summary
from tests.conformance.geometries import SHARES, STRATEGIES, pasteable
from tools import fuzz


def test_a_wrong_rule_is_a_mismatch(monkeypatch):
    right, other = cases.row("avg_pool", (2, 6, 3), window=2), cases.row("avg_pool", (1, 4, 2), window=2)
    wrong = dataclasses.replace(right, function=functools.partial(right.function, rule=doubled))
    monkeypatch.setitem(STRATEGIES, "avg_pool", st.sampled_from([wrong, other, None]))
    monkeypatch.setitem(fuzz.DTYPES, "avg_pool", st.just(np.float64))
    found = fuzz.turn("avg_pool", 0, 2)
    assert found.compared == {f"{case} float64" for case in (right, other)}
    (said,) = found.mismatches
    assert said.startswith(
        'row("avg_pool", (2, 6, 3), window=2),  # float64\nAssertionError: avg_pool-2x6x3-window=2\n'
    )
    assert "cotangent 0" in said


@pytest.mark.parametrize("op", STRATEGIES)
def test_what_is_pasted_is_the_same_row(op):
    @settings(max_examples=30)
    @given(STRATEGIES[op])
    def same(case):
        if case is not None:
            pasted = eval(pasteable(case).removesuffix(","), vars(cases))
            assert str(pasted) == str(case)
            assert (pasted.shapes, pasted.options, pasted.draw) == (case.shapes, case.options, case.draw)

    same()


@pytest.mark.parametrize("count", [130, 10_000])
def test_turns_add_up(count):
    found = list(fuzz.turns(count, 3, list(STRATEGIES)))
    drawn = collections.Counter()
    for op, _, geometries in found:
        drawn[op] += geometries
    assert drawn == {op: -(-count * share // 100) for op, share in SHARES.items()}
    assert len({(op, seed) for op, seed, _ in found}) == len(found)
    assert sum(SHARES.values()) == 100


def test_counts_by_source():
    counted = [("b", "conv", 2), ("a", "max_pool", 1), ("b", "avg_pool", 1), ("b", "conv", 3)]
    assert summary.lines(counted) == ["     1  a: max_pool 1", "     6  b: conv 5, avg_pool 1"]
