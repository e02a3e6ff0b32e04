"""A sample covers what it promises, is the same for the same seed, and keeps to its budget."""

import ast
import contextlib
import itertools
import time
import types
from pathlib import Path

import pytest

from jaxcnn.ops.kinds import kind_of
from tests import conftest, sampling
from tests.cases import CASES, OPS, shows

ROOT = Path(__file__).parents[1]


def item(function, slow=False, fixtures=(), **params):
    """Return what sampling needs of a test in pytest."""
    of_test = {"callspec": types.SimpleNamespace(params=params)} if params else {}
    named = "-".join(str(value) for value in params.values())
    return types.SimpleNamespace(
        nodeid=f"tests/test_{function}.py::test_{function}" + (f"[{named}]" if params else ""),
        get_closest_marker=lambda name: "a reason" if slow and name == "slow" else None,
        fixturenames=[*params, *fixtures],
        **of_test,
    )


ONE, SLOW = item("one"), [item("slow", slow=True), item("fixture", fixtures=["whole"])]
CHEAP = [item("cheap", value=i) for i in range(30)]
PAIRS = [item("pairs", rule=rule, size=size) for rule, size in itertools.product("abcdef", range(10))]
ROWS = [item("rows", case=case) for case in CASES]
CHECKS = [item("checks", case=case) for case in CASES]
LONG_PAIRS = [item("long_pairs", rule=rule, size=size) for rule, size in itertools.product("abc", range(3))]
LONG_CHECKS = [item("long_checks", case=case) for case in CASES]
ALL = [ONE, *SLOW, *CHEAP, *PAIRS, *ROWS, *CHECKS, *LONG_PAIRS, *LONG_CHECKS]
COSTS = {f"tests/test_{function}.py::test_{function}": 0.05 for function in ("pairs", "rows", "checks")}
COSTS |= {f"tests/test_{function}.py::test_{function}": 0.25 for function in ("long_pairs", "long_checks")}


def sample(seed=0, budget=100.0, slow=False):
    return sampling.sample(ALL, seed, budget, slow=slow, costs=COSTS)


def of(function, items):
    return [one for one in items if one.nodeid.startswith(f"tests/test_{function}.py")]


@pytest.mark.parametrize("budget", [0.0, 100.0, 1e9])
def test_what_is_not_sampled_runs_whole_except_slow_tests(budget):
    found = sample(budget=budget)
    assert ONE in found
    assert not any(one in found for one in SLOW)
    assert of("cheap", found) == CHEAP
    assert [one for one in sample(budget=budget, slow=True) if one not in SLOW] == found
    assert all(one in sample(budget=budget, slow=True) for one in SLOW)


@pytest.mark.parametrize("seed", [0, 1])
def test_each_value_of_a_parameter_and_each_option_of_an_op_is_covered_at_any_budget(seed):
    found = sample(seed, budget=0.0)
    pairs = [one.callspec.params for one in of("pairs", found)]
    assert {params["rule"] for params in pairs} == set("abcdef")
    assert {params["size"] for params in pairs} == set(range(10))
    assert len(pairs) == 10
    rows, checks = ([one.callspec.params["case"] for one in of(name, found)] for name in ("rows", "checks"))
    assert set().union(*map(shows, [*rows, *checks])) == set().union(*map(shows, CASES))
    assert {case.op for case in rows} == {case.op for case in checks} == set(OPS)
    assert len(rows) + len(checks) < len(CASES) / 1.5


def test_of_long_tests_one_case_or_one_row_of_each_kind_of_op_is_covered_at_any_budget():
    found = sample(budget=0.0)
    assert len(of("long_pairs", found)) == 1
    rows = [one.callspec.params["case"] for one in of("long_checks", found)]
    assert {kind_of(case.op) for case in rows} == {kind_of(op) for op in OPS}
    assert len(rows) < len(OPS)


def test_a_larger_budget_covers_each_op_in_each_check():
    found = sample(budget=75.0)
    assert {one.callspec.params["case"].op for one in of("long_checks", found)} == set(OPS)
    assert {one.callspec.params["rule"] for one in of("long_pairs", found)} == set("abc")
    spent = sum(COSTS.get(sampling.function_of(one.nodeid), 0.0) for one in found)
    assert 74 < spent <= 75
    assert sample(budget=1e9) == [one for one in ALL if one not in SLOW]


def test_a_seed_draws_the_same_sample_and_another_seed_another():
    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_the_order_is_that_of_the_suite_and_rows_stay_together():
    found = sample()
    assert found == [one for one in ALL if one in found]
    a, b, c = CASES[:3]
    mixed = [item("rows", case=a), item("rows", case=b), ONE, item("rows", case=c), item("rows", case=a)]
    assert [one.callspec.params["case"] for one in of("rows", sampling.by_row(mixed))] == [a, a, b, c]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_begins_with_its_share_of_the_sample(processes):
    first = sample(budget=0.0, slow=True)
    found = sampling.sample_first(ALL, first, processes)
    assert sorted(found, key=id) == sorted(ALL, key=id)
    begin, modules = 0, []
    for left in range(processes, 0, -1):  # as pytest-xdist deals them
        part = found[begin : begin + (len(found) - begin) // left]
        begin += len(part)
        in_sample = [one in first for one in part]
        assert in_sample == sorted(in_sample, reverse=True)
        assert any(in_sample)
        assert not all(in_sample)
        modules.append({one.nodeid.partition("::")[0] for one in part if one in first})
    assert len(set.union(*modules)) == sum(map(len, modules))  # none has two processes


@pytest.mark.parametrize(
    ("limit", "name", "skipped"), [(None, "b", False), (1e6, "b", False), (0, "b", True), (0, "a", False)]
)
def test_after_the_time_limit_only_tests_of_the_sample_run(limit, name, skipped):
    option = types.SimpleNamespace(seconds=limit)
    config = types.SimpleNamespace(option=option, stash={conftest.FIRST: {"a"}, conftest.BEGAN: time.monotonic() - 1})
    test = types.SimpleNamespace(nodeid=name, config=config)
    with pytest.raises(pytest.skip.Exception) if skipped else contextlib.nullcontext():
        conftest.pytest_runtest_setup(test)


def test_the_sampled_tests_exist_and_have_parameters():
    """If this fails, run `make test-full ARGS=--junitxml=full.xml` and `python -m tools.costs full.xml`."""
    functions: dict[str, dict[str, ast.FunctionDef]] = {}
    for name, seconds in sampling.COSTS.items():
        path, _, function = name.partition("::")
        if path not in functions:
            body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
            functions[path] = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        assert functions[path][function].decorator_list, name
        assert seconds > 0
