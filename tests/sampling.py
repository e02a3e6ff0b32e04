"""The quick run: a covering sample of the tests, drawn from a fixed seed.

`costs.json` lists the parametrized tests that take long in total, with the seconds of one case. Of their cases a
sample has

1. enough for each test, each value of each parameter, each op in each check of the case table, and each op with each
   of its options (`needed`); of a test whose cases take long, one case, or one row for each kind of op;
2. then enough for each option of an op in each check, and each pair of parameter values (`wanted`), as far as the
   budget goes;
3. then others at random, until the budget is spent.

All other tests run whole. The quick run excludes those marked ``slow`` and those that use a fixture of
`SLOW_FIXTURES`. A run with a time limit begins with the sample and these (`sample_first`).
"""

import heapq
import itertools
import json
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcnn.ops.kinds import kind_of
from tests.cases import Case, shows

#: Seconds of one case of each expensive test on the machine that wrote them; `python -m tools.costs` writes the file.
COSTS: dict[str, float] = json.loads(Path(__file__).with_name("costs.json").read_text(encoding="utf-8"))
#: Seconds, in the same unit, that the expensive tests take together in a quick run.
BUDGET = 150.0
#: A case that takes more seconds is long.
LONG = 0.06
#: Fixtures that take long to make.
SLOW_FIXTURES = frozenset({"whole", "gallery", "all_results"})


def function_of(nodeid: str) -> str:
    """Return a test's name without its parameters."""
    return nodeid.partition("[")[0]


def case_of(item: Any) -> Case | None:
    """Return the row of the case table that a test checks."""
    value = parameters(item).get("case")
    return value if isinstance(value, Case) else None


def parameters(item: Any) -> Mapping[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def by_row(items: Sequence[Any]) -> list[Any]:
    """Sort the tests of each module by row of the case table, because the checks of a row share compiled programs."""
    modules: dict[str, int] = {}
    rows: dict[tuple[int, Case | None], int] = {}

    def place(item: Any) -> tuple[int, int]:
        module = modules.setdefault(item.nodeid.partition("::")[0], len(modules))
        return module, rows.setdefault((module, case_of(item)), len(rows))

    return sorted(items, key=place)


def is_slow(item: Any) -> bool:
    """Whether a test is never part of a quick run."""
    return bool(item.get_closest_marker("slow") or SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())))


def needed(item: Any, varied: Mapping[str, set[str]], cost: float) -> set[Hashable]:
    """Return what a test covers that the quick run must cover."""
    function, case = function_of(item.nodeid), case_of(item)
    if case is not None:
        return {(function, kind_of(case.op) if cost > LONG else case.op), *shows(case)}
    if cost > LONG:
        return {function}
    return {function, *((function, name, labelled(value)) for name, value in parameters(item).items()
                        if name in varied[function])}  # fmt: skip


def wanted(item: Any, varied: Mapping[str, set[str]]) -> set[Hashable]:
    """Return what else a test covers."""
    function, case = function_of(item.nodeid), case_of(item)
    if case is not None:
        return {(function, *entry) for entry in shows(case)}
    values = needed(item, varied, 0.0) - {function}
    return values | {(function, *pair) for pair in itertools.combinations(sorted(values), 2)}


def labelled(value: Any) -> str:
    """Return a name for a parameter's value that is the same in every process."""
    return getattr(value, "__name__", None) or str(value)


def repeated(items: Iterable[Any]) -> dict[str, set[str]]:
    """Return the parameters of each test whose values repeat; a value that occurs once covers nothing."""
    values: dict[str, dict[str, list[str]]] = {}
    for item in items:
        of_test = values.setdefault(function_of(item.nodeid), {})
        for name, value in parameters(item).items():
            of_test.setdefault(name, []).append(labelled(value))
    return {
        function: {name for name, found in of_test.items() if len(set(found)) < len(found)}
        for function, of_test in values.items()
    }


def cover(left: dict[int, set[Hashable]], costs: Sequence[float], budget: float) -> list[int]:
    """Choose numbers of tests that together cover all sets, the most per second first, until the budget is spent."""
    chosen, unseen = [], set().union(*left.values())
    heap = [(-len(covers) / costs[i], place, i) for place, (i, covers) in enumerate(left.items())]
    heapq.heapify(heap)
    while heap and unseen and budget > 0:
        _, place, i = heapq.heappop(heap)
        gain = len(left[i] & unseen) / costs[i]
        if not gain:
            continue
        if heap and gain < -heap[0][0]:  # others gain more by now
            heapq.heappush(heap, (-gain, place, i))
            continue
        chosen.append(i)
        unseen -= left[i]
        budget -= costs[i]
    return chosen


def sample(
    items: Sequence[Any],
    seed: int,
    budget: float = BUDGET,
    *,
    slow: bool = False,
    costs: Mapping[str, float] = COSTS,
) -> list[Any]:
    """Return the tests of a sample, in the order given; with ``slow`` those that a quick run excludes as well."""
    fast = [i for i, item in enumerate(items) if slow or not is_slow(item)]
    kept = {i for i in fast if function_of(items[i].nodeid) not in costs or not parameters(items[i])}
    expensive = [i for i in fast if i not in kept]
    # A seeded order decides between tests that cover equally much, and the remainder. Checks of one row stay together.
    order = random.Random(seed)
    groups = {i: (items[i].nodeid.partition("::")[0], str(case_of(items[i]) or i)) for i in expensive}
    places = {group: order.random() for group in dict.fromkeys(groups.values())}
    expensive.sort(key=lambda i: (places[groups[i]], i))
    cost = [costs.get(function_of(item.nodeid), 0.0) for item in items]
    varied = repeated(items[i] for i in expensive)
    chosen = cover({i: needed(items[i], varied, cost[i]) for i in expensive}, cost, float("inf"))
    budget -= sum(cost[i] for i in chosen)
    seen = set().union(*(wanted(items[i], varied) for i in chosen))
    left = {i: wanted(items[i], varied) - seen for i in expensive if i not in {*chosen}}
    more = cover(left, cost, budget)
    budget -= sum(cost[i] for i in more)
    kept |= {*chosen, *more}
    for i in expensive:
        if i not in kept and cost[i] <= budget:
            kept.add(i)
            budget -= cost[i]
    return [items[i] for i in sorted(kept)]


def sample_first(items: Sequence[Any], first: Sequence[Any], processes: int) -> list[Any]:
    """Sort the tests so that each process of pytest-xdist begins with its share of the tests in ``first``.

    The processes receive consecutive parts of equal length. Modules of ``first`` are dealt to them in turn.
    """
    names = {item.nodeid for item in first}
    turn: dict[str, int] = {}
    parts: list[list[Any]] = [[] for _ in range(processes)]
    for item in items:
        if item.nodeid in names:
            module = item.nodeid.partition("::")[0]
            parts[turn.setdefault(module, len(turn)) % processes].append(item)
    rest = [item for item in items if item.nodeid not in names]
    for i, part in enumerate(parts):
        size = (len(items) - sum(map(len, parts[:i]))) // (processes - i)
        number = max(0, size - len(part))
        part += rest[:number]
        del rest[:number]
    return [*itertools.chain(*parts), *rest]
