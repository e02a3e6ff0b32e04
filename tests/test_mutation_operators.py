"""Each mutant has one change, differs in meaning from the original, and has lines for which tests can be found."""

import pytest

from tools.mutation_operators import EQUIVALENT, ROOT, equivalent, mutants

SOURCE = '''
import functools

Kind = int | str


@functools.lru_cache(maxsize=8)
def scaled(x: int = 2, *, by: Kind = "a") -> list[int]:
    """Doc."""
    return [
        a * b
        for a, b in zip(x, by, strict=True)
    ]


table = {"s": scaled}
'''


@pytest.fixture
def found(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    return {(m.before, m.after): m for m in mutants([str(path)], seed=0)}


def test_each_is_the_source_with_one_place_changed(found):
    assert {after for before, after in found if before == "a * b"} == {"a / b"}
    for (before, after), mutant in found.items():
        assert before != after
        assert [line.strip() for line in SOURCE.splitlines()].count(before) == 1
        assert after in [line.strip() for line in mutant.source.splitlines()]


def test_decorators_and_defaults_are_changed(found):
    head = 'def scaled(x: int = 2, *, by: Kind = "a") -> list[int]:'
    assert (head, head.replace("2", "3")) in found
    assert (head, head.replace('"a"', '"A"')) in found
    assert ("@functools.lru_cache(maxsize=8)", "@functools.lru_cache(maxsize=9)") in found


def test_what_means_the_same_is_no_mutant(found):
    """Changes to annotations, type aliases, docstrings and ``strict=`` of zip are not mutants."""
    changed = {before for before, _ in found}
    assert not any(line.startswith(("Kind", '"""')) for line in changed)
    assert not any("int" not in after and before.startswith("def") for before, after in found)
    of_zip = {after for before, after in found if "zip" in before}
    assert of_zip == {
        f"for a, b in {call}"
        for call in (
            "zip(None, by, strict=True)", "zip(x, None, strict=True)", "zip(by, strict=True)", "zip(x, strict=True)",
        )
    }  # fmt: skip


def test_lines_to_look_for_tests_at(found):
    inner = found["a * b", "a / b"]
    assert inner.where == "scaled"
    assert [sorted(lines)[:: max(len(lines) - 1, 1)] for lines in inner.lines[:3]] == [[11], [10, 13], [8, 13]]
    at_import = found['table = {"s": scaled}', "table = None"]
    assert at_import.where == "-"
    assert at_import.lines[-2] == {8, 9, 10, 11, 12, 13, 16}  # lines it names, and lines that name it


def test_equivalent_mutants_are_in_the_sources():
    known = equivalent()
    assert len(known) == EQUIVALENT.read_text().count("\n+ ")
    for path, _, before, after in known:
        assert before != after
        lines = [line.strip() for line in (ROOT / path).read_text().splitlines()]
        assert before in lines or before in " ".join(lines), f"{path} has no line {before}"
